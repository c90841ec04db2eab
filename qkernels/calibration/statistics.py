"""Statistics of a layer's inputs: sums that merge, so that two processes give what one gives.

`STATISTICS` has a row for each, beside the observers of ranges (`observers.py`). A method names
what it needs in `Needs`; `LayerInputs` holds what was collected for one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from qkernels.backends.cpu_calibration import transposed_product
from qkernels.calibration.observers import ObserverChoice
from qkernels.calibration.ranges import Cells

SAMPLE_ROWS = 256
"""Rows of input kept of a layer, for the error of its output."""


class Statistic(Protocol):
    """A sum over rows of input. Neither the order of `add` and `merge` nor how the batches are
    spread over instances changes the result, but for rounding where a statistic adds floats."""

    def add(self, x: Tensor, *, batch: int, dense: Tensor | None = None) -> None:
        """Takes rows in.

        Args:
            x: floating [T, K], T >= 1.
            batch: the number of the calibration batch that x comes from.
            dense: [T, K], the same rows in the model before quantization, where both were asked.
        """

    def merge(self, other: Any) -> None:
        """Takes in what another instance has seen."""

    def state_dict(self) -> dict[str, Tensor]:
        """The sum as tensors, to be stored or sent."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Becomes what gave `state`."""


class SampledRows:
    """A sample of rows: `rows` [R, K] in x's type, R <= `SAMPLE_ROWS`.

    Each row draws a number from its batch and its place there; the rows with the least numbers are
    kept. So the sample is spread over all batches and tokens, and a union of samples is the sample
    of the union.
    """

    def __init__(self, columns: int) -> None:
        self.rows = torch.empty(0, columns)
        self.drawn = torch.empty(0, dtype=torch.float64)
        # Rows of each batch so far: a layer may be called several times in one batch.
        self._seen: dict[int, int] = {}

    def add(self, x: Tensor, *, batch: int, dense: Tensor | None = None) -> None:
        seen = self._seen.get(batch, 0)
        self._seen[batch] = seen + len(x)
        generator = torch.Generator().manual_seed(batch)
        drawn = torch.rand(seen + len(x), dtype=torch.float64, generator=generator)[seen:]
        self._keep(x, drawn)

    def merge(self, other: SampledRows) -> None:
        self._keep(other.rows, other.drawn)

    def state_dict(self) -> dict[str, Tensor]:
        return {"rows": self.rows, "drawn": self.drawn}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.rows, self.drawn = state["rows"], state["drawn"]

    def _keep(self, rows: Tensor, drawn: Tensor) -> None:
        # Only what can be among the least is copied out of the batch.
        order = drawn.argsort(stable=True)[:SAMPLE_ROWS]
        rows, drawn = rows[order.to(rows.device)], drawn[order]
        if len(self.drawn):
            rows = torch.cat((self.rows.to(rows.device), rows))
            drawn = torch.cat((self.drawn, drawn))
            order = drawn.argsort(stable=True)[:SAMPLE_ROWS]
            rows, drawn = rows[order.to(rows.device)], drawn[order]
        self.rows, self.drawn = rows, drawn


