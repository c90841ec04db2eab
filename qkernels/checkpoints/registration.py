"""Tells Transformers of our own format when it is imported, before or after this package.

Without that, `from_pretrained` takes a folder in our format for one that is not quantized, and
fills the model with random weights.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_QUANTIZERS = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """At once where Transformers has its quantizers, else as soon as it has; imports nothing."""
    if _QUANTIZERS in sys.modules:
        _register(sys.modules[_QUANTIZERS])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(quantizers: ModuleType) -> None:
    # Versions without it read no format that is not theirs.
    if hasattr(quantizers, "register_quantizer"):
        importlib.import_module("qkernels.checkpoints.hf_quantizer")


class _Finder(MetaPathFinder):
    """Finds one module as it is found without it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _QUANTIZERS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            loader.exec_module = execute_and_register
        return spec
