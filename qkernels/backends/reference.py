"""The reference as a kernel: runs every scheme, shape and device, and so never refuses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from qkernels import reference
from qkernels.backends.kernel import Kernel, Problem
from qkernels.backends.rows import CODES, QuantizedRows, RowInputs, RowKernel, RowProblem
from qkernels.layouts import PackedWeight
from qkernels.scheme import largest_number


def _run(x: Tensor, packed: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
    return reference.linear(x, packed, bias, batch_invariant=problem.batch_invariant)


def _run_quantized(
    x: Tensor, scale: Tensor, packed: PackedWeight, bias: Tensor | None, problem: Problem
) -> Tensor:
    # Static zero points are the weight's own; those of a token come with no x.
    zero = packed.buffers.get("activation_zero")
    zeros = None if zero is None else zero.expand(x.shape[0])
    return reference.linear_quantized(x, scale, packed, bias, problem.x_dtype, zeros)


KERNELS = (
    Kernel(
        name="reference",
        backend="reference",
        layout=None,
        activations=("none", "int8", "int4", "fp8"),
        activation_zeros=True,
        activation_positions=True,
        activation_outliers=True,
        fields=None,
        proves_itself=False,
        run=_run,
        run_quantized=_run_quantized,
    ),
)


_GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu_mul": reference.silu_mul,
    "gelu_mul": partial(reference.gelu_mul, approximate="none"),
    "gelu_tanh_mul": partial(reference.gelu_mul, approximate="tanh"),
}


def row_values(problem: RowProblem, inputs: RowInputs) -> tuple[Tensor, Tensor | None]:
    """The rows that are quantized, and x + residual where there is one."""
    x, other, total = inputs.x, inputs.other, None
    if problem.kind == "plain":
        return x, None
    if problem.kind == "rms_norm":
        values, total = reference.rms_norm(x, inputs.gain, inputs.epsilon, other)
    elif problem.kind == "layer_norm":
        values, total = reference.layer_norm(x, inputs.gain, inputs.bias, inputs.epsilon, other)
    else:
        assert other is not None
        values = _GATES[problem.kind](x, other)
    if problem.rounds:
        values = values.to(x.dtype)
    return values, None if other is None else total


def scale_of_rows(problem: RowProblem, values: Tensor, inputs: RowInputs) -> Tensor | None:
    """The scale that is known before rows of `values` are quantized, or None."""
    if problem.scale_of == "tensor":
        return reference.tensor_scale(values, largest_number(problem.codes))
    return inputs.scale


def _run_rows(problem: RowProblem, inputs: RowInputs) -> QuantizedRows:
    values, total = row_values(problem, inputs)
    rounded = values if problem.rounds else None
    if problem.scale_of == "asymmetric":
        quantized, scale, zero = reference.quantize_rows_asymmetric(values)
        return QuantizedRows(values=quantized, scale=scale, zero=zero, total=total, rounded=rounded)
    given = scale_of_rows(problem, values, inputs)
    quantized, scale = reference.quantize_rows(values, problem.codes, given)
    if problem.scale_of == "static":
        scale = reference.where_finite(values, scale)
    return QuantizedRows(values=quantized, scale=scale, total=total, rounded=rounded)


ROW_KERNELS = (
    RowKernel(name="reference_quantize_rows", backend="reference", codes=CODES, run=_run_rows),
)
