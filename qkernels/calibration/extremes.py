"""Observers of the ends of all values: `MinMax`, and `MovingAverage` of those of each batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkernels.calibration.ranges import Cells, Numbers, grown


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
