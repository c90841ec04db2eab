"""Observers of a tensor's range, for the scales and zero points of static activations.

`OBSERVERS` has a row for each. They are statistics (`statistics.Statistic`): neither the order of
`add` and `merge` nor how batches are spread over instances changes the range by a bit. A range
always includes 0, which quantized values hold exactly; an observer that has seen nothing has the
range [0, 0], one that has seen NaN or infinity has a range that is not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkernels.calibration.clipping import (
    KL,
    Percentile,
    PercentileParameters,
    SquaredError,
    TokenWise,
    TokenWiseParameters,
)
from qkernels.calibration.extremes import AverageParameters, MinMax, MovingAverage
from qkernels.calibration.ranges import WHOLE, Cells, Numbers
from qkernels.errors import RecipeError
from qkernels.spelling import CHOICE, parse_parameters, spell_choice


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
