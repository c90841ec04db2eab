"""The CUDA C++ kernels as rows, on a GPU and, for tests, in the emulator on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qkernels import compiled
from qkernels.backends.beside import (
    BESIDE,
    add_by_kernel,
    has_beside,
    run_beside,
    run_int8_beside,
)
from qkernels.backends.kernel import (
    FLOATS,
    PREPARED,
    GradInput,
    Kernel,
    Problem,
    RouteOf,
    by_route,
    no_gpu,
)
from qkernels.backends.rounded import has_positions, run_rounded
from qkernels.backends.rows import (
    CODES,
    QuantizedRows,
    RowInputs,
    RowKernel,
    RowProblem,
    adjacent,
)
from qkernels.layouts import FRAGMENT, PackedWeight, fragment_int8
from qkernels.layouts.fragment import code_name, padded_rows
from qkernels.layouts.padding import column_order, kernel_columns, kernel_group
from qkernels.scheme import QuantScheme
from qkernels.weight import codebook

MOST_SIZE = 1 << 30
"""Rows or columns of a weight, as the kernels see it; kMostSize of weights/fragment.cuh."""

MOST_NUMBERS = 1 << 40
"""All of a weight; kMostNumbers."""

_INVARIANT_ROWS = 64
"""The number of rows whose schedule serves every M where results must not depend on M."""


def _build_info() -> dict[str, Any]:
    extension = compiled.extension()
    return {} if extension is None else extension.build_info()


@lru_cache(maxsize=1)
def build_problem() -> str | None:
    """Why there are no CUDA kernels in this installation, or None."""
    if compiled.extension() is None:
        return compiled.problem()
    if not _build_info()["cuda"]:
        return (
            "qkernels._C was built without CUDA: install a torch with CUDA and nvcc, then build "
            "again with pip install --no-build-isolation ."
        )
    return None


@lru_cache(maxsize=1)
def built_architectures() -> tuple[str, ...]:
    """The architectures in qkernels._C, such as "8.0" and "9.0a"."""
    return tuple(_build_info()["cuda_architectures"])


def missing_architecture(capability: tuple[int, int], built: tuple[str, ...]) -> str | None:
    """Why code for `built` does not run on a GPU of that capability, or None.

    Code for x.y runs on x.z with z >= y, code for x.ya on x.y alone, and PTX ("x.y+PTX") on
    everything newer.
    """
    for name in built:
        number = name.removesuffix("+PTX")
        major, minor = (int(part) for part in number.rstrip("af").split("."))
        exact = number.endswith("a")
        if capability == (major, minor):
            return None
        if not exact and capability[0] == major and capability[1] >= minor:
            return None
        if name.endswith("+PTX") and not exact and capability > (major, minor):
            return None
    wanted = f"{capability[0]}.{capability[1]}"
    return (
        f"this build has code for {', '.join(built)}, and the GPU has capability {wanted}: build "
        f"again with TORCH_CUDA_ARCH_LIST={wanted}"
    )


def emulator_is_loaded() -> bool:
    """Whether the library of emulated kernels was loaded into this process."""
    return hasattr(torch.ops.qkernels_emulated, "weight_only_mma")


def not_built(capability: tuple[int, int] | None) -> str | None:
    """Why there are no kernels for a GPU of that capability in this installation, or None."""
    reason = build_problem()
    if reason is None and capability is not None:
        reason = missing_architecture(capability, built_architectures())
    return reason


def _not_built_for(problem: Problem) -> str | None:
    return no_gpu(problem) or not_built(problem.capability)


def _why_no_emulator(device: str) -> str | None:
    if device != "cpu":
        return "is the emulator of the CUDA kernels, which runs on the CPU"
    if not emulator_is_loaded():
        return "is the emulator of the CUDA kernels, for tests: see CONTRIBUTING.md"
    return None


def _no_emulator(problem: Problem) -> str | None:
    return _why_no_emulator(problem.device)


def weight_arguments(packed: PackedWeight) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What the operators take of a weight: tensors, and what they are."""
    assert packed.layout is FRAGMENT, f"the weight is in {packed.layout.name}"
    scheme, buffers = packed.scheme, packed.buffers
    code = code_name(scheme)
    table = codebook(scheme.weight, packed.device) if code == "table4" else None
    tensors = (buffers["words"], buffers["scales"], buffers.get("zeros"), table)
    columns, group = kernel_columns(scheme, packed.k), kernel_group(scheme, packed.k)
    return tensors, (packed.n, columns, group, code)


