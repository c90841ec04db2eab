"""A launch of a kernel as a value, which the launchers run and `compile.py` compiles."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """A kernel, its grid, its arguments by name, and Triton's options such as num_warps."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


def run(*launches: Launch, on: Tensor) -> None:
    """Runs the launches, one after the other, on the device of a tensor."""
    with torch.cuda.device_of(on):
        for launch in launches:
            launch.kernel[launch.grid](**launch.arguments, **launch.options)


def ceil_div(length: int, part: int) -> int:
    """Parts that cover a length. triton.cdiv looks for Triton's own constants first, which costs
    a call some microseconds of the host."""
    return -(-length // part)


@lru_cache(maxsize=64)
def device_facts(device: torch.device) -> tuple[str, tuple[int, int], int]:
    """(name, compute capability, multiprocessors); a CPU counts as one of capability 8.0."""
    if device.type != "cuda":
        return device.type, (8, 0), 1
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    return properties.name, capability, properties.multi_processor_count
