"""Observers whose range leaves some values out, by what histograms count: of all values, or of the
largest and the smallest of each token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkernels.calibration.extremes import MinMax
from qkernels.calibration.histogram import Histogram
from qkernels.calibration.ranges import Cells, Numbers
from qkernels.calibration.thresholds import kl_threshold, least_error, uniform


class _Counted(MinMax):
    """A histogram beside the ends, which the range is found in."""

    bits, octaves = 7, 24

    def __init__(self, cells: Cells, parameters: Any = None) -> None:
        super().__init__(cells)
        self.parameters = parameters
        self.histogram = Histogram(self.bits, self.octaves)
        if len(self.low):
            self.histogram.add(0, torch.zeros(len(self.low), 0))

    def take(self, first: int, values: Tensor) -> None:
        super().take(first, values)
        self.histogram.add(first, values)

    def merge(self, other: Any) -> None:
        super().merge(other)
        self.histogram.merge(other.histogram)

    def state_dict(self) -> dict[str, Tensor]:
        return {**super().state_dict(), **self.histogram.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.histogram.load_state_dict(state)

    def range(self, numbers: Numbers) -> tuple[Tensor, Tensor]:
        finite = self.low.isfinite() & self.high.isfinite()
        low, high = (torch.where(finite, end, 0.0) for end in (self.low, self.high))
        found = self.cut(low, high, numbers)
        ends = (
            torch.maximum(found[0].float().clamp(max=0), low),
            torch.minimum(found[1].float().clamp(min=0), high),
        )
        low, high = (torch.where(finite, end, torch.nan) for end in ends)
        return low, high

    def cut(self, low: Tensor, high: Tensor, numbers: Numbers) -> tuple[Tensor, Tensor]:
        """The part of the ranges [low, high], fp32 [C], that is kept; what is beyond does not
        count."""
        raise NotImplementedError


@dataclass(frozen=True)
class PercentileParameters:
    """Attributes:
    percent: of the values that are inside the range, in (0, 100].
    """

    percent: float = 99.99

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise ValueError(f"percent must be in (0, 100], got {self.percent:g}")


class Percentile(_Counted):
    """The range that holds a percentage of all values: of |x| where it is symmetric; else as many
    are left out above as below."""

    def cut(self, low: Tensor, high: Tensor, numbers: Numbers) -> tuple[Tensor, Tensor]:
        inside = self.parameters.percent / 100
        if numbers.symmetric:
            end = _quantile(self.histogram.magnitudes(), self.histogram.edges(), inside)
            return -end, end
        counts, edges = self.histogram.in_order()
        out = (1 - inside) / 2
        return _quantile(counts, edges, out), _quantile(counts, edges, 1 - out)


def _quantile(counts: Tensor, edges: Tensor, part: float) -> Tensor:
    """The value [C] that this part of all is not above, those of a bin spread evenly over it.

    Args:
        counts: int64 [C, B].
        edges: fp64 [C, B + 1].
    """
    below = counts.cumsum(dim=1)
    rank = below[:, -1:].double() * part
    place = torch.searchsorted(below.double(), rank).clamp_(max=counts.shape[1] - 1)
    own = counts.gather(1, place)
    before = below.gather(1, place) - own
    share = ((rank - before) / own.clamp(min=1)).clamp(0, 1)
    start, stop = edges.gather(1, place), edges.gather(1, place + 1)
    return (start + share * (stop - start)).squeeze(1)


class KL(_Counted):
    """The range whose clipped and rounded values lose the least information (TensorRT): both ends
    are limited to one threshold of |x|."""

    # So that 2048 equal bins below the power of two above the largest are whole bins of it.
    bits, octaves = 10, 11

    def cut(self, low: Tensor, high: Tensor, numbers: Numbers) -> tuple[Tensor, Tensor]:
        ends = []
        counts, edges = self.histogram.magnitudes(), self.histogram.edges()
        for cell in range(len(counts)):
            equal = uniform(counts[cell], edges[cell])
            bins = kl_threshold(equal, numbers.levels) if equal.any() else 0.0
            ends.append(bins * float(edges[cell, -1]) / len(equal))
        end = torch.tensor(ends, dtype=torch.float64, device=low.device)
        return -end, end


class SquaredError(_Counted):
    """The range with the least sum of squared errors of its rounded values, searched over the
    histogram."""

    def cut(self, low: Tensor, high: Tensor, numbers: Numbers) -> tuple[Tensor, Tensor]:
        return least_error(self.histogram, low, high, numbers)


@dataclass(frozen=True)
class TokenWiseParameters:
    """Attributes:
    percent: of the tokens whose largest and smallest values are inside the range, in (0, 100]; 0 is
        what gives a layer's output the least error, and all where no layer is known.
    """

    percent: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.percent <= 100:
            raise ValueError(f"percent must be in [0, 100], got {self.percent:g}")


_PARTS = (1.0, 0.9999, 0.999, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8, 0.65, 0.5, 0.35, 0.2, 0.1)
"""Of the tokens, tried by `TokenWise`."""


class TokenWise(MinMax):
    """The range of a part of all tokens, by the largest and the smallest value of each: outliers of
    a few tokens are clipped, and how many values they have does not matter (Outlier Suppression,
    Wei et al. 2022, section 4.2)."""

    def __init__(self, cells: Cells, parameters: TokenWiseParameters) -> None:
        super().__init__(cells)
        self._percent = parameters.percent
        # Of the largest value of each token, and of the smallest, taken positive.
        self._tops = (
            Histogram(_Counted.bits, _Counted.octaves),
            Histogram(_Counted.bits, _Counted.octaves),
        )
        for histogram in self._tops if len(self.low) else ():
            histogram.add(0, torch.zeros(1, 0))

    def add(self, x: Tensor, *, batch: int, dense: Tensor | None = None) -> None:
        super().add(x, batch=batch)
        x = x.detach().float()
        if x.shape[-1]:
            for histogram, signed in zip(self._tops, (x, -x), strict=True):
                tops, cells = self._of_tokens(signed)
                for first, values in cells.parts(tops.clamp(min=0)):
                    histogram.add(first, values)

    def _of_tokens(self, x: Tensor) -> tuple[Tensor, Cells]:
        """The largest values of each token, one for each of its cells, and whose cells they are."""
        if self.cells.granularity == "group":
            assert self.cells.group_size is not None
            groups = x.split(self.cells.group_size, dim=-1)
            return torch.stack([group.amax(dim=-1) for group in groups], dim=-1), Cells("channel")
        if self.cells.granularity == "channel":
            return x, self.cells
        return x.amax(dim=-1, keepdim=True), self.cells

    def merge(self, other: Any) -> None:
        super().merge(other)
        for mine, theirs in zip(self._tops, other._tops, strict=True):
            mine.merge(theirs)

    def state_dict(self) -> dict[str, Tensor]:
        high, low = (histogram.state_dict() for histogram in self._tops)
        return {
            **super().state_dict(),
            **{f"high.{name}": value for name, value in high.items()},
            **{f"low.{name}": value for name, value in low.items()},
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        for histogram, end in zip(self._tops, ("high.", "low."), strict=True):
            own = {n.removeprefix(end): v for n, v in state.items() if n.startswith(end)}
            histogram.load_state_dict(own)

    def range(self, numbers: Numbers) -> tuple[Tensor, Tensor]:
        return self._inside(self._percent / 100 if self._percent else 1.0)

    def tried(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Ranges to choose from by what they do to an output; none where a percentage is given."""
        if not self._percent:
            yield from (self._inside(part) for part in _PARTS)

    def _inside(self, part: float) -> tuple[Tensor, Tensor]:
        """The range of this part of the tokens."""
        ends = []
        for histogram, whole in zip(self._tops, (self.high, -self.low), strict=True):
            end = _quantile(histogram.magnitudes(), histogram.edges(), part).float()
            end = torch.where(whole.isfinite(), torch.minimum(end, whole), torch.nan)
            ends.append(whole if part == 1 else end)
        return -ends[1], ends[0]
