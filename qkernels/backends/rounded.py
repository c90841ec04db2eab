"""Integer products whose x is rounded by torch's operations: of activations of 4 bits, and of those
with a scale for each position."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import Tensor

from qkernels import reference
from qkernels.backends.beside import kernel_for
from qkernels.backends.kernel import Kernel, Problem, Run
from qkernels.layouts import PackedWeight
from qkernels.scheme import Activation


def run_rounded(kernels: Callable[[], Iterable[Kernel]]) -> Run:
    """`Kernel.run` of one that gives int8 rows to the first of `kernels` that takes them."""

    def run(x: Tensor, packed: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
        quantized, scale = reference.quantize_activations(x, packed)
        # What x was quantized with stays here: as rows of int8 have them, scales are one a row.
        buffers = {
            name: held for name, held in packed.buffers.items() if name != "activation_scale"
        }
        scheme = replace(problem.scheme, activation=Activation("int8"))
        inner = replace(problem, scheme=scheme)
        weight = PackedWeight(scheme, packed.layout, packed.n, packed.k, buffers)
        kernel = kernel_for(inner, kernels())
        if kernel is None or kernel.run_quantized is None:
            return reference.linear_quantized(quantized, scale, weight, bias, problem.x_dtype)
        return kernel.run_quantized(quantized, scale, weight, bias, inner)

    return run


def has_positions(problem: Problem) -> str | None:
    """Why these kernels are not for a problem of int8 activations, or None."""
    if problem.scheme.activation.by_position:
        return None
    return "is for schemes with scales of activations per position"
