"""Codes of one column of a weight after the other, all rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import rounding
from qkernels.weight import QuantizedWeight, WeightParameters, code_values

BLOCK = 128
"""Columns whose errors are carried over to all others in one product."""


class Columns:
    """Rounds columns of a weight to nearest under its parameters."""

    def __init__(self, parameters: WeightParameters) -> None:
        self._scheme, n = parameters.scheme, parameters.n
        self._scales = parameters.group_scales().t().contiguous()
        zeros = parameters.group_zeros()
        self._zeros = None if zeros is None else zeros.t().contiguous()
        self._limits = [limit.t().contiguous() for limit in rounding.code_limits(parameters, 0, n)]

    def take_group(self, group: int, part: WeightParameters) -> None:
        """Gives a group the scales and zero points of `part`, a weight of these columns alone."""
        self._scales[group] = part.group_scales()[:, 0]
        zeros = part.group_zeros()
        if self._zeros is not None and zeros is not None:
            self._zeros[group] = zeros[:, 0]

    def nearest(self, column: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Codes uint8 [N] and the values that they stand for, fp32 [N]."""
        scheme, scale = self._scheme, self._scales[group]
        scaled = column / rounding.nonzero(scale)
        if scheme.weight.kind != "linear":
            codes = rounding.nearest_codes(scaled, scheme)
            return codes, code_values(scheme, codes) * scale
        zero = scheme.implied_zero if self._zeros is None else self._zeros[group]
        low, high = (limit[group] for limit in self._limits)
        rounded = scaled.add_(zero).round_().clamp_(low, high)
        return rounded.to(torch.uint8), (rounded - zero) * scale


def descend(made: QuantizedWeight, weight: Tensor, gram: Tensor) -> QuantizedWeight:
    """The weight with each code in turn the one that leaves the least error beside all others.

    One sweep of coordinate descent on tr(E H E^T), E = weight - made, which never rises.

    Args:
        weight: fp32 [N, K] and `gram`, H, fp32 [K, K], both in the order of the codes.
    """
    length = made.scheme.group_length(made.k)
    columns = Columns(made.parameters)
    values = made.dequantize_rows(made.codes, 0).t().contiguous()
    codes = made.codes.t().contiguous()
    # How the error changes with each value, [K, N].
    slope = gram @ (weight.t() - values)
    diagonal = gram.diagonal().tolist()
    for start in range(0, made.k, BLOCK):
        stop = min(made.k, start + BLOCK)
        near, block = slope[start:stop], gram[start:stop, start:stop]
        moved = torch.empty_like(near)
        for j in range(start, stop):
            wanted = near[j - start] / diagonal[j] + values[j]
            codes[j], found = columns.nearest(wanted, j // length)
            moved[j - start] = step = found - values[j]
            near[j - start + 1 :].addr_(block[j - start, j - start + 1 :], step, alpha=-1)
        slope[stop:].addmm_(gram[stop:, start:stop], moved, alpha=-1)
    return made.replace(codes=codes.t().contiguous())
