"""AutoRound: rounding and clipping learned by signed gradient descent, a block at a time.

Each weight may be rounded to either side: V, in [-1/2, 1/2], is added before it is rounded. Each
group has two factors, for the ends of its range. With lo = z0 s0 and hi = (2^b - 1 - z0) s0, of the
scale and zero point that it begins with,

    s = (alpha lo + beta hi) / (2^b - 1),   z = round(alpha lo / s),   symmetric: s = beta s0
    q = clamp(round(w / s + V) + z, 0, 2^b - 1),    W' = s (q - z)

Gradients pass rounding as if it were not there. What is made small is the squared difference
between the block's output with W', on what quantized blocks give it, and its output in the model
before quantization; every step moves V, alpha and beta by the learning rate, against the signs of
their gradients (Cheng et al. 2023, SignRound, which is AutoRound's method).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels import rounding
from qkernels.calibration.statistics import Needs
from qkernels.modules.fake_quant import rounded_input
from qkernels.quantizers import grids
from qkernels.quantizers.descent import Descent
from qkernels.quantizers.hessian import gram_of
from qkernels.quantizers.method import BlockTask, LayerTask, Method
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight, WeightParameters


@dataclass(frozen=True)
class AutoRoundParameters:
    """Attributes:
    steps: of gradient descent.
    batch: sequences of a step.
    lr: how far the first step moves, in parts of a code and of a range; it falls linearly to 0.
        0 is 1 / steps.
    minmax: learn the ranges too; of scales of a whole weight, or such that are quantized
        themselves, they stay.
    grid: what scales begin with; see `grids.Grid`.
    """

    steps: int = 200
    batch: int = 4
    lr: float = 0.0
    minmax: bool = True
    grid: grids.Grid = "hessian"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(
                f"steps and batch must be 1 or more, got {self.steps} and {self.batch}"
            )
        if not 0 <= self.lr <= 1:
            raise ValueError(f"lr must be in [0, 1], got {self.lr:g}")


def _statistics(scheme: QuantScheme, parameters: AutoRoundParameters) -> Needs:
    # Some statistic of dense inputs, so that the dense model runs beside.
    gram = ("gram",) if grids.asks_for_inputs(parameters.grid) else ()
    return Needs(quantized=gram, dense=("rows",))


def _why_not(scheme: QuantScheme, parameters: AutoRoundParameters) -> str | None:
    if scheme.weight.kind != "linear":
        return "it learns which of two neighbouring integers a weight becomes: use gptq"
    if scheme.scale_levels == "blocks":
        return "it learns beside integer zero points, and those of -spqr are none: use gptq or spqr"
    return None


class LearnedRounding:
    """The weight of a layer under V, alpha and beta.

    Attributes:
        learned: V fp32 [N, G, L], with K filled up to whole groups, then alpha and beta, fp32
            [N, G, 1]; of symmetric weights beta alone, and V alone where ranges stay.
    """

    def __init__(
        self,
        weight: Tensor,
        parameters: WeightParameters,
        minmax: bool,
        input_zero: int | Tensor | None = None,
    ) -> None:
        self.parameters, self._input_zero = parameters, input_zero
        self._k = parameters.k
        scheme = parameters.scheme
        length = scheme.group_length(self._k)
        padded = F.pad(weight.float(), (0, -self._k % length))
        self._weight = padded.unflatten(1, (-1, length))
        self._scale = parameters.group_scales()[:, :, None]
        zeros = parameters.group_zeros()
        self._zero = None if zeros is None else zeros[:, :, None]
        low, high = rounding.code_limits(parameters, 0, parameters.n)
        self._limits = low[:, :, None], high[:, :, None]
        self._largest = float((1 << scheme.bits) - 1)
        self.learned = [torch.zeros_like(self._weight)]
        if minmax and grids.why_not_by_group(scheme) is None:
            ends = 1 if self._zero is None else 2
            self.learned += [torch.ones_like(self._scale) for _ in range(ends)]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W' [N, K]."""
        scale, zero = self._grid()
        codes = self._nearest(scale, zero)
        codes.clamp_(*self._limits).sub_(zero).mul_(scale)
        return self._columns(codes).to(dtype)

    def step(self, gradient: Tensor, rate: float) -> None:
        """Moves what is learned by `rate`.

        Args:
            gradient: of the loss with respect to W', [N, K].
        """
        gradient = F.pad(gradient.float(), (0, -self._k % self._weight.shape[2]))
        gradient = gradient.view_as(self._weight)
        scale, zero = self._grid()
        rounded = self._nearest(scale, zero)
        codes = rounded.clamp(*self._limits)
        # Where a code is clamped, W' depends on the scale and the zero point alone.
        free = gradient * (rounded == codes)
        if len(self.learned) > 1:
            by_scale = (gradient * codes.sub_(zero)).sum(dim=2, keepdim=True)
            by_scale -= (free * self._weight).sum(dim=2, keepdim=True) / rounding.nonzero(scale)
            by_zero = (free - gradient).sum(dim=2, keepdim=True) * scale
            for factor, moved in zip(
                self.learned[1:], self._by_ends(scale, by_scale, by_zero), strict=True
            ):
                factor.sub_(moved.sign_(), alpha=rate).clamp_(0, 1)
        self.learned[0].sub_(free.sign_(), alpha=rate).clamp_(-0.5, 0.5)

    def rounded_input(self, x: Tensor) -> Tensor:
        own = self.parameters
        return rounded_input(x, own.scheme, own.activation_scale, self._input_zero)

    def quantized(self) -> QuantizedWeight:
        """What W' is stored as."""
        scale, zero = self._grid()
        codes = self._nearest(scale, zero).clamp_(*self._limits)
        fields = dict(self.parameters.fields)
        if len(self.learned) > 1:
            fields["scales"] = scale.squeeze(2).to(fields["scales"].dtype)
            if self._zero is not None:
                fields["zeros"] = zero.squeeze(2).to(fields["zeros"].dtype)
        return QuantizedWeight(
            scheme=self.parameters.scheme, codes=self._columns(codes).to(torch.uint8), **fields
        )

    def _columns(self, grouped: Tensor) -> Tensor:
        return grouped.flatten(1)[:, : self._k].contiguous()

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Scales as their type holds them, and zero points: fp32 [N, G, 1]."""
        if len(self.learned) == 1:
            scale = self._scale
        elif self._zero is None:
            scale = self._stored(self._scale * self.learned[1])
        else:
            low, high = self._ends()
            low, high = low * self.learned[1], high * self.learned[2]
            scale = self._stored((low + high) / self._largest)
            return scale, (low / scale).round_().clamp_(0, self._largest)
        zero = self._zero
        if zero is None:
            zero = torch.full_like(scale, float(self.parameters.scheme.implied_zero))
        return scale, zero

    def _ends(self) -> tuple[Tensor, Tensor]:
        assert self._zero is not None
        return self._scale * self._zero, self._scale * (self._largest - self._zero)

    def _by_ends(self, scale: Tensor, by_scale: Tensor, by_zero: Tensor) -> list[Tensor]:
        """Gradients of the factors from those of scale and zero point."""
        if self._zero is None:
            return [by_scale]
        low, high = self._ends()
        across = by_zero * low * self.learned[1] / scale.square()
        by_scale = (by_scale - across) / self._largest
        return [low * by_scale + by_zero * low / scale, high * by_scale]

    def _stored(self, scale: Tensor) -> Tensor:
        dtype = self.parameters.scales.dtype
        return scale.to(dtype).clamp_(min=rounding.least_scale(dtype)).float()

    def _nearest(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes before they are clamped, fp32 [N, G, L]."""
        return (self._weight / rounding.nonzero(scale)).add_(self.learned[0]).round_().add_(zero)


