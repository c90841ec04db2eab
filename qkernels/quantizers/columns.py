"""Codes of one column of a weight after the other, all rows at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qkernels import rounding
from qkernels.backends import cpu_calibration
from qkernels.weight import QuantizedWeight, WeightParameters, code_values

BLOCK = 128
"""Columns whose errors are carried over to all others in one product."""


@dataclass(frozen=True)
class Kept:
    """Numbers of a weight [N, K] that are kept as they are, beside their codes.

    Attributes:
        mask: bool [K, N], which ones.
        beyond: fp32 [K, N], what they are beyond their codes; 0 elsewhere. Written.
    """

    mask: Tensor
    beyond: Tensor

    @staticmethod
    def of(mask: Tensor) -> Kept:
        """Args: mask: bool [N, K]."""
        mask = mask.t().contiguous()
        return Kept(mask, torch.zeros(mask.shape, device=mask.device))

    @property
    def numbers(self) -> Tensor:
        """`beyond` as fp32 [N, K]."""
        return self.beyond.t()


class Columns:
    """Rounds columns of a weight to nearest under its parameters."""

    def __init__(self, parameters: WeightParameters) -> None:
        self._scheme, n = parameters.scheme, parameters.n
        self._length = parameters.scheme.group_length(parameters.k)
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

    def round_block(
        self,
        left: Tensor,
        factors: Tensor,
        order: list[int],
        codes: Tensor,
        values: Tensor | None = None,
        kept: Kept | None = None,
    ) -> Tensor:
        """Rounds columns one after the other, each with what those before it left:

            left[j] -= sum_{i < j} moved[i] factors[i, j]
            moved[j] = (left[j] - nearest(left[j])) / factors[j, j]

        or, where `values` stand there before,

            moved[j] = nearest(left[j] / factors[j, j] + values[j]) - values[j]

        Args:
            left: fp32 [B, N]; may be changed.
            factors: fp32 [B, B]; only the upper triangle counts.
            order: [B], what numbers the columns have among `codes`, uint8 [K, N], written.
            values: fp32 [B, N], with what is kept beyond codes in them.
            kept: by the numbers of `order`; such a number is what it is to be, and leaves nothing.

        Returns:
            `moved`, fp32 [B, N].
        """
        groups = [column // self._length for column in order]
        if self._scheme.weight.kind == "linear" and cpu_calibration.runs_on(left):
            places = torch.tensor(order)
            moved, beyond = cpu_calibration.round_columns(
                left,
                factors,
                values,
                places,
                torch.tensor(groups),
                self._scales,
                float(self._scheme.implied_zero) if self._zeros is None else self._zeros,
                (self._limits[0], self._limits[1]),
                codes,
                None if kept is None else kept.mask[places].float(),
            )
            if kept is not None and beyond is not None:
                kept.beyond[places] = beyond
            return moved
        moved = torch.empty_like(left)
        pivots = factors.diagonal().tolist()
        for j, (column, group, pivot) in enumerate(zip(order, groups, pivots, strict=True)):
            wanted = left[j] if values is None else left[j] / pivot + values[j]
            codes[column], found = self.nearest(wanted, group)
            if kept is not None:
                mask = kept.mask[column]
                kept.beyond[column] = torch.where(mask, wanted - found, 0)
                found = torch.where(mask, wanted, found)
            moved[j] = step = (wanted - found) / pivot if values is None else found - values[j]
            left[j + 1 :].addr_(factors[j, j + 1 :], step, alpha=-1)
        return moved

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


def descend(
    made: QuantizedWeight, weight: Tensor, gram: Tensor, kept: Kept | None = None
) -> QuantizedWeight:
    """The weight with each code in turn the one that leaves the least error beside all others.

    One sweep of coordinate descent on tr(E H E^T), E = weight - made, which never rises.

    Args:
        weight: fp32 [N, K] and `gram`, H, fp32 [K, K], both in the order of the codes.
        kept: what some numbers are beyond their codes, which is chosen anew with these.
    """
    columns = Columns(made.parameters)
    values = made.dequantize_rows(made.codes, 0).t().contiguous()
    if kept is not None:
        values += kept.beyond
    codes = made.codes.t().contiguous()
    # How the error changes with each value, [K, N].
    slope = gram @ (weight.t() - values)
    for start in range(0, made.k, BLOCK):
        stop = min(made.k, start + BLOCK)
        moved = columns.round_block(
            slope[start:stop],
            gram[start:stop, start:stop],
            list(range(start, stop)),
            codes,
            values[start:stop],
            kept,
        )
        slope[stop:].addmm_(gram[stop:, start:stop], moved, alpha=-1)
    return made.replace(codes=codes.t().contiguous())
