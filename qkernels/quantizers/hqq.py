"""HQQ: zero points, and then scales, that leave few large errors; no data.

    min over z of  |W - s (round(W / s + z) - z)|_p^p,   p < 1

by half-quadratic splitting: E takes the large errors, z fits what is left (Badri & Shaji 2023,
Half-Quadratic Quantization of Large Machine Learning Models):

    E <- sign(R) max(|R| - p |R|^(p-1) / beta, 0),     R = W - s (Q - z)
    z <- mean over the group of  Q - (W - E) / s,      beta <- kappa beta

HQQ ends there, and keeps the scale of the range. Here what is best is then looked for nearby: scale
and zero point fitted to the codes together, and both moved by parts of a code. Of all that was met
a group keeps what leaves it the least squared error, its range among them. Each column counts by
its diagonal element of x^T x, in the mean and in the squared error; for that, tokens that are drawn
at random do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qkernels import rounding
from qkernels.calibration.statistics import Needs
from qkernels.quantizers import grids
from qkernels.quantizers.hessian import squares_of
from qkernels.quantizers.method import LayerTask, Method
from qkernels.scheme import QuantScheme
from qkernels.weight import WeightParameters, row_slices


@dataclass(frozen=True)
class HqqParameters:
    """Attributes:
    zeros: "real" numbers, as in HQQ's own format, or "integer", which every format holds.
    grid: what a group's error is: "hessian" with columns weighed by their inputs on the calibration
        batches, else on random tokens, all alike where the model embeds none; or "mse".
    p: of the norm.
    beta: the first weight of the split, and `kappa` what it grows by with each step.
    steps: at most; a group that stops getting better stays as it was.
    """

    zeros: Literal["real", "integer"] = "real"
    grid: Literal["mse", "hessian"] = "hessian"
    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    steps: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"p must be in (0, 1], got {self.p:g}")
        if not (self.beta > 0 and self.kappa >= 1):
            raise ValueError(
                f"beta must be > 0 and kappa >= 1, got {self.beta:g} and {self.kappa:g}"
            )
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, got {self.steps}")


_ROUNDS = 2
"""Of looking nearby; each takes half of the steps of the one before it."""
_LONGER = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)
"""What is tried beside the best scale, in codes that the range takes."""
_REAL = (-0.5, -0.375, -0.25, -0.125, 0.0, 0.125, 0.25, 0.375, 0.5)
_INTEGER = (-1.0, 0.0, 1.0)
"""And beside its zero point, in codes, where those are real and where they are integers."""


def _statistics(scheme: QuantScheme, parameters: HqqParameters) -> Needs:
    return Needs(quantized=("squares",)) if _weighs(parameters) else Needs()


def _weighs(parameters: HqqParameters) -> bool:
    return parameters.grid == "hessian"


def _quantize(task: LayerTask, parameters: HqqParameters) -> WeightParameters:
    fitted = rounding.fit(task.weight, task.scheme, activation_scale=task.activation_scale)
    scales, zeros = fitted.scales.clone(), fitted.zeros
    assert zeros is not None
    zeros = zeros.to(scales.dtype) if parameters.zeros == "real" else zeros.clone()
    importance = torch.ones(fitted.k, device=scales.device)
    if _weighs(parameters) and task.inputs is not None:
        importance = squares_of(task.inputs).to(scales.device)
    length = task.scheme.group_length(fitted.k)
    for group in range(task.scheme.groups(fitted.k)):
        columns = slice(group * length, min((group + 1) * length, fitted.k))
        weights = importance[columns] / importance[columns].sum()
        for start, stop in row_slices(fitted.n, length):
            part = slice(start, stop)
            rows = task.weight[part, columns].float()
            fit = _Group(rows, weights, scales.dtype, task.scheme, parameters)
            scale, zero = fit.best(scales[part, group].float(), zeros[part, group].float())
            scales[part, group], zeros[part, group] = scale, zero
    return fitted.replace(scales=scales, zeros=zeros)


class _Group:
    """Rows [R, L] of one group; scales and zero points are fp32 [R], as they can be stored.

    Args:
        weights: fp32 [L], what columns count; their sum is 1.
        dtype: of scales, and of real zero points.
    """

    def __init__(
        self,
        rows: Tensor,
        weights: Tensor,
        dtype: torch.dtype,
        scheme: QuantScheme,
        parameters: HqqParameters,
    ) -> None:
        self._rows, self._weights, self._dtype = rows, weights, dtype
        self._scheme, self._parameters = scheme, parameters
        self._largest = (1 << scheme.bits) - 1

    def best(self, full: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and the zero point of the least squared error. Args: those of the range."""
        self._scale, self._zero = full, zero
        self._least = self._error(full, zero)
        for candidate in self._half_quadratic(full, zero):
            self._try(full, self._stored(candidate))
        shifts = _REAL if self._parameters.zeros == "real" else _INTEGER
        for step in range(_ROUNDS):
            self._try(*self._fitting())
            best = self._scale, self._zero
            for longer in _LONGER:
                factor = 1 + longer / (self._largest + 1) / 2**step
                scale, centred = self._scaled(*best, factor)
                for shift in shifts:
                    self._try(scale, self._stored(centred + shift / 2**step))
        self._try(*self._fitting())
        return self._scale, self._zero

    def _scaled(self, scale: Tensor, zero: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """A multiple of a scale, and the zero point that leaves the range's middle where it is."""
        middle = self._largest / 2
        return (scale * factor).to(self._dtype).float(), (zero - middle) / factor + middle

    def _try(self, scale: Tensor, zero: Tensor) -> None:
        found = self._error(scale, zero)
        better = (found < self._least) & (scale > 0)
        self._least = torch.where(better, found, self._least)
        self._scale = torch.where(better, scale, self._scale)
        self._zero = torch.where(better, zero, self._zero)

    def _error(self, scale: Tensor, zero: Tensor) -> Tensor:
        return grids.error_of(self._rows, scale, zero, self._scheme).square_() @ self._weights

    def _stored(self, zero: Tensor) -> Tensor:
        if self._parameters.zeros == "real":
            return zero.to(self._dtype).float()
        return zero.round().clamp_(0, self._largest)

    def _fitting(self) -> tuple[Tensor, Tensor]:
        """The scale and the zero point that the present codes fit best, by linear regression."""
        codes = grids.encode(self._rows, self._scale, self._zero, self._scheme)
        codes += self._zero[:, None]
        code, value = codes @ self._weights, self._rows @ self._weights
        codes -= code[:, None]
        scale = (codes * self._rows) @ self._weights / (codes.square() @ self._weights)
        scale = scale.to(self._dtype).float()
        return scale, self._stored(code - value / rounding.nonzero(scale))

    def _half_quadratic(self, scale: Tensor, zero: Tensor) -> list[Tensor]:
        """Zero points that the splitting ends at: as they are, and of the least mean error."""
        p, beta = self._parameters.p, self._parameters.beta
        last, best, least = zero.clone(), zero.clone(), torch.full_like(scale, torch.inf)
        # Those that still get better, and what they are made of.
        active, rows = torch.arange(len(scale), device=scale.device), self._rows
        for _ in range(self._parameters.steps):
            values = grids.encode(rows, scale, zero, self._scheme)
            residual = rows - values * scale[:, None]
            found = residual.abs() @ self._weights
            better = found < least[active]
            if not better.all():
                active, rows, scale, zero = (t[better] for t in (active, rows, scale, zero))
                values, residual, found = values[better], residual[better], found[better]
            if not len(active):
                break
            best[active], least[active] = zero, found
            large = residual.abs()
            large = (large - p * large.clamp(min=1e-9).pow(p - 1) / beta).clamp_(min=0)
            kept = rows - large.mul_(residual.sign())
            codes = values + zero[:, None]
            zero = (codes - kept / rounding.nonzero(scale)[:, None]) @ self._weights
            last[active] = zero
            beta *= self._parameters.kappa
        return [last, best]


def _why_not(scheme: QuantScheme, parameters: HqqParameters) -> str | None:
    if scheme.weight.kind != "linear" or scheme.symmetric:
        return "it searches zero points, and the scheme has none: use rtn(grid=mse)"
    reason = grids.why_not_by_group(scheme)
    if reason is None and parameters.zeros == "real" and scheme.integer_activation:
        return "int8 products take integer zero points: use hqq(zeros=integer)"
    return reason


HQQ = Method(
    name="hqq",
    title="zero points by half-quadratic splitting, without data",
    parameters=HqqParameters,
    statistics=_statistics,
    quantize=_quantize,
    draws_tokens=_weighs,
    real_zeros=lambda parameters: parameters.zeros == "real",
    why_not=_why_not,
)
