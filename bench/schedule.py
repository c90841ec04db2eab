"""The schedules that the CUDA weight-only kernel takes on GPUs, by the chooser's own model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TextIO

import torch

from bench.report import align
from bench.shapes import Layer


class Gpu(NamedTuple):
    """Facts that schedules depend on, from NVIDIA's data sheets and the CUDA programming guide."""

    multiprocessors: int
    shared_bytes: int
    """Of shared memory that a block can have."""
    multiprocessor_shared_bytes: int


GPUS = {
    "A100": Gpu(108, 163 * 1024, 164 * 1024),
    "L40S": Gpu(142, 99 * 1024, 100 * 1024),
    "H100": Gpu(132, 227 * 1024, 228 * 1024),
    "H200": Gpu(132, 227 * 1024, 228 * 1024),
    "B200": Gpu(148, 227 * 1024, 228 * 1024),
}

M_VALUES = (1, 16, 64, 256)

COLUMNS = ("gpu", "layer", "M", "tokens", "blocks", "stages", "shared KB", "busy %")


class Schedule(NamedTuple):
    """csrc/cuda/weight_only/config.h says what these are."""

    tokens: int
    blocks: int
    stages: int
    unit: int
    shared_bytes: int
    busy: float
    """The share of multiprocessors that are at work on average until the last one is done."""


def schedule(
    m: int,
    n: int,
    k: int,
    gpu: Gpu,
    *,
    group_size: int = 128,
    bits: int = 4,
    each_tile: bool = False,
) -> Schedule:
    """The schedule of x [m, k] times a weight [n, k] with 16-bit scales and integer zero points."""
    return Schedule(
        *torch.ops.qkernels.weight_only_schedule(
            m, n, k, min(group_size, k), bits, 2, 1, *gpu, each_tile=each_tile
        )
    )


def print_schedules(
    layers: Iterable[Layer], m_values: Sequence[int], stream: TextIO | None = None
) -> None:
    """A line for each GPU, layer and number of rows, of w4a16-g128."""
    stream = sys.stdout if stream is None else stream
    rows: list[tuple[str, ...]] = [COLUMNS]
    for name, gpu in GPUS.items():
        for layer in layers:
            for m in m_values:
                found = schedule(m, layer.n, layer.k, gpu)
                rows.append(
                    (
                        name,
                        f"{layer.n}x{layer.k}",
                        str(m),
                        str(found.tokens),
                        str(found.blocks),
                        str(found.stages),
                        f"{found.shared_bytes / 1024:.0f}",
                        f"{100 * found.busy:.1f}",
                    )
                )
    print("w4a16-g128, by the chooser's own model; not measured", file=stream)
    print(align(rows), file=stream)
