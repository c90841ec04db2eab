"""The C++ kernels for the CPU as rows: for each set of instructions one for floats, one for int8.

QKERNELS_CPU_ISA caps the instructions: portable, avx2, avx512 or amx.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qkernels import compiled, reference
from qkernels.backends.kernel import Kernel, Problem, Remember, Run, WhyNot
from qkernels.backends.rows import QuantizedRows, RowInputs, RowKernel, RowProblem
from qkernels.errors import NoKernelError
from qkernels.layouts import PackedWeight
from qkernels.layouts.padding import column_order, kernel_columns, kernel_group
from qkernels.preparation import pad_groups
from qkernels.scheme import QuantScheme
from qkernels.weight import codebook, nested_table

ISAS = ("amx", "avx512", "avx2", "portable")
"""Sets of instructions, the fastest first. Each machine runs those after its best too."""

ISA_VARIABLE = "QKERNELS_CPU_ISA"

_BUFFERS = (
    *("words", "scales", "zeros", "channel_scales", "nested_absmax", "nested_offset"),
    *("perm", "activation_scale"),
)


@lru_cache(maxsize=1)
def build_problem() -> str | None:
    """Why there are no CPU kernels in this installation, or None."""
    return compiled.problem()


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


def _with(isa: str) -> WhyNot:
    """Why kernels with these instructions do not run on a problem's device."""

    def where(problem: Problem) -> str | None:
        if problem.device != "cpu":
            return f"runs on the CPU, and the weight is on {problem.device}"
        return why_no_isa(isa)

    return where


def _groups_of(multiple: int) -> WhyNot:
    """Why groups do not fall into whole tiles of so many columns.

    Integer sums over all of K, of one scale a row or of two-level scales, need no whole groups.
    """

    def why_not(problem: Problem) -> str | None:
        scheme, k = problem.scheme, problem.k
        group = kernel_group(scheme, k)
        if scheme.groups(k) == 1 or scheme.scale_levels == "two" or group % multiple == 0:
            return None
        return f"needs groups of a multiple of {multiple} columns, not of {group}"

    return why_not


def _code_name(scheme: QuantScheme) -> str:
    if scheme.weight.kind == "linear":
        return "int8" if scheme.bits == 8 else "int4"
    return "table4" if scheme.weight.kind == "codebook" else scheme.weight.name


@lru_cache(maxsize=1024)
def _linear(
    scheme: QuantScheme, n: int, k: int, isa: str, tiles: bool, rounds: bool = False
) -> Any:
    """The compiled description of a weight; what differs between calls is passed to them."""
    return _compiled().CpuLinear(
        n,
        kernel_columns(scheme, k),
        kernel_group(scheme, k),
        _code_name(scheme),
        float(1 << (scheme.bits - 1)) if scheme.weight.kind == "linear" else 0.0,
        codebook(scheme.weight, entries=16) if scheme.weight.kind == "codebook" else None,
        nested_table(torch.device("cpu")) if scheme.scale_levels == "double" else None,
        isa,
        tiles,
        rounds,
        scheme.activation.granularity,
    )


