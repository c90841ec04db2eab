"""Quantization of rows of activations to int8 or float8, symmetric.

    s[m]    = max_k |x[m, k]| / largest      largest = 127 (int8), 448 (E4M3), 57344 (E5M2)
    q[m, k] = round_half_even(x[m, k] / s[m])    with IEEE division

A row whose s would be 0 has s = 1. With a static scale, s is given and q is saturated. What is not
finite in a row stays visible in a product with q: s is then NaN or infinite, static or not; the
elements themselves are 0 in int8, and NaN or infinite in float8.

One program quantizes one row: from registers if it fits into one block, else in two passes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, run

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
_FORMATS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8e4m3", torch.float8_e5m2: "fp8e5m2"}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_BLOCK = 8192  # 32 fp32 values a lane with 8 warps: fits the registers

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
def encode(v, s, FORMAT: tl.constexpr):
    """Codes of the fp32 tile v / s."""
    ratio = tl.math.div_rn(v, s)
    is_finite = abs_bits(v) < _INFINITY_BITS
    if FORMAT == "int8":
        # An infinite element is no number: 0, like NaN. A finite one may overflow: saturated.
        codes = encode_int8(tl.where(is_finite, ratio, float("nan")))
    else:
        ratio = tl.where(is_finite, clamp_finite(ratio), ratio)
        if FORMAT == "fp8e4m3":
            codes = encode_float8(ratio, 3, 7, 448.0)
        else:
            tl.static_assert(FORMAT == "fp8e5m2", "FORMAT is one of int8, fp8e4m3, fp8e5m2")
            codes = encode_float8(ratio, 2, 15, 57344.0)
    return codes


@triton.jit
def clamp_finite(v):
    """Infinity to the largest finite fp32: a finite element over a tiny scale, to be saturated."""
    overflowed = abs_bits(v) == _INFINITY_BITS
    return tl.where(overflowed, tl.where(v > 0, 3.4028234663852886e38, -3.4028234663852886e38), v)


@triton.jit(do_not_specialize=["M"])
def quantize_rows_kernel(
    x_ptr,
    scale_ptr,
    q_ptr,
    s_ptr,
    M,
    K,
    stride_xm,
    stride_xk,
    FORMAT: tl.constexpr,
    LARGEST: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    x_row = x_ptr + m * stride_xm
    q_row = q_ptr + m * K
    if ONE_BLOCK:
        x = tl.load(x_row + i.to(tl.int64) * stride_xk, mask=i < K, other=0.0).to(tl.float32)
        amax_bits = tl.max(abs_bits(x), axis=0)
    else:
        tile_bits = tl.zeros((BLOCK,), dtype=tl.int32)
        for k0 in range(0, K, BLOCK):
            k = k0 + i
            x = tl.load(x_row + k.to(tl.int64) * stride_xk, mask=k < K, other=0.0).to(tl.float32)
            tile_bits = tl.maximum(tile_bits, abs_bits(x))
        amax_bits = tl.max(tile_bits, axis=0)
    amax = amax_bits.to(tl.float32, bitcast=True)

    if scale_ptr is None:
        s = tl.math.div_rn(amax, LARGEST)
        s = tl.where(s == 0.0, 1.0, s)
        tl.store(s_ptr + m, s)
    else:
        s = tl.load(scale_ptr)
        tl.store(s_ptr + m, tl.where(amax_bits < _INFINITY_BITS, s, amax))

    if ONE_BLOCK:
        tl.store(q_row + i, encode(x, s, FORMAT), mask=i < K)
    else:
        for k0 in range(0, K, BLOCK):
            k = k0 + i
            x = tl.load(x_row + k.to(tl.int64) * stride_xk, mask=k < K, other=0.0).to(tl.float32)
            tl.store(q_row + k, encode(x, s, FORMAT), mask=k < K)


def quantize_rows(
    x: Tensor, dtype: torch.dtype, scale: Tensor | None = None, *, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """(q [M, K], s fp32 [M]) with x ~ s[:, None] * q.

    Args:
        x: [M, K] fp16, bf16 or fp32, any strides; M and K may be 0.
        dtype: of q: torch.int8, torch.float8_e4m3fn or torch.float8_e5m2.
        scale: fp32 with one element, a static scale for all rows; None for one per row. s is then
            this scale in every row, but for rows that hold NaN or infinity.
        block: elements a program handles at a time, a power of two; for tests and tuning.

    Raises:
        ValueError: where types, shapes or devices do not fit, with their values.
    """
    if dtype not in LARGEST:
        accepted = ", ".join(map(str, LARGEST))
        raise ValueError(f"cannot quantize to {dtype}: accepted are {accepted}")
    if x.dim() != 2 or x.dtype not in _FLOATS:
        raise ValueError(f"x is fp16, bf16 or fp32 [M, K], got {x.dtype} {list(x.shape)}")
    if scale is not None and (scale.numel() != 1 or scale.dtype != torch.float32):
        raise ValueError(
            f"a static scale is fp32 with one element, got {scale.dtype} {list(scale.shape)}"
        )
    if scale is not None and scale.device != x.device:
        raise ValueError(f"the scale is on {scale.device}, x is on {x.device}")
    m, k = x.shape
    codes = torch.empty(
        (m, k), dtype=torch.int8 if dtype == torch.int8 else torch.uint8, device=x.device
    )
    scales = torch.empty((m,), dtype=torch.float32, device=x.device)
    if m:
        run(quantize_launch(x, dtype, scale, codes, scales, block), on=x)
    return codes.view(dtype), scales


def quantize_launch(
    x: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    block: int | None = None,
) -> Launch:
    """The launch that writes `codes` [M, K], of `dtype` or its bytes, and `scales` [M]."""
    m, k = x.shape
    block = block or min(LARGEST_BLOCK, max(128, triton.next_power_of_2(k)))
    arguments = {
        "x_ptr": x,
        "scale_ptr": scale,
        "q_ptr": codes,
        "s_ptr": scales,
        "M": m,
        "K": k,
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "FORMAT": _FORMATS[dtype],
        "LARGEST": LARGEST[dtype],
        "ONE_BLOCK": k <= block,
        "BLOCK": block,
    }
    options = {"num_warps": 8 if block >= 4096 else 4, "enable_fp_fusion": False}
    return Launch(quantize_rows_kernel, (m,), arguments, options)
