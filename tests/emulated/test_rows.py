"""Rows in the emulator: what the tests of every kernel, tests/test_row_kernels.py, do not ask."""

import pytest
import torch

from qkernels import reference
from qkernels.backends.rows import KINDS
from tests.bounds import GATE_BOUND, GATE_NEAR_BOUND
from tests.emulated.emulator import (
    counted,
    failing_launches,
    last_blocks_alone,
    needs_emulator,
    skipped_launches,
)
from tests.emulated.test_limits import promised
from tests.test_row_kernels import COLUMNS, DTYPES, rows_of

pytestmark = needs_emulator

SLOTS, PIECE = 256, 32
"""Bytes of shared memory of a block: what reductions take, and what each piece of eight does."""

MOST_ROWS, MOST_COLUMNS = (1 << 31) - 1, 1 << 30


def rows(x, kind="plain", other=None, gain=None, scale_of="token", scale=None, **more):
    bias, dtype = more.pop("bias", None), more.pop("dtype", torch.int8)
    operator = torch.ops.qkernels_emulated.quantize_rows
    return operator(x, kind, other, gain, bias, 1e-5, scale_of, scale, dtype, **more)


def equal(got, want):
    return all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(got, want, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", COLUMNS)
@pytest.mark.parametrize("scale", [None, 0.02, 1e-30, 1e30])
def test_fp8_rows_are_the_reference_bit_for_bit(dtype, k, scale):
    x = rows_of(dtype, k, "cpu")
    x[1] = torch.linspace(-1, 1, k) ** 5 * 448  # subnormal numbers too
    given = None if scale is None else torch.tensor(scale)
    scale_of = "token" if scale is None else "static"
    codes, scales, *_ = rows(x, scale_of=scale_of, scale=given, dtype=torch.float8_e4m3fn)
    want, want_scales = reference.quantize_rows(x, torch.float8_e4m3fn, given)
    got, want = codes.float(), want.float()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num().view(torch.int32), want.nan_to_num().view(torch.int32))
    if scale is None:
        assert torch.equal(scales.nan_to_num(-1.0), want_scales.nan_to_num(-1.0))


def test_every_number_of_fp8_and_the_midpoints_of_them():
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].unique()
    middles = (numbers[1:] + numbers[:-1]) / 2
    near = [torch.nextafter(middles, torch.tensor(end)) for end in (-1e9, 1e9)]
    x = torch.cat([numbers, middles, *near])[None]
    for scale in (1.0, 0.5, 3.0):
        given = torch.tensor(scale)
        codes = rows(x * scale, scale_of="static", scale=given, dtype=torch.float8_e4m3fn)[0]
        want = reference.quantize_rows(x * scale, torch.float8_e4m3fn, given)[0]
        assert torch.equal(codes.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("scale", [3e-45, 1e-20, 2.0**-60, 1.0, 1.7, 2.0**60, 1e38])
@pytest.mark.parametrize("dtype", DTYPES)
def test_given_scales_of_every_size(scale, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).to(dtype)[None]
    given = torch.tensor(scale)
    assert rows(x[:, :9], scale_of="static", scale=given)[1] == given
    for factor in (1.0, scale):
        values = (x.float() * factor).to(dtype)
        codes, scales, *_ = rows(values, scale_of="static", scale=given)
        assert torch.equal(codes, reference.quantize_rows(values, torch.int8, given)[0])
        assert scales.isnan()  # there are infinities in the row


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [1e-45, 1e-42, 1e-38, 1e38, 3e38])
def test_rows_at_the_ends_of_fp32(dtype, magnitude):
    x = (torch.rand(4, 50) * 2 - 1).double() * magnitude
    x[1].abs_()
    x[2].abs_().neg_()
    x = x.to(torch.float32).to(dtype)
    codes, scales, *_ = rows(x)
    want, want_scales = reference.quantize_rows(x, torch.int8)
    assert torch.equal(scales.nan_to_num(-1.0), want_scales.nan_to_num(-1.0))
    assert torch.equal(codes, want)
    codes, scales, zeros, *_ = rows(x, scale_of="asymmetric")
    want, want_scales, want_zeros = reference.quantize_rows_asymmetric(x)
    assert torch.equal(scales.nan_to_num(-1.0), want_scales.nan_to_num(-1.0))
    assert torch.equal(codes, want) and torch.equal(zeros, want_zeros)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", [-128, -7, 127])
