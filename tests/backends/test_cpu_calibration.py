"""C++ for calibration on the CPU against its forms in torch, on every set of instructions."""

import pytest
import torch
import torch.nn.functional as F

from qkernels import rounding
from qkernels.backends import cpu, cpu_calibration
from qkernels.calibration.statistics import Drift, Gram
from qkernels.quantizers import grids
from qkernels.quantizers.columns import Columns
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight, WeightParameters
from tests.bounds import SUM_BOUND

SCHEMES = (
    *("w4a16-g64", "w4a16-g64-sym", "w3a16-g32-sbf16", "w2a16-g24-sfp32", "w4a16", "w8a16-g64"),
    *("w4a8-g64", "w4a8-g64-asym", "w3a8-g32"),
)


@pytest.fixture(params=cpu.ISAS)
def isa(request, monkeypatch):
    monkeypatch.delenv(cpu.ISA_VARIABLE, raising=False)
    problem = cpu.why_no_isa(request.param)
    if problem is not None:
        pytest.skip(problem)
    monkeypatch.setenv(cpu.ISA_VARIABLE, request.param)
    return request.param


@pytest.fixture
def on_threads():
    """What a function gives with 1, 2 and 5 threads."""
    before = torch.get_num_threads()

    def results(function):
        made = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made.append(function())
        return made

    yield results
    torch.set_num_threads(before)


def in_torch(monkeypatch):
    monkeypatch.setattr(cpu_calibration, "runs_on", lambda tensor: False)


def weights(n, k, dtype=torch.float32):
    weight = 0.02 * torch.randn(n, k)
    weight[torch.rand(n, k) < 0.02] *= 5
    return weight.to(dtype)


def inputs(k, rows=200):
    mixing = torch.eye(k) + torch.randn(k, k) * 0.5 / k**0.5
    return torch.randn(rows, k) @ mixing * torch.rand(k) ** 3


def with_fields(parameters, **fields):
    p = parameters
    return WeightParameters(scheme=p.scheme, n=p.n, k=p.k, **{**p.fields, **fields})


def costs(parameters, weight, gram):
    """Of each group by its block of gram [K, K], float64 [N, G]."""
    codes = rounding.encode_rows(weight, parameters, 0)
    made = QuantizedWeight(scheme=parameters.scheme, codes=codes, **parameters.fields)
    error = made.dequantize().double() - weight.double()
    length, k = parameters.scheme.group_length(parameters.k), parameters.k
    group = torch.arange(k) // length
    weighed = error @ (gram.double() * (group[:, None] == group)) * error
    return F.pad(weighed, (0, -k % length)).unflatten(1, (-1, length)).sum(dim=2)


def least_of_ranges(parameters, weight, gram):
    """The least cost of each group under narrower ranges and zero points beside its own."""
    scheme, least = parameters.scheme, costs(parameters, weight, gram)
    for step in range(19):
        if parameters.channel_scales is None:
            scales = (parameters.scales.float() * (1 - step / 32)).to(scheme.scale_dtype)
        else:
            scales = (parameters.scales.float() * (1 - step / 32)).round()
            scales = scales.clamp(1, rounding.most_multiplier(scheme)).to(torch.uint8)
        for shift in range(-2, 3) if parameters.zeros is not None else (0,):
            fields = {"scales": scales}
            if parameters.zeros is not None:
                moved = parameters.zeros.int() + shift
                fields["zeros"] = moved.clamp(0, (1 << scheme.bits) - 1).to(torch.uint8)
            least = torch.minimum(least, costs(with_fields(parameters, **fields), weight, gram))
    return least


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("grid", ["mse", "hessian", "block"])
@pytest.mark.parametrize(("n", "k"), [(33, 200), (1, 50), (16, 1)])
def test_scales_are_the_best_of_all_ranges(isa, scheme, grid, n, k, monkeypatch):
    scheme, weight, x = QuantScheme.parse(scheme), weights(n, k), inputs(k)
    gram, first = x.T @ x, rounding.fit(weight, scheme)
    assert cpu_calibration.searches_scales(weight, first, grid == "block")
    found = grids.search(weight, first, grid, gram)
    assert {name: value.dtype for name, value in found.fields.items()} == {
        name: value.dtype for name, value in first.fields.items()
    }
    weighs = {"mse": torch.eye(k), "hessian": gram.diagonal().diag(), "block": gram}[grid]
    cost, least = costs(found, weight, weighs), least_of_ranges(first, weight, weighs)
    # What fp32 takes for the error of a weight that a code hits is the rounding of both.
    noise = (SUM_BOUND * weight.double()).square().sum() * weighs.abs().double().sum()
    assert (cost <= least * (1 + SUM_BOUND) + noise).all()
    in_torch(monkeypatch)
    # Ties and scales that are solved for may fall otherwise, in few groups.
    reference = costs(grids.search(weight, first, grid, gram), weight, weighs)
    assert cost.sum() <= reference.sum() * 1.01 + noise


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_and_with_gaps_between_rows(isa, dtype):
    wide = weights(40, 150, dtype)
    weight = wide[:, 3:131]
    first = rounding.fit(weight, QuantScheme.parse("w4a16-g64"))
    found = grids.search(weight, first, "mse", None)
    same = grids.search(weight.float().contiguous(), first, "mse", None)
    assert torch.equal(found.scales, same.scales)
    assert torch.equal(found.zeros, same.zeros)
    assert not torch.equal(found.scales, first.scales)


