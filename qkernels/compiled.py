"""qkernels._C, the compiled part of the package, which an installation may lack."""

from __future__ import annotations

import importlib
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


def problem() -> str | None:
    """Why this installation has no qkernels._C, or None."""
    loaded = _loaded()
    return loaded if isinstance(loaded, str) else None