class SumOfProducts:
    """A sum over rows of what `product` makes of them, in which rows may count differently.

    What a call adds is fp32 and the sum fp64, which holds it exactly where the addends of an entry
    are within 2^29 of each other, and to 2^-53 elsewhere. So their order changes no bit of the sum
    in fp32 but by a chance of about 2^-29.

    Attributes:
        rows: how many were summed.
    """

    def __init__(self, *shape: int) -> None:
        self._sum = torch.zeros(shape, dtype=torch.float64)
        self.rows = 0

    def add(self, x: Tensor, *, batch: int, dense: Tensor | None = None) -> None:
        self.take(self.product(x, dense), len(x))

    @staticmethod
    def product(x: Tensor, dense: Tensor | None, roots: Tensor | None = None) -> Tensor:
        """What rows [T, K] add to the sum, fp32.

        Args:
            roots: fp32 [T, 1], of what each row counts.
        """
        raise NotImplementedError

    def take(self, product: Tensor, rows: int) -> None:
        """Takes in so many rows by what they add."""
        # Its device is that of the first rows.
        self._sum = self._sum.to(product.device).add_(product)
        self.rows += rows

    def merge(self, other: SumOfProducts) -> None:
        self._sum = self._sum + other._sum.to(self._sum.device)
        self.rows += other.rows

    def state_dict(self) -> dict[str, Tensor]:
        return {"sum": self._sum, "rows": torch.tensor(self.rows)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._sum, self.rows = state["sum"], int(state["rows"])


class Gram(SumOfProducts):
    """`matrix` = x^T x over all rows, fp32 [K, K]."""

    def __init__(self, columns: int) -> None:
        super().__init__(columns, columns)

    @property
    def matrix(self) -> Tensor:
        return self._sum.float()

    @staticmethod
    def product(x: Tensor, dense: Tensor | None, roots: Tensor | None = None) -> Tensor:
        rows = x if roots is None else _narrow(x.float() * roots, x.dtype)
        return transposed_product(rows, rows)


class Drift(Gram):
    """`matrix` = (x_dense - x)^T x over all rows, fp32 [K, K]: how far quantized blocks have moved
    the inputs, as a layer can make up for it."""

    @staticmethod
    def product(x: Tensor, dense: Tensor | None, roots: Tensor | None = None) -> Tensor:
        assert dense is not None, "of pairs of inputs"
        # The difference is taken first: it is small beside both.
        moved, rows = dense.float() - x.float(), x
        if roots is not None:
            moved, rows = moved * roots, _narrow(x.float() * roots, x.dtype)
        return transposed_product(_narrow(moved, x.dtype), rows)


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 made bf16 where that is the type of the inputs that it comes from: rounded as they were,
    and multiplied twice as fast. Other types keep fp32, which holds what fp16 may not."""
    return x.bfloat16() if dtype == torch.bfloat16 else x


class Squares(SumOfProducts):
    """`sums` = the sum of x^2 over all rows, fp64 [K]: the diagonal of x^T x alone."""

    @property
    def sums(self) -> Tensor:
        return self._sum

    @staticmethod
    def product(x: Tensor, dense: Tensor | None, roots: Tensor | None = None) -> Tensor:
        x = x.float()
        return (x if roots is None else x * roots).square().sum(dim=0)


class Largest:
    """`values` = the largest |x| of each column, fp32 [K]."""

    def __init__(self, columns: int) -> None:
        self.values = torch.zeros(columns)

    def add(self, x: Tensor, *, batch: int, dense: Tensor | None = None) -> None:
        self._take(x.abs().amax(dim=0).float())

    def merge(self, other: Largest) -> None:
        self._take(other.values)

    def state_dict(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.values = state["values"]

    def _take(self, values: Tensor) -> None:
        # Its device is that of the first rows. NaN stays NaN.
        self.values = torch.maximum(self.values.to(values.device), values)


STATISTICS: dict[str, Callable[[int], Statistic]] = {
    "drift": Drift,
    "gram": Gram,
    "largest": Largest,
    "rows": SampledRows,
    "squares": Squares,
}
"""Name -> made for a layer with so many columns."""


POSITIONS = 128
"""Positions that have a range of their own; the last of them is that of all behind it too. Together
their histograms take 6 MB a layer, twice that with `tokenwise` and 23 MB with `kl`."""

_BY_POSITION = " by position"


def by_position(observer: ObserverChoice) -> str:
    """The name of the statistic `PositionRanges` of an observer."""
    return f"{observer}{_BY_POSITION}"


class PositionRanges:
    """An observer of each position's range.

    Attributes:
        sampled: the positions of the rows that `SampledRows` keeps: fp32 [R, 1], in its order.
    """

    def __init__(self, choice: ObserverChoice) -> None:
        self.observer: Any = choice.make(Cells("token", most=POSITIONS))
        self.sampled = SampledRows(1)

    def add_at(self, positions: Tensor, x: Tensor, *, batch: int) -> None:
        """Takes rows in.

        Args:
            positions: int64 [R], one sequence after the other, each from 0 on without gaps.
            x: floating [R, K], R >= 1.
        """
        self.sampled.add(positions.float()[:, None], batch=batch)
        starts = (positions == 0).nonzero()[:, 0].tolist()
        lengths = [b - a for a, b in zip(starts, (*starts[1:], len(x)), strict=True)]
        if len({*lengths}) == 1:
            self.observer.add(x.view(len(lengths), lengths[0], -1), batch=batch)
            return
        for sequence in x.split(lengths):
            self.observer.add(sequence, batch=batch)

    def merge(self, other: PositionRanges) -> None:
        self.observer.merge(other.observer)
        self.sampled.merge(other.sampled)

    def state_dict(self) -> dict[str, Tensor]:
        parts = {"observer": self.observer, "sampled": self.sampled}
        return {
            f"{part}.{name}": value
            for part, statistic in parts.items()
            for name, value in statistic.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for part, statistic in (("observer.", self.observer), ("sampled.", self.sampled)):
            own = {n.removeprefix(part): v for n, v in state.items() if n.startswith(part)}
            statistic.load_state_dict(own)


def new_statistic(name: str, columns: int) -> Any:
    """One that has seen nothing: of `STATISTICS`, an observer of the whole input's range, as
    `ObserverChoice` spells it, or one of each position's range, by the name of `by_position`."""
    if name in STATISTICS:
        return STATISTICS[name](columns)
    choice = ObserverChoice.parse(name.removesuffix(_BY_POSITION))
    return PositionRanges(choice) if name.endswith(_BY_POSITION) else choice.make()


@dataclass(frozen=True)
class Needs:
    """Which statistics of a layer a method asks for, by the names that `new_statistic` takes.

    Attributes:
        quantized: of inputs from blocks that are quantized already, which are those the layer will
            meet.
        dense: of inputs in the model before quantization.
        paired: of both at once, row by row.
    """

    quantized: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    paired: tuple[str, ...] = ()

    def __or__(self, other: Needs) -> Needs:
        def union(name: str) -> tuple[str, ...]:
            return tuple(dict.fromkeys((*getattr(self, name), *getattr(other, name))))

        return Needs(**{part.name: union(part.name) for part in fields(self)})

    def __bool__(self) -> bool:
        return bool(self.quantized or self.dense or self.paired)


@dataclass
class LayerInputs:
    """What calibration collected for one layer.

    Attributes:
        rows: rows of input that reached the layer behind quantized blocks.
        quantized, dense, paired: the statistics that `Needs` asked for, by name. Paired are of
            rows that are of one token, which may be fewer: experts are given other tokens in the
            dense model.
        broken: whether rows were met that are not finite and that no sum shows.
    """

    rows: int = 0
    broken: bool = False
    quantized: dict[str, Any] = field(default_factory=dict)
    dense: dict[str, Any] = field(default_factory=dict)
    paired: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def empty(needs: Needs, columns: int) -> LayerInputs:
        """Nothing collected yet, for a layer with so many columns."""

        def made(names: tuple[str, ...]) -> dict[str, Any]:
            return {name: new_statistic(name, columns) for name in names}

        return LayerInputs(
            quantized=made(needs.quantized), dense=made(needs.dense), paired=made(needs.paired)
        )

    @property
    def row_positions(self) -> Tensor | None:
        """The position of each of the sampled rows, int64 [R], where positions were observed."""
        found = (each for each in self.quantized.values() if isinstance(each, PositionRanges))
        statistic = next(found, None)
        return None if statistic is None else statistic.sampled.rows[:, 0].long()

    @property
    def finite(self) -> bool:
        """Whether no row has met NaN or infinity."""
        sums = (self.quantized, self.dense, self.paired)
        tensors = (
            tensor
            for statistics in sums
            for name, statistic in statistics.items()
            if name != "rows"
            for tensor in statistic.state_dict().values()
        )
        return not self.broken and all(bool(tensor.isfinite().all()) for tensor in tensors)

    def merge(self, other: LayerInputs) -> None:
        """Takes in what another process collected for the same layer and needs."""
        self.rows += other.rows
        self.broken |= other.broken
        for mine, theirs in (
            (self.quantized, other.quantized),
            (self.dense, other.dense),
            (self.paired, other.paired),
        ):
            for name, statistic in mine.items():
                statistic.merge(theirs[name])
