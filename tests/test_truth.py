"""Layers against tests/truth.py: each scheme, with a column order and without, at every call."""

import pytest
import torch

import qkernels as qk
from qkernels.layouts import LAYOUTS, pack
from tests import schemes, truth
from tests.bounds import FROBENIUS_BOUND

# Several panels of 16 rows and blocks of 256 scales, of which some begin inside of a panel; groups
# that do not divide K.
N, K = 149, 328
NESTED = ("nf4-g16-dq", "w4a16-g16-dq", "w4a16-g16-sym-dq")
ALL = schemes.ALL + NESTED


def weight_of(text, n=N, k=K, ordered=False, bias=True):
    linear = torch.nn.Linear(k, n, bias=bias)
    scale = (
        0.02
        if qk.QuantScheme.parse(text).activation.granularity in ("static", "position")
        else None
    )
    weight = qk.WQLinear.from_linear(linear, text, activation_scale=scale).to_weight()
    return truth.with_order(weight, torch.randperm(k)) if ordered else weight


def same(got, exact):
    return torch.allclose(got.double(), exact, rtol=truth.WEIGHT_BOUND, atol=0)


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize("ordered", [False, True])
def test_a_weight_is_dequantized(text, ordered):
    weight = weight_of(text, ordered=ordered)
    exact = truth.dense(weight)
    assert same(weight.dequantize(), exact)
    for layout in LAYOUTS.values():
        if layout.why_not(weight.scheme) is None:
            assert same(pack(weight, layout).unpack().dequantize(), exact), layout.name


@pytest.mark.parametrize("text", ["w4a16-g24", "w4a16-gtensor", "w4a8-g64-asym", *NESTED])
def test_a_weight_is_dequantized_slice_by_slice(text, monkeypatch):
    monkeypatch.setattr("qkernels.weight.SLICE_ELEMENTS", 1)
    # Three slices of 256 rows, which take several blocks of scales each.
    weight = weight_of(text, n=700, k=88, ordered=True)
    exact = truth.dense(weight)
    assert same(weight.dequantize(), exact)
    layer = qk.WQLinear.from_weight(weight)
    assert same(layer.dequantize(), exact)
    assert same(layer.to_weight().dequantize(), exact)
    x = torch.randn(3, 88)
    for backend in (None, "reference"):
        y = qk.WQLinear.from_weight(weight, backend=backend)(x)
        assert truth.error(y, truth.product(weight, x)) <= FROBENIUS_BOUND[torch.float32]


# What a first call asks Python for is remembered for the others: each has all buffers to use.
CALLS = 3


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize("ordered", [False, True])
def test_every_call_is_right(text, ordered):
    weight = weight_of(text, ordered=ordered)
    layer = qk.WQLinear.from_weight(weight)
    for m, dtype in ((1, torch.bfloat16), (5, torch.float16), (20, torch.float32)):
        for _ in range(CALLS):
            x = torch.randn(m, K).to(dtype)
            y = layer(x)
            assert y.dtype == dtype
            assert truth.error(y, truth.product(weight, x)) <= FROBENIUS_BOUND[dtype]


@pytest.mark.parametrize("text", ["w8a8", "w8a8-g64", "w4a8-g64-asym", "w4a8-g64-flat", "w3a8-g64"])
@pytest.mark.parametrize("ordered", [False, True])
def test_every_call_with_quantized_x_is_right(text, ordered):
    weight = weight_of(text, ordered=ordered)
    layer = qk.WQLinear.from_weight(weight)
    for m in (1, 5, 20):
        for _ in range(CALLS):
            x = torch.randn(m, K)
            y = layer(qk.quantize_activation(x))
            assert truth.error(y, truth.product(weight, x)) <= FROBENIUS_BOUND[torch.float32]


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize("ordered", [False, True])
def test_every_gradient_is_right(text, ordered):
    weight = weight_of(text, ordered=ordered)
    layer, exact = qk.WQLinear.from_weight(weight), truth.dense(weight)
    for _ in range(CALLS):
        x = torch.randn(2, 3, K, requires_grad=True)
        grad = torch.randn(2, 3, N)
        layer(x).backward(grad)
        error = truth.error(x.grad, grad.double() @ exact)
        assert error <= FROBENIUS_BOUND[torch.float32]


# Sizes at which a CPU splits K, shares panels among threads and takes rows of x in several blocks.
@pytest.mark.parametrize("size", [(40, 4096, 5), (33, 2120, 70), (600, 1032, 1), (40, 520, 130)])
@pytest.mark.parametrize("text", ["w4a16-g64", "nf4-g64-dq", "w8a8", "w8a8-g64", "w4a8-g64-asym"])
def test_work_that_is_split_is_right(text, size):
    n, k, m = size
    weight = weight_of(text, n, k)
    layer, x = qk.WQLinear.from_weight(weight), torch.randn(m, k)
    exact, before = truth.product(weight, x), torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert truth.error(layer(x), exact) <= FROBENIUS_BOUND[torch.float32]
    finally:
        torch.set_num_threads(before)
