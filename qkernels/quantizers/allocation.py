"""Which scheme each layer gets under a budget of bits: an exact multiple-choice knapsack.

Layer by layer, the totals of all choices so far are kept that no other beats in bits and in loss.
What keeps them few is a bound: with a price p of a bit, the layers that are left cost no less than
their least loss + p bits, and each bit that the budget has left is worth no more than p. Totals
that by this bound end above the best known choice are dropped, so the result stays exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qkernels.errors import QuantizationError

_HALVINGS = 100
"""Of the interval of the price of a bit: past what fp64 tells apart."""

_ROUNDING = 1e-9
"""Relative slack of the bound, for sums in another order."""


@dataclass(frozen=True)
class Choice:
    """What a layer may become.

    Attributes:
        scheme: its spelling; None leaves the layer in 16 bits, or in what it has.
        bits: of the whole layer, scales and zero points among them.
        loss: what the model loses; sums over layers are compared.
    """

    scheme: str | None
    bits: int
    loss: float


def allocate(
    layers: Mapping[str, Sequence[Choice]], budget: int, together: Iterable[Sequence[str]] = ()
) -> dict[str, Choice]:
    """The choice of each layer, with the least sum of losses whose sum of bits is in the budget.

    Of equal sums that of fewer bits is taken, and then the choices that come first.

    Args:
        layers: name -> what it may become, each scheme once.
        budget: bits of all layers together.
        together: names of layers that must get one scheme, each layer at most once.

    Raises:
        QuantizationError: where the budget is too small, or layers that go together have no scheme
            in common.
    """
    groups = _groups(layers, together)
    items = [_in_common(layers, names) for names in groups]
    least = sum(min(choice.bits for choice in item) for item in items)
    if least > budget:
        raise QuantizationError(
            f"a budget of {budget:,} bits is too small: the least that these schemes take is "
            f"{least:,}"
        )
    taken = _solve([_worthwhile(item) for item in items], budget)
    schemes = {
        name: choice.scheme for names, choice in zip(groups, taken, strict=True) for name in names
    }
    return {
        name: next(choice for choice in choices if choice.scheme == schemes[name])
        for name, choices in layers.items()
    }


def _groups(
    layers: Mapping[str, Sequence[Choice]], together: Iterable[Sequence[str]]
) -> list[list[str]]:
    """Every layer in one list, in the order of the layers."""
    with_others = {name: list(names) for names in together for name in names}
    groups = [with_others.get(name, [name]) for name in layers]
    return [names for name, names in zip(layers, groups, strict=True) if name == names[0]]


def _in_common(layers: Mapping[str, Sequence[Choice]], names: Sequence[str]) -> list[Choice]:
    """What layers may become together, in the order of the first one's choices."""
    by_scheme = [{choice.scheme: choice for choice in layers[name]} for name in names]
    found = []
    for scheme in by_scheme[0]:
        if all(scheme in choices for choices in by_scheme):
            every = [choices[scheme] for choices in by_scheme]
            found.append(Choice(scheme, sum(c.bits for c in every), sum(c.loss for c in every)))
    if not found:
        raise QuantizationError(f"{', '.join(names)} have no scheme in common")
    return found


def _worthwhile(choices: Sequence[Choice]) -> list[Choice]:
    """Those that no other beats in both bits and loss, with rising bits."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.bits, c.loss)):
        if not kept or choice.loss < kept[-1].loss:
            kept.append(choice)
    return kept


def _solve(items: Sequence[Sequence[Choice]], budget: int) -> list[Choice]:
    """The best choice of each item. Args: items: of which the least bits fit the budget."""
    price, most_loss = _price(items, budget)
    cheapest = [min(c.loss + price * c.bits for c in item) for item in items]
    fewest = [item[0].bits for item in items]
    # What the items behind each one take at least.
    cost_left = _sums_behind(cheapest)
    bits_left = _sums_behind(fewest)
    slack = _ROUNDING * (abs(most_loss) + sum(abs(c.loss) for item in items for c in item))
    bits, losses = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    trail: list[tuple[Tensor, Tensor]] = []
    for number, item in enumerate(items):
        more_bits = torch.tensor([c.bits for c in item])
        more_loss = torch.tensor([c.loss for c in item], dtype=torch.float64)
        totals = (bits[:, None] + more_bits).flatten()
        sums = (losses[:, None] + more_loss).flatten()
        bound = sums + cost_left[number] - price * (budget - totals).double()
        kept = ((totals + bits_left[number] <= budget) & (bound <= most_loss + slack)).nonzero()[
            :, 0
        ]
        # By bits, then by loss, then as they come.
        kept = kept[sums[kept].argsort(stable=True)]
        kept = kept[totals[kept].argsort(stable=True)]
        least = sums[kept].cummin(dim=0).values
        better = torch.ones(len(kept), dtype=torch.bool)
        better[1:] = sums[kept][1:] < least[:-1]
        kept = kept[better]
        bits, losses = totals[kept], sums[kept]
        trail.append((kept // len(item), kept % len(item)))
    # The last has the least loss: losses fall where bits rise.
    place, taken = len(bits) - 1, []
    for item, (parents, chosen) in zip(reversed(items), reversed(trail), strict=True):
        taken.append(item[int(chosen[place])])
        place = int(parents[place])
    return taken[::-1]


def _price(items: Sequence[Sequence[Choice]], budget: int) -> tuple[float, float]:
    """A price of a bit under which everyone's cheapest choices together are about the budget, and
    the loss of a choice that is inside of it."""

    def taken(price: float) -> tuple[int, float]:
        cheapest = [min(item, key=lambda c: (c.loss + price * c.bits, c.bits)) for item in items]
        return sum(c.bits for c in cheapest), sum(c.loss for c in cheapest)

    low, high = 0.0, 1.0
    bits, loss = taken(low)
    if bits <= budget:
        return low, loss
    steps = [
        (a.loss - b.loss) / (b.bits - a.bits) for item in items for a, b in itertools.pairwise(item)
    ]
    # Past the dearest step everyone takes the fewest bits.
    high = 2 * max(steps)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if taken(middle)[0] > budget else (low, middle)
    return high, taken(high)[1]


def _sums_behind(values: Sequence[float]) -> list[float]:
    """For each the sum of all that follow it."""
    sums = list(itertools.accumulate(reversed(values), initial=type(values[0])(0)))
    return sums[-2::-1]
