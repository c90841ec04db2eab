"""The reference as a kernel: runs every scheme, shape and device, and so never refuses."""

from __future__ import annotations

from torch import Tensor

from qkernels import reference
from qkernels.backends.kernel import Kernel, Problem
from qkernels.layouts import PackedWeight


def _run(x: Tensor, packed: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
    return reference.linear(x, packed, bias, batch_invariant=problem.batch_invariant)


def _run_quantized(
    x: Tensor, scale: Tensor, packed: PackedWeight, bias: Tensor | None, problem: Problem
) -> Tensor:
    return reference.linear_quantized(x, scale, packed, bias, problem.x_dtype)


KERNELS = (
    Kernel(
        "reference",
        "reference",
        layout=None,
        fields=None,
        why_not=lambda problem: None,
        run=_run,
        run_quantized=_run_quantized,
    ),
)