@lru_cache(maxsize=1024)
def _made(
    namespace: str,
    scheme: QuantScheme,
    n: int,
    k: int,
    device: torch.device,
    kind: str,
    schedule_m: int,
) -> Any:
    code = code_name(scheme)
    table = codebook(scheme.weight, device) if code == "table4" else None
    sizes = (n, k, scheme.group_length(k), kernel_group(scheme, k))
    make = getattr(torch.ops, namespace).weight_only_route
    extension = compiled.extension()
    assert extension is not None, "routes are run by qkernels._C"
    return extension.adopt_route(make(*sizes, code, table, kind, schedule_m))


def _route(namespace: str, kind: str) -> RouteOf:
    def route(problem: Problem, device: torch.device) -> Any:
        schedule_m = _INVARIANT_ROWS if problem.batch_invariant else 0
        return _made(namespace, problem.scheme, problem.n, problem.k, device, kind, schedule_m)

    return route


@lru_cache(maxsize=1024)
def _made_int8(namespace: str, scheme: QuantScheme, n: int, k: int, schedule_m: int) -> Any:
    sizes = (n, k, scheme.group_length(k), fragment_int8.kernel_group(scheme, k))
    weight = (scheme.bits, scheme.scale_levels == "two")
    activation = (scheme.activation.dtype, scheme.activation.granularity)
    make = getattr(torch.ops, namespace).int8_route
    extension = compiled.extension()
    assert extension is not None, "routes are run by qkernels._C"
    outliers = scheme.activation.outliers
    return extension.adopt_route(make(*sizes, *weight, *activation, schedule_m, outliers))


def _int8_route(namespace: str) -> RouteOf:
    def route(problem: Problem, device: torch.device) -> Any:
        schedule_m = _INVARIANT_ROWS if problem.batch_invariant else 0
        return _made_int8(namespace, problem.scheme, problem.n, problem.k, schedule_m)

    return route


_LEAST_GRAD_BITS = 4
"""Of weights that weight_only_grad takes."""


def _grad_input(namespace: str, dense: bool) -> GradInput:
    def grad_input(grad: Tensor, packed: PackedWeight, problem: Problem) -> Tensor:
        tensors, facts = weight_arguments(packed)
        operators = getattr(torch.ops, namespace)
        if dense or packed.scheme.bits < _LEAST_GRAD_BITS:
            # Of 16 bits, and gone after the call.
            grad_x = grad @ operators.dequantize(*tensors, *facts, grad.dtype)
        else:
            schedule_m = _INVARIANT_ROWS if problem.batch_invariant else 0
            grad_x = operators.weight_only_grad(grad, *tensors, *facts, schedule_m=schedule_m)
        order = column_order(packed.scheme, packed.k, packed.device)
        return grad_x if order is None else grad_x.index_select(1, order[1])

    return grad_input


def _too_large(problem: Problem) -> str | None:
    return _too_large_of(problem, kernel_columns(problem.scheme, problem.k))


def _too_large_of(problem: Problem, k: int) -> str | None:
    # Padded, as packing sees them.
    n = padded_rows(problem.n)
    if n <= MOST_SIZE and k <= MOST_SIZE and n * k <= MOST_NUMBERS:
        return None
    return (
        f"takes weights of up to 2^30 rows and columns and 2^40 numbers, and this one is "
        f"[{problem.n}, {problem.k}]"
    )


def _sums_whole(problem: Problem) -> bool:
    """Whether integer sums run over all of K."""
    return problem.scheme.groups(problem.k) == 1 or problem.scheme.scale_levels == "two"


def _why_not_whole(problem: Problem) -> str | None:
    if not _sums_whole(problem):
        return "needs one scale a row, or two levels of them"
    columns = fragment_int8.kernel_columns(problem.scheme, problem.k)
    return _overflows(problem, columns) or _too_large_of(problem, columns)


def _why_not_grouped(problem: Problem) -> str | None:
    scheme, k = problem.scheme, problem.k
    if _sums_whole(problem):
        return "is for groups with floating scales"
    overflow = _overflows(problem, fragment_int8.kernel_group(scheme, k))
    return overflow or _too_large_of(problem, fragment_int8.kernel_columns(scheme, k))


def _why_no_outliers(problem: Problem) -> str | None:
    if not problem.scheme.activation.outliers:
        return "is for schemes that keep columns with outliers apart"
    return _why_not_whole(problem) if _sums_whole(problem) else _why_not_grouped(problem)


def _overflows(problem: Problem, columns: int) -> str | None:
    """Why int32 may not hold a sum of so many products of int8."""
    # Less a zero point, numbers go to 255.
    largest = 255 if problem.scheme.activation.has_zeros else 128
    most = ((1 << 31) - 1) // (128 * largest)
    if columns <= most:
        return None
    return f"adds up to {most} products of integers, whose sum int32 holds, and not {columns}"


