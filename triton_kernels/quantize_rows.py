"""Quantization of rows of activations to int8 or float8: alone, or behind a norm or a gate.

    s[m]    = max_k |v[m, k]| / largest      largest = 127 (int8), 448 (E4M3), 57344 (E5M2)
    q[m, k] = round_half_even(v[m, k] / s[m])    with IEEE division

v is x; norm(x (+ residual)) * gain (+ bias); or gate(x) * up; all in fp32. A row whose s would be 0
has s = 1. With a static scale, s is given and q is saturated. With zero points, v is about
s * (q - zero), and s = (max - min) / 255 over a range that includes 0. A row that is not finite
stays visible in a product with q: its s is then NaN or infinite, and NaN where it was given.

One program quantizes one row: from registers if it fits into one block, else in passes that each
read it again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, run
from .numerics import round_to

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
_FORMATS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8e4m3", torch.float8_e5m2: "fp8e5m2"}
KINDS = ("plain", "rms_norm", "silu_mul", "layer_norm", "gelu_mul", "gelu_tanh_mul")
"""What is quantized. Norms take a residual, a gain [K], and that of layers a bias [K]; the others
but "plain" take what the gate multiplies."""

_NORMS = ("rms_norm", "layer_norm")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_BLOCK = 8192  # 32 fp32 values a lane with 8 warps: fits the registers
PASS_BLOCK = 4096  # of longer rows: gates in loops take more of them

_INFINITY_BITS = tl.constexpr(0x7F800000)
_ABS_BITS = tl.constexpr(0x7FFFFFFF)
# 1.5 * 2^23: adding it leaves no bit for a fraction, so that the sum is rounded to an integer.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def abs_bits(v):
    """Bits of |v|, which order as the numbers do, with NaN above infinity."""
    return v.to(tl.int32, bitcast=True) & _ABS_BITS


@triton.jit
def encode_int8(v):
    """int8 of fp32 `v`, half to even, saturated to [-127, 127]; NaN gives 0."""
    clamped = tl.minimum(tl.maximum(v, -127.0), 127.0)
    rounded = (clamped + _ROUNDER) - _ROUNDER
    return tl.where(abs_bits(v) > _INFINITY_BITS, 0.0, rounded).to(tl.int8)


@triton.jit
def encode_float8(v, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    """uint8 bit pattern of fp32 `v`, half to even, finite values saturated to LARGEST.

    Above the smallest normal number the mantissa is rounded in the bits of fp32; below it, an fp32
    addition of a number whose last place is the smallest subnormal does the rounding.
    """
    SHIFT: tl.constexpr = 23 - MANTISSA
    sign = (v.to(tl.int32, bitcast=True) >> 24) & 0x80
    a = abs_bits(v)
    magnitude = tl.minimum(a.to(tl.float32, bitcast=True), LARGEST)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + ((1 << (SHIFT - 1)) - 1) + ((bits >> SHIFT) & 1)) >> SHIFT) - (
        (127 - BIAS) << MANTISSA
    )
    PLACE: tl.constexpr = 2.0 ** (23 + 1 - BIAS - MANTISSA)
    subnormal = (magnitude + PLACE).to(tl.int32, bitcast=True) & 0xFF
    SMALLEST_NORMAL: tl.constexpr = 2.0 ** (1 - BIAS)
    code = tl.where(magnitude < SMALLEST_NORMAL, subnormal, normal)
    if MANTISSA == 2:
        code = tl.where(a == _INFINITY_BITS, 0x7C, code)
        code = tl.where(a > _INFINITY_BITS, 0x7F, code)
    else:
        code = tl.where(a >= _INFINITY_BITS, 0x7F, code)  # E4M3 has no infinity
    return (code | sign).to(tl.uint8)


@triton.jit
def encode(v, s, zero, FORMAT: tl.constexpr):
    """Codes of the fp32 tile v / s, less the zero point where FORMAT has one."""
    ratio = tl.math.div_rn(v, s)
    if FORMAT == "int8":
        codes = encode_int8(ratio)
    elif FORMAT == "int8_zero":
        # Rounded before the zero point is added: half to even of the value itself.
        rounded = (tl.minimum(tl.maximum(ratio, -512.0), 512.0) + _ROUNDER) - _ROUNDER
        rounded = tl.where(abs_bits(ratio) > _INFINITY_BITS, 0.0, rounded)
        codes = tl.minimum(tl.maximum(rounded + zero, -128.0), 127.0).to(tl.int8)
    elif FORMAT == "fp8e4m3":
        codes = encode_float8(clamp_finite(ratio), 3, 7, 448.0)
    else:
        tl.static_assert(FORMAT == "fp8e5m2", "FORMAT is int8, int8_zero, fp8e4m3 or fp8e5m2")
        codes = encode_float8(clamp_finite(ratio), 2, 15, 57344.0)
    return codes


@triton.jit
def clamp_finite(v):
    """Infinity to the largest finite fp32, which is saturated."""
    overflowed = abs_bits(v) == _INFINITY_BITS
    return tl.where(overflowed, tl.where(v > 0, 3.4028234663852886e38, -3.4028234663852886e38), v)


# --- Gates. Sums and products are not fused, so that they give the same bits everywhere.


@triton.jit
def exponential(x):
    """e^x within a few units in the last place, 0 below -104 and infinity above 89; NaN gives any
    number. 2^n * 2^f with the Taylor series of e^(f log 2) on |f| <= 1/2; log 2 in two parts keeps
    the rest exact."""
    clamped = tl.minimum(tl.maximum(x, -104.0), 89.0)
    whole = (clamped * 1.44269504 + _ROUNDER) - _ROUNDER
    rest = (clamped - whole * 0.693145751953125) - whole * 1.42860677e-6
    total = rest * (1.0 / 5040) + 1.0 / 720
    total = total * rest + 1.0 / 120
    total = total * rest + 1.0 / 24
    total = total * rest + 1.0 / 6
    total = total * rest + 0.5
    total = total * rest + 1.0
    total = total * rest + 1.0
    # In two steps: 2^n itself may lie outside of the range of floats.
    n = whole.to(tl.int32)
    half = n >> 1
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    second = ((n - half + 127) << 23).to(tl.float32, bitcast=True)
    return total * first * second


@triton.jit
def silu(x):
    """x / (1 + e^-x)"""
    return tl.math.div_rn(x, 1.0 + exponential(-x))


@triton.jit
def gelu(x):
    """x Phi(x). With z = |x| / sqrt(2) and t = 1 / (1 + z / 2), erfc(z) = t e^(p(t) - z^2), where p
    was fitted to it on 0 <= z <= 10. z^2 comes in two parts, the first of which is exact, and what
    their sum with p rounds off is a factor: so the result is within 2^-20 of itself."""
    near = tl.minimum(tl.maximum(x, -15.0), 15.0)  # beyond, erfc is 0 or 2
    t = tl.math.div_rn(1.0, tl.abs(near) * 0.70710678 * 0.5 + 1.0)
    total = t * 0.14805983 - 0.69787419
    total = total * t + 1.19684815
    total = total * t - 0.74962485
    total = total * t - 0.03616848
    total = total * t - 0.02213898
    total = total * t + 0.04254839
    total = total * t + 0.38498244
    total = total * t + 0.99882513
    total = total * t - 1.26545739
    short = (near.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    square = short * short * 0.5
    added = total - (near - short) * (near + short) * 0.5
    power = added - square
    whole = exponential(power)
    erfc = t * (whole * (added - (power + square)) + whole)
    return tl.where(x > 0, x * (1.0 - 0.5 * erfc), x * 0.5 * erfc)


@triton.jit
def gelu_tanh(x):
    """x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / (1 + e^(-2 u))."""
    minus_twice = (x * x * x * 0.044715 + x) * -1.59576912
    return tl.math.div_rn(x, 1.0 + exponential(minus_twice))


# --- Rows


@triton.jit
def load_floats(p, offset, mask):
    """fp32 of some numbers; 0 where there is none."""
    return tl.load(p + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def read(x_row, other_row, k, mask, stride_xk, stride_ok, KIND: tl.constexpr, ROUNDS: tl.constexpr):
    """x, x + residual as it is rounded, or the product with the gate."""
    v = load_floats(x_row, k.to(tl.int64) * stride_xk, mask)
    if KIND == "rms_norm" or KIND == "layer_norm":
        if other_row is not None:
            v += load_floats(other_row, k.to(tl.int64) * stride_ok, mask)
            v = round_to(v, x_row.dtype.element_ty).to(tl.float32)
    elif KIND != "plain":
        up = load_floats(other_row, k.to(tl.int64) * stride_ok, mask)
        if KIND == "silu_mul":
            v = silu(v) * up
        elif KIND == "gelu_mul":
            v = gelu(v) * up
        else:
            tl.static_assert(KIND == "gelu_tanh_mul", "KIND is one of KINDS")
            v = gelu_tanh(v) * up
        if ROUNDS:
            v = round_to(v, x_row.dtype.element_ty).to(tl.float32)
    return v


@triton.jit
def normalize(
    v, mean, factor, gain_ptr, bias_ptr, k, mask, ROUNDS: tl.constexpr, TYPE: tl.constexpr
):
    """What is quantized of a norm, from what `read` gives."""
    v = tl.where(mask, (v - mean) * factor, 0.0)
    if gain_ptr is not None:
        v *= load_floats(gain_ptr, k, mask)
    if bias_ptr is not None:
        v += load_floats(bias_ptr, k, mask)
    if ROUNDS:
        v = round_to(v, TYPE).to(tl.float32)
    return v


@triton.jit
def inverse_root(squares, K, epsilon):
    """1 / sqrt(squares / K + epsilon)"""
    return tl.math.div_rn(1.0, tl.math.sqrt_rn(tl.math.div_rn(squares, K * 1.0) + epsilon))


@triton.jit
def store_as(p, offset, v, mask):
    tl.store(p + offset, round_to(v, p.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def quantize_rows_kernel(
    x_ptr,
    other_ptr,
    gain_ptr,
    bias_ptr,
    scale_ptr,
    q_ptr,
    s_ptr,
    zero_ptr,
    total_ptr,
    rounded_ptr,
    M,
    K,
    epsilon,
    stride_xm,
    stride_xk,
    stride_om,
    stride_ok,
    KIND: tl.constexpr,
    FORMAT: tl.constexpr,
    LARGEST: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    IS_NORM: tl.constexpr = KIND == "rms_norm" or KIND == "layer_norm"
    ROUNDS: tl.constexpr = rounded_ptr is not None
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    m = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < K
    first = m * K  # of the outputs
    x_row = x_ptr + m * stride_xm
    other_row = None
    if other_ptr is not None:
        other_row = other_ptr + m * stride_om
    mean = 0.0
    factor = 1.0
    # Largest magnitudes, by their bits, and ends of the range.
    bits = tl.zeros((BLOCK,), dtype=tl.int32)
    low = tl.zeros((BLOCK,), dtype=tl.float32)
    high = tl.zeros((BLOCK,), dtype=tl.float32)
    v = tl.zeros((BLOCK,), dtype=tl.float32)

    if ONE_BLOCK:
        v = read(x_row, other_row, i, mask, stride_xk, stride_ok, KIND, ROUNDS)
        if IS_NORM:
            if total_ptr is not None:
                store_as(total_ptr, first + i, v, mask)
            if KIND == "layer_norm":
                mean = tl.math.div_rn(tl.sum(v, axis=0), K * 1.0)
            centered = tl.where(mask, v - mean, 0.0)
            factor = inverse_root(tl.sum(centered * centered, axis=0), K, epsilon)
            v = normalize(v, mean, factor, gain_ptr, bias_ptr, i, mask, ROUNDS, TYPE)
        bits = abs_bits(v)
        low = tl.minimum(v, 0.0)
        high = tl.maximum(v, 0.0)
    else:
        if IS_NORM:
            sums = tl.zeros((BLOCK,), dtype=tl.float32)
            if KIND == "layer_norm":
                for k0 in range(0, K, BLOCK):
                    k = k0 + i
                    sums += read(x_row, other_row, k, k < K, stride_xk, stride_ok, KIND, ROUNDS)
                mean = tl.math.div_rn(tl.sum(sums, axis=0), K * 1.0)
            squares = tl.zeros((BLOCK,), dtype=tl.float32)
            for k0 in range(0, K, BLOCK):
                k = k0 + i
                v = read(x_row, other_row, k, k < K, stride_xk, stride_ok, KIND, ROUNDS)
                if total_ptr is not None:
                    store_as(total_ptr, first + k, v, k < K)
                centered = tl.where(k < K, v - mean, 0.0)
                squares += centered * centered
            factor = inverse_root(tl.sum(squares, axis=0), K, epsilon)
        for k0 in range(0, K, BLOCK):
            k = k0 + i
            v = read(x_row, other_row, k, k < K, stride_xk, stride_ok, KIND, ROUNDS)
            if IS_NORM:
                v = normalize(v, mean, factor, gain_ptr, bias_ptr, k, k < K, ROUNDS, TYPE)
            bits = tl.maximum(bits, abs_bits(v))
            low = tl.minimum(low, v)
            high = tl.maximum(high, v)

    amax_bits = tl.max(bits, axis=0)
    amax = amax_bits.to(tl.float32, bitcast=True)
    is_finite = amax_bits < _INFINITY_BITS
    zero = 0.0
    if FORMAT == "int8_zero":
        least = tl.min(low, axis=0)
        range_of_row = tl.max(high, axis=0) - least
        s = tl.math.div_rn(range_of_row, 255.0)
        s = tl.where(range_of_row == 0.0, 1.0, s)
        s = tl.where(is_finite, s, float("nan"))
        # |least / s| is 255 at most.
        shifted = -128.0 - ((tl.math.div_rn(least, s) + _ROUNDER) - _ROUNDER)
        zero = tl.where(is_finite, tl.minimum(tl.maximum(shifted, -128.0), 127.0), 0.0)
        tl.store(s_ptr + m, s)
        tl.store(zero_ptr + m, zero.to(tl.int32))
    elif scale_ptr is None:
        s = tl.math.div_rn(amax, LARGEST)
        s = tl.where(s == 0.0, 1.0, s)
        tl.store(s_ptr + m, s)
    else:
        s = tl.load(scale_ptr)
        tl.store(s_ptr + m, tl.where(is_finite, s, float("nan")))

    if ONE_BLOCK:
        if rounded_ptr is not None:
            store_as(rounded_ptr, first + i, v, mask)
        tl.store(q_ptr + first + i, encode(v, s, zero, FORMAT), mask=mask)
    else:
        for k0 in range(0, K, BLOCK):
            k = k0 + i
            v = read(x_row, other_row, k, k < K, stride_xk, stride_ok, KIND, ROUNDS)
            if IS_NORM:
                v = normalize(v, mean, factor, gain_ptr, bias_ptr, k, k < K, ROUNDS, TYPE)
            if rounded_ptr is not None:
                store_as(rounded_ptr, first + k, v, k < K)
            tl.store(q_ptr + first + k, encode(v, s, zero, FORMAT), mask=k < K)


class Rows(NamedTuple):
    """What `quantize_rows_of` gives.

    Attributes:
        codes: [M, K], int8 or float8.
        scales: fp32 [M].
        zeros: int32 [M], or None.
        total: x + residual, [M, K] of x's type, or None.
        rounded: the rows in x's type, or None.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    total: Tensor | None
    rounded: Tensor | None


