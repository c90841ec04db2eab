"""Observers of a tensor's range, for the scales and zero points of static activations.

`OBSERVERS` has a row for each. They are statistics (`statistics.Statistic`): neither the order of
`add` and `merge` nor how batches are spread over instances changes the range by a bit. A range
always includes 0, which quantized values hold exactly; an observer that has seen nothing has the
range [0, 0], one that has seen NaN or infinity has a range that is not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkernels.calibration.histogram import Histogram
from qkernels.calibration.ranges import WHOLE, Cells, Numbers, grown
from qkernels.calibration.thresholds import kl_threshold, least_error, uniform
from qkernels.errors import RecipeError
from qkernels.spelling import CHOICE, parse_parameters, spell_choice


class MinMax:
    """All values seen: `low` <= 0 <= `high`, fp32 [C] for C cells."""

    def __init__(self, cells: Cells, parameters: Any = None) -> None:
        self.cells = cells
        first = 1 if cells.granularity == "tensor" else 0
        self.low, self.high = torch.zeros(first), torch.zeros(first)

    def add(self, x: Tensor, *, batch: int, dense: Tensor | None = None) -> None:
        """Takes in x [..., S, K]; `batch` as in `Statistic`."""
        for first, values in self.cells.parts(x):
            self.take(first, values)

    def take(self, first: int, values: Tensor) -> None:
        """Takes in values fp32 [C, V] of the cells from `first` on."""
        end = first + len(values)
        self._to_cells(end, values.device)
        if values.shape[1]:
            own = slice(first, end)
            self.low[own] = torch.minimum(self.low[own], values.amin(dim=1))
            self.high[own] = torch.maximum(self.high[own], values.amax(dim=1))

    def merge(self, other: MinMax) -> None:
        cells, device = max(len(self.low), len(other.low)), self.low.device
        self._to_cells(cells, device)
        self.low = torch.minimum(self.low, grown(other.low.to(device), cells))
        self.high = torch.maximum(self.high, grown(other.high.to(device), cells))

    def state_dict(self) -> dict[str, Tensor]:
        return {"low": self.low, "high": self.high}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.low, self.high = state["low"].clone(), state["high"].clone()

    def range(self, numbers: Numbers) -> tuple[Tensor, Tensor]:
        """low <= 0 <= high, fp32 [C], for values that are rounded to `numbers`."""
        return self.low, self.high

    def _to_cells(self, cells: int, device: torch.device) -> None:
        self.low, self.high = (grown(end.to(device), cells) for end in (self.low, self.high))


@dataclass(frozen=True)
class AverageParameters:
    """Attributes:
    momentum: the weight of all earlier batches beside the next one, in [0, 1).
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum:g}")