def _no_floats(problem: Problem) -> str | None:
    if code_name(problem.scheme) == "table4":
        return (
            f"multiplies x of fp32 by weights that bf16 holds but for their scales, which those of "
            f"{problem.scheme} are not"
        )
    return _too_large(problem)


def _no_beside(problem: Problem) -> str | None:
    reason = has_beside(problem)
    if reason is not None or problem.x_dtype != torch.float32:
        return reason or _too_large(problem)
    return _no_floats(problem)


def _of_codes() -> tuple[Kernel, ...]:
    return _FUSED, _DENSE, _FLOAT


def _of_codes_emulated() -> tuple[Kernel, ...]:
    return _EMULATED_FLOAT


def _of_integers() -> tuple[Kernel, ...]:
    return _INT8, _INT8_GROUPED


def _of_integers_emulated() -> tuple[Kernel, ...]:
    return _EMULATED_INT8


_HALVES = (torch.float16, torch.bfloat16)
_VARIES = "multiplies with cuBLAS, which may round a row differently for another M"

# From 257 rows on the weight is dequantized and left to cuBLAS, whose tensor-core instructions are
# faster on large tiles; likewise for the gradient. Not measured on a GPU.
KERNELS = (
    Kernel(
        name="cuda_weight_only_mma",
        backend="cuda",
        layout="fragment",
        activations=("none",),
        x_dtypes=_HALVES,
        most_rows=256,
        weight_rounding="x_dtype",
        where=_not_built_for,
        why_not=_too_large,
        **by_route(_route("qkernels_cuda", "fused")),
        grad_input=_grad_input("qkernels_cuda", dense=False),
    ),
    Kernel(
        name="cuda_dequantize_matmul",
        backend="cuda",
        layout="fragment",
        activations=("none",),
        x_dtypes=_HALVES,
        varies=_VARIES,
        weight_rounding="x_dtype",
        where=_not_built_for,
        why_not=_too_large,
        **by_route(_route("qkernels_cuda", "dense")),
        grad_input=_grad_input("qkernels_cuda", dense=True),
    ),
    # x in three bf16 numbers each, so that a weight is met in all bits of both.
    Kernel(
        name="cuda_weight_only_mma_float",
        backend="cuda",
        layout="fragment",
        activations=("none",),
        x_dtypes=(torch.float32,),
        where=_not_built_for,
        why_not=_no_floats,
        **by_route(_route("qkernels_cuda", "float")),
    ),
    Kernel(
        name="cuda_float_beside",
        backend="cuda",
        layout="fragment",
        activations=("none",),
        x_dtypes=FLOATS,
        fields=PREPARED | BESIDE,
        weight_rounding="x_dtype",
        where=_not_built_for,
        why_not=_no_beside,
        run=run_beside(_of_codes, add_by_kernel("qkernels_cuda")),
    ),
    Kernel(
        name="cuda_int8_mma",
        backend="cuda",
        layout="fragment_int8",
        activations=("int8",),
        activation_zeros=True,
        exact=True,
        weight_rounding="integers",
        where=_not_built_for,
        why_not=_why_not_whole,
        **by_route(_int8_route("qkernels_cuda"), quantized=True),
    ),
    Kernel(
        name="cuda_int8_mma_grouped",
        backend="cuda",
        layout="fragment_int8",
        activations=("int8",),
        activation_zeros=True,
        weight_rounding="integers",
        where=_not_built_for,
        why_not=_why_not_grouped,
        **by_route(_int8_route("qkernels_cuda"), quantized=True),
    ),
    Kernel(
        name="cuda_int8_positions",
        backend="cuda",
        layout="fragment_int8",
        activations=("int8",),
        activation_positions=True,
        weight_rounding="integers",
        where=_not_built_for,
        why_not=has_positions,
        run=run_rounded(_of_integers),
    ),
    Kernel(
        name="cuda_int4_activations",
        backend="cuda",
        layout="fragment_int8",
        activations=("int4",),
        activation_positions=True,
        weight_rounding="integers",
        where=_not_built_for,
        run=run_rounded(_of_integers),
    ),
    Kernel(
        name="cuda_int8_beside",
        backend="cuda",
        layout="fragment_int8",
        activations=("int8", "int4"),
        activation_positions=True,
        fields=PREPARED | BESIDE,
        weight_rounding="integers",
        where=_not_built_for,
        why_not=has_beside,
        **run_int8_beside(_of_integers, add_by_kernel("qkernels_cuda")),
    ),
    Kernel(
        name="cuda_int8_outliers",
        backend="cuda",
        layout="fragment_int8",
        activations=("int8", "int4"),
        activation_outliers=True,
        varies="finds columns with outliers in all rows of x, and batch_invariant wants each alone",
        weight_rounding="integers",
        where=_not_built_for,
        why_not=_why_no_outliers,
        **by_route(_int8_route("qkernels_cuda")),
    ),
)
_FUSED, _DENSE, _FLOAT, _BESIDE, _INT8, _INT8_GROUPED, *_OTHERS = KERNELS
_POSITIONS, _INT4, _INT8_BESIDE, _OUTLIERS = _OTHERS


