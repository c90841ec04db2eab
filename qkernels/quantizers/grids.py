"""Scales and zero points of groups, searched for the least error of what is rounded to them.

The range of a group is where the search begins. Narrower ranges clip the largest weights and round
all others finer; beside each the zero points around its own are tried; and from the best of them
the scale moves to the one that its codes fit best, as long as that helps. Only scales that can be
stored are tried: with two levels those of multiples of the channel's, with double quantization
those of the table, and what the second level has stays that of the ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qkernels import rounding
from qkernels.backends import cpu_calibration
from qkernels.fields import SCALE_BLOCK
from qkernels.quantizers.scale_forms import ScaleForm, Scales, scale_form
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


def asks_for_inputs(grid: Grid) -> bool:
    """Whether it takes x^T x."""
    return grid in ("hessian", "block")


def why_not_by_group(scheme: QuantScheme) -> str | None:
    """Why the scale of a group is not free of those of others, or None."""
    if scheme.per_tensor:
        return "one scale serves the whole weight"
    if scheme.scale_levels != "one":
        return "its scales are quantized themselves"
    return None


def search(
    weight: Tensor, parameters: WeightParameters, grid: Grid, gram: Tensor | None
) -> WeightParameters:
    """The parameters with scales and zero points of the least cost; none has more than before, and
    of scales in blocks no 16 rows together.

    Args:
        weight: [N, K], in the order of the codes.
        parameters: those of ranges, without `perm`.
        gram: x^T x, fp32 [K, K] in the order of the codes, for the costs that depend on it.
    """
    if grid == "minmax":
        return parameters
    if parameters.scheme.scale_levels == "blocks":
        return _in_blocks(weight, parameters, grid, gram)
    if cpu_calibration.searches_scales(weight, parameters, blocks=grid == "block"):
        scales, zeros = cpu_calibration.search_scales(
            weight,
            parameters,
            diagonal=gram.diagonal() if grid == "hessian" and gram is not None else None,
            gram=gram if grid == "block" else None,
        )
    else:
        scales, zeros = _search_all(weight, parameters, grid, gram)
    found = {"scales": scales} if zeros is None else {"scales": scales, "zeros": zeros}
    return parameters.replace(**found)


def _in_blocks(
    weight: Tensor, parameters: WeightParameters, grid: Grid, gram: Tensor | None
) -> WeightParameters:
    """Scales and zero points of 4 bits: steps for those that are found as if they were stored as
    they are, and in these steps the codes of the least cost. 16 rows keep the steps of their
    ranges where that costs less."""
    scheme, (n, k) = parameters.scheme, weight.shape
    apart = search(weight, rounding.fit(weight, replace(scheme, scale_levels="one")), grid, gram)
    fields = rounding.quantize_in_blocks(*_numbers(apart), scheme.scale_dtype)
    found = parameters.replace(**fields)
    length, blocks = scheme.group_length(k), -(-n // SCALE_BLOCK)
    scales, ranges = found.scales.clone(), fields["block_ranges"].clone()
    begun = _numbers(parameters), _numbers(found)
    owners = torch.arange(n, device=weight.device) // SCALE_BLOCK
    for group in range(scheme.groups(k)):
        columns = slice(group * length, min((group + 1) * length, k))
        cost = _cost(grid, None if gram is None else gram[columns, columns])
        rows = weight[:, columns].float()
        (first, first_zeros), (begin, begin_zeros) = begun
        before = cost(error_of(rows, first[:, group], first_zeros[:, group], scheme))
        codes, own = _codes_in_blocks(
            rows, found, group, (begin[:, group], begin_zeros[:, group]), cost
        )
        sums = torch.zeros(2, blocks, dtype=torch.float64, device=weight.device)
        sums.index_add_(1, owners, torch.stack([before, own]).double())
        better = sums[1] < sums[0]
        old = parameters.block_ranges
        assert old is not None
        ranges[:, group] = torch.where(better[:, None], ranges[:, group], old[:, group])
        scales[:, group] = torch.where(better[owners], codes, parameters.scales[:, group])
    return parameters.replace(scales=scales, block_ranges=ranges)


def _numbers(parameters: WeightParameters) -> tuple[Tensor, Tensor]:
    """Scales and zero points, fp32 [N, G], of a weight that has both."""
    zeros = parameters.group_zeros()
    assert zeros is not None
    return parameters.group_scales(), zeros


def _codes_in_blocks(
    rows: Tensor,
    parameters: WeightParameters,
    group: int,
    begin: tuple[Tensor, Tensor],
    measure: Cost,
) -> tuple[Tensor, Tensor]:
    """The codes of scale and zero point, uint8 [N], of the least cost in given steps, and what they
    cost, fp32 [N]: every scale, and for each the zero points beside the one that leaves the middle
    of the range where it is.

    Args:
        begin: scales and zero points, fp32 [N], of the present codes.
    """
    scheme, ranges = parameters.scheme, parameters.block_ranges
    assert ranges is not None
    owners = torch.arange(len(rows), device=rows.device) // SCALE_BLOCK
    step, least, zero_step, least_zero = ranges[owners, group].float().unbind(dim=1)
    middle = ((1 << scheme.bits) - 1) / 2
    (scale, zero), best = begin, parameters.scales[:, group]
    lowest = measure(error_of(rows, scale, zero, scheme))
    centre = (middle - zero) * scale
    for code in range(16):
        tried = step * code + least
        wanted = middle - centre / rounding.nonzero(tried)
        nearest = ((wanted - least_zero) / rounding.nonzero(zero_step)).round_()
        for shift in (0, -1, 1):
            zero_code = (nearest + shift).clamp_(0, 15)
            cost = measure(error_of(rows, tried, zero_code * zero_step + least_zero, scheme))
            better = (cost < lowest) & (tried > 0)
            lowest = torch.where(better, cost, lowest)
            best = torch.where(better, code + 16 * zero_code.to(torch.uint8), best)
    return best, lowest


def _search_all(
    weight: Tensor, parameters: WeightParameters, grid: Grid, gram: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The scales and zero points that `search` finds, of any scheme on any device."""
    scheme = parameters.scheme
    scales = parameters.scales.clone()
    zeros = None if parameters.zeros is None else parameters.zeros.clone()
    for owner in _owners(weight, parameters, grid, gram):
        before = Scales(scales[owner.place], owner.first)
        zero = None if zeros is None else zeros[owner.place].float()
        found, moved = _search(owner, before, zero, scheme)
        scales[owner.place] = found.stored
        if zeros is not None and moved is not None:
            zeros[owner.place] = moved.to(zeros.dtype)
    return scales, zeros