def _rows_of(x: Tensor) -> Tensor:
    """x [M, K] with adjacent columns, as the kernels take it."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def _run_floats(isa: str, tiles: bool = False, rounds: bool = False) -> Run:
    def run(x: Tensor, packed: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
        scheme, buffers = packed.scheme, packed.buffers
        y_dtype, row_scales = x.dtype, None
        if not scheme.weight_only:
            # Numbers of float8 are numbers of bf16.
            quantized, row_scales = reference.quantize_activations(x, packed)
            x = quantized.to(torch.bfloat16)
        return _linear(scheme, packed.n, packed.k, isa, tiles, rounds).floats(
            _rows_of(pad_groups(x, scheme)),
            buffers["words"],
            buffers["scales"],
            buffers.get("zeros"),
            buffers.get("channel_scales"),
            buffers.get("nested_absmax"),
            buffers.get("nested_offset"),
            row_scales,
            bias,
            y_dtype,
        )

    return run


def _run_integers(isa: str, tiles: bool = False) -> Run:
    run = _run_quantized(isa, tiles)
    return lambda x, packed, bias, problem: run(x, None, packed, bias, problem)


def _run_quantized(
    isa: str, tiles: bool = False
) -> Callable[[Tensor, Tensor | None, PackedWeight, Tensor | None, Problem], Tensor]:
    """A function of x, to be quantized, and None; or of int8 x and its row scales."""

    def run(
        x: Tensor,
        scale: Tensor | None,
        packed: PackedWeight,
        bias: Tensor | None,
        problem: Problem,
    ) -> Tensor:
        scheme, buffers = packed.scheme, packed.buffers
        return _linear(scheme, packed.n, packed.k, isa, tiles).integers(
            _rows_of(pad_groups(x, scheme)),
            buffers["words"],
            buffers["scales"],
            buffers.get("zeros"),
            buffers.get("channel_scales"),
            buffers.get("activation_scale"),
            scale,
            bias,
            problem.x_dtype,
        )

    return run


def _remember(isa: str, tiles: bool = False, rounds: bool = False) -> Remember:
    def remember(spec: str, problem: Problem, names: tuple[str, ...]) -> None:
        scheme, n, k = problem.scheme, problem.n, problem.k
        is_float8 = not scheme.weight_only and not scheme.integer_activation
        is_padded = column_order(scheme, k, torch.device("cpu")) is not None
        if is_float8 or is_padded or "input_factor" in names:
            return  # x is prepared in Python
        places = [names.index(name) if name in names else -1 for name in _BUFFERS]
        linear = _linear(scheme, n, k, isa, tiles, rounds)
        _compiled().remember_linear(
            spec, problem.m, problem.x_dtype, linear, scheme.integer_activation, n, k, places
        )

    return remember


_VARIES = "rounds unlike the kernels for few rows, and batch_invariant wants one for every M"

# The numbers of rows were measured, each against the rows below it and the reference, which
# dequantizes for torch's product: see docs/cpu.md. Those of portable and avx2 were measured where
# torch had AVX-512 and VNNI. Tiles have 32 columns of floats or 64 of int8.
KERNELS = (
    Kernel(
        name="cpu_amx_scaled",
        backend="cpu",
        layout="vnni",
        activations=("none", "fp8"),
        x_dtypes=(torch.bfloat16,),
        least_rows={0: 40, 128: 96},
        varies=_VARIES,
        where=_with("amx"),
        run=_run_floats("amx", tiles=True, rounds=True),
        remember=_remember("amx", tiles=True, rounds=True),
    ),
    Kernel(
        name="cpu_amx_float",
        backend="cpu",
        layout="vnni",
        activations=("none", "fp8"),
        least_rows=3,
        weight_rounding="bf16_terms",
        where=_with("amx"),
        why_not=_groups_of(32),
        run=_run_floats("amx", tiles=True),
        remember=_remember("amx", tiles=True),
    ),
    Kernel(
        name="cpu_amx_int8",
        backend="cpu",
        layout="vnni",
        activations=("int8",),
        least_rows=9,
        exact=True,
        weight_rounding="integers",
        where=_with("amx"),
        why_not=_groups_of(64),
        run=_run_integers("amx", tiles=True),
        run_quantized=_run_quantized("amx", tiles=True),
        remember=_remember("amx", tiles=True),
    ),
    Kernel(
        name="cpu_avx512_float",
        backend="cpu",
        layout="vnni",
        activations=("none", "fp8"),
        where=_with("avx512"),
        run=_run_floats("avx512"),
        remember=_remember("avx512"),
    ),
    Kernel(
        name="cpu_avx512_int8",
        backend="cpu",
        layout="vnni",
        activations=("int8",),
        exact=True,
        weight_rounding="integers",
        where=_with("avx512"),
        run=_run_integers("avx512"),
        run_quantized=_run_quantized("avx512"),
        remember=_remember("avx512"),
    ),
    Kernel(
        name="cpu_avx2_float",
        backend="cpu",
        layout="vnni",
        activations=("none", "fp8"),
        most_rows=128,
        where=_with("avx2"),
        run=_run_floats("avx2"),
        remember=_remember("avx2"),
    ),
    Kernel(
        name="cpu_avx2_int8",
        backend="cpu",
        layout="vnni",
        activations=("int8",),
        exact=True,
        weight_rounding="integers",
        where=_with("avx2"),
        run=_run_integers("avx2"),
        run_quantized=_run_quantized("avx2"),
        remember=_remember("avx2"),
    ),
    Kernel(
        name="cpu_portable_float",
        backend="cpu",
        layout="vnni",
        activations=("none", "fp8"),
        most_rows=16,
        where=_with("portable"),
        run=_run_floats("portable"),
        remember=_remember("portable"),
    ),
    Kernel(
        name="cpu_portable_int8",
        backend="cpu",
        layout="vnni",
        activations=("int8",),
        most_rows=2,
        exact=True,
        weight_rounding="integers",
        where=_with("portable"),
        run=_run_integers("portable"),
        run_quantized=_run_quantized("portable"),
        remember=_remember("portable"),
    ),
)


def _where_rows(problem: RowProblem) -> str | None:
    if problem.device != "cpu":
        return f"runs on the CPU, and x is on {problem.device}"
    return build_problem()


def _run_rows(problem: RowProblem, inputs: RowInputs) -> QuantizedRows:
    x, other = (None if t is None else _rows_of(t) for t in (inputs.x, inputs.other))
    if problem.kind == "rms_norm" and other is not None:
        other = other.contiguous()
    values, scale, zero, total = _compiled().quantize_rows_cpu(
        *(x, problem.kind, other, inputs.gain, inputs.epsilon, problem.scale_of, inputs.scale),
        best_isa(),
    )
    if inputs.scale is not None:
        scale = inputs.scale
    return QuantizedRows(values=values, scale=scale, zero=zero, total=total)


ROW_KERNELS = (
    RowKernel(
        name="cpu_quantize_rows",
        backend="cpu",
        where=_where_rows,
        run=_run_rows,
    ),
)
