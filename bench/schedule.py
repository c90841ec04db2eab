"""The schedules that the CUDA products take on GPUs, by the chooser's own model."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
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

COLUMNS = ("scheme", "gpu", "layer", "M", "tokens", "blocks", "stages", "shared KB", "busy %")


class Schedule(NamedTuple):
    """csrc/cuda/weight_only/config.h says what these are."""

    tokens: int
    blocks: int
    stages: int
    unit: int
    shared_bytes: int
    busy: float
    """The share of multiprocessors that are at work on average until the last one is done."""


class Weight(NamedTuple):
    """What of a weight, and of x, schedules depend on."""

    bits: int
    group_size: int | None
    """Columns of a group whose scales come with the weight; None where they are met at the end."""
    scale_bytes: int
    zero_bytes: int
    x_bytes: int


SCHEMES = {
    "w4a16-g128": Weight(4, 128, 2, 1, 2),
    "w4a8-g128": Weight(4, 128, 1, 0, 1),
    "w8a8": Weight(8, None, 0, 0, 1),
}


def schedule(
    m: int,
    n: int,
    k: int,
    gpu: Gpu,
    *,
    group_size: int | None = 128,
    bits: int = 4,
    scale_bytes: int = 2,
    zero_bytes: int = 1,
    x_bytes: int = 2,
    each_tile: bool = False,
) -> Schedule:
    """The schedule of x [m, k] times a weight [n, k]."""
    group = k if group_size is None else min(group_size, k)
    return Schedule(
        *torch.ops.qkernels.weight_only_schedule(
            *(m, n, k, group, bits, scale_bytes, zero_bytes, *gpu),
            each_tile=each_tile,
            x_bytes=x_bytes,
        )
    )


def print_schedules(
    layers: Sequence[Layer], m_values: Sequence[int], stream: TextIO | None = None
) -> None:
    """A line for each scheme, GPU, layer and number of rows."""
    stream = sys.stdout if stream is None else stream
    rows: list[tuple[str, ...]] = [COLUMNS]
    for (scheme, weight), (name, gpu) in itertools.product(SCHEMES.items(), GPUS.items()):
        for layer, m in itertools.product(layers, m_values):
            found = schedule(m, layer.n, layer.k, gpu, **weight._asdict())
            rows.append(
                (
                    scheme,
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
    print("By the chooser's own model; not measured", file=stream)
    print(align(rows), file=stream)