def _emulated(kernel: Kernel, name: str, **parts: Any) -> Kernel:
    return replace(
        kernel,
        name=name,
        backend="emulated",
        is_simulator=True,
        proves_itself=False,
        where=_no_emulator,
        **parts,
    )


def _emulated_float(kernel: Kernel, kind: str, name: str) -> Kernel:
    namespace, gives_grad = "qkernels_emulated", kernel.grad_input is not None
    return _emulated(
        kernel,
        name,
        **by_route(_route(namespace, kind)),
        grad_input=_grad_input(namespace, dense=kind == "dense") if gives_grad else None,
    )


def _emulated_int8(kernel: Kernel, name: str) -> Kernel:
    return _emulated(kernel, name, **by_route(_int8_route("qkernels_emulated"), quantized=True))


_EMULATED_FLOAT = (
    _emulated_float(_FUSED, "fused", name="emulated_weight_only_mma"),
    _emulated_float(_DENSE, "dense", name="emulated_dequantize_matmul"),
    _emulated_float(_FLOAT, "float", name="emulated_weight_only_mma_float"),
)
_EMULATED_INT8 = (
    _emulated_int8(_INT8, name="emulated_int8_mma"),
    _emulated_int8(_INT8_GROUPED, name="emulated_int8_mma_grouped"),
)
_EMULATED_ADD = add_by_kernel("qkernels_emulated")

EMULATED_KERNELS = (
    *_EMULATED_FLOAT,
    _emulated(
        _BESIDE, name="emulated_float_beside", run=run_beside(_of_codes_emulated, _EMULATED_ADD)
    ),
    *_EMULATED_INT8,
    _emulated(_POSITIONS, name="emulated_int8_positions", run=run_rounded(_of_integers_emulated)),
    _emulated(_INT4, name="emulated_int4_activations", run=run_rounded(_of_integers_emulated)),
    _emulated(
        _INT8_BESIDE,
        name="emulated_int8_beside",
        **run_int8_beside(_of_integers_emulated, _EMULATED_ADD),
    ),
    _emulated(
        _OUTLIERS, name="emulated_int8_outliers", **by_route(_int8_route("qkernels_emulated"))
    ),
)


def _rows_not_built_for(problem: RowProblem) -> str | None:
    if problem.device != "cuda":
        return f"needs a CUDA GPU, and x is on {problem.device}"
    return not_built(problem.capability)


def _run_rows(namespace: str) -> Callable[[RowProblem, RowInputs], QuantizedRows]:
    def run(problem: RowProblem, inputs: RowInputs) -> QuantizedRows:
        other = None if inputs.other is None else adjacent(inputs.other)
        gain, bias = (None if t is None else t.contiguous() for t in (inputs.gain, inputs.bias))
        values, scale, zero, total, rounded = getattr(torch.ops, namespace).quantize_rows(
            *(adjacent(inputs.x), problem.kind, other, gain, bias, inputs.epsilon),
            *(problem.scale_of, inputs.scale, problem.codes, problem.rounds),
        )
        return QuantizedRows(values=values, scale=scale, zero=zero, total=total, rounded=rounded)

    return run


def _for_plain_rows(problem: RowProblem) -> str | None:
    if problem.kind == "plain":
        return None
    if problem.scale_of == "tensor":
        return f"finds the scale of a tensor for plain rows, not for {problem.kind}"
    if problem.codes is not torch.int8:
        return f"gives {problem.codes} for plain rows, not for {problem.kind}"
    return None


ROW_KERNELS = (
    RowKernel(
        name="cuda_quantize_rows",
        backend="cuda",
        codes=CODES,
        where=lambda problem: _for_plain_rows(problem) or _rows_not_built_for(problem),
        run=_run_rows("qkernels_cuda"),
    ),
)
EMULATED_ROW_KERNELS = (
    RowKernel(
        name="emulated_quantize_rows",
        backend="emulated",
        codes=CODES,
        where=lambda problem: _for_plain_rows(problem) or _why_no_emulator(problem.device),
        run=_run_rows("qkernels_emulated"),
    ),
)
