"""Which implementation packs a tensor: C++ on the CPU, Triton on a GPU, or plain torch."""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from qkernels import compiled
from qkernels.errors import WeightError


@lru_cache(maxsize=1)
def _triton() -> ModuleType | None:
    try:
        importlib.import_module("triton")
    except ImportError:
        return None
    return importlib.import_module("qkernels.triton_kernels.pack")


def fastest(tensor: Tensor) -> ModuleType | None:
    """The module with the fastest functions for `tensor`; None leaves it to plain torch."""
    if tensor.device.type == "cpu":
        return compiled.extension()
    return _triton() if tensor.device.type == "cuda" else None


def check(tensor: Tensor, dtype: torch.dtype, bits: int, accepted: tuple[int, ...]) -> None:
    """Raises WeightError for what no implementation takes."""
    if tensor.dtype != dtype or tensor.dim() != 2:
        raise WeightError(
            f"expected a 2-D tensor of {dtype}, got {tensor.dtype} of shape {list(tensor.shape)}"
        )
    if bits not in accepted:
        raise WeightError(f"{bits} bits do not pack: accepted are {accepted}")
