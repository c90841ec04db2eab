"""Hadamard matrices by their formulas, and rotations that are applied fast."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels.quantizers.hadamard import Rotation, hadamard, has_hadamard

CONSTRUCTED = [n for n in range(1, 401) if has_hadamard(n)]
EXACT = 1e-12


@pytest.mark.parametrize("n", CONSTRUCTED)
def test_rows_are_orthogonal_and_of_ones(n):
    h = hadamard(n)
    assert h.shape == (n, n) and (h.abs() == 1).all()
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


def test_which_orders_are_constructed():
    assert CONSTRUCTED[:6] == [1, 2, 4, 8, 12, 16]
    # 92 was the first that Paley's and Sylvester's constructions left open.
    assert [n for n in range(4, 200, 4) if n not in CONSTRUCTED] == [92, 116, 156, 172, 184, 188]
    # Squares and cubes of primes: 25 + 25 + 2, 49 + 49 + 2 and 7^3 + 1.
    assert {52, 100, 344} <= set(CONSTRUCTED)
    for hidden in (576, 768, 896, 2304, 2560, 3072, 3584, 5120, 5376, 11008, 13824, 14336, 29568):
        assert has_hadamard(hidden), hidden
    with pytest.raises(ValueError, match="order 92"):
        hadamard(92)


def matrix_of(rotation):
    return rotation.apply(torch.eye(rotation.n))


def is_orthogonal(q):
    return (q @ q.T - torch.eye(len(q))).abs().max() < EXACT


def test_by_hand():
    """Signs first, then sums and differences of halves, of 4 numbers each with each."""
    assert hadamard(4).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    rotation = Rotation(torch.tensor([1.0, -1.0, 1.0, 1.0]).double(), [hadamard(4) / 2])
    # 1, -2, 3, 4: the sums 6, 2, -8 and 4, of which each is divided by sqrt(4).
    assert rotation.apply(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [3, 1, -4, 2]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 320), st.integers(0, 2**31), st.booleans())
def test_rotations_of_any_order_are_orthogonal(n, seed, keep_ones):
    rotation = Rotation.random(n, torch.Generator().manual_seed(seed), keep_ones=keep_ones)
    q = matrix_of(rotation)
    assert is_orthogonal(q)
    if keep_ones:
        assert (q.sum(dim=1) - 1).abs().max() < EXACT
        assert (q.sum(dim=0) - 1).abs().max() < EXACT
    elif has_hadamard(n):
        assert (q.abs() * n**0.5 - 1).abs().max() < EXACT


@pytest.mark.parametrize("n", [64, 576, 92, 50])
def test_a_rotation_is_the_product_of_its_parts(n):
    rotation = Rotation.random(n, torch.Generator().manual_seed(3))
    whole = torch.ones(1, 1, dtype=torch.float64)
    for factor in rotation.factors:
        whole = torch.kron(whole, factor)
    x = torch.randn(3, 5, n)
    wanted = (x.double() * rotation.signs) @ whole
    assert rotation.apply(x).shape == x.shape
    assert (rotation.apply(x) - wanted).abs().max() < EXACT * n


def test_a_seed_gives_one_rotation_and_another_gives_another():
    first, again, other = (
        matrix_of(Rotation.random(36, torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_an_outlier_is_spread_over_every_column():
    for n in (576, 92):
        rotation = Rotation.random(n, torch.Generator().manual_seed(0))
        spike = torch.zeros(1, n)
        spike[0, 5] = 1
        assert rotation.apply(spike).abs().max() < 4 / n**0.5
