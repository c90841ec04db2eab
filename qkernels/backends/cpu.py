"""The C++ kernels for the CPU as rows: for each set of instructions one for floats, one for int8.

QKERNELS_CPU_ISA caps the instructions: portable; avx2, avx512 or amx; neon, neon_dot or neon_i8mm.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qkernels import compiled, reference
from qkernels.backends.beside import BESIDE, has_beside, run_beside, run_by, run_int8_beside
from qkernels.backends.kernel import PREPARED, Kernel, Problem, RouteOf, WhyNot, by_route
from qkernels.backends.rounded import has_positions, run_rounded
from qkernels.backends.rows import QuantizedRows, RowInputs, RowKernel, RowProblem, adjacent
from qkernels.errors import NoKernelError
from qkernels.layouts import PackedWeight
from qkernels.layouts.padding import kernel_group
from qkernels.scheme import Activation, QuantScheme
from qkernels.weight import codebook, nested_table

ISAS = ("amx", "avx512", "avx2", "neon_i8mm", "neon_dot", "neon", "portable")
"""Sets of instructions of x86 and of 64-bit Arm, the fastest of each first. Each machine runs
those of its kind after its best too."""

ISA_VARIABLE = "QKERNELS_CPU_ISA"


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


def _with_bf16_products(isa: str) -> WhyNot:
    """The same for kernels that multiply pairs of bf16 in vectors."""

    def where(problem: Problem) -> str | None:
        problem_of_isa = _with(isa)(problem)
        if problem_of_isa is not None or _compiled().rounds_on_vectors(isa):
            return problem_of_isa
        return f"this CPU has {isa} without products of pairs of bf16"

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


def _whole_sums(problem: Problem) -> str | None:
    """Why integer sums do not run over all of K."""
    if problem.scheme.groups(problem.k) == 1 or problem.scheme.scale_levels == "two":
        return None
    return "needs one scale a row, or two levels of them"


def _up_to_four_bits(problem: Problem) -> str | None:
    """Why codes are no indices of a small table."""
    if _code_name(problem.scheme) in ("int4", "table4"):
        return None
    return "takes codes of up to 4 bits"


def _code_name(scheme: QuantScheme) -> str:
    if scheme.weight.kind == "linear":
        return "int8" if scheme.bits == 8 else "int4"
    return "table4" if scheme.weight.kind == "codebook" else scheme.weight.name


@lru_cache(maxsize=1024)
def _made(
    scheme: QuantScheme, n: int, k: int, isa: str, tiles: bool, rounds: bool, pairs: bool = False
) -> Any:
    return _compiled().CpuRoute(
        n=n,
        k=k,
        group=scheme.group_length(k),
        padded_group=kernel_group(scheme, k),
        code=_code_name(scheme),
        implied_zero=float(1 << (scheme.bits - 1)) if scheme.weight.kind == "linear" else 0.0,
        table=codebook(scheme.weight, entries=16) if scheme.weight.kind == "codebook" else None,
        nested_table=nested_table(torch.device("cpu")) if scheme.scale_levels == "double" else None,
        isa=isa,
        tiles=tiles,
        rounds_weights=rounds,
        pairs=pairs,
        activation=scheme.activation.dtype,
        granularity=scheme.activation.granularity,
    )


def _route(isa: str, tiles: bool = False, rounds: bool = False, pairs: bool = False) -> RouteOf:
    return lambda problem, device: _made(
        problem.scheme, problem.n, problem.k, isa, tiles, rounds, pairs
    )


def _of_rows() -> tuple[Kernel, ...]:
    """The kernels but for those that call another one."""
    return tuple(kernel for kernel in KERNELS if kernel not in COMPOSED)


def _keeps_outliers(problem: Problem) -> str | None:
    if problem.scheme.activation.outliers:
        return None
    return "is for schemes that keep columns with outliers apart"


def _outlier_route(problem: Problem, device: torch.device) -> Any:
    """Columns with outliers beside the kernels that take the others, each for its rows."""
    activation = problem.scheme.activation
    scheme = replace(problem.scheme, activation=Activation("int8"))
    inner = replace(problem, scheme=scheme, batch_invariant=False)
    parts = []
    for kernel in _of_rows():
        if kernel.refusal_of_any_rows(inner) is None and kernel.route is not None:
            least, most = kernel.rows(inner)
            parts.append((least, -1 if most is None else most, kernel.route(inner, device)))
    return _compiled().CpuOutlierRoute(
        k=problem.k,
        threshold=activation.outliers,
        largest=activation.largest,
        each_row=problem.batch_invariant,
        parts=parts,
    )


def _has_outliers_and_beside(problem: Problem) -> str | None:
    return _keeps_outliers(problem) or has_beside(problem)


def _run_apart(x: Tensor, packed: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
    """Integers but for columns of x with outliers, whose product is added in fp32, of weights with
    columns or single numbers of their own in 16 bits."""
    columns = reference.outlier_columns(x, problem.scheme.activation.outliers)
    left = reference.without_columns(x, columns) if columns.numel() else x
    scheme = replace(problem.scheme, activation=replace(problem.scheme.activation, outliers=0.0))
    inner = replace(problem, scheme=scheme, x_dtype=torch.float32)
    weight = PackedWeight(scheme, packed.layout, packed.n, packed.k, packed.buffers)
    y = run_by((_INT8_BESIDE,), left.float(), weight, bias, inner)
    if columns.numel():
        with reference.full_precision():
            y += x[:, columns].float() @ packed.columns(columns).t()
    return y.to(x.dtype)


_VARIES = "rounds unlike the kernels for few rows, and batch_invariant wants one for every M"

_FLOAT_ROWS = PREPARED | {"offsets"}
"""The optional fields that kernels for few rows know; tiles leave offsets to them."""

_INT4 = Kernel(
    name="cpu_int4_activations",
    backend="cpu",
    layout="vnni",
    activations=("int4",),
    activation_positions=True,
    exact=True,
    weight_rounding="integers",
    where=_with("portable"),
    run=run_rounded(_of_rows),
)

_INT8_BESIDE = Kernel(
    name="cpu_int8_beside",
    backend="cpu",
    layout="vnni",
    activations=("int8", "int4"),
    activation_positions=True,
    fields=PREPARED | BESIDE,
    varies=_VARIES,
    weight_rounding="integers",
    where=_with("portable"),
    why_not=has_beside,
    **run_int8_beside(_of_rows),
)

_OUTLIERS = Kernel(
    name="cpu_int8_outliers",
    backend="cpu",
    layout="vnni",
    activations=("int8", "int4"),
    activation_outliers=True,
    weight_rounding="integers",
    where=_with("portable"),
    why_not=_keeps_outliers,
    **by_route(_outlier_route),
)

# The numbers of rows were measured, each against the rows below it and the reference, which
# dequantizes for torch's product: see docs/cpu.md. Those of portable were measured where torch had
# AVX-512 and VNNI, those of avx2 where it was kept to AVX2. Tiles have 32 columns of floats or 64
# of int8. Those of NEON are not measured: docs/cpu.md counts instructions.
COMPOSED = (
    _INT4,
    replace(_INT4, name="cpu_int8_positions", activations=("int8",), why_not=has_positions),
    _OUTLIERS,
    replace(
        _OUTLIERS,
        name="cpu_int8_outliers_beside",
        fields=PREPARED | BESIDE,
        varies="finds columns with outliers in all rows of x, and batch_invariant wants each alone",
        why_not=_has_outliers_and_beside,
        run=_run_apart,
        route=None,
    ),
    Kernel(
        name="cpu_float_beside",
        backend="cpu",
        layout="vnni",
        activations=("none",),
        fields=_FLOAT_ROWS | BESIDE,
        varies=_VARIES,
        where=_with("portable"),
        why_not=has_beside,
        run=run_beside(_of_rows),
    ),
    _INT8_BESIDE,
)
"""Kernels that call one of the others for most of their product."""

KERNELS: tuple[Kernel, ...] = (
    Kernel(
        name="cpu_amx_scaled",
        backend="cpu",
        layout="vnni",
        activations=("none", "fp8"),
        x_dtypes=(torch.bfloat16,),
        least_rows={0: 40, 128: 96},
        varies=_VARIES,
        where=_with("amx"),
        **by_route(_route("amx", tiles=True, rounds=True)),
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
        **by_route(_route("amx", tiles=True)),
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
        **by_route(_route("amx", tiles=True), quantized=True),
    ),
    Kernel(
        name="cpu_avx512_pairs",
        backend="cpu",
        layout="vnni",
        activations=("none", "fp8"),
        x_dtypes=(torch.bfloat16,),
        fields=_FLOAT_ROWS,
        most_rows={0: 16, 32: 31, 64: 48},
        weight_rounding="bf16_terms",
        where=_with_bf16_products("avx512"),
        why_not=_up_to_four_bits,
        **by_route(_route("avx512", pairs=True)),
    ),
    Kernel(
        name="cpu_avx512_scaled",
        backend="cpu",
        layout="vnni",
        activations=("none", "fp8"),
        x_dtypes=(torch.bfloat16,),
        least_rows=16,
        varies=_VARIES,
        where=_with_bf16_products("avx512"),
        **by_route(_route("avx512", rounds=True)),
    ),
    Kernel(
        name="cpu_avx512_float",
        backend="cpu",
        layout="vnni",
        activations=("none", "fp8"),
        fields=_FLOAT_ROWS,
        where=_with("avx512"),
        **by_route(_route("avx512")),
    ),
    Kernel(
        name="cpu_avx512_int8_tiles",
        backend="cpu",
        layout="vnni",
        activations=("int8",),
        least_rows=24,
        exact=True,
        weight_rounding="integers",
        where=_with("avx512"),
        why_not=_whole_sums,
        **by_route(_route("avx512", tiles=True), quantized=True),
    ),
    Kernel(
        name="cpu_avx512_int8",
        backend="cpu",
        layout="vnni",
        activations=("int8",),
        exact=True,
        weight_rounding="integers",
        where=_with("avx512"),
        **by_route(_route("avx512"), quantized=True),
    ),
    Kernel(
        name="cpu_avx2_float",
        backend="cpu",
        layout="vnni",
        activations=("none", "fp8"),
        fields=_FLOAT_ROWS,
        most_rows=256,
        where=_with("avx2"),
        **by_route(_route("avx2")),
    ),
    Kernel(
        name="cpu_avx2_int8",
        backend="cpu",
        layout="vnni",
        activations=("int8",),
        exact=True,
        weight_rounding="integers",
        where=_with("avx2"),
        **by_route(_route("avx2"), quantized=True),
    ),
    Kernel(
        name="cpu_neon_scaled",
        backend="cpu",
        layout="vnni",
        activations=("none", "fp8"),
        x_dtypes=(torch.bfloat16,),
        least_rows=8,
        varies=_VARIES,
        where=_with_bf16_products("neon_i8mm"),
        **by_route(_route("neon_i8mm", rounds=True)),
    ),
    Kernel(
        name="cpu_neon_i8mm_tiles",
        backend="cpu",
        layout="vnni",
        activations=("int8",),
        least_rows=8,
        exact=True,
        weight_rounding="integers",
        where=_with("neon_i8mm"),
        **by_route(_route("neon_i8mm", tiles=True), quantized=True),
    ),
    Kernel(
        name="cpu_neon_i8mm_int8",
        backend="cpu",
        layout="vnni",
        activations=("int8",),
        exact=True,
        weight_rounding="integers",
        where=_with("neon_i8mm"),
        **by_route(_route("neon_i8mm"), quantized=True),
    ),
    Kernel(
        name="cpu_neon_dot_int8",
        backend="cpu",
        layout="vnni",
        activations=("int8",),
        exact=True,
        weight_rounding="integers",
        where=_with("neon_dot"),
        **by_route(_route("neon_dot"), quantized=True),
    ),
    Kernel(
        name="cpu_neon_float",
        backend="cpu",
        layout="vnni",
        activations=("none", "fp8"),
        fields=_FLOAT_ROWS,
        most_rows=128,
        where=_with("neon"),
        **by_route(_route("neon")),
    ),
    Kernel(
        name="cpu_neon_int8",
        backend="cpu",
        layout="vnni",
        activations=("int8",),
        exact=True,
        weight_rounding="integers",
        where=_with("neon"),
        **by_route(_route("neon"), quantized=True),
    ),
    Kernel(
        name="cpu_portable_float",
        backend="cpu",
        layout="vnni",
        activations=("none", "fp8"),
        fields=_FLOAT_ROWS,
        most_rows=16,
        where=_with("portable"),
        **by_route(_route("portable")),
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
        **by_route(_route("portable"), quantized=True),
    ),
    *COMPOSED,
)


def _where_rows(problem: RowProblem) -> str | None:
    if problem.device != "cpu":
        return f"runs on the CPU, and x is on {problem.device}"
    return build_problem()


def _run_rows(problem: RowProblem, inputs: RowInputs) -> QuantizedRows:
    x, other = (None if t is None else adjacent(t) for t in (inputs.x, inputs.other))
    if problem.kind in ("rms_norm", "layer_norm") and other is not None:
        other = other.contiguous()
    gain, bias = (None if t is None else t.contiguous() for t in (inputs.gain, inputs.bias))
    values, scale, zero, total, rounded = _compiled().quantize_rows_cpu(
        *(x, problem.kind, other, gain, bias, inputs.epsilon, problem.scale_of, inputs.scale),
        *(problem.rounds, best_isa()),
    )
    if problem.scale_of == "tensor":
        scale = scale[0].clone() if scale.numel() else scale.new_ones(())
    return QuantizedRows(values=values, scale=scale, zero=zero, total=total, rounded=rounded)


Rounded = tuple[Tensor, Tensor, Tensor]
"""Rows of x's type, the same as int8, and their scales, fp32 [..., 1]."""


