"""GEMM of int8 activations with 2, 3, 4 or 8-bit weights on the int8 tensor cores.

    acc[m, n] = sum_k x[m, k] * w[n, k]                  int32, exact

The weight becomes int8 in registers, in one of three ways (EPILOGUE):

    channel    w = value(code) - zero                     y = (s_x[m] * s_w[n]) * acc + b[n]
    two_level  w = multiplier[n, g] * (value(code) - zero)    same, with s_w the channel scales
    group      w = value(code) - zero, one int32 sum a group:
               acc_f32 += s_w[n, g] * acc_g               y = s_x[m] * acc_f32 + b[n]

Values are code - 2^(bits-1), or code with zero points; those of 8 bits are stored as int8.
Products are computed as y^T = w @ x^T, like in weight_only_gemm.py, which draws the loop.

Groups that cross planes (a group size that is no multiple of the plane): of a plane of P columns,
the product is taken once per group that touches it, with x zeroed outside the group. At least 16
columns make a group, so that is at most P / 16 + 1 products; exact, but a group size that is a
multiple of the plane is faster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import GemmConfig, gemm_config_for
from .launch import check_product, weight_arguments
from .numerics import dot, grouped_block, round_to
from .planar import PlanarWeight, values_per_word
from .reduce import epilogue, new_partials, sum_partials, x_scale_stride


@triton.jit
def int8_weight(
    words,
    i,
    scales_ptr,
    zeros_ptr,
    n,
    g,
    N,
    mask,
    SIGNED: tl.constexpr,
    BITS: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """Field `i` of the words as int8 [BLOCK_N, PLANE]; `g` broadcasts to its groups."""
    value = words
    if BITS != 8:
        value = (words >> (BITS * i)) & ((1 << BITS) - 1)
        index = g.to(tl.int64) * N + n
        if SIGNED:
            value -= 1 << (BITS - 1)
        if zeros_ptr is not None:
            value -= tl.load(zeros_ptr + index, mask=mask, other=0).to(tl.int32)
        if EPILOGUE == "two_level":
            value *= tl.load(scales_ptr + index, mask=mask, other=0).to(tl.int32)
    return value.to(tl.int8)


@triton.jit(do_not_specialize=["M", "G", "tiles_per_split"])
def int8_gemm_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    channel_scales_ptr,
    bias_ptr,
    x_scale_ptr,
    out_ptr,
    M,
    N,
    K,
    G,
    group_size,
    stride_xm,
    stride_xk,
    x_scale_stride,
    tiles_per_split,
    SIGNED: tl.constexpr,
    EPILOGUE: tl.constexpr,
    BITS: tl.constexpr,
    VALUES: tl.constexpr,
    PLANE: tl.constexpr,
    GROUPING: tl.constexpr,
    GROUPS_PER_PLANE: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    m_block, n_block = grouped_block(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    split = tl.program_id(1)
    m = m_block * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]  # [1, BLOCK_M]
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]  # [BLOCK_N, 1]
    r = tl.arange(0, PLANE)
    m_mask = m < M
    n_mask = n < N
    x_rows = x_ptr + m.to(tl.int64) * stride_xm
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    if EPILOGUE == "group":
        total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)

    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(K, VALUES * PLANE))
    for tile in range(first, last):
        row = (tile * PLANE + r)[None, :]  # [1, PLANE]
        word_mask = n_mask if BITS != 8 or EVEN_K else n_mask & (row < K)
        words = tl.load(words_ptr + (row.to(tl.int64) * N + n), mask=word_mask, other=0)
        if EPILOGUE == "group" and GROUPING == "tile":
            acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
        for i in tl.static_range(VALUES):
            k0 = (tile * VALUES + i) * PLANE
            k = k0 + r
            if GROUPING == "element":
                g = tl.minimum(k // group_size, G - 1)[None, :]
            elif GROUPING == "channel":
                g = n * 0
            else:
                g = n * 0 + tl.minimum(k0 // group_size, G - 1)
            w = int8_weight(
                words, i, scales_ptr, zeros_ptr, n, g, N, n_mask, SIGNED, BITS, EPILOGUE
            )
            # Padded columns: x is 0 there.
            x_mask = m_mask if EVEN_K else m_mask & (k < K)[:, None]
            x = tl.load(x_rows + k[:, None].to(tl.int64) * stride_xk, mask=x_mask, other=0)
            if EPILOGUE != "group" or GROUPING == "tile":
                acc = dot(w, x, acc)
            elif GROUPING == "plane":
                part = dot(w, x, tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32))
                scale = tl.load(scales_ptr + (g.to(tl.int64) * N + n), mask=n_mask, other=0.0)
                total += scale.to(tl.float32) * part.to(tl.float32)
            else:
                for j in range(GROUPS_PER_PLANE):
                    one = k0 // group_size + j
                    x_one = tl.where((k // group_size == one)[:, None], x, 0)
                    part = dot(w, x_one, tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32))
                    one = n * 0 + tl.minimum(one, G - 1)
                    scale = tl.load(scales_ptr + (one.to(tl.int64) * N + n), mask=n_mask, other=0.0)
                    total += scale.to(tl.float32) * part.to(tl.float32)
        if EPILOGUE == "group" and GROUPING == "tile":
            g = n * 0 + tl.minimum(tile * (VALUES * PLANE) // group_size, G - 1)
            scale = tl.load(scales_ptr + (g.to(tl.int64) * N + n), mask=n_mask, other=0.0)
            total += scale.to(tl.float32) * acc.to(tl.float32)

    out = m.to(tl.int64) * N + n
    mask = m_mask & n_mask
    if SPLIT_K == 1:
        if EPILOGUE == "group":
            y = epilogue(total, m, n, m_mask, n_mask, x_scale_ptr, x_scale_stride, None, bias_ptr)
        else:
            y = epilogue(
                acc, m, n, m_mask, n_mask, x_scale_ptr, x_scale_stride, channel_scales_ptr, bias_ptr
            )
        tl.store(out_ptr + out, round_to(y, out_ptr.dtype.element_ty), mask=mask)
    else:
        partial_ptr = out_ptr + split * (tl.cast(M, tl.int64) * N)
        tl.store(partial_ptr + out, total if EPILOGUE == "group" else acc, mask=mask)


def int8_gemm(
    xq: Tensor,
    x_scale: Tensor,
    weight: PlanarWeight,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    config: GemmConfig | None = None,
) -> Tensor:
    """y [M, N] of quantized rows and a quantized weight; the int32 sums are exact.

    Args:
        xq: int8 [M, K], any strides; M may be 0.
        x_scale: fp32 [M] or [1].
        weight: [N, K], decode "signed" or "unsigned"; int8 words for 8 bits; plane 32 or 64; zeros
            uint8 or None. Scales per channel, per group, or two-level: then the multiplier times
            (value - zero) fits int8 by the way it was quantized, which is not checked here.
        bias: [N] fp16, bf16, fp32 or None.
        out_dtype: fp16, bf16 or fp32.
        config: tile sizes; by default from the tuned table or the heuristic.

    Raises:
        ValueError: where shapes, types or devices do not fit, with their values.
    """
    if xq.dtype != torch.int8:
        raise ValueError(f"xq is {xq.dtype}, expected torch.int8: see quantize_rows")
    _check_int8_weight(weight)
    check_product(xq, weight, bias, x_scale, out_dtype)
    (m, k), n = xq.shape, weight.n
    out = torch.empty((m, n), dtype=out_dtype, device=xq.device)
    if m == 0:
        return out
    config = config or gemm_config_for("int8_gemm", m, weight, xq.device, x_bytes=1)
    plane = config.block_k if weight.bits == 8 else weight.plane
    if plane < 32:
        raise ValueError(f"block_k {plane} is too small for int8 products: use 32 or more")
    tile = plane * values_per_word(weight.bits)
    tiles_per_split = triton.cdiv(triton.cdiv(k, tile), config.split_k)
    split_k = triton.cdiv(triton.cdiv(k, tile), tiles_per_split)
    ending = _epilogue(weight)
    target = out
    if split_k > 1:
        dtype = torch.float32 if ending == "group" else torch.int32
        target = new_partials(split_k, m, n, dtype, xq)
    channel_scales = weight.scales if ending == "channel" else weight.channel_scales
    arguments = weight_arguments(weight, tile, plane)
    for name in ("codebook_ptr", "nested_table_ptr", "nested_absmax_ptr", "nested_offset_ptr"):
        del arguments[name]
    del arguments["DECODE"], arguments["SCALE_MODE"]
    arguments["channel_scales_ptr"] = channel_scales
    blocks = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    with torch.cuda.device_of(xq):
        int8_gemm_kernel[(blocks, split_k)](
            x_ptr=xq,
            bias_ptr=bias,
            x_scale_ptr=x_scale,
            out_ptr=target,
            M=m,
            stride_xm=xq.stride(0),
            stride_xk=xq.stride(1),
            x_scale_stride=x_scale_stride(x_scale),
            tiles_per_split=tiles_per_split,
            SIGNED=weight.decode == "signed",
            EPILOGUE=ending,
            GROUPS_PER_PLANE=groups_per_plane(plane, weight.group_size),
            SPLIT_K=split_k,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
            **arguments,
        )
        if split_k > 1:
            sum_partials(target, out, x_scale, None if ending == "group" else channel_scales, bias)
    return out


def groups_per_plane(plane: int, group_size: int) -> int:
    """Groups of `group_size` columns that a plane can touch, wherever it begins."""
    if group_size == 0 or group_size % plane == 0:
        return 1
    return (plane + group_size - 2) // group_size + 1


def _epilogue(weight: PlanarWeight) -> str:
    if weight.scale_mode == "two_level":
        return "two_level"
    # One group reaches over all of K, like a channel.
    return "channel" if weight.groups == 1 else "group"


def _check_int8_weight(weight: PlanarWeight) -> None:
    if weight.decode not in ("signed", "unsigned"):
        raise ValueError(f"int8 products need linear codes, got decode {weight.decode!r}")
    if weight.scale_mode == "nested":
        raise ValueError("int8 products take no nested scales: use weight_only_gemm")
    if weight.zeros is not None and weight.zeros.dtype != torch.uint8:
        raise ValueError(f"int8 products need integer zeros (uint8), got {weight.zeros.dtype}")
    if weight.bits == 8:
        if weight.words.dtype != torch.int8 or weight.zeros is not None:
            raise ValueError(
                "8-bit weights of int8 products are int8 words (code - 128) without zeros, got "
                f"{weight.words.dtype} {'with' if weight.zeros is not None else 'without'} zeros"
            )
        if weight.scale_mode == "two_level":
            raise ValueError("two-level scales are for weights under 8 bits, got 8")
    elif weight.plane < 32:
        raise ValueError(f"plane {weight.plane} is too small for int8 products: use 32 or 64")