class MovingAverage:
    """Ends of each batch's range, averaged in the order of the batches' numbers:
    r = momentum r + (1 - momentum) r_batch, from the range of the first on.

    The range of each batch is kept by its number, so that the average of all is taken when it is
    asked for: what merged is what one instance would have seen.
    """

    def __init__(self, cells: Cells, parameters: AverageParameters) -> None:
        self.cells, self._momentum = cells, parameters.momentum
        self._batches: dict[int, MinMax] = {}

    def add(self, x: Tensor, *, batch: int, dense: Tensor | None = None) -> None:
        self._batches.setdefault(batch, MinMax(self.cells)).add(x, batch=batch)

    def merge(self, other: MovingAverage) -> None:
        for number, seen in other._batches.items():
            self._batches.setdefault(number, MinMax(self.cells)).merge(seen)

    def state_dict(self) -> dict[str, Tensor]:
        numbers = sorted(self._batches)
        seen = [self._batches[number] for number in numbers]
        cells = max((len(each.low) for each in seen), default=0)

        def stacked(ends: list[Tensor]) -> Tensor:
            return torch.stack([grown(e, cells) for e in ends]) if ends else torch.zeros(0, 0)

        return {
            "batches": torch.tensor(numbers, dtype=torch.int64),
            # A batch may have fewer positions than others.
            "cells": torch.tensor([len(each.low) for each in seen], dtype=torch.int64),
            "low": stacked([each.low for each in seen]),
            "high": stacked([each.high for each in seen]),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._batches = {}
        for i, number in enumerate(state["batches"].tolist()):
            cells = int(state["cells"][i])
            self._batches[number] = seen = MinMax(self.cells)
            ends = {"low": state["low"][i, :cells], "high": state["high"][i, :cells]}
            seen.load_state_dict(ends)

    def range(self, numbers: Numbers) -> tuple[Tensor, Tensor]:
        empty = MinMax(self.cells)
        low = high = None
        for _, seen in sorted(self._batches.items()):
            low, high = self._mixed(low, seen.low), self._mixed(high, seen.high)
        return (empty.low, empty.high) if low is None or high is None else (low, high)

    def _mixed(self, old: Tensor | None, own: Tensor) -> Tensor:
        if old is None:
            return own
        old = old.to(own.device)
        both = min(len(old), len(own))
        mixed = self._momentum * old[:both] + (1 - self._momentum) * own[:both]
        # Of the longer one; the other has none left.
        return torch.cat((mixed, old[both:], own[both:]))


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


@dataclass(frozen=True)
class NoParameters:
    """Of an observer that takes none."""


def _none_tried(statistic: Any) -> tuple[()]:
    """For observers whose range does not depend on a layer."""
    return ()


def _any_numbers(numbers: Numbers) -> None:
    """For observers that look at values alone."""


def _whole_numbers(numbers: Numbers) -> str | None:
    return None if numbers.whole else "it looks for a step between whole numbers, not floats"


@dataclass(frozen=True, kw_only=True)
class Observer:
    """A row of the table.

    Attributes:
        name: how it is chosen.
        title: a few words for listings.
        parameters: a frozen dataclass with defaults, as `spelling` takes it.
        make: (cells, parameters) -> a `Statistic` with a `range` as `MinMax` has it.
        tried: of a statistic that was made, ranges to choose from by what they do to the output of
            a layer, where one is known; none for what needs no output.
        why_not: (numbers) -> the reason, in a user's words, why it finds no range for values that
            are rounded to them, or None.
    """

    name: str
    title: str
    parameters: type[Any] = NoParameters
    make: Callable[[Cells, Any], Any]
    tried: Callable[[Any], Iterable[tuple[Tensor, Tensor]]] = _none_tried
    why_not: Callable[[Numbers], str | None] = _any_numbers


OBSERVERS: dict[str, Observer] = {
    row.name: row
    for row in (
        Observer(name="minmax", title="all values", make=MinMax),
        Observer(
            name="moving_average",
            title="the ends of each batch, averaged",
            parameters=AverageParameters,
            make=MovingAverage,
        ),
        Observer(
            name="percentile",
            title="a percentage of all values",
            parameters=PercentileParameters,
            make=Percentile,
        ),
        Observer(
            name="tokenwise",
            title="a part of all tokens, by each one's largest value",
            parameters=TokenWiseParameters,
            make=TokenWise,
            tried=TokenWise.tried,
        ),
        Observer(name="kl", title="least loss of information", make=KL, why_not=_whole_numbers),
        Observer(
            name="mse", title="least squared error", make=SquaredError, why_not=_whole_numbers
        ),
    )
}


@dataclass(frozen=True)
class ObserverChoice:
    """An observer with its parameters; `str` gives the canonical spelling."""

    observer: Observer
    parameters: Any

    @staticmethod
    def parse(text: str | ObserverChoice) -> ObserverChoice:
        """The choice that `text` spells, such as "percentile(percent=99.9)"; a choice is returned
        as it is.

        Raises:
            RecipeError: naming what is wrong, with what is accepted.
        """
        if isinstance(text, ObserverChoice):
            return text
        found = CHOICE.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise RecipeError(
                f"observer {text!r} does not parse: write name or name(parameter=value, ...)"
            )
        row = OBSERVERS.get(found[1])
        if row is None:
            raise RecipeError(f"observer {found[1]!r} is not one of {', '.join(OBSERVERS)}")
        name, where = f"observer {row.name}", f"observer {text!r}"
        return ObserverChoice(row, parse_parameters(name, row.parameters, found[2], where))

    def make(self, cells: Cells = WHOLE) -> Any:
        """One that has seen nothing."""
        return self.observer.make(cells, self.parameters)

    def __str__(self) -> str:
        return spell_choice(self.observer.name, self.parameters)


DEFAULT_OBSERVER = ObserverChoice.parse("minmax")


def range_of(
    x: Tensor,
    numbers: Numbers,
    observer: str | ObserverChoice = DEFAULT_OBSERVER,
    cells: Cells = WHOLE,
) -> tuple[Tensor, Tensor]:
    """The range of one tensor, for dynamic quantization.

    Args:
        x: floating [..., K].
        cells: what has a range of its own: all of x; a column; a token, which is a row of x; or a
            group of columns of a row.

    Returns:
        low <= 0 <= high, fp32: [], [K], [...] or [..., G].
    """
    choice, rows = ObserverChoice.parse(observer), x.reshape(-1, x.shape[-1])
    leading = x.shape[:-1]
    if cells.granularity == "group":
        assert cells.group_size is not None
        groups = rows.split(cells.group_size, dim=1)
        found = [range_of(group, numbers, choice, Cells("token")) for group in groups]
        low, high = (torch.stack(ends, dim=1) for ends in zip(*found, strict=True))
        return low.reshape(*leading, -1), high.reshape(*leading, -1)
    made = choice.make(cells)
    made.add(rows, batch=0)
    shapes = {"tensor": torch.Size(()), "channel": x.shape[-1:], "token": leading}
    low, high = made.range(numbers)
    return low.reshape(shapes[cells.granularity]), high.reshape(shapes[cells.granularity])
