"""The C++ kernels for the CPU as rows: for each set of instructions one for floats, one for int8.

QKERNELS_CPU_ISA caps the instructions: portable, avx2, avx512 or amx.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qkernels.backends.kernel import (
    Kernel,
    Problem,
    RouteOf,
    Run,
    WhyNot,
    kernel_rows,
    run_by,
    run_quantized_by,
)
from qkernels.errors import NoKernelError
from qkernels.layouts import VNNI
from qkernels.layouts.padding import kernel_group
from qkernels.scheme import QuantScheme
from qkernels.weight import codebook, nested_table

ISAS = ("amx", "avx512", "avx2", "portable")
"""Sets of instructions, the fastest first. Each machine runs those after its best too."""

ISA_VARIABLE = "QKERNELS_CPU_ISA"

_FLOAT_TILE_ROWS = 3
_SCALED_TILE_ROWS = {64: 40, 128: 96}
_INT8_TILE_ROWS = 9
"""Rows of x from which on tiles are faster than vectors, and tiles of scaled weights than exact
ones, for groups of so many columns and more, measured: see docs/cpu.md."""

_MOST_ROWS = {"avx2_float": 128, "portable_float": 16, "portable_int8": 2}
"""Rows up to which a kernel is faster than the reference, which dequantizes for torch's product.
Measured on one machine, where torch had AVX-512 and VNNI: see docs/cpu.md."""

_FLOAT_TILE_GROUP, _INT8_TILE_GROUP = 32, 64
"""Columns of a tile, of which groups must be multiples."""


@lru_cache(maxsize=1)
def build_problem() -> str | None:
    """Why there are no CPU kernels in this installation, or None."""
    try:
        importlib.import_module("qkernels._C")
    except ImportError as error:
        return str(error)
    return None


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return importlib.import_module("qkernels._C")


def isa_cap() -> str:
    """The best set of instructions that the environment allows.

    Raises:
        NoKernelError: for a value of QKERNELS_CPU_ISA that names none.
    """
    cap = os.environ.get(ISA_VARIABLE) or ISAS[0]
    if cap not in ISAS:
        raise NoKernelError(f"{ISA_VARIABLE}={cap!r} is not one of {', '.join(ISAS)}")
    return cap


@lru_cache(maxsize=16)
def _why_no_isa(isa: str, cap: str) -> str | None:
    problem = build_problem()
    if problem is not None:
        return problem
    if ISAS.index(isa) < ISAS.index(cap):
        return f"{ISA_VARIABLE}={cap} rules out {isa}"
    return _compiled().why_no_isa(isa)


def why_no_isa(isa: str) -> str | None:
    """Why kernels with these instructions do not run here, or None."""
    return _why_no_isa(isa, isa_cap())


@lru_cache(maxsize=8)
def _best_isa(cap: str) -> str:
    return next(isa for isa in ISAS if _why_no_isa(isa, cap) is None)


def best_isa() -> str:
    """The set of instructions that work on rows, which has no tiles, uses here."""
    return _best_isa(isa_cap())


def _not_here(isa: str) -> WhyNot:
    def why_not(problem: Problem) -> str | None:
        if problem.device != "cpu":
            return f"runs on the CPU, and the weight is on {problem.device}"
        return why_no_isa(isa)

    return why_not


def _no_floats(problem: Problem) -> str | None:
    if problem.scheme.integer_activation:
        return "multiplies 16-bit activations, and the scheme has int8 ones"
    return None


def _no_integers(problem: Problem) -> str | None:
    if not problem.scheme.integer_activation:
        return "multiplies int8 activations, and the scheme has none"
    return None


def _odd_group(problem: Problem, multiple: int) -> str | None:
    """Why groups do not fall into whole tiles, or None."""
    scheme, k = problem.scheme, problem.k
    group = kernel_group(scheme, k)
    if scheme.groups(k) > 1 and group % multiple:
        return f"needs groups of a multiple of {multiple} columns, not of {group}"
    return None


def _no_float_tiles(problem: Problem) -> str | None:
    reason = _no_floats(problem) or _odd_group(problem, _FLOAT_TILE_GROUP)
    # Tiles round otherwise than vectors do, so that one of them must do for every M.
    if reason is None and problem.m < _FLOAT_TILE_ROWS and not problem.batch_invariant:
        reason = f"is for {_FLOAT_TILE_ROWS} rows of x and more, got {problem.m}"
    return reason


def _no_scaled_tiles(problem: Problem) -> str | None:
    reason = _no_floats(problem)
    if reason is not None:
        return reason
    if problem.x_dtype != torch.bfloat16:
        return f"rounds weights to bf16, and x is {problem.x_dtype}"
    if problem.batch_invariant:
        return "rounds unlike the kernels for few rows, and batch_invariant wants one for every M"
    group = kernel_group(problem.scheme, problem.k)
    least = _SCALED_TILE_ROWS[128 if group >= 128 else 64]
    if problem.m < least:
        return f"is for {least} rows of x and more, got {problem.m}"
    return None


def _no_int8_tiles(problem: Problem) -> str | None:
    reason = _no_integers(problem)
    if reason is None and problem.scheme.scale_levels == "one":
        reason = _odd_group(problem, _INT8_TILE_GROUP)
    if reason is None and problem.m < _INT8_TILE_ROWS:
        reason = f"is for {_INT8_TILE_ROWS} rows of x and more, got {problem.m}"
    return reason


def _few_rows(name: str, why_not: WhyNot) -> WhyNot:
    """`why_not`, and too many rows for the kernel called `name`."""
    most = _MOST_ROWS.get(name)
    if most is None:
        return why_not

    def refuses(problem: Problem) -> str | None:
        reason = why_not(problem)
        if reason is None and problem.m > most and not problem.batch_invariant:
            reason = f"is for {most} rows of x at most, got {problem.m}"
        return reason

    return refuses


def _code_name(scheme: QuantScheme) -> str:
    if scheme.weight.kind == "linear":
        return "int8" if scheme.bits == 8 else "int4"
    return "table4" if scheme.weight.kind == "codebook" else scheme.weight.name


@lru_cache(maxsize=1024)
def _route(scheme: QuantScheme, n: int, k: int, isa: str, tiles: bool, rounds: bool) -> Any:
    return _compiled().CpuRoute(
        n=n,
        k=k,
        group=scheme.group_length(k),
        padded_group=kernel_group(scheme, k),
        code=_code_name(scheme),
        middle=float(1 << (scheme.bits - 1)) if scheme.weight.kind == "linear" else 0.0,
        table=codebook(scheme.weight) if scheme.weight.kind == "codebook" else None,
        nested_table=nested_table(torch.device("cpu")) if scheme.scale_levels == "double" else None,
        isa=isa,
        tiles=tiles,
        rounds_weights=rounds,
        activation=scheme.activation.dtype,
        granularity=scheme.activation.granularity,
    )


def _route_of(isa: str, tiles: bool, rounds: bool = False) -> RouteOf:
    return lambda problem, device: _route(problem.scheme, problem.n, problem.k, isa, tiles, rounds)


def _rows(isa: str) -> tuple[Kernel, ...]:
    tiles = isa == "amx"
    no_floats = _few_rows(f"{isa}_float", _no_float_tiles if tiles else _no_floats)
    no_integers = _few_rows(f"{isa}_int8", _no_int8_tiles if tiles else _no_integers)
    route = _route_of(isa, tiles)
    kernels: dict[str, tuple[WhyNot, Run]] = {
        f"{isa}_float": (no_floats, run_by(route)),
        f"{isa}_int8": (no_integers, run_by(route)),
    }
    floats, integers = kernel_rows("cpu", VNNI.name, _not_here(isa), kernels)
    rows = (
        replace(floats, route=route),
        replace(integers, route=route, run_quantized=run_quantized_by(route)),
    )
    if not tiles:
        return rows
    route = _route_of(isa, tiles, rounds=True)
    kernels = {"amx_scaled": (_no_scaled_tiles, run_by(route))}
    (scaled,) = kernel_rows("cpu", VNNI.name, _not_here(isa), kernels)
    return (replace(scaled, route=route), *rows)


KERNELS = tuple(row for isa in ISAS for row in _rows(isa))


def _adjacent(x: Tensor) -> Tensor:
    """x [M, K] with adjacent columns, as the kernels take it."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def quantize_rows(
    x: Tensor,
    kind: str = "plain",
    other: Tensor | None = None,
    gain: Tensor | None = None,
    epsilon: float = 0.0,
    scale_of: str = "token",
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Rows of x [M, K] on the CPU, or of what `kind` makes of them, as int8.

    Args:
        kind: "plain"; "rms_norm" of x (+ other), times gain [K]; "silu_mul" of x and other.
        scale_of: "token", "tensor", "static" (`scale` fp32 []), or "asymmetric" per token.

    Returns:
        int8 [M, K], scales fp32 [M], zero points int32 [M] or None, x + other or None.
    """
    rows = [None if t is None else _adjacent(t) for t in (x, other)]
    return _compiled().quantize_rows_cpu(
        *(rows[0], kind, rows[1], gain, epsilon, scale_of, scale, best_isa())
    )
