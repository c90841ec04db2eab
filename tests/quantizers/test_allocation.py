"""The knapsack of schemes against trying everything."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels.errors import QuantizationError
from qkernels.quantizers.allocation import Choice, allocate

SCHEMES = ("w2a16-g32", "w3a16-g64", "w4a16-g64", None)


@st.composite
def problems(draw):
    """Layers with choices that may tie in bits, in loss or in both, and groups of them."""
    count = draw(st.integers(1, 6))
    layers = {}
    for number in range(count):
        schemes = draw(st.lists(st.sampled_from(SCHEMES), min_size=1, max_size=4, unique=True))
        if draw(st.booleans()):
            schemes = list(SCHEMES)
        losses = st.one_of(st.integers(0, 4).map(float), st.floats(-1, 50), st.floats(0, 1e-6))
        layers[f"layer{number}"] = [
            Choice(scheme, draw(st.integers(0, 12)), draw(losses)) for scheme in schemes
        ]
    names = draw(st.permutations(sorted(layers)))
    cut = draw(st.integers(0, count))
    together = [sorted(names[:cut])] if cut > 1 and draw(st.booleans()) else []
    return layers, draw(st.integers(0, 60)), together


def everything(layers, budget, together):
    """All allocations that are allowed: (loss, bits)."""
    found = []
    for chosen in itertools.product(*layers.values()):
        by_name = dict(zip(layers, chosen, strict=True))
        alike = all(len({by_name[name].scheme for name in names}) == 1 for names in together)
        bits = sum(choice.bits for choice in chosen)
        if alike and bits <= budget:
            found.append((sum(choice.loss for choice in chosen), bits))
    return found


@settings(max_examples=200, deadline=None)
@given(problems())
def test_nothing_is_better(problem):
    layers, budget, together = problem
    allowed = everything(layers, budget, together)
    if not allowed:
        with pytest.raises(QuantizationError, match=r"too small|in common"):
            allocate(layers, budget, together)
        return
    taken = allocate(layers, budget, together)
    assert list(taken) == list(layers)
    assert all(taken[name] in choices for name, choices in layers.items())
    for names in together:
        assert len({taken[name].scheme for name in names}) == 1
    assert sum(choice.bits for choice in taken.values()) <= budget
    loss = sum(choice.loss for choice in taken.values())
    assert loss == pytest.approx(min(allowed)[0], rel=1e-9, abs=1e-9)
    assert allocate(layers, budget, together) == taken


def test_of_equal_losses_fewer_bits_are_taken_and_the_first_of_equals():
    layers = {
        "a": [Choice("w4a16", 8, 1.0), Choice("w3a16", 6, 1.0)],
        "b": [Choice("w8a16", 4, 2.0), Choice("w2a16", 4, 2.0)],
    }
    assert [choice.scheme for choice in allocate(layers, 100).values()] == ["w3a16", "w8a16"]


def test_a_budget_that_nothing_fits_says_what_the_least_is():
    layers = {"a": [Choice("w4a16", 1000, 1.0), Choice("w3a16", 750, 3.0)]}
    with pytest.raises(QuantizationError, match=r"a budget of 749 bits .* is 750"):
        allocate(layers, 749)
    assert allocate(layers, 750)["a"].scheme == "w3a16"


def test_layers_without_a_common_scheme_are_named():
    layers = {"a": [Choice("w4a16", 4, 1.0)], "b": [Choice("w3a16", 3, 1.0)]}
    with pytest.raises(QuantizationError, match="a, b have no scheme in common"):
        allocate(layers, 100, [("a", "b")])


def test_many_layers_of_sizes_without_a_common_divisor():
    generator = torch.Generator().manual_seed(0)
    layers, numbers = {}, 0
    for number in range(300):
        n = int(torch.randint(1000, 10**7, (), generator=generator))
        importance = float(torch.rand((), generator=generator) ** 4)
        numbers += n
        layers[str(number)] = [
            Choice(f"w{bits}a16", n * bits + 17, importance * n * 4.0**-bits)
            for bits in (2, 3, 4, 8)
        ]
    taken = allocate(layers, int(4.1 * numbers))
    bits = sum(choice.bits for choice in taken.values())
    uniform = sum(choices[2].loss for choices in layers.values())
    assert 4.09 * numbers < bits <= 4.1 * numbers
    assert sum(choice.loss for choice in taken.values()) < 0.6 * uniform
