"""Products with what a weight has beside its codes: another kernel of the backend multiplies the
codes, and columns or single numbers of 16 bits are added."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qkernels import compiled, reference, sparse
from qkernels.backends.kernel import Kernel, Problem, Run
from qkernels.backends.rows import adjacent, quantize_activations
from qkernels.layouts import PackedWeight
from qkernels.scheme import Activation, QuantScheme

COLUMNS = frozenset({"outlier_columns", "outlier_values"})
SPARSE = frozenset(sparse.NAMES)
BESIDE = COLUMNS | SPARSE
"""Fields of what a weight has beside its codes, and which only these kernels know."""


def kernel_for(problem: Problem, kernels: Iterable[Kernel]) -> Kernel | None:
    """The first that runs a problem with its number of rows."""
    return next((kernel for kernel in kernels if kernel.refusal(problem) is None), None)


def run_by(
    kernels: Iterable[Kernel],
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None,
    problem: Problem,
) -> Tensor:
    """A part of a product by the kernel that is for it, or by the reference."""
    kernel = kernel_for(problem, kernels)
    if kernel is None:
        return reference.linear(x, packed, bias)
    return kernel.run(x, packed, bias, problem)


def has_beside(problem: Problem) -> str | None:
    """Why these kernels are not for a problem, or None."""
    if problem.fields & BESIDE:
        return None
    return "is for weights with columns or single numbers in 16 bits beside their codes"


Add = Callable[[Tensor, Tensor, PackedWeight, torch.dtype, Tensor | None], Tensor]
"""(y [M, N], x [M, K], packed weight, dtype, row scales fp32 [M] of int8 x or None) -> y and what x
is times what the weight has beside its codes, [M, N] of `dtype`. It may write to y."""


def add(
    y: Tensor, x: Tensor, packed: PackedWeight, dtype: torch.dtype, scale: Tensor | None
) -> Tensor:
    """`Add` by operators of torch and, on a CPU, what C++ has for single numbers."""
    if scale is not None:
        x = x.float() * scale[:, None]
    held = packed.buffers
    if "outlier_columns" in held:
        with reference.full_precision():
            columns = x.index_select(1, held["outlier_columns"])
            y.addmm_(columns.to(y.dtype), held["outlier_values"].to(y.dtype).t())
    if "sparse_ends" in held:
        _add_sparse(y, x, packed)
    return y.to(dtype)


def add_by_kernel(namespace: str) -> Add:
    """`Add` by the CUDA kernel of torch.ops.`namespace`, in one launch."""

    def run(
        y: Tensor, x: Tensor, packed: PackedWeight, dtype: torch.dtype, scale: Tensor | None
    ) -> Tensor:
        held = packed.buffers
        out: Tensor = getattr(torch.ops, namespace).add_beside(
            *(y, adjacent(x), held.get("outlier_columns"), held.get("outlier_values")),
            *(*(held.get(name) for name in sparse.NAMES), scale, None, dtype),
        )
        return out

    return run


def without_beside(packed: PackedWeight, scheme: QuantScheme | None = None) -> PackedWeight:
    """The codes of a weight alone; of another scheme, what x was quantized with is left out too."""
    left_out = BESIDE if scheme is None else BESIDE | {"activation_scale"}
    buffers = {name: held for name, held in packed.buffers.items() if name not in left_out}
    return PackedWeight(scheme or packed.scheme, packed.layout, packed.n, packed.k, buffers)


def run_beside(kernels: Callable[[], Iterable[Kernel]], add: Add = add) -> Run:
    """`Kernel.run` of one that leaves the codes to the first of `kernels` that takes them."""

    def run(x: Tensor, packed: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
        inner = replace(problem, fields=problem.fields - BESIDE)
        y = run_by(kernels(), x, without_beside(packed), bias, inner)
        return add(y, x, packed, x.dtype, None)

    return run


def run_int8_beside(kernels: Callable[[], Iterable[Kernel]], add: Add = add) -> dict[str, Any]:
    """`Kernel.run` and `run_quantized` of one that leaves the product with int8 x to the first of
    `kernels` that takes it, in fp32, so that y is rounded once."""

    def run(x: Tensor, packed: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
        quantized, scale = quantize_activations(x, packed)
        return run_quantized(quantized, scale, packed, bias, problem)

    def run_quantized(
        x: Tensor, scale: Tensor, packed: PackedWeight, bias: Tensor | None, problem: Problem
    ) -> Tensor:
        scheme = replace(problem.scheme, activation=Activation("int8"))
        fields = problem.fields - BESIDE
        inner = replace(problem, scheme=scheme, fields=fields, x_dtype=torch.float32)
        kernel = kernel_for(inner, kernels())
        if kernel is None or kernel.run_quantized is None:
            return reference.linear_quantized(x, scale, packed, bias, problem.x_dtype)
        y = kernel.run_quantized(x, scale, without_beside(packed, scheme), bias, inner)
        return add(y, x, packed, problem.x_dtype, scale)

    return {"run": run, "run_quantized": run_quantized}


def _add_sparse(y: Tensor, x: Tensor, packed: PackedWeight) -> None:
    held, fast = packed.buffers, compiled.extension()
    if y.device.type == "cpu" and fast is not None and hasattr(fast, "add_sparse_product_cpu"):
        fast.add_sparse_product_cpu(y, adjacent(x), *(held[name] for name in sparse.NAMES))
        return
    with reference.full_precision():
        y += sparse.product(x, held).to(y.dtype)
