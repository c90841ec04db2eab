"""Kernels that quantize rows of x to int8: the question put to one, and the row that answers it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("plain", "rms_norm", "silu_mul")
"""What is quantized: x; x (+ residual) over its root mean square, times a gain; silu(x) * up."""

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
        capability: compute capability of the GPU, None on a CPU.
    """

    kind: str
    scale_of: str
    x_dtype: torch.dtype
    device: str
    capability: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class RowInputs:
    """What a row kernel reads.

    Attributes:
        x: [M, K] of fp16, bf16 or fp32.
        other: [M, K] of x's type: the residual, or what the gate multiplies; or None.
        gain: [K] or None.
        epsilon: of the root mean square.
        scale: fp32 [] where it is given, else None.
    """

    x: Tensor
    other: Tensor | None = None
    gain: Tensor | None = None
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
    """

    values: Tensor
    scale: Tensor
    zero: Tensor | None = None
    total: Tensor | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class RowKernel:
    """A row of the table of row kernels.

    Attributes:
        name: unique in the table.
        backend: the family it belongs to.
        kinds, scales: those of `KINDS` and `SCALES` that it makes.
        where: the reason why it does not run on a problem's device, or None.
        run: (problem, inputs) -> quantized rows.
    """

    name: str
    backend: str
    kinds: tuple[str, ...] = KINDS
    scales: tuple[str, ...] = SCALES
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
        return self.where(problem)


def adjacent(x: Tensor) -> Tensor:
    """x [M, K] with adjacent columns, as compiled kernels take it."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()