@dataclass(frozen=True)
class _Rows:
    """Rows [R, L] of one group, each with its own scale.

    Attributes:
        place: where the scales are in their field.
        first: those of ranges, fp32 [R].
    """

    place: tuple[slice, int]
    first: Tensor
    form: ScaleForm
    rows: Tensor
    measure: Cost

    def cost(self, scales: Scales, zero: Tensor | None) -> Tensor:
        """What rounding under these scales costs, [R]. Args: zero: fp32 [R]."""
        return self.measure(self._values(scales, zero).mul_(scales.values[:, None]).sub_(self.rows))

    def fit(self, scales: Scales, zero: Tensor | None) -> tuple[Tensor, Tensor]:
        """Numerator and denominator, [R], of the scale that the codes fit best: a cost is a
        quadratic form."""
        codes = self._values(scales, zero)
        both = self.measure(self.rows + codes)
        return (both - self.measure(self.rows - codes)) / 4, self.measure(codes)

    def _values(self, scales: Scales, zero: Tensor | None) -> Tensor:
        limits = self.form.limits(scales, zero)
        return encode(self.rows, scales.values, zero, self.form.scheme, limits)


@dataclass(frozen=True)
class _Whole:
    """A weight [N, K] with one scale, taken in slices of rows. Otherwise as `_Rows`, with R = 1."""

    place: tuple[slice, int]
    first: Tensor
    form: ScaleForm
    weight: Tensor
    measure: Cost

    def cost(self, scales: Scales, zero: Tensor | None) -> Tensor:
        return self._sum(lambda part, s, z: part.cost(s, z)[None], scales, zero)[0]

    def fit(self, scales: Scales, zero: Tensor | None) -> tuple[Tensor, Tensor]:
        top, bottom = self._sum(lambda part, s, z: torch.stack(part.fit(s, z)), scales, zero)
        return top, bottom

    def _sum(
        self,
        look: Callable[[_Rows, Scales, Tensor | None], Tensor],
        scales: Scales,
        zero: Tensor | None,
    ) -> Tensor:
        """The sum over all rows, [.., 1], of what `look` says of each, [.., R]."""
        total: Tensor | float = 0.0
        for start, stop in row_slices(*self.weight.shape):
            count = stop - start
            rows = self.weight[start:stop].float()
            part = _Rows(self.place, self.first, self.form, rows, self.measure)
            each = Scales(scales.stored.expand(count), scales.values.expand(count))
            seen = look(part, each, None if zero is None else zero.expand(count))
            total = total + seen.double().sum(dim=-1, keepdim=True)
        assert isinstance(total, Tensor)
        return total