def _quantize_block(
    task: BlockTask, layers: Mapping[str, LayerTask], parameters: AutoRoundParameters
) -> dict[str, QuantizedWeight]:
    if not layers:
        return {}
    # Neither what is saved for gradients nor what has them may come from inference mode.
    with torch.inference_mode(False), torch.no_grad():
        rounded = {name: _begin(layer, parameters) for name, layer in layers.items()}
        Descent(task, rounded, parameters).run()
        return {name: own.quantized() for name, own in rounded.items()}


def _begin(task: LayerTask, parameters: AutoRoundParameters) -> LearnedRounding:
    fitted = rounding.fit(task.weight, task.scheme, activation_scale=task.activation_scale)
    gram = None
    if grids.asks_for_inputs(parameters.grid):
        assert task.inputs is not None
        gram = gram_of(task.inputs)
    fitted = grids.search(task.weight, fitted, parameters.grid, gram)
    return LearnedRounding(task.weight, fitted, parameters.minmax, task.input_zero)


AUTOROUND = Method(
    name="autoround",
    title="rounding and clipping learned by signed gradient descent, block by block",
    parameters=AutoRoundParameters,
    statistics=_statistics,
    quantize_block=_quantize_block,
    uses_batches=True,
    most_sequences=lambda parameters: parameters.batch,
    why_not=_why_not,
)
