"""Products with what a weight has beside its codes: another kernel of the backend multiplies the
codes, and columns or single numbers of 16 bits are added."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import Tensor

from qkernels import compiled, reference, sparse
from qkernels.backends.kernel import Kernel, Problem, Run
from qkernels.layouts import PackedWeight

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


def run_beside(kernels: Callable[[], Iterable[Kernel]]) -> Run:
    """`Kernel.run` of one that leaves the codes to the first of `kernels` that takes them."""

    def run(x: Tensor, packed: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
        inner = replace(problem, fields=problem.fields - BESIDE)
        buffers = {name: held for name, held in packed.buffers.items() if name not in BESIDE}
        weight = PackedWeight(packed.scheme, packed.layout, packed.n, packed.k, buffers)
        y = run_by(kernels(), x, weight, bias, inner)
        held = packed.buffers
        if "outlier_columns" in held:
            with reference.full_precision():
                columns = x.index_select(1, held["outlier_columns"])
                y.addmm_(columns, held["outlier_values"].to(x.dtype).t())
        if "sparse_ends" in held:
            _add_sparse(y, x, packed)
        return y

    return run


def _add_sparse(y: Tensor, x: Tensor, packed: PackedWeight) -> None:
    held, fast = packed.buffers, compiled.extension()
    if y.device.type == "cpu" and fast is not None and hasattr(fast, "add_sparse_product_cpu"):
        adjacent = x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()
        fast.add_sparse_product_cpu(y, adjacent, *(held[name] for name in sparse.NAMES))
        return
    with reference.full_precision():
        y += sparse.product(x, held).to(y.dtype)
