"""Statistics merge: batches spread over two collectors give what one collector gives."""

import itertools

import pytest
import torch

from qkernels.calibration.statistics import SAMPLE_ROWS, STATISTICS, LayerInputs, Needs
from tests.bounds import SUM_BOUND

COLUMNS = 8


def batches():
    """Of different lengths, with the largest value in each in turn."""
    return [torch.randn(90 + 40 * i, COLUMNS) * (1 + i % 3) for i in range(6)]


def collected(name, numbered):
    statistic = STATISTICS[name](COLUMNS)
    for number, x in numbered:
        statistic.add(x, batch=number, dense=x.roll(1, dims=1))
    return statistic


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        # Sums are exact for inputs that are about of one size.
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, check_dtype=True)


@pytest.mark.parametrize("name", STATISTICS)
def test_two_collectors_merge_to_one(name):
    numbered = list(enumerate(batches()))
    whole = collected(name, numbered)
    for part in (numbered[:1], numbered[::2], numbered[3:]):
        rest = [item for item in numbered if all(item[0] != other[0] for other in part)]
        for a, b in ((part, rest), (rest, part)):
            merged = collected(name, a)
            merged.merge(collected(name, b))
            same(merged, whole)


@pytest.mark.parametrize("name", STATISTICS)
def test_the_order_of_batches_changes_nothing(name):
    numbered = list(enumerate(batches()))
    whole = collected(name, numbered)
    for order in itertools.islice(itertools.permutations(numbered), 1, 720, 97):
        same(collected(name, order), whole)


@pytest.mark.parametrize("name", STATISTICS)
def test_a_state_comes_back(name):
    statistic = collected(name, enumerate(batches()))
    again = STATISTICS[name](COLUMNS)
    again.load_state_dict(statistic.state_dict())
    same(again, statistic)
    empty = STATISTICS[name](COLUMNS)
    empty.merge(statistic)
    same(empty, statistic)
    statistic.merge(STATISTICS[name](COLUMNS))
    same(empty, statistic)


def test_gram_and_drift_are_their_formulas():
    x, dense = torch.randn(50, COLUMNS), torch.randn(50, COLUMNS)
    found = {}
    for name in ("gram", "drift"):
        statistic = STATISTICS[name](COLUMNS)
        for batch, rows in enumerate((slice(0, 20), slice(20, 50))):
            statistic.add(x[rows].bfloat16(), batch=batch, dense=dense[rows].bfloat16())
        found[name] = statistic.matrix
    x, dense = x.bfloat16(), dense.bfloat16()
    # Differences are rounded as the inputs are.
    moved = (dense.float() - x.float()).bfloat16().double()
    x = x.double()
    torch.testing.assert_close(found["gram"].double(), x.T @ x, rtol=0, atol=1e-4)
    torch.testing.assert_close(found["drift"].double(), moved.T @ x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_count_as_their_weights_say(dtype):
    x, dense = (torch.randn(50, COLUMNS).to(dtype) for _ in range(2))
    weights = torch.rand(50, 1)
    rows, moved = x.double(), dense.double() - x.double()
    root = weights.double().sqrt()
    for name, left in (("gram", rows), ("drift", moved)):
        found = type(STATISTICS[name](COLUMNS)).product(x, dense, weights.sqrt())
        wanted = (root * left).T @ (root * rows)
        # Both factors are rounded, to 2^-8 where the inputs are bf16.
        bound = 2 * 2**-8 if dtype == torch.bfloat16 else SUM_BOUND
        size = (root * left).norm() * (root * rows).norm()
        assert (found.double() - wanted).norm() <= bound * size, name
    squares = STATISTICS["squares"](COLUMNS).product(x, None, weights.sqrt())
    wanted = (weights * rows.square()).sum(dim=0)
    assert (squares.double() - wanted).norm() <= SUM_BOUND * wanted.norm()


def test_the_sample_is_spread_over_batches_and_rows():
    # Every row is its own number.
    numbers = torch.arange(4000.0)
    parts = list(enumerate(numbers.view(-1, 1).expand(-1, COLUMNS).split(1000)))
    rows = collected("rows", parts).rows[:, 0]
    assert len(rows) == len(rows.unique()) == SAMPLE_ROWS
    # Binomial with mean 64 and deviation 7: each quarter of the tokens is there.
    for quarter in range(4):
        inside = (rows >= 1000 * quarter) & (rows < 1000 * (quarter + 1))
        assert 30 < int(inside.sum()) < 98
        first_half = inside & (rows % 1000 < 500)
        assert 0.25 < int(first_half.sum()) / int(inside.sum()) < 0.75


def test_few_rows_are_all_kept_and_two_calls_of_one_batch_count_on():
    x = torch.randn(20, COLUMNS)
    once, twice = collected("rows", [(3, x)]), collected("rows", [(3, x[:8]), (3, x[8:])])
    assert sorted(once.rows[:, 0].tolist()) == sorted(x[:, 0].tolist())
    same(once, twice)


def test_the_inputs_of_a_layer_merge():
    needs = Needs(quantized=("minmax",)) | Needs(quantized=("rows", "minmax"), dense=("minmax",))
    assert needs == Needs(quantized=("minmax", "rows"), dense=("minmax",))
    a, b = LayerInputs.empty(needs, COLUMNS), LayerInputs.empty(needs, COLUMNS)
    a.rows, b.rows = 3, 4
    b.dense["minmax"].add(torch.full((1, COLUMNS), 2.0), batch=0)
    a.merge(b)
    assert a.rows == 7
    assert float(a.dense["minmax"].high) == 2 and float(a.quantized["minmax"].high) == 0