def norm_rows(
    x: Tensor, gain: Tensor, epsilon: float, rounds_first: bool, adds_one: bool, isa: str
) -> Rounded | None:
    """`reference.rounded_norm` of x [..., K], bit for bit, and what `quantize_per_token` makes of
    it.

    Not an operator of torch: None for x that only torch's own operators take, such as one on
    another device, one with a gradient, or any under autocast, vmap or a mode of Python.
    """
    return _compiled().norm_rows_cpu(x, gain, epsilon, rounds_first, adds_one, isa)


def layer_norm_rows(
    x: Tensor, gain: Tensor, bias: Tensor | None, epsilon: float, isa: str
) -> Rounded | None:
    """The same of `reference.layer_norm`, rounded to x's type, but for the order of its sums."""
    return _compiled().layer_norm_rows_cpu(x, gain, bias, epsilon, isa)


def product_rows(gate: Tensor, up: Tensor, isa: str, kind: str = "product") -> Rounded | None:
    """The same of gate * up, of [..., K] each, bit for bit; or of a gate of `rows.KINDS`, which is
    rounded once."""
    return _compiled().product_rows_cpu(gate, up, kind, isa)


ROW_KERNELS = (
    RowKernel(
        name="cpu_quantize_rows",
        backend="cpu",
        where=_where_rows,
        run=_run_rows,
    ),
)
