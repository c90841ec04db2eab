"""Memory that is free, handed back to the system."""

import ctypes
import os


def give_back_free_pages() -> None:
    """Hands back what the C library keeps for later, where it is one that can be asked to.

    glibc finds no place for an aligned block in a hole of just its size, so that what was read and
    unpacked for one layer would stay resident beside the next one's: 2.5 times the file in all.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