def quantize_rows(
    x: Tensor, dtype: torch.dtype, scale: Tensor | None = None, *, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """(q [M, K], s fp32 [M]) with x ~ s[:, None] * q: plain rows of `quantize_rows_of`."""
    rows = quantize_rows_of(x, "plain", dtype, scale=scale, block=block)
    return rows.codes, rows.scales


def quantize_rows_of(
    x: Tensor,
    kind: str,
    dtype: torch.dtype,
    *,
    other: Tensor | None = None,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    epsilon: float = 0.0,
    scale: Tensor | None = None,
    has_zeros: bool = False,
    rounds: bool = False,
    block: int | None = None,
) -> Rows:
    """Rows of x as codes, with a scale each.

    Args:
        x: [M, K] fp16, bf16 or fp32, any strides; M and K may be 0.
        kind: one of KINDS.
        dtype: of the codes: torch.int8, torch.float8_e4m3fn or torch.float8_e5m2.
        other: like x: the residual of a norm, or what the gate multiplies.
        gain, bias: [K] fp16, bf16 or fp32, of norms; a bias of layer norms alone.
        epsilon: of norms.
        scale: fp32 with one element, a static scale for all rows; None for one per row. The scales
            are then this one in every row, and NaN for rows that hold NaN or infinity.
        has_zeros: whether int8 rows have zero points, which static scales have not.
        rounds: whether the rows of a norm or gate are rounded to x's type, quantized as rounded,
            and given too.
        block: elements a program handles at a time, a power of two; for tests and tuning.

    Raises:
        ValueError: where types, shapes or devices do not fit, with their values.
    """
    _check(x, kind, dtype, other, gain, bias, scale, has_zeros, rounds)
    m, k = x.shape
    codes = torch.empty(
        (m, k), dtype=torch.int8 if dtype == torch.int8 else torch.uint8, device=x.device
    )
    scales = torch.empty((m,), dtype=torch.float32, device=x.device)
    zeros = torch.empty((m,), dtype=torch.int32, device=x.device) if has_zeros else None
    total = x.new_empty((m, k)) if other is not None and kind in _NORMS else None
    rounded = x.new_empty((m, k)) if rounds else None
    if m:
        outputs = Rows(codes, scales, zeros, total, rounded)
        vectors = gain, bias
        launch = quantize_launch(x, kind, dtype, other, vectors, epsilon, scale, outputs, block)
        run(launch, on=x)
    return Rows(codes.view(dtype), scales, zeros, total, rounded)


def _check(
    x: Tensor,
    kind: str,
    dtype: torch.dtype,
    other: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    has_zeros: bool,
    rounds: bool,
) -> None:
    if dtype not in LARGEST:
        accepted = ", ".join(map(str, LARGEST))
        raise ValueError(f"cannot quantize to {dtype}: accepted are {accepted}")
    if kind not in KINDS:
        raise ValueError(f"kind is one of {', '.join(KINDS)}, got {kind!r}")
    if x.dim() != 2 or x.dtype not in _FLOATS:
        raise ValueError(f"x is fp16, bf16 or fp32 [M, K], got {x.dtype} {list(x.shape)}")
    if scale is not None and (scale.numel() != 1 or scale.dtype != torch.float32):
        raise ValueError(
            f"a static scale is fp32 with one element, got {scale.dtype} {list(scale.shape)}"
        )
    if has_zeros and (dtype != torch.int8 or scale is not None):
        raise ValueError("zero points go with int8 and a scale for each row")
    if other is not None and (other.shape != x.shape or other.dtype != x.dtype):
        raise ValueError(
            f"both inputs are alike, got {x.dtype} {list(x.shape)} and {other.dtype} "
            f"{list(other.shape)}"
        )
    if kind not in _NORMS and (other is None) != (kind == "plain"):
        takes = "takes no other rows" if kind == "plain" else "needs the rows that it multiplies"
        raise ValueError(f"{kind} {takes}")
    if rounds and kind == "plain":
        raise ValueError("plain rows are not rounded")
    for name, vector, kinds in (("gain", gain, _NORMS), ("bias", bias, ("layer_norm",))):
        if vector is None:
            continue
        if kind not in kinds:
            raise ValueError(f"{kind} takes no {name}")
        if vector.shape != x.shape[1:] or vector.dtype not in _FLOATS:
            raise ValueError(
                f"the {name} is fp16, bf16 or fp32 {[x.shape[1]]}, got {vector.dtype} "
                f"{list(vector.shape)}"
            )
    for name, part in (("scale", scale), ("gain", gain), ("bias", bias), ("other", other)):
        if part is not None and part.device != x.device:
            raise ValueError(f"the {name} is on {part.device}, x is on {x.device}")


def quantize_launch(
    x: Tensor,
    kind: str,
    dtype: torch.dtype,
    other: Tensor | None,
    vectors: tuple[Tensor | None, Tensor | None],
    epsilon: float,
    scale: Tensor | None,
    outputs: Rows,
    block: int | None = None,
) -> Launch:
    """The launch that writes `outputs`, whose codes may be of `dtype` or its bytes.

    Args:
        vectors: gain and bias.
    """
    m, k = x.shape
    whole = max(128, triton.next_power_of_2(k))
    block = block or (whole if whole <= LARGEST_BLOCK else PASS_BLOCK)
    gain, bias = (None if vector is None else vector.contiguous() for vector in vectors)
    arguments = {
        "x_ptr": x,
        "other_ptr": other,
        "gain_ptr": gain,
        "bias_ptr": bias,
        "scale_ptr": scale,
        "q_ptr": outputs.codes,
        "s_ptr": outputs.scales,
        "zero_ptr": outputs.zeros,
        "total_ptr": outputs.total,
        "rounded_ptr": outputs.rounded,
        "M": m,
        "K": k,
        "epsilon": epsilon,
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "stride_om": 0 if other is None else other.stride(0),
        "stride_ok": 0 if other is None else other.stride(1),
        "KIND": kind,
        "FORMAT": "int8_zero" if outputs.zeros is not None else _FORMATS[dtype],
        "LARGEST": LARGEST[dtype],
        "ONE_BLOCK": k <= block,
        "BLOCK": block,
    }
    options = {"num_warps": 8 if block >= 4096 else 4, "enable_fp_fusion": False}
    return Launch(quantize_rows_kernel, (m,), arguments, options)
