"""weight_only_mma in the emulator: every schedule, tails, real zero points, determinism, errors."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels import WQLinear, rounding
from qkernels.layouts import FRAGMENT, pack
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight
from tests.bounds import FROBENIUS_BOUND
from tests.emulated.emulator import (
    BLOCK_ROWS,
    STAGE_COLUMNS,
    Way,
    counted,
    needs_emulator,
    product,
    set_seed,
)

pytestmark = needs_emulator

SCHEDULES = [  # tokens, parts of K, stages
    *itertools.product(("w4a16-g32", "w8a16-g48"), (8, 16, 32, 64), (1, 3), (2, 3)),
    *itertools.product(("w2a16-g32", "w3a16-g64"), (8, 16, 32, 64), (3,), (2,)),
    *(("w4a16-g32", *deep) for deep in ((8, 5, 6), (16, 2, 5), (32, 1, 4), (64, 2, 4))),
]


def quantized(n, k, text="w4a16-g64", bias=False):
    return rounding.quantize(torch.randn(n, k), text, bias=torch.randn(n) if bias else None)


def error(y, x, weight):
    exact = x.double()[:, : weight.k] @ weight.dequantize().double().t()
    if weight.bias is not None:
        exact += weight.bias.double()
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("text", "tokens", "parts", "stages"), SCHEDULES)
def test_every_schedule(text, tokens, parts, stages):
    """Tails of rows, tokens and columns; the pipeline starts over, and the last part is shorter."""
    weight = quantized(33, 72, text)  # one stage: the pipeline never fills
    x = torch.randn(1, 72, dtype=torch.float16)
    units = 2 if weight.scheme.bits >= 4 else 1  # of all columns
    y = product(x, pack(weight, FRAGMENT), tokens=tokens, parts=min(parts, units), stages=stages)
    assert error(y, x, weight) <= FROBENIUS_BOUND[torch.float16]

    m, n = tokens + 1, BLOCK_ROWS[tokens] + 33
    all_stages = (stages + 1) * parts
    k = all_stages * STAGE_COLUMNS[weight.scheme.bits][tokens] - 64 + 40
    weight = quantized(n, k, text)
    x = torch.randn(m, k, dtype=torch.float16)
    set_seed(parts)
    with counted() as counters:
        y = product(x, pack(weight, FRAGMENT), tokens=tokens, parts=parts, stages=stages)
    assert Way.of(counters, m, n, tokens) == Way(parts, all_stages)
    assert error(y, x, weight) <= FROBENIUS_BOUND[torch.float16]


@pytest.mark.parametrize("n", [1, 4, 31, 64, 97])
@pytest.mark.parametrize("k", [8, 64, 136, 513])
def test_tails(n, k):
    """Integers, whose sums fp32 holds: the only rounding is that of the result."""
    for m, dtype in ((1, torch.float16), (8, torch.bfloat16), (17, torch.float16)):
        base = quantized(n, k, "w4a16-g16")
        ones = torch.ones_like(base.scales)
        weight = QuantizedWeight(
            scheme=base.scheme, codes=base.codes, scales=ones, zeros=base.zeros
        )
        x = torch.zeros(m, -(-k // 8) * 8, dtype=dtype)
        x[:, :k] = torch.randint(-2, 3, (m, k))
        exact = x[:, :k].float() @ weight.dequantize().t()
        assert torch.equal(product(x, pack(weight, FRAGMENT)), exact.to(dtype)), m


def of_integers(n, k, group, bits):
    """A weight of integers, and of halves in every other group: exact in both types of x."""
    scheme = QuantScheme.parse(f"w{bits}a16-g{group}")
    groups = scheme.groups(k)
    scales = torch.ones(n, groups, dtype=torch.float16)
    scales[:, ::2] = 0.5
    return QuantizedWeight(
        scheme=scheme,
        codes=torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8),
        scales=scales,
        # code - zero has 8 bits at most, so that bf16 holds it.
        zeros=torch.randint(0, 1 << bits, (n, groups), dtype=torch.uint8),
    )


@given(
    m=st.integers(1, 80),
    n=st.integers(1, 300),
    k=st.integers(1, 700),
    group=st.integers(16, 256),
    bits=st.sampled_from([2, 3, 4, 8]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_any_shape_and_group_through_the_layer(m, n, k, group, bits, dtype, seed):
    torch.manual_seed(seed)
    set_seed(seed)
    weight = of_integers(n, k, group, bits)
    layer = WQLinear.from_weight(weight, backend="emulated")
    x = torch.randint(-2, 3, (m, k)).to(dtype)
    exact = x.double() @ weight.dequantize().double().t()
    assert torch.equal(layer(x), exact.float().to(dtype))


@given(
    m=st.integers(1, 20),
    n=st.integers(1, 150),
    k=st.integers(1, 4000),
    group=st.integers(1, 16).map(lambda steps: 16 * steps),
    bits=st.sampled_from([2, 3, 4, 8]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    tokens=st.sampled_from(list(BLOCK_ROWS)),
    blocks=st.integers(1, 9),
    stages=st.integers(2, 6),
    unit=st.sampled_from([1, 2]),
    each_tile=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=100)
def test_any_shape_in_any_schedule(
    m, n, k, group, bits, dtype, tokens, blocks, stages, unit, each_tile, seed
):
    """Shares of blocks begin and end anywhere: in a tile, in a group, with a tile."""
    unit = 2 if bits < 4 else unit
    units = -(-k // (64 * unit))
    if not each_tile:
        units *= -(-m // tokens) * -(-n // BLOCK_ROWS[tokens])
    if bits <= 4 and tokens > 8:
        stages = min(stages, 5)  # six, with the scales of groups of 16, are more than a block has
    schedule = {"blocks": min(blocks, units), "stages": stages, "unit": unit}
    torch.manual_seed(seed)
    set_seed(seed)
    weight = of_integers(n, k, group, bits)
    x = torch.zeros(m, -(-k // 8) * 8, dtype=dtype)
    x[:, :k] = torch.randint(-2, 3, (m, k))
    exact = x[:, :k].double() @ weight.dequantize().double().t()
    y = product(x, pack(weight, FRAGMENT), tokens=tokens, each_tile=each_tile, **schedule)
    assert torch.equal(y, exact.float().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zero_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
def test_real_zero_points(dtype, zero_dtype, bits):
    n, k = 40, 2560  # more groups than a block has room for at a time
    base = quantized(n, k, f"w{bits}a16-g64")
    middle = (1 << bits) / 2
    for spread in (0.3, 3.0, 0.9 * middle):
        zeros = (middle + spread * torch.randn(n, k // 64)).to(zero_dtype)
        weight = QuantizedWeight(
            scheme=base.scheme, codes=base.codes, scales=base.scales, zeros=zeros
        )
        x = torch.randn(5, k, dtype=dtype)
        y = product(x, pack(weight, FRAGMENT), tokens=8, stages=2)
        assert error(y, x, weight) <= FROBENIUS_BOUND[dtype], spread


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("bias_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bias_of_every_type(bias_dtype, parts):
    weight = quantized(70, 1536)
    bias = (100 * torch.randn(70)).to(bias_dtype)
    x = torch.zeros(3, 1536, dtype=torch.bfloat16)
    with counted() as counters:
        y = product(x, pack(weight, FRAGMENT), bias, tokens=8, parts=parts)
    assert Way.of(counters, 3, 70, 8).parts == parts
    assert torch.equal(y, bias.to(torch.bfloat16).expand(3, -1))


@pytest.mark.parametrize("each_tile", [True, False])
@pytest.mark.parametrize("tokens", BLOCK_ROWS)
def test_the_same_bits_in_every_order_of_blocks_and_threads(tokens, each_tile):
    """Each column comes twice, with x of either sign: the exact result is 0.

    So what is left are the roundings of the sums, which another order of adding makes differ. Of
    two parts of K it would not: a + b is b + a.
    """
    m, n, parts = 3, 70, 4
    tiles = -(-n // BLOCK_ROWS[tokens])
    # Each tile alone has four parts; shares of the line of all reach into the next tile.
    blocks = parts * tiles if each_tile else parts * tiles + 1
    schedule = {"blocks": parts if each_tile else blocks, "each_tile": each_tile}
    half = parts * STAGE_COLUMNS[4][tokens]
    order = torch.randperm(2 * half)
    codes = torch.randint(0, 16, (n, half), dtype=torch.uint8).repeat(1, 2)[:, order]
    scales = torch.ones(n, 1, dtype=torch.float16)
    weight = QuantizedWeight(scheme=QuantScheme.parse("w4a16-sym"), codes=codes, scales=scales)
    packed = pack(weight, FRAGMENT)
    # Of many magnitudes: no fp32 sum of them is exact.
    x = (torch.randn(m, half) * torch.randint(-8, 8, (m, half)).exp2()).to(torch.float16)
    x = torch.cat([x, -x], 1)[:, order].contiguous()
    results = []
    for seed in range(16):
        set_seed(seed)
        with counted() as counters:
            results.append(product(x, packed, tokens=tokens, stages=3, **schedule))
        assert counters["blocks"] == blocks
    assert results[0].count_nonzero() > results[0].numel() / 2
    assert all(torch.equal(result, results[0]) for result in results)


def test_rows_of_x_that_lie_apart():
    """Slices of a wider x, such as what a fused projection leaves for one of its layers."""
    weight = quantized(40, 136)
    wide = torch.full((5, 200), torch.nan, dtype=torch.float16)
    wide[:, 8:144] = torch.randn(5, 136)
    x = wide[:, 8:144]
    packed = pack(weight, FRAGMENT)
    assert torch.equal(product(x, packed), product(x.contiguous(), packed))


def test_no_rows():
    assert product(
        torch.empty(0, 128, dtype=torch.float16), pack(quantized(8, 128), FRAGMENT)
    ).shape == (0, 8)


def test_wrong_input_is_named():
    packed = pack(quantized(32, 128), FRAGMENT)
    x = torch.randn(2, 128, dtype=torch.float16)
    unaligned = torch.randn(2 * 128 + 1, dtype=torch.float16)[1:].view(2, 128)
    for bad, message in (
        (x[:, :64], r"shape \[M, 128\], got \[2, 64\]"),
        (x.float(), "fp16 or bf16"),
        (x[0], r"shape \[M, 128\]"),
        (x.repeat(1, 2)[:, ::2], "contiguous along K"),
        (unaligned, "unaligned address"),
        (torch.randn(2, 132, dtype=torch.float16)[:, :128], "aligned to 16 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            product(bad, packed)
    for bias, message in (
        (torch.zeros(31), r"bias must have shape \[32\], got \[31\]"),
        (torch.zeros(32, dtype=torch.int32), "bias must be fp16"),
    ):
        with pytest.raises(ValueError, match=message):
            product(x, packed, bias)
    for schedule, message in (
        ({"tokens": 24}, "8, 16, 32 or 64 tokens"),
        ({"tokens": 8, "stages": 7}, "2 to 6 stages"),
        ({"tokens": 8, "blocks": 0}, "at least one"),
        ({"tokens": 8, "blocks": 3}, "a block for each unit of work at most"),
        ({"tokens": 8, "parts": 3}, "a block for each unit of work at most"),
        ({"tokens": 8, "unit": 3}, "1 or 2 chunks"),
    ):
        with pytest.raises(ValueError, match=message):
            product(x, packed, **schedule)


def test_weights_that_do_not_fit_are_named():
    packed = pack(quantized(32, 128), FRAGMENT)
    words, scales, zeros = (packed.buffers[name] for name in ("words", "scales", "zeros"))
    x = torch.randn(2, 128, dtype=torch.float16)
    call = torch.ops.qkernels_emulated.weight_only_mma
    for arguments, message in (
        ((words, scales, zeros, None, None, 64, 128, 64, "int4"), "words must have shape"),
        ((words, scales, zeros, None, None, 32, 128, 32, "int4"), "scales must have shape"),
        ((words, scales, zeros, None, None, 32, 128, 24, "int4"), "multiple of 16"),
        ((words, scales, zeros, None, None, 32, 128, 64, "int5"), "code must be int2, int3"),
        (
            (words, scales, zeros, None, None, 32, 128, 64, "table4"),
            "int4 and int8 codes take zeros",
        ),
        ((words, scales, None, None, None, 32, 128, 64, "table4"), "table goes with table4"),
        ((words.float(), scales, zeros, None, None, 32, 128, 64, "int4"), "words must be int32"),
        ((words, scales.int(), zeros, None, None, 32, 128, 64, "int4"), "scales must be fp16"),
        ((words, scales, zeros.int(), None, None, 32, 128, 64, "int4"), "zeros must be uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            call(x, *arguments)