_Owner = _Rows | _Whole
"""Weights whose scales are searched together."""


def _owners(
    weight: Tensor, parameters: WeightParameters, grid: Grid, gram: Tensor | None
) -> Iterator[_Owner]:
    scheme, (n, k) = parameters.scheme, weight.shape
    if scheme.per_tensor:
        form, first = scale_form(parameters, 0, 1, 0), parameters.group_scales(0, 1)[:, 0]
        yield _Whole((slice(0, 1), 0), first, form, weight, _cost(grid, gram))
        return
    length = scheme.group_length(k)
    for group in range(scheme.groups(k)):
        columns = slice(group * length, min((group + 1) * length, k))
        cost = _cost(grid, None if gram is None else gram[columns, columns])
        for start, stop in row_slices(n, length):
            rows = weight[start:stop, columns].float()
            first = parameters.group_scales(start, stop)[:, group]
            form = scale_form(parameters, start, stop, group)
            yield _Rows((slice(start, stop), group), first, form, rows, cost)


def _cost(grid: Grid, block: Tensor | None) -> Cost:
    if grid == "mse" or block is None:
        return lambda error: error.square().sum(dim=1)
    if grid == "hessian":
        diagonal = block.diagonal().contiguous()
        return lambda error: error.square() @ diagonal
    return lambda error: ((error @ block) * error).sum(dim=1)


def _search(
    owner: _Owner, first: Scales, zero: Tensor | None, scheme: QuantScheme
) -> tuple[Scales, Tensor | None]:
    """The scales and zero points, fp32 [R], of the least cost."""
    largest = (1 << scheme.bits) - 1
    best, best_zero, least = first, zero, owner.cost(first, zero)
    for factor in _NARROWER:
        scales = owner.form.nearest(first.values * factor)
        for shift in _ZEROS if zero is not None else (0,):
            moved = None if zero is None else (zero + shift).clamp_(0, largest)
            found = owner.cost(scales, moved)
            better = found < least
            least = torch.where(better, found, least)
            best = scales.where(better, best)
            if best_zero is not None and moved is not None:
                best_zero = torch.where(better, moved, best_zero)
    for _ in range(_REFITS):
        top, bottom = owner.fit(best, best_zero)
        fitting = (top > 0) & (bottom > 0) & (top / bottom).isfinite()
        scales = owner.form.nearest(
            torch.where(fitting, top / bottom, best.values.double()).float()
        )
        found = owner.cost(scales, best_zero)
        better = (found < least) & scales.values.isfinite()
        if not better.any():
            break
        least = torch.where(better, found, least)
        best = scales.where(better, best)
    return best, best_zero


def encode(
    rows: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scheme: QuantScheme,
    limits: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """What the nearest codes of rows [R, L] stand for in units of their scale: fp32 [R, L].

    Args:
        scale, zero: fp32 [R].
        limits: the least and the largest code of linear weights, fp32 [R], where not all are taken.
    """
    scaled = rows / rounding.nonzero(scale)[:, None]
    if scheme.weight.kind == "linear":
        # Shortcut past uint8: the values are the codes.
        offset = scheme.implied_zero if zero is None else zero[:, None]
        codes = scaled.add_(offset).round_()
        if limits is None:
            codes.clamp_(0, (1 << scheme.bits) - 1)
        else:
            codes.clamp_(limits[0][:, None], limits[1][:, None])
        return codes.sub_(offset)
    return code_values(scheme, rounding.nearest_codes(scaled, scheme))


def error_of(rows: Tensor, scale: Tensor, zero: Tensor | None, scheme: QuantScheme) -> Tensor:
    """What is wrong with the nearest values of rows [R, L]. Args: scale, zero: fp32 [R]."""
    return encode(rows, scale, zero, scheme).mul_(scale[:, None]).sub_(rows)