@pytest.mark.parametrize("scheme", ["w4a16-g64", "w4a8-g64-asym", "w4a16-sym"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_keeps_to_itself(isa, scheme, value):
    weight = weights(20, 130)
    first = rounding.fit(weight, QuantScheme.parse(scheme))
    clean = grids.search(weight, first, "mse", None)
    weight[5, 70] = value
    found = grids.search(weight, first, "mse", None)
    others = torch.arange(20) != 5
    for name in ("scales",) if clean.zeros is None else ("scales", "zeros"):
        assert torch.equal(found.fields[name][others], clean.fields[name][others])
    assert found.scales.float().isfinite().all()


def test_groups_of_zeros_stay(isa):
    weight = weights(20, 128)
    weight[3] = 0
    weight[4, 64:] = 0
    found = grids.search(weight, rounding.fit(weight, QuantScheme.parse("w4a16-g64")), "mse", None)
    codes = rounding.encode_rows(weight, found, 0)
    made = QuantizedWeight(scheme=found.scheme, codes=codes, **found.fields).dequantize()
    assert not made[3].any()
    assert not made[4, 64:].any()


@pytest.mark.parametrize("grid", ["hessian", "block"])
def test_scales_do_not_depend_on_threads(isa, on_threads, grid):
    weight, x = weights(100, 300), inputs(300)
    first = rounding.fit(weight, QuantScheme.parse("w4a16-g64"))
    results = on_threads(lambda: grids.search(weight, first, grid, x.T @ x))
    assert all(torch.equal(result.scales, results[0].scales) for result in results)
    assert all(torch.equal(result.zeros, results[0].zeros) for result in results)


def exact_block(scheme, n, columns, k):
    """Columns of `k` whose rounding takes no more bits than fp32 has, ties among them."""
    scheme = QuantScheme.parse(scheme)
    groups = scheme.groups(k)
    fields = {"scales": 2.0 ** torch.randint(-2, 2, (n, groups)).to(scheme.scale_dtype)}
    if not scheme.symmetric:
        fields["zeros"] = torch.randint(0, 1 << scheme.bits, (n, groups), dtype=torch.uint8)
    if scheme.scale_levels == "two":
        fields |= {
            "scales": torch.randint(1, 8, (n, groups), dtype=torch.uint8),
            "channel_scales": 2.0 ** torch.randint(-4, 0, (n,)).float(),
        }
    parameters = WeightParameters(scheme=scheme, n=n, k=k, **fields)
    left = torch.randint(-64, 64, (columns, n)) / 16.0
    factors = torch.randint(-1, 2, (columns, columns)) * (torch.rand(columns, columns) < 0.1)
    factors = factors.triu(1).float() + torch.diag(2.0 ** torch.randint(-1, 2, (columns,)))
    return parameters, left, factors


@pytest.mark.parametrize("scheme", ["w4a16-g16", "w8a16-g16-sym", "w4a8-g16-asym", "w2a16"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (16, 8), (37, 45), (100, 20)])
@pytest.mark.parametrize("has_values", [False, True])
def test_columns_are_those_of_torch(isa, scheme, shape, has_values, monkeypatch):
    n, count = shape
    k = count + 7
    parameters, left, factors = exact_block(scheme, n, count, k)
    order = torch.randperm(k)[:count].tolist()
    values = torch.randint(-32, 32, (count, n)) / 16.0 if has_values else None
    codes = torch.full((2, k, n), 77, dtype=torch.uint8)
    moved = Columns(parameters).round_block(left.clone(), factors, order, codes[0], values)
    in_torch(monkeypatch)
    wanted = Columns(parameters).round_block(left.clone(), factors, order, codes[1], values)
    assert torch.equal(moved, wanted)
    assert torch.equal(codes[0], codes[1])


def test_columns_that_are_not_finite_keep_to_their_rows(isa):
    parameters, left, factors = exact_block("w4a16-g16", 20, 24, 24)
    codes = torch.empty(2, 24, 20, dtype=torch.uint8)
    clean = Columns(parameters).round_block(left.clone(), factors, list(range(24)), codes[0])
    left[4, 3], left[6, 11] = float("nan"), float("inf")
    moved = Columns(parameters).round_block(left.clone(), factors, list(range(24)), codes[1])
    others = torch.tensor([row not in (3, 11) for row in range(20)])
    assert torch.equal(moved[:, others], clean[:, others])
    assert torch.equal(codes[0][:, others], codes[1][:, others])
    assert moved[4, 3].isnan()
    assert (codes <= 15).all()


def test_columns_do_not_depend_on_threads(isa, on_threads):
    parameters = rounding.fit(weights(300, 128), QuantScheme.parse("w4a16-g32"))
    left, factors = torch.randn(128, 300), torch.eye(128) + 0.1 * torch.randn(128, 128)

    def rounded():
        codes = torch.empty(128, 300, dtype=torch.uint8)
        moved = Columns(parameters).round_block(left.clone(), factors, list(range(128)), codes)
        return torch.cat((moved, codes.float()))

    results = on_threads(rounded)
    assert all(torch.equal(result, results[0]) for result in results)


SHAPES = ((1, 1), (7, 50), (513, 100), (300, 48), (2200, 97))
"""Rows and columns: fewer than a panel, whole ones, more rows than are packed at once."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_summed_in_fp32(isa, shape, dtype):
    x = torch.randn(shape).to(dtype)
    product, exact = Gram.product(x, None), x.double().T @ x.double()
    assert product.dtype == torch.float32
    if isa != "portable":  # which leaves it to torch
        assert torch.equal(product, product.T)
    assert ((product - exact).abs() <= SUM_BOUND * (x.double().abs().T @ x.double().abs())).all()
    whole = torch.randint(-8, 9, shape).to(dtype)
    assert torch.equal(Gram.product(whole, None).double(), whole.double().T @ whole.double())


@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_differences(isa, shape):
    x, dense = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
    # Rounded to bf16 as x is.
    moved = (dense.float() - x.float()).bfloat16().double()
    product, exact = Drift.product(x, dense), moved.T @ x.double()
    assert ((product - exact).abs() <= SUM_BOUND * (moved.abs().T @ x.double().abs())).all()
    whole = torch.randint(-8, 9, (shape[0], shape[1] + 60)).float()
    found = cpu_calibration.transposed_product(x.float().sign(), whole)
    assert torch.equal(found.double(), x.double().sign().T @ whole.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_numbers_that_are_not_finite_reach_their_products_alone(isa, dtype):
    x = torch.randn(20, 70).to(dtype)
    x[3, 50], x[19, 2] = float("nan"), float("inf")
    product = Gram.product(x, None)
    touched = torch.zeros(70, dtype=torch.bool)
    touched[[50, 2]] = True
    expected = touched[:, None] | touched
    assert torch.equal(~product.isfinite(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_do_not_depend_on_threads_nor_on_strides(isa, dtype, on_threads):
    x = torch.randn(700, 200).to(dtype)
    results = on_threads(lambda: Gram.product(x, None))
    results.append(Gram.product(x.T.contiguous().T, None))
    assert all(torch.equal(result, results[0]) for result in results)
