"""Where to cut a range off, from a histogram: by KL divergence, or by the squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.calibration.histogram import Histogram
from qkernels.calibration.ranges import Numbers, scale_and_zero

UNIFORM_BINS = 2048
"""Bins from 0 to the power of two above the largest magnitude (TensorRT)."""

_COARSE = tuple(2.0 ** (-step / 4) for step in range(41))
_FINE, _FINEST = (
    tuple(2.0 ** (step / parts) for step in (-3, -2, -1, 1, 2, 3)) for parts in (16, 64)
)
"""Ranges down to 2^-10 of the whole are tried, and then twice those beside the best: near the
least, the error changes with the square of the distance from it, but beyond the largest value in
proportion, where steps of 4% left 2% more than there had to be."""

_NO_WIDTH = 2.0**-200
"""Of bins below the least number of fp32, which hold nothing."""

_ROUNDS = 2
"""Times that each end of an asymmetric range is searched, the other one held."""


def uniform(counts: Tensor, edges: Tensor) -> Tensor:
    """int64 [UNIFORM_BINS] over [0, top), top the last edge, of bins that nest in these.

    Args:
        counts: int64 [B].
        edges: fp64 [B + 1], from 0 up.
    """
    places = (edges[:-1] / edges[-1] * UNIFORM_BINS).long()
    return counts.new_zeros(UNIFORM_BINS).index_add_(0, places, counts)


def kl_threshold(counts: Tensor, levels: int) -> float:
    """The threshold, in bins, whose clipped values lose the least information.

    For i bins from `levels` on: P is their counts with those of all bins above in the last;
    Q their counts alone in `levels` equal parts, each part spread evenly over its bins that are not
    empty in P. The i with the least sum(P log(P / Q)), both scaled to sum 1, gives i + 1/2 (Migacz
    2017, 8-bit inference with TensorRT). Where a last part is empty but for what is clipped, the
    sum would be infinite, however little that is: the part counts as one value.

    Args:
        counts: int64 [UNIFORM_BINS], of magnitudes, not all 0.
    """
    values = counts.double()
    used = int(counts.nonzero().max()) + 1
    if used <= levels:
        return used + 0.5
    candidates = torch.arange(levels, used + 1, device=counts.device)
    # Sums over bins [0, i) of each i.
    below, filled, entropy = (
        torch.cat((values.new_zeros(1), part.cumsum(0)))
        for part in (values, (values > 0).double(), _x_log_x(values))
    )
    total, inside = below[-1], below[candidates]
    clipped, last = total - inside, values[candidates - 1]
    # P log P, with what is clipped in the last bin.
    own = entropy[candidates] - _x_log_x(last) + _x_log_x(last + clipped)
    parts = torch.arange(levels + 1, device=counts.device)
    # Bin j is in part floor(j levels / i), so part k begins at ceil(k i / levels).
    starts = (parts * candidates[:, None] + levels - 1) // levels
    sums, bins = below[starts].diff(dim=1), filled[starts].diff(dim=1)
    bins[:, -1] += (last == 0) & (clipped > 0)
    lone = ((sums[:, -1] == 0) & (clipped > 0)).double()
    sums[:, -1] += lone
    means = torch.where(sums > 0, sums / bins.clamp(min=1), 1.0)
    sums[:, -1] += clipped - lone
    crossed = (sums * means.log()).sum(dim=1)
    divergence = (own - crossed) / total - total.log() + (inside + lone).log()
    # Scaled to sum 1, the lone value would be all of Q, and of P.
    divergence[inside == 0] = torch.inf
    return float(candidates[divergence.argmin()]) + 0.5


def _x_log_x(x: Tensor) -> Tensor:
    return torch.special.xlogy(x, x)


def least_error(
    histogram: Histogram, low: Tensor, high: Tensor, numbers: Numbers
) -> tuple[Tensor, Tensor]:
    """The part of the ranges [low, high], fp32 [C], with the least squared error when rounded.

    Symmetric ranges shrink as a whole. The ends of the others are searched in turn.
    """
    best = _Best(histogram, numbers, low, high)
    if numbers.symmetric:
        best.search(ends=(True, True))
        return best.low, best.high
    for _ in range(_ROUNDS):
        best.search(ends=(False, True))
        best.search(ends=(True, False))
    return best.low, best.high


class _Best:
    """The best ranges so far, of C cells."""

    def __init__(self, histogram: Histogram, numbers: Numbers, low: Tensor, high: Tensor) -> None:
        counts, edges = histogram.in_order()
        used = counts.any(dim=0)
        self._counts = counts[:, used].double()
        self._edges = torch.stack((edges[:, :-1][:, used], edges[:, 1:][:, used]))
        self._widths = (self._edges[1] - self._edges[0]).clamp(min=_NO_WIDTH)
        self._numbers, self._whole = numbers, (low, high)
        self.low, self.high = low, high
        self._error = self._error_of(low, high)

    def search(self, ends: tuple[bool, bool]) -> None:
        """Takes the best place of one end, or of both that move alike; [low, high] at most."""
        whole, present = self._whole, (self.low, self.high)
        start = tuple(whole[i] if moves else present[i] for i, moves in enumerate(ends))
        self._try(start, ends, _COARSE)
        for steps in (_FINE, _FINEST):
            self._try((self.low, self.high), ends, steps)

    def _try(
        self, start: tuple[Tensor, ...], ends: tuple[bool, bool], steps: tuple[float, ...]
    ) -> None:
        for step in steps:
            low, high = (
                end * step if moves else end for end, moves in zip(start, ends, strict=True)
            )
            low, high = torch.maximum(low, self._whole[0]), torch.minimum(high, self._whole[1])
            error = self._error_of(low, high)
            better = error < self._error
            self._error = torch.where(better, error, self._error)
            self.low = torch.where(better, low, self.low)
            self.high = torch.where(better, high, self.high)

    def _error_of(self, low: Tensor, high: Tensor) -> Tensor:
        """The sum of squared errors, fp64 [C], of values spread evenly over their bins."""
        scale, zero = (part.double()[:, None] for part in scale_and_zero(low, high, self._numbers))
        edges, least = self._edges / scale, self._numbers.least - zero
        nearest = edges.round().clamp_(min=least, max=self._numbers.most - zero)
        # The integral from 0 of the squared distance to the nearest number.
        integral = (edges - nearest).pow_(3).div_(3).add_(nearest, alpha=1 / 12)
        means = (integral[1] - integral[0]) * scale / self._widths
        return (means * self._counts).sum(dim=1) * scale[:, 0] ** 2
