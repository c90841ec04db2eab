"""Kernels that quantize rows of x to 8 bits: the question put to one, the row that answers it, and
who is asked for a scheme's x."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qkernels import reference
from qkernels.layouts import PackedWeight

KINDS = ("plain", "rms_norm", "silu_mul", "layer_norm", "gelu_mul", "gelu_tanh_mul")
"""What is quantized: x; x (+ residual) over its root mean square, times a gain; silu(x) * up;
x (+ residual) without its mean, over its standard deviation, times a gain, and a bias;
gelu(x) * up, of the error function or of tanh."""

SCALES = ("token", "asymmetric", "static", "tensor")
"""A scale for each row, the same with a zero point, one that is given for all, or one that is found
for all."""

CODES = (torch.int8, torch.float8_e4m3fn)
"""What numbers become: integers of -127..127, or of -128..127 with a zero point; or E4M3."""


@dataclass(frozen=True)
class RowProblem:
    """Everything that the choice of a row kernel may depend on.

    Attributes:
        kind: one of `KINDS`.
        scale_of: one of `SCALES`.
        device: "cpu" or "cuda".
        rounds: whether the rows, but plain ones, are rounded to x's type, quantized as rounded, and
            given too.
        codes: what they become, one of `CODES`; with zero points int8.
        capability: compute capability of the GPU, None on a CPU.
    """

    kind: str
    scale_of: str
    x_dtype: torch.dtype
    device: str
    rounds: bool = False
    codes: torch.dtype = torch.int8
    capability: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        assert self.scale_of != "asymmetric" or self.codes is torch.int8, self


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
        values: [M, K] of the problem's codes.
        scale: fp32 [M]; where it is static the given one, and NaN for rows with NaN or infinity;
            fp32 [] where it is of the tensor.
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
        kinds, scales, codes: those of `KINDS`, `SCALES` and `CODES` that it makes.
        rounds: whether it gives rounded rows too.
        where: the reason why it does not run on a problem's device, or None.
        run: (problem, inputs) -> quantized rows.
    """

    name: str
    backend: str
    kinds: tuple[str, ...] = KINDS
    scales: tuple[str, ...] = SCALES
    codes: tuple[torch.dtype, ...] = (torch.int8,)
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
        if problem.codes not in self.codes:
            return f"gives {', '.join(map(str, self.codes))}, not {problem.codes}"
        if problem.rounds and not self.rounds:
            return "gives no rounded rows"
        return self.where(problem)


ROW_KERNELS: list[RowKernel] = []
"""In order of priority; the reference refuses nothing. `qkernels.select`, which knows all backends,
fills it."""


@lru_cache(maxsize=256)
def select_rows(problem: RowProblem) -> RowKernel:
    """The first row kernel, in order, that can run `problem`."""
    return next(kernel for kernel in ROW_KERNELS if kernel.refusal(problem) is None)


def make_row_problem(
    kind: str, scale_of: str, x: Tensor, rounds: bool = False, codes: torch.dtype = torch.int8
) -> RowProblem:
    """A `RowProblem` of x, for the GPU that it is on."""
    device = x.device
    return RowProblem(kind, scale_of, x.dtype, device.type, rounds, codes, capability(device))


@lru_cache(maxsize=64)
def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU, None of a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def quantize_activations(x: Tensor, packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """`reference.quantize_activations` by the row kernel that is chosen; 4 bits and scales per
    position are the reference's own.

    Returns q [M, K] and the scale of each row, fp32 [M].
    """
    activation = packed.scheme.activation
    if activation.bits < 8 or activation.by_position:
        return reference.quantize_activations(x, packed)
    codes, scale_of = activation.torch_dtype, activation.granularity
    problem = make_row_problem("plain", scale_of, x, codes=codes)
    given = packed.buffers["activation_scale"] if scale_of == "static" else None
    rows = select_rows(problem).run(problem, RowInputs(x=x, scale=given))
    return rows.values, rows.scale.expand(x.shape[0]).contiguous()


def adjacent(x: Tensor) -> Tensor:
    """x [M, K] with adjacent columns, as compiled kernels take it."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()
