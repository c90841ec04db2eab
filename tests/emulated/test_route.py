"""The route of the CUDA kernels in the emulator: any form of x, the same as the kernels alone."""

import pytest
import torch
import torch.nn.functional as F

from qkernels import WQLinear, rounding
from qkernels.errors import WeightError
from qkernels.layouts import FRAGMENT, pack
from qkernels.weight import QuantizedWeight
from tests.emulated.emulator import counted, needs_emulator, product
from tests.test_preparation import FORMS

pytestmark = needs_emulator
N = 40


def weight_of(text, k, optional=()):
    weight = rounding.quantize(
        torch.randn(N, k),
        text,
        bias=torch.randn(N),
        perm=torch.randperm(k) if "perm" in optional else None,
    )
    if "input_factor" not in optional:
        return weight
    fields = {**weight.fields, "input_factor": torch.rand(k) + 0.5}
    return QuantizedWeight(scheme=weight.scheme, codes=weight.codes, bias=weight.bias, **fields)


@pytest.mark.parametrize("k", [64, 100, 200])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [(), (1,), (5,), (2, 3), (0,)])
def test_any_shape_and_strides(k, form, rows):
    layer = WQLinear.from_weight(weight_of("w4a16-g64", k), backend="emulated")
    x = FORMS[form](torch.randn(*rows, k, dtype=torch.float16))
    y = layer(x)
    assert y.shape == (*rows, N) and y.is_contiguous()
    assert torch.equal(y, layer(x.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", ["w4a16-g64", "w8a16", "nf4-g64", "w4a16-gtensor"])
@pytest.mark.parametrize("optional", [(), ("perm",), ("input_factor", "perm")])
@pytest.mark.parametrize("m", [3, 257])
def test_as_the_kernels_alone(text, dtype, optional, m):
    k = 200
    weight = weight_of(text, k, optional)
    x = torch.randn(m, k).to(dtype)
    rows = x
    if "input_factor" in optional:
        rows = (x.float() * weight.input_factor).to(dtype)
    if "perm" in optional:
        rows = rows[:, weight.perm].contiguous()
    packed = pack(weight, FRAGMENT)
    layer = WQLinear.from_weight(weight, backend="emulated")
    if m <= 256:
        want = product(rows, packed, weight.bias)
    else:
        identity = torch.eye(k, dtype=dtype)
        want = F.linear(rows, product(identity, packed).t().contiguous(), weight.bias.to(dtype))
    for _ in range(2):
        assert torch.equal(layer(x), want)


SCHEDULE = ("blocks", "mma", "sync_threads")
"""Counters of the emulator that tell schedules apart."""


def test_numbers_of_rows_in_turn():
    """A layer keeps the schedule of its last call, and takes it where that is the right one."""
    k = 1024
    weight = weight_of("w4a16-g64", k)
    packed = pack(weight, FRAGMENT)
    layers = [WQLinear.from_weight(weight, backend="emulated") for _ in range(2)]
    schedules = set()
    for i, m in enumerate([1, 1, 64, 1, 17, 100, 8, 9, 9]):
        x = torch.randn(m, k, dtype=torch.float16)
        with counted() as want:
            y = product(x, packed, weight.bias)
        with counted() as done:
            assert torch.equal(layers[i % 2](x), y)
        schedule, wanted = ([each[key] for key in SCHEDULE] for each in (done, want))
        assert schedule == wanted
        schedules.add(tuple(schedule))
    assert len(schedules) > 3


@pytest.mark.parametrize("group", [24, 40, 100])
def test_groups_are_filled_up(group):
    """Integers, whose sums are exact in every order."""
    k = 200
    base = weight_of(f"w4a16-g{group}", k)
    fields = {**base.fields, "scales": torch.ones_like(base.scales)}
    weight = QuantizedWeight(scheme=base.scheme, codes=base.codes, **fields)
    layer = WQLinear.from_weight(weight, backend="emulated")
    for m in (1, 7, 257):
        x = torch.randint(-2, 3, (m, k)).half()
        assert torch.equal(layer(x), (x.float() @ weight.dequantize().t()).half())


def test_batch_invariance_through_the_layer():
    layer = WQLinear.from_weight(
        weight_of("w4a16-g64", 1024), backend="emulated", batch_invariant=True
    )
    x = torch.randn(300, 1024, dtype=torch.float16)
    together = layer(x)
    for rows in (slice(0, 1), slice(5, 70)):
        assert torch.equal(layer(x[rows]), together[rows])


def test_what_is_wrong_is_named():
    layer = WQLinear.from_weight(weight_of("w4a16-g64", 200), backend="emulated")
    codebook = WQLinear.from_weight(weight_of("nf4-g64", 200), backend="emulated")
    x = torch.randn(2, 200, dtype=torch.float16)
    for _ in range(2):
        with pytest.raises(WeightError, match=r"\[..., 200\], got \[2, 199\]"):
            layer(x[:, :199])
        with pytest.raises(WeightError, match="float64"):
            layer(x.double())
        with pytest.raises(NotImplementedError, match="bf16 holds"):
            codebook(x.float())
        layer(x)
    buffers = list(layer.packed.buffers.values())
    with pytest.raises(ValueError, match="scales must have shape"):
        torch.ops.qkernels.linear(x, [buffers[0], buffers[1][:1], *buffers[2:]], None, layer._spec)
