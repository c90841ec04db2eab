"""HQQ: zero points, and then scales, that leave few large errors; no calibration.

    min over z of  |W - s (round(W / s + z) - z)|_p^p,   p < 1

by half-quadratic splitting: E takes the large errors, z fits what is left (Badri & Shaji 2023,
Half-Quadratic Quantization of Large Machine Learning Models):

    E <- sign(R) max(|R| - p |R|^(p-1) / beta, 0),     R = W - s (Q - z)
    z <- mean over the group of  Q - (W - E) / s,      beta <- kappa beta

What it is searched for is not what a product loses, so a group keeps the zero point of its range
where that leaves less squared error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qkernels import rounding
from qkernels.quantizers import grids
from qkernels.quantizers.method import LayerTask, Method
from qkernels.scheme import QuantScheme
from qkernels.weight import WeightParameters, row_slices


@dataclass(frozen=True)
class HqqParameters:
    """Attributes:
    zeros: "real" numbers, as in HQQ's own format, or "integer", which every format holds.
    p: of the norm.
    beta: the first weight of the split, and `kappa` what it grows by with each step.
    steps: at most; a group that stops getting better stays as it was.
    """

    zeros: Literal["real", "integer"] = "integer"
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


_NARROWER = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Parts of a group's range that its scale is tried at: HQQ itself keeps the whole."""


def _quantize(task: LayerTask, parameters: HqqParameters) -> WeightParameters:
    fitted = rounding.fit(task.weight, task.scheme, activation_scale=task.activation_scale)
    real = parameters.zeros == "real"
    scales, zeros = fitted.scales.clone(), fitted.zeros
    assert zeros is not None
    zeros = zeros.to(scales.dtype) if real else zeros.clone()
    length = task.scheme.group_length(fitted.k)
    for group in range(task.scheme.groups(fitted.k)):
        columns = slice(group * length, min((group + 1) * length, fitted.k))
        for start, stop in row_slices(fitted.n, length):
            part = slice(start, stop)
            rows = task.weight[part, columns].float()
            scales[part, group], found = _fit_group(
                rows, scales[part, group], zeros[part, group].float(), task.scheme, parameters
            )
            zeros[part, group] = found.to(zeros.dtype)
    fields = {**fitted.fields, "scales": scales, "zeros": zeros}
    return WeightParameters(scheme=task.scheme, n=fitted.n, k=fitted.k, **fields)


def _fit_group(
    rows: Tensor, first: Tensor, zero: Tensor, scheme: QuantScheme, parameters: HqqParameters
) -> tuple[Tensor, Tensor]:
    """Scales, in their type, and zero points, fp32, of rows [R, L]: the best that were seen."""
    largest = (1 << scheme.bits) - 1

    def stored(zero: Tensor) -> Tensor:
        if parameters.zeros == "real":
            return zero.to(first.dtype).float()
        return zero.round().clamp_(0, largest)

    best_scale, best_zero = first.clone(), zero
    least = grids.error_of(rows, first.float(), zero, scheme).square().sum(dim=1)
    for factor in _NARROWER:
        scale = (first.float() * factor).to(first.dtype)
        for candidate in _half_quadratic(rows, scale.float(), zero, scheme, parameters):
            kept = stored(candidate)
            found = grids.error_of(rows, scale.float(), kept, scheme).square().sum(dim=1)
            better = found < least
            least = torch.where(better, found, least)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, kept, best_zero)
    return best_scale, best_zero


def _half_quadratic(
    rows: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme, parameters: HqqParameters
) -> list[Tensor]:
    """Zero points [R] that the splitting ends at: as they are, and of the least p-norm."""
    p, beta = parameters.p, parameters.beta
    best, least = zero, torch.full_like(scale, torch.inf)
    for _ in range(parameters.steps):
        values = grids.encode(rows, scale, zero, scheme)
        residual = rows - values * scale[:, None]
        found = residual.abs().mean(dim=1)
        better = found < least
        if not better.any():
            break
        best, least = torch.where(better, zero, best), torch.where(better, found, least)
        large = residual.abs()
        large = (large - p * large.clamp(min=1e-9).pow(p - 1) / beta).clamp_(min=0)
        kept = rows - large.mul_(residual.sign())
        codes = values + zero[:, None]
        zero = (codes - kept / scale[:, None]).mean(dim=1)
        beta *= parameters.kappa
    return [zero, best]


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
    quantize=_quantize,
    why_not=_why_not,
)
