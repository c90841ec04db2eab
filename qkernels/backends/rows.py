"""Kernels that quantize rows of x to int8: the question put to one, and the row that answers it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("plain", "rms_norm", "silu_mul", "layer_norm", "gelu_mul", "gelu_tanh_mul")
"""What is quantized: x; x (+ residual) over its root mean square, times a gain; silu(x) * up;
x (+ residual) without its mean, over its standard deviation, times a gain, and a bias;
gelu(x) * up, of the error function or of tanh."""

SCALES = ("token", "asymmetric", "static", "tensor")
"""A scale for each row, the same with a zero point, one that is given for all, or one that is found
for all."""


@dataclass(frozen=True)
class RowProblem:
    """Everything that the choice of a row kernel may depend on.

    Attributes:
        kind: one of `KINDS`.
        scale_of: one of `SCALES`.
        device: "cpu" or "cuda".
        rounds: whether the rows, but plain ones, are rounded to x's type, quantized as rounded, and
            given too.
        capability: compute capability of the GPU, None on a CPU.
    """

    kind: str
    scale_of: str
    x_dtype: torch.dtype
    device: str
    rounds: bool = False
    capability: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class RowInputs:
    """What a row kernel reads.

    Attributes:
        x: [M, K] of fp16, bf16 or fp32.
        other: [M, K] of x's type: the residual, or what the gate multiplies; or None.
        gain: [K] or None.
        bias: [K] of a layer norm, or None.
        epsilon: of norms.
        scale: fp32 [] where it is given, else None.
    """

    x: Tensor
    other: Tensor | None = None
    gain: Tensor | None = None
    bias: Tensor | None = None
    epsilon: float = 0.0
    scale: Tensor | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class QuantizedRows:
    """What a row kernel gives.

    Attributes:
        values: int8 [M, K].
        scale: fp32 [M]; the given one where it is static, and fp32 [] where it is of the tensor.
        zero: int32 [M] with asymmetric scales, else None.
        total: x + residual, rounded to x's type, where there is a residual, else None.
        rounded: the rows in x's type where that was asked for, else None.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor | None = None
    total: Tensor | None = None
    rounded: Tensor | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class RowKernel:
    """A row of the table of row kernels.

    Attributes:
        name: unique in the table.
        backend: the family it belongs to.
        kinds, scales: those of `KINDS` and `SCALES` that it makes.
        rounds: whether it gives rounded rows too.
        where: the reason why it does not run on a problem's device, or None.
        run: (problem, inputs) -> quantized rows.
    """

    name: str
    backend: str
    kinds: tuple[str, ...] = KINDS
    scales: tuple[str, ...] = SCALES
    rounds: bool = True
    where: Callable[[RowProblem], str | None] = lambda problem: None
    run: Callable[[RowProblem, RowInputs], QuantizedRows]

    def refusal(self, problem: RowProblem) -> str | None:
        """Why this kernel cannot run `problem`, or None."""
        for what, has, wanted in (
            ("makes rows of", self.kinds, problem.kind),
            ("has scales of", self.scales, problem.scale_of),
        ):
            if wanted not in has:
                return f"{what} {', '.join(has)}, not of {wanted}"
        if problem.rounds and not self.rounds:
            return "gives no rounded rows"
        return self.where(problem)


def adjacent(x: Tensor) -> Tensor:
    """x [M, K] with adjacent columns, as compiled kernels take it."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()
