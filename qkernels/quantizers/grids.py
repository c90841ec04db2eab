"""Scales and zero points of groups, searched for the least error of what is rounded to them.

The range of a group is where the search begins. Narrower ranges clip the largest weights and round
all others finer; beside each the zero points around its own are tried; and from the best of them
the scale moves to the one that its codes fit best, as long as that helps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from qkernels import rounding
from qkernels.scheme import QuantScheme
from qkernels.weight import WeightParameters, code_values, row_slices

Grid = Literal["minmax", "mse", "hessian", "block"]
"""What a group's scale is fitted to: its range; its squared error; the same with each column by its
part of the output error, the diagonal of x^T x; or the error that the group alone makes in the
output, with the whole block of x^T x."""

_NARROWER = tuple(1 - step / 32 for step in range(19))
_ZEROS = (0, -1, 1, -2, 2)
_REFITS = 3

Cost = Callable[[Tensor], Tensor]
"""Errors of a group's weights [R, L] -> the cost of each row, [R]."""


def why_not_searched(scheme: QuantScheme) -> str | None:
    """Why scales of a scheme stay those of ranges, or None."""
    if scheme.per_tensor:
        return "one scale serves the whole weight"
    if scheme.scale_levels != "one":
        return "its scales are quantized themselves"
    return None


def search(
    weight: Tensor, parameters: WeightParameters, grid: Grid, gram: Tensor | None
) -> WeightParameters:
    """The parameters with scales and zero points of the least cost.

    Args:
        weight: [N, K], in the order of the codes.
        parameters: those of ranges, without `perm`.
        gram: x^T x, fp32 [K, K] in the order of the codes, for the costs that depend on it.
    """
    scheme = parameters.scheme
    if grid == "minmax" or why_not_searched(scheme) is not None:
        return parameters
    length = scheme.group_length(parameters.k)
    scales = parameters.scales.clone()
    zeros = None if parameters.zeros is None else parameters.zeros.clone()
    for group in range(scheme.groups(parameters.k)):
        columns = slice(group * length, min((group + 1) * length, parameters.k))
        cost = _cost(grid, None if gram is None else gram[columns, columns])
        for start, stop in row_slices(parameters.n, length):
            rows = weight[start:stop, columns].float()
            first = scales[start:stop, group]
            zero = None if zeros is None else zeros[start:stop, group].float()
            scale, found = _search_group(rows, first, zero, scheme, cost)
            scales[start:stop, group] = scale
            if zeros is not None and found is not None:
                zeros[start:stop, group] = found.to(zeros.dtype)
    fields = {**parameters.fields, "scales": scales}
    if zeros is not None:
        fields["zeros"] = zeros
    return WeightParameters(scheme=scheme, n=parameters.n, k=parameters.k, **fields)


def _cost(grid: Grid, block: Tensor | None) -> Cost:
    if grid == "mse" or block is None:
        return lambda error: error.square().sum(dim=1)
    if grid == "hessian":
        diagonal = block.diagonal().contiguous()
        return lambda error: error.square() @ diagonal
    return lambda error: ((error @ block) * error).sum(dim=1)


def _search_group(
    rows: Tensor, first: Tensor, zero: Tensor | None, scheme: QuantScheme, cost: Cost
) -> tuple[Tensor, Tensor | None]:
    """Scales, in their type, and zero points, fp32, of rows [R, L]."""
    largest = (1 << scheme.bits) - 1
    full = first.float()
    best_scale, best_zero = first.clone(), zero
    least = cost(error_of(rows, full, zero, scheme))
    for factor in _NARROWER:
        scale = (full * factor).to(first.dtype)
        for shift in _ZEROS if zero is not None else (0,):
            moved = None if zero is None else (zero + shift).clamp_(0, largest)
            found = cost(error_of(rows, scale.float(), moved, scheme))
            better = found < least
            least = torch.where(better, found, least)
            best_scale = torch.where(better, scale, best_scale)
            if best_zero is not None and moved is not None:
                best_zero = torch.where(better, moved, best_zero)
    for _ in range(_REFITS):
        codes = encode(rows, best_scale.float(), best_zero, scheme)
        # The scale that these codes fit best under a cost that is a sum over columns; others only
        # take it where it is better.
        top, bottom = _fit(rows, codes, cost)
        scale = torch.where(bottom > 0, top / bottom, best_scale.float()).to(first.dtype)
        found = cost(error_of(rows, scale.float(), best_zero, scheme))
        better = (found < least) & (scale > 0) & scale.isfinite()
        if not better.any():
            break
        least = torch.where(better, found, least)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale, best_zero


def _fit(rows: Tensor, codes: Tensor, cost: Cost) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of the best scale: a cost is a quadratic form."""
    both = cost(rows + codes)
    return (both - cost(rows - codes)) / 4, cost(codes)


def encode(rows: Tensor, scale: Tensor, zero: Tensor | None, scheme: QuantScheme) -> Tensor:
    """What the nearest codes of rows [R, L] stand for in units of their scale: fp32 [R, L].

    Args:
        scale, zero: fp32 [R].
    """
    scaled = rows / rounding.nonzero(scale)[:, None]
    offset = scheme.implied_zero if zero is None else zero[:, None]
    if scheme.weight.kind == "linear":
        # Shortcut past uint8: the values are the codes.
        codes = scaled.add_(offset).round_().clamp_(0, (1 << scheme.bits) - 1)
        return codes.sub_(offset)
    return code_values(scheme, rounding.nearest_codes(scaled, scheme))


def error_of(rows: Tensor, scale: Tensor, zero: Tensor | None, scheme: QuantScheme) -> Tensor:
    """What is wrong with the nearest values of rows [R, L]. Args: as of `encode`."""
    return encode(rows, scale, zero, scheme).mul_(scale[:, None]).sub_(rows)