def test_given_zero_points(zero, dtype):
    x = torch.randn(4, 301)
    x[1, 7], x[2, 300], x[3, 0] = torch.inf, torch.nan, 1e30
    x, zero = x.to(dtype), torch.tensor(zero, dtype=torch.int32)
    for scale in (0.02, 1e-30, 1e30):
        given = torch.tensor(scale)
        codes, scales, zeros, *_ = rows(x, scale_of="static", scale=given, zero=zero)
        assert torch.equal(codes, reference.quantize_with_zero(x, given, zero))
        assert torch.equal(scales.isfinite(), x.isfinite().all(1)) and scales[0] == given
        assert torch.equal(zeros, zero.expand(4))
    with pytest.raises(ValueError, match="goes with a static scale alone"):
        rows(x, zero=zero)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 8, 9, 16, 24, 301, 1024])
def test_padded_rows_end_in_zeros(k, dtype):
    x = torch.randn(3, k).to(dtype) + 2
    for more in (
        {},
        {"scale_of": "asymmetric"},
        {"scale_of": "static", "scale": torch.tensor(0.1), "zero": torch.tensor(5).int()},
        {"dtype": torch.float8_e4m3fn},
    ):
        plain, padded = rows(x, **more), rows(x, padded=True, **more)
        codes = padded[0].view(torch.int8)
        assert codes.shape == (3, -(-k // 16) * 16) and not codes[:, k:].any()
        assert torch.equal(codes[:, :k], plain[0].view(torch.int8))
        assert equal(padded[1:], plain[1:])


@pytest.mark.parametrize("k", [7, 64, 1000, 4099])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale_of", ["token", "asymmetric"])
def test_what_does_not_fit_shared_memory_is_read_again(k, kind, scale_of):
    x, other = torch.randn(2, 3, k).bfloat16()
    arguments = (x, kind, None if kind == "plain" else other)
    want = rows(*arguments, scale_of=scale_of)
    for pieces in (0, 1, k // 16):
        shared = SLOTS + PIECE * pieces
        assert equal(rows(*arguments, scale_of=scale_of, shared_bytes=shared), want)


def test_rows_beyond_the_shared_memory_of_any_device():
    x = torch.randn(2, 70_003).half()
    codes, scales, *_ = rows(x)
    want, want_scales = reference.quantize_rows(x, torch.int8)
    assert torch.equal(codes, want) and torch.equal(scales, want_scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_read_once_in_whole_sectors(dtype, kind):
    """Of fp32, a lane reads two halves of a sector after each other."""
    m, k, times = 3, 11008, dtype.itemsize // 2
    x, other = torch.randn(2, m, k).to(dtype)
    second = None if kind == "plain" else other
    with counted(x=x, other=other) as counters:
        codes, _, _, total, _ = rows(x, kind, second)
    assert counters["launches"] == 1 and counters["blocks"] == m
    for name in ("x",) if kind == "plain" else ("x", "other"):
        read = counters["regions"][name]["read"]
        assert read["least"] == read["most"] == times, name
        assert read["bytes"] == x.nbytes
    load = counters["global_load"]
    assert load["sectors"] * 32 == load["bytes"] * times
    assert load["instructions"] == load["bytes"] // 512  # 16 bytes a lane
    stored = codes.nbytes + (total.nbytes if total is not None else 0) + 4 * m
    assert counters["global_store"]["bytes"] == stored
    for side in ("shared_load", "shared_store"):
        assert counters[side]["wavefronts"] == counters[side]["ideal_wavefronts"]


def relative_error(got, exact):
    return ((got.double() - exact) / exact).abs()


def gate_of(kind, x):
    """What the kernel makes of gates x, from its rounded rows."""
    return rows(x[None], kind, torch.ones_like(x)[None], rounds=True)[4][0]


def test_gates_over_their_whole_range():
    x = torch.linspace(-13, 20, 20_001)
    exact = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    got = gate_of("gelu_mul", x)
    error = relative_error(got, exact)
    assert error[x > 4].max() <= 2**-23  # that of a rounding
    assert error[(x > -4) & (x != 0)].max() <= GATE_NEAR_BOUND
    assert error[x != 0].max() <= GATE_BOUND
    inner = 2 * (2 / torch.pi) ** 0.5 * (x.double() + 0.044715 * x.double() ** 3)
    exact = x.double() * torch.sigmoid(inner)
    kept = exact.abs() > 1e-30
    assert relative_error(gate_of("gelu_tanh_mul", x), exact)[kept].max() <= GATE_BOUND
    for kind in ("silu_mul", "gelu_mul", "gelu_tanh_mul"):
        ends = gate_of(kind, torch.tensor([0.0, -0.0, float("inf"), 3e38, -3e38, float("nan")]))
        assert torch.equal(ends[:5], torch.tensor([0, 0, float("inf"), 3e38, 0])), kind
        assert ends[5].isnan()


def test_scales_of_a_tensor_take_one_more_launch():
    x = torch.randn(50, 128).half()
    with counted(x=x) as counters:
        for _ in range(3):
            scale = rows(x, scale_of="tensor")[1]
            assert scale == x.float().abs().max() / 127
    assert counters["launches"] == 6
    assert counters["regions"]["x"]["read"]["most"] == 6


def test_no_rows_are_no_launch():
    with counted() as counters:
        for scale_of in ("token", "asymmetric"):
            assert rows(torch.randn(0, 64), scale_of=scale_of)[0].shape == (0, 64)
    assert counters["launches"] == 0


@pytest.mark.parametrize(("m", "k"), [(MOST_ROWS, 8), (3, MOST_COLUMNS), (1 << 22, 2056)])
def test_the_last_rows_of_the_largest_tensors(m, k):
    x = promised(m, k, dtype=torch.float16)
    with skipped_launches():
        codes = rows(x[:1, :8])[0]
    if k == MOST_COLUMNS:  # a block would read all of it
        with skipped_launches():
            assert rows(x)[0].shape == (m, k)
        return
    x[-1] = torch.randn(k)
    with last_blocks_alone():
        codes, scales, *_ = rows(x)
    want, want_scales = reference.quantize_rows(x[-1:], torch.int8)
    assert torch.equal(codes[-1:], want) and torch.equal(scales[-1:], want_scales)


def test_failing_launches_are_errors_with_their_words():
    x = torch.randn(3, 64)
    want = rows(x, scale_of="tensor")
    with failing_launches("no kernel image is available", "activations/quantize_rows.cu"):
        for scale_of in ("token", "tensor"):
            with pytest.raises(RuntimeError, match="no kernel image is available"):
                rows(x, scale_of=scale_of)
    assert equal(rows(x, scale_of="tensor"), want)


def test_what_is_wrong_is_named():
    x, one = torch.randn(4, 64), torch.tensor(1.0)
    wide = promised(2, MOST_COLUMNS + 1, dtype=torch.float16)
    for call, message in (
        (lambda: rows(x[0]), r"x must have 2 dimensions, got shape \[64\]"),
        (lambda: rows(x.double()), "x must be fp16, bf16 or fp32, got Double"),
        (lambda: rows(x.t()), r"x must have adjacent columns, got strides \[1, 64\]"),
        (lambda: rows(wide), f"and {MOST_COLUMNS} columns, got shape"),
        (lambda: rows(x, "relu"), "kind must be plain, rms_norm, silu_mul, .* got relu"),
        (lambda: rows(x, scale_of="block"), "token, asymmetric, static or tensor, got block"),
        (lambda: rows(x, scale_of="static"), "a scale goes with static scales alone"),
        (lambda: rows(x, scale=one), "a scale goes with static scales alone"),
        (lambda: rows(x, scale_of="static", scale=one[None]), r"scale must have shape \[\]"),
        (lambda: rows(x, "silu_mul"), "silu_mul needs the rows that the gate multiplies"),
        (lambda: rows(x, other=x), "plain takes no other rows"),
        (lambda: rows(x, "silu_mul", x.half()), "up must be like x"),
        (lambda: rows(x, "rms_norm", x[:1]), "residual must be like x"),
        (lambda: rows(x, gain=x[0]), "a gain goes with rms_norm and layer_norm alone"),
        (lambda: rows(x, "rms_norm", bias=x[0]), "a bias goes with layer_norm alone"),
        (lambda: rows(x, "layer_norm", bias=x), r"bias must have shape \[64\]"),
        (lambda: rows(x, rounds=True), "plain rows are not rounded"),
        (lambda: rows(x, "rms_norm", gain=x[0, 1:]), r"gain must have shape \[64\]"),
        (lambda: rows(x, dtype=torch.uint8), "int8, or without zero points to float8_e4m3fn"),
        (lambda: rows(x, "rms_norm", dtype=torch.float8_e4m3fn), "is for plain rows"),
        (lambda: rows(x, "rms_norm", scale_of="tensor"), "is for plain rows, got rms_norm"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
