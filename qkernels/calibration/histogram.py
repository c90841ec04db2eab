"""A histogram whose bins depend on the values alone, not on the order in which they come.

Bins are floats with few bits: a value belongs to the one whose exponent and leading bits of the
mantissa are its own. Below a number of powers of two under the largest value one bin takes all
that is left. So bins have a width relative to what is in them, one outlier leaves the others apart,
and where the largest value grows, what the smallest bins hold moves to the last one: the counts
are then those of a histogram that has known the largest from the beginning.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qkernels.calibration.ranges import grown

_MANTISSA = 23
"""Bits of fp32's."""


class Histogram:
    """Counts of finite values, for each of C cells.

    Attributes:
        counts: int64 [C, 2, B + 1], B = octaves << bits: values >= 0, and those below by their
            magnitude; bin 0 holds the smallest, zero among them.
        top: int64 [C]: the biased exponent of the largest magnitude.

    Args:
        bits: of the mantissa; a bin is as wide as its lower edge / 2^bits, at most.
        octaves: powers of two under the largest magnitude that have bins.
    """

    def __init__(self, bits: int, octaves: int) -> None:
        self._bits, self._octaves = bits, octaves
        self._bins = (octaves << bits) + 1
        self.counts = torch.zeros(0, 2, self._bins, dtype=torch.int64)
        self.top = torch.zeros(0, dtype=torch.int64)

    def add(self, first: int, values: Tensor) -> None:
        """Counts values fp32 [C, V] of the cells from `first` on."""
        finite = values.isfinite()
        # Zero counts nowhere in what follows but where it is finite.
        kept = torch.where(finite, values, 0.0)
        magnitudes = kept.abs()
        cells = len(values)
        self._grow_cells(first + cells, values.device)
        own = slice(first, first + cells)
        if not values.shape[1]:
            return
        largest = _pattern(magnitudes.amax(dim=1)) >> _MANTISSA
        self._raise_top(own, torch.maximum(self.top[own], largest))
        places = (_pattern(magnitudes) >> (_MANTISSA - self._bits)) - self._base(own)[:, None]
        places = (places + 1).clamp_(min=0)
        places += (kept < 0) * self._bins
        places += torch.arange(cells, device=values.device)[:, None] * (2 * self._bins)
        counted = torch.bincount(places[finite], minlength=cells * 2 * self._bins)
        self.counts[own] += counted.view(cells, 2, self._bins)

    def merge(self, other: Histogram) -> None:
        device = self.counts.device if len(self.counts) else other.counts.device
        self._grow_cells(len(other.counts), device)
        twin = Histogram(self._bits, self._octaves)
        twin.counts = grown(other.counts.to(device), len(self.counts)).clone()
        twin.top = grown(other.top.to(device), len(self.counts)).clone()
        top, every = torch.maximum(self.top, twin.top), slice(None)
        self._raise_top(every, top)
        twin._raise_top(every, top)
        self.counts += twin.counts

    def state_dict(self) -> dict[str, Tensor]:
        return {"counts": self.counts, "top": self.top}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.counts, self.top = state["counts"].clone(), state["top"].clone()

    def edges(self) -> Tensor:
        """fp64 [C, B + 2]: bin i of each sign reaches from [i] to [i + 1] in magnitude."""
        start = self._base(slice(None)) - 1
        patterns = start[:, None] + torch.arange(self._bins + 1, device=start.device)
        # Bin 0 begins at 0; there are no bins below the numbers that fp32 has.
        patterns[:, 0] = 0
        patterns = patterns.clamp(min=0) << (_MANTISSA - self._bits)
        edges = patterns.int().view(torch.float32).double()
        return edges.clamp(max=2.0**128)

    def magnitudes(self) -> Tensor:
        """int64 [C, B + 1]: both signs together."""
        return self.counts.sum(dim=1)

    def in_order(self) -> tuple[Tensor, Tensor]:
        """Counts int64 [C, 2 B + 2] and edges fp64 [C, 2 B + 3], from the lowest value up."""
        edges = self.edges()
        counts = torch.cat((self.counts[:, 1].flip(1), self.counts[:, 0]), dim=1)
        return counts, torch.cat((-edges.flip(1), edges[:, 1:]), dim=1)

    def _base(self, own: slice) -> Tensor:
        """The pattern, exponent and leading bits, of bin 1."""
        return (self.top[own] - self._octaves + 1) << self._bits

    def _grow_cells(self, cells: int, device: torch.device) -> None:
        self.counts = grown(self.counts.to(device), cells)
        self.top = grown(self.top.to(device), cells)

    def _raise_top(self, own: slice, top: Tensor) -> None:
        risen = (top - self.top[own]) << self._bits
        self.top[own] = top
        if not risen.any():
            return
        counts = self.counts[own]
        places = torch.arange(self._bins, device=counts.device) - risen[:, None]
        places = places.clamp_(min=0)[:, None].expand_as(counts)
        self.counts[own] = torch.zeros_like(counts).scatter_add_(2, places, counts)


def _pattern(magnitudes: Tensor) -> Tensor:
    return magnitudes.contiguous().view(torch.int32).long()
