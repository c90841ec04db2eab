"""qkernels._C, the compiled part of the package, which an installation may lack."""

from __future__ import annotations

import importlib
import warnings
from functools import lru_cache
from types import ModuleType


@lru_cache(maxsize=1)
def _loaded() -> ModuleType | str:
    try:
        return importlib.import_module("qkernels._C")
    except ImportError as error:
        return str(error)


def extension() -> ModuleType | None:
    """qkernels._C, or None where it was not built."""
    loaded = _loaded()
    return None if isinstance(loaded, str) else loaded


@lru_cache(maxsize=1)
def warn_of_its_lack() -> None:
    """Warns, once in a process, where a layer is slow for want of qkernels._C."""
    if problem() is not None:
        warnings.warn(
            f"qkernels has no compiled part here ({problem()}), so that layers on the CPU run "
            "through the reference, some 30 times slower. To build it, install a C++ compiler and "
            "qkernels again, with: pip install --no-build-isolation. backend='reference' or "
            "QKERNELS_CPU_ISA=portable say that it is meant.",
            stacklevel=2,
        )


def problem() -> str | None:
    """Why this installation has no qkernels._C, or None."""
    loaded = _loaded()
    return loaded if isinstance(loaded, str) else None
