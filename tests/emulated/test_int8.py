"""int8_mma in the emulator: every schedule, exact sums, groups, zero points, int8 out, errors."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels import reference, rounding
from qkernels.layouts import FRAGMENT_INT8, fragment_int8, pack
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight
from tests.bounds import FROBENIUS_BOUND
from tests.emulated.emulator import (
    BLOCK_ROWS,
    INT8_STAGE_COLUMNS,
    Way,
    counted,
    integer_product,
    needs_emulator,
    set_seed,
)

pytestmark = needs_emulator

WHOLE = ("w8a8", "w4a8", "w4a8-asym", "w4a8-g64", "w4a8-g96-asym", "w4a8-g32-asym")
GROUPED = ("w8a8-g128", "w4a8-g64-flat", "w4a8-g128-flat-asym", "w8a8-g32")
SCHEDULES = [  # tokens, parts of K, stages
    *itertools.product(("w8a8", "w4a8", "w4a8-g32"), (8, 16, 32, 64), (1, 3), (2, 3)),
    *itertools.product(("w8a8-g48", "w4a8-g64-flat"), (8, 16, 32), (2,), (3,)),
    *(("w8a8", *deep) for deep in ((8, 5, 6), (16, 2, 5), (32, 1, 4), (64, 2, 4))),
]


def quantized(n, k, text, bias=False):
    """Of two levels: multipliers and zero points with which all numbers, and some barely, fit."""
    scheme = QuantScheme.parse(text)
    if scheme.scale_levels != "two" and scheme.symmetric:
        return rounding.quantize(torch.randn(n, k), text, bias=torch.randn(n) if bias else None)
    groups = scheme.groups(k)
    zeros = torch.randint(0, 17, (n, groups), dtype=torch.uint8)
    if scheme.symmetric:
        zeros.fill_(8)
    most = torch.where(zeros > 0, 128 // zeros.clamp(min=1), 255)
    most = torch.minimum(most, 127 // (15 - zeros.short()).clamp(min=1)).clamp(max=255)
    multipliers = (torch.rand(n, groups) * most + 1).floor().clamp(max=most).to(torch.uint8)
    two = scheme.scale_levels == "two"
    return QuantizedWeight(
        scheme=scheme,
        codes=torch.randint(0, 16, (n, k), dtype=torch.uint8),
        scales=multipliers if two else 0.01 + torch.rand(n, groups).to(scheme.scale_dtype),
        channel_scales=0.01 + torch.rand(n) if two else None,
        zeros=None if scheme.symmetric else zeros,
        bias=torch.randn(n) if bias else None,
    )


def rows(m, k):
    """Any int8 rows, their scales, and zero points."""
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    return x, torch.rand(m) + 0.5, torch.randint(-128, 128, (m,), dtype=torch.int32)


def check(y, x, scale, packed, bias=None, dtype=torch.float32, zero=None):
    """Of whole sums every bit; else what the order of fp32 sums leaves."""
    expected = reference.linear_quantized(x, scale, packed, bias, dtype, zero)
    scheme = packed.scheme
    if scheme.scale_levels == "two" or scheme.groups(packed.k) == 1:
        assert torch.equal(y, expected)
    else:
        exact = reference.linear_quantized(x, scale, packed, bias, torch.float32, zero).double()
        assert (y.double() - exact).norm() <= FROBENIUS_BOUND[dtype] * exact.norm()


@pytest.mark.parametrize(("text", "tokens", "parts", "stages"), SCHEDULES)
def test_every_schedule(text, tokens, parts, stages):
    """Tails of rows, tokens and columns; the pipeline starts over, and the last part is shorter."""
    packed = pack(quantized(33, 72, text), FRAGMENT_INT8)  # one stage: the pipeline never fills
    x, scale, zero = rows(1, 72)
    y = integer_product(x, scale, packed, tokens=tokens, parts=min(parts, 2), stages=stages)
    check(y, x, scale, packed)

    m, n = tokens + 1, BLOCK_ROWS[tokens] + 33
    all_stages = (stages + 1) * parts
    k = all_stages * INT8_STAGE_COLUMNS[packed.scheme.bits][tokens] - 64 + 40
    if "g48" in text:
        k = k * 3 // 4 // 48 * 48  # columns in memory are what they were
    packed = pack(quantized(n, k, text), FRAGMENT_INT8)
    x, scale, zero = rows(m, k)
    schedule = {"tokens": tokens, "parts": parts, "stages": stages}
    for each in (None, zero):
        set_seed(parts)
        with counted() as counters:
            y = integer_product(x, scale, packed, zero=each, **schedule)
        assert Way.of(counters, m, n, tokens) == Way(parts, all_stages)
        check(y, x, scale, packed, zero=each)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("text", WHOLE + GROUPED)
def test_types_of_y_and_of_its_bias(text, dtype):
    for m, n, bias_dtype in ((1, 30, torch.float32), (9, 36, torch.bfloat16), (20, 97, dtype)):
        weight = quantized(n, 712, text, bias=True)
        packed, bias = pack(weight, FRAGMENT_INT8), weight.bias.to(bias_dtype)
        x, scale, zero = rows(m, 712)
        scale *= 1e-3
        for each in (None, zero):
            y = integer_product(x, scale, packed, bias, dtype, each)
            assert y.dtype == dtype
            check(y, x, scale, packed, bias, dtype, each)


@given(
    m=st.integers(1, 80),
    n=st.integers(1, 300),
    k=st.integers(1, 900),
    group=st.integers(1, 256),
    text=st.sampled_from(
        ["w8a8", "w4a8", "w4a8-g{}", "w4a8-g{}-asym", "w8a8-g{}", "w4a8-g{}-flat"]
    ),
    shifted=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_any_shape_and_group(m, n, k, group, text, shifted, seed):
    """Whatever schedule is chosen for it. Groups of any size are padded to 32 columns."""
    torch.manual_seed(seed)
    set_seed(seed)
    weight = quantized(n, k, text.format(group))
    x, scale, zero = rows(m, k)
    if weight.scheme.scale_levels == "one":  # then fp32 holds all sums of groups
        scales = torch.randint(0, 3, weight.scales.shape).exp2().to(weight.scales.dtype)
        weight = QuantizedWeight(scheme=weight.scheme, codes=weight.codes, scales=scales)
        x, zero = x % 7 - 3, zero % 7 - 3
    packed = pack(weight, FRAGMENT_INT8)
    shift = zero if shifted else None
    y = integer_product(x, scale, packed, zero=shift)
    assert torch.equal(y, reference.linear_quantized(x, scale, packed, None, torch.float32, shift))


@pytest.mark.parametrize("text", ["w8a8", "w4a8", "w4a8-g64-asym"])
def test_the_largest_sums(text):
    """Of all columns that int32 has room for; one chunk more is refused."""
    zero = torch.tensor([127, -128], dtype=torch.int32)
    for each, k in ((None, 131_008), (zero, 65_728)):
        base = quantized(2, k, text)
        codes = torch.zeros(2, k, dtype=torch.uint8)
        codes[1] = (1 << base.scheme.bits) - 1
        more = {}
        if "g64" in text:
            most = torch.tensor([[16], [17]], dtype=torch.uint8).expand(-1, base.scheme.groups(k))
            zeros = torch.tensor([[8], [8]], dtype=torch.uint8).expand_as(most)
            more = {"channel_scales": torch.ones(2), "zeros": zeros.contiguous()}
        scales = most.contiguous() if more else torch.ones_like(base.scales)
        weight = QuantizedWeight(scheme=base.scheme, codes=codes, scales=scales, **more)
        packed = pack(weight, FRAGMENT_INT8)
        x = torch.full((2, k), -128, dtype=torch.int8)
        x[1] = 127
        y = integer_product(x, torch.ones(2), packed, zero=each)
        check(y, x, torch.ones(2), packed, zero=each)
        assert y.abs().max() > 2**23
    call = torch.ops.qkernels_emulated.int8_mma
    scale, scales = torch.ones(1), torch.ones(1, 32)
    for each, k, most in ((None, 131_136, 131071), (zero[:1], 65_856, 65793)):
        words = torch.zeros(fragment_int8.words_shape(2, k, 8), dtype=torch.int32)
        x = torch.zeros(1, k, dtype=torch.int8)
        with pytest.raises(ValueError, match=f"of {most} columns at most, got K of {k}"):
            call(x, scale, each, words, scales, None, None, None, 2, k, k, 8, torch.float32)


def test_sums_of_groups_are_exact():
    """Scales are powers of two, and all sums integers that fp32 holds."""
    for text, k in (("w8a8-g64", 640), ("w4a8-g32-flat", 320), ("w4a8-g96-flat-asym", 960)):
        base = quantized(70, k, text)
        scales = torch.randint(0, 3, base.scales.shape).exp2().to(base.scales.dtype)
        codes = torch.randint(0, 1 << base.scheme.bits, (70, k), dtype=torch.uint8)
        weight = QuantizedWeight(scheme=base.scheme, codes=codes, scales=scales, zeros=base.zeros)
        packed = pack(weight, FRAGMENT_INT8)
        x = torch.randint(-3, 4, (9, k), dtype=torch.int8)
        zero = torch.randint(-3, 4, (9,), dtype=torch.int32)
        for each in (None, zero):
            expected = reference.linear_quantized(
                x, torch.ones(9), packed, None, torch.float32, each
            )
            for tokens, parts in itertools.product((8, 16, 32), (1, 2)):
                schedule = {"tokens": tokens, "parts": parts, "stages": 2}
                y = integer_product(x, torch.ones(9), packed, zero=each, **schedule)
                assert torch.equal(y, expected), (text, tokens, parts)


@pytest.mark.parametrize("each_tile", [True, False])
@pytest.mark.parametrize("text", ["w8a8-g64", "w4a8-g64-flat"])
def test_the_same_bits_in_every_order_of_blocks_and_threads(text, each_tile):
    """Of fp32 sums of groups, which another order of adding would round otherwise."""
    m, n, k = 9, 70, 1536
    packed = pack(quantized(n, k, text), FRAGMENT_INT8)
    x, scale, zero = rows(m, k)
    schedule = {"tokens": 8, "blocks": 4 if each_tile else 11, "each_tile": each_tile, "stages": 2}
    results = []
    for seed in range(8):
        set_seed(seed)
        results.append(integer_product(x, scale, packed, zero=zero, **schedule))
    assert all(torch.equal(result, results[0]) for result in results)
    check(results[0], x, scale, packed, zero=zero)


@pytest.mark.parametrize("text", ["w8a8-g64", "w4a8-g64"])
def test_a_row_is_what_it_is_alone(text):
    packed = pack(quantized(70, 1500, text), FRAGMENT_INT8)
    x, scale, zero = rows(40, 1500)
    together = integer_product(x, scale, packed, zero=zero, schedule_m=16)
    for m in (0, 7, 39):
        one = slice(m, m + 1)
        alone = integer_product(x[one], scale[one], packed, zero=zero[one], schedule_m=16)
        assert torch.equal(alone[0], together[m])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [30, 36])
def test_what_a_reader_makes_of_y(dtype, n):
    """As a layer that is calibrated quantizes it: y as rounded, relu, scale, zero point."""
    for text, parts in (("w8a8", 1), ("w4a8-g64", 2), ("w8a8-g64", 1)):
        packed = pack(quantized(n, 640, text), FRAGMENT_INT8)
        x, scale, _ = rows(11, 640)
        scale *= 1e-2
        scale[2], scale[5] = torch.nan, 1e38
        bias = torch.randn(n)
        bias[3] = torch.inf if n == 30 else 0.0
        y = integer_product(x, scale, packed, bias, dtype, tokens=8, parts=parts)
        assert not y[2].isfinite().any()
        for relu, zero, step in itertools.product(
            (False, True), (None, torch.tensor(-9, dtype=torch.int32)), (0.37, 1e-30, 1e30)
        ):
            step = torch.tensor(step)
            row_scales = torch.empty(11, 1)
            got = integer_product(
                *(x, scale, packed, bias, dtype),
                tokens=8,
                parts=parts,
                y_scale=step,
                y_zero=zero,
                relu=relu,
                row_scales=row_scales,
            )
            expected, scales = reference.quantize_output(y, step, zero, relu)
            assert got.dtype == torch.int8 and torch.equal(got, expected)
            assert torch.equal(row_scales.isnan(), scales.isnan())
            assert torch.equal(row_scales.nan_to_num(), scales.nan_to_num())


def test_no_rows():
    packed = pack(quantized(8, 128, "w8a8"), FRAGMENT_INT8)
    assert integer_product(*rows(0, 128)[:2], packed).shape == (0, 8)


def test_wrong_input_is_named():
    packed = pack(quantized(32, 128, "w4a8-g64"), FRAGMENT_INT8)
    words, scales, channel = (
        packed.buffers[name] for name in ("words", "scales", "channel_scales")
    )
    x, scale, zero = rows(2, 128)
    unaligned = torch.zeros(2 * 128 + 1, dtype=torch.int8)[1:].view(2, 128)
    call = torch.ops.qkernels_emulated.int8_mma
    right = (x, scale, None, words, scales, None, channel, None, 32, 128, 64, 4, torch.float16)
    call(*right)
    for place, bad, message in (
        (0, x[:, :64], r"shape \[M, 128\], got \[2, 64\]"),
        (0, x.half(), "x must be int8"),
        (0, x.repeat(1, 2)[:, ::2], "contiguous along K"),
        (0, unaligned, "unaligned address"),
        (0, torch.zeros(2, 136, dtype=torch.int8)[:, :128], "aligned to 16 bytes"),
        (1, scale[:1], r"x_scale must have shape \[2\]"),
        (2, zero.float(), "x_zero must be Int"),
        (3, words.float(), "words must be int32"),
        (4, scales.half(), "scales must be uint8"),
        (5, scales.half(), "zeros must be Byte"),
        (6, None, "scales must be fp16, bf16 or fp32"),
        (7, torch.zeros(31), r"bias must have shape \[32\]"),
        (8, 64, "words must have shape"),
        (10, 48, "multiple of 32"),
        (11, 8, "words must have shape"),
        (11, 3, "bits must be 4 or 8, got 3"),
        (12, torch.int32, "y must be fp16, bf16 or fp32"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*right[:place], bad, *right[place + 1 :])
    grouped = pack(quantized(32, 128, "w4a8-g64-flat"), FRAGMENT_INT8)
    with pytest.raises(ValueError, match="32 tokens of int8 with floating scales of groups"):
        integer_product(x, scale, grouped, tokens=64)
    for schedule, message in (
        ({"tokens": 24}, "8, 16, 32 or 64 tokens"),
        ({"tokens": 8, "stages": 7}, "2 to 6 stages"),
        ({"filled": 65}, "has 1 to all of them filled, got 65"),
        ({"relu": True}, "go with a scale of y"),
        ({"y_scale": torch.tensor(1.0), "row_scales": torch.empty(3)}, "must be 2 numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*right, **schedule)
