"""The emulator's C interface (csrc/emulator/emulator.h) for tests, and what their modules share."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch

from qkernels.backends.cuda import emulator_is_loaded, weight_arguments
from qkernels.layouts import PackedWeight, fragment_int8

needs_emulator = pytest.mark.skipif(
    not emulator_is_loaded(), reason="the emulator is not loaded: run make emulated"
)


@lru_cache(maxsize=1)
def library() -> Any:
    found = ctypes.CDLL(os.environ["QKERNELS_EMULATOR"])
    for name in ("counters", "sites"):
        getattr(found, f"qkernels_emulator_{name}_json").restype = ctypes.c_char_p
    return found


def set_seed(seed: int) -> None:
    """Draws the order of blocks and threads anew."""
    library().qkernels_emulator_set_seed(ctypes.c_uint64(seed))


@contextmanager
def counted(**regions: torch.Tensor) -> Iterator[dict[str, Any]]:
    """Counts what the launches inside do; the dictionary is filled when the block ends."""
    library().qkernels_emulator_reset()
    for name, tensor in regions.items():
        library().qkernels_emulator_register_region(
            name.encode(), ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes)
        )
    counters: dict[str, Any] = {}
    yield counters
    counters.update(json.loads(library().qkernels_emulator_counters_json()))


@contextmanager
def sites() -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Lists where the launches inside called what, by kind."""
    library().qkernels_emulator_reset()
    found: dict[str, list[dict[str, Any]]] = {}
    yield found
    found.update(json.loads(library().qkernels_emulator_sites_json()))


@contextmanager
def disabled(kind: str, file: str, line: int) -> Iterator[None]:
    """Makes one barrier, wait or mask do nothing."""
    library().qkernels_emulator_disable_site(kind.encode(), file.encode(), line)
    try:
        yield
    finally:
        library().qkernels_emulator_disable_site(None, b"", 0)


@contextmanager
def skipped_launches() -> Iterator[None]:
    """Makes the launches inside do nothing: what is left of the time of a call is the host's."""
    library().qkernels_emulator_skip_launches(1)
    try:
        yield
    finally:
        library().qkernels_emulator_skip_launches(0)


@contextmanager
def last_blocks_alone() -> Iterator[None]:
    """Makes the launches inside run the last block of their grid alone."""
    library().qkernels_emulator_run_last_blocks(1)
    try:
        yield
    finally:
        library().qkernels_emulator_run_last_blocks(0)


@contextmanager
def failing_launches(error: str, file: str = "") -> Iterator[None]:
    """Makes the launches in files whose path ends in `file` fail with `error`."""
    library().qkernels_emulator_fail_launches(file.encode(), error.encode())
    try:
        yield
    finally:
        library().qkernels_emulator_fail_launches(b"", None)


BLOCK_ROWS = {8: 64, 16: 64, 32: 128, 64: 256}
"""Rows of the weight that a block of weight_only_mma computes, by its tokens."""

STAGE_COLUMNS = {
    2: {8: 512, 16: 512, 32: 256, 64: 128},
    3: {8: 512, 16: 512, 32: 256, 64: 128},
    4: {8: 512, 16: 512, 32: 128, 64: 64},
    8: {8: 256, 16: 256, 32: 128, 64: 64},
}
"""Columns that a block brings to shared memory at a time, by the bits of a code and its tokens."""

INT8_STAGE_COLUMNS = {
    4: {8: 512, 16: 512, 32: 256, 64: 128},
    8: {8: 256, 16: 256, 32: 128, 64: 128},
}
"""The same of int8_mma."""


@dataclass(frozen=True)
class Way:
    """How a product went over K, from what the emulator counted.

    A test that is about parts of K, or about a pipeline that starts over, asks whether there were.
    """

    parts: float  # of K, each of another block
    stages: float  # of all parts

    @staticmethod
    def of(counters: dict[str, Any], m: int, n: int, tokens: int) -> Way:
        tiles = -(-n // BLOCK_ROWS[tokens]) * -(-m // tokens)
        parts = counters["blocks"] / tiles
        # A block meets once a stage, twice at its end, and twice to count itself as arrived.
        ends = parts * (2 if parts == 1 else 4)
        return Way(parts, counters["sync_threads"] / tiles - ends)


def product(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    **schedule: int,
) -> torch.Tensor:
    """weight_only_mma in the emulator; `schedule`: tokens, blocks, stages and unit, or none.

    With `parts` in place of `blocks` each tile is shared by so many blocks.
    """
    tensors, facts = weight_arguments(packed)
    return torch.ops.qkernels_emulated.weight_only_mma(
        x, *tensors, bias, *facts, **_with_parts(schedule)
    )


def grouped_product(
    x: torch.Tensor, ends: list[int], experts: list[PackedWeight], **schedule: int
) -> torch.Tensor:
    """weight_only_mma with a weight for each expert, whose rows of x are up to ends[e]."""
    return stacked_product(x, ends, stacked(experts), weight_arguments(experts[0])[1], **schedule)


def stacked(experts: list[PackedWeight]) -> list[torch.Tensor | None]:
    """words, scales, zeros, each [E, ...], and the table of all."""
    *stacks, tables = zip(*(weight_arguments(packed)[0] for packed in experts), strict=True)
    return [None if each[0] is None else torch.stack(each) for each in stacks] + [tables[0]]


def stacked_product(
    x: torch.Tensor,
    ends: list[int],
    stacks: list[torch.Tensor | None],
    facts: tuple[Any, ...],
    **schedule: int,
) -> torch.Tensor:
    """`grouped_product` of what `stacked` gives, and of what `weight_arguments` says it is."""
    return torch.ops.qkernels_emulated.weight_only_mma(
        *(x, *stacks, None, *facts),
        **_with_parts(schedule),
        ends=torch.tensor(ends, dtype=torch.int32),
    )


def _with_parts(schedule: dict[str, int]) -> dict[str, int]:
    if "parts" not in schedule:
        return schedule
    rest = {name: value for name, value in schedule.items() if name != "parts"}
    return rest | {"blocks": schedule["parts"], "each_tile": True}


def integer_product(
    x: torch.Tensor,
    scale: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    zero: torch.Tensor | None = None,
    **more: Any,
) -> torch.Tensor:
    """int8_mma in the emulator of int8 x [M, K], with a scale fp32 [M] and a zero point int32 [M].

    `more`: the schedule, as `product` has it, and the reader of y.
    """
    scheme, k = packed.scheme, packed.k
    order = fragment_int8.column_order(scheme, k, x.device)
    if order is not None:
        x = torch.nn.functional.pad(x, (0, 1)).index_select(1, order[0])
    columns = x.shape[1]
    rows = torch.zeros(x.shape[0], -(-columns // 16) * 16, dtype=torch.int8)
    rows[:, :columns] = x
    buffers = packed.buffers
    return torch.ops.qkernels_emulated.int8_mma(
        *(rows, scale, zero, buffers["words"], buffers["scales"], buffers.get("zeros")),
        *(buffers.get("channel_scales"), bias, packed.n, columns),
        *(fragment_int8.kernel_group(scheme, k), scheme.bits, dtype),
        filled=scheme.group_length(k),
        **_with_parts(more),
    )


def gradient(dy: torch.Tensor, packed: PackedWeight, **schedule: int) -> torch.Tensor:
    """weight_only_grad in the emulator; `schedule`: tokens and parts, or none."""
    tensors, facts = weight_arguments(packed)
    return torch.ops.qkernels_emulated.weight_only_grad(dy, *tensors, *facts, **schedule)
