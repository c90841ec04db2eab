"""Weight-only GEMV for few rows of x: y = x @ w.T + b on the fp32 units.

    y[m, n] = x_scale[m] * sum_k x[m, k] * scale[n, g] * (value(code[n, k]) - zero[n, g]) + b[n]

The weights are read once per row and used once, so nothing is gained by tensor cores: a program
owns BLOCK_N outputs of one row and one of SPLIT_K parts of K, keeps products in a [P, BLOCK_N] tile
of fp32 registers and sums the tile over P once, at its end. Where a group covers whole word tiles,
the scale is applied to the sum instead of the weights. Decoded weights are not rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import GemvConfig, gemv_config_for
from .decode import DECODE, load_group
from .launch import check_product, check_weight_only, float_operand, weight_arguments
from .numerics import round_to
from .planar import PlanarWeight, values_per_word
from .reduce import epilogue, new_partials, sum_partials, x_scale_stride


@triton.jit(do_not_specialize=["M", "G", "tiles_per_split"])
def weight_only_gemv_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    codebook_ptr,
    channel_scales_ptr,
    nested_table_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
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
    DECODE: tl.constexpr,
    X_DECODE: tl.constexpr,
    BITS: tl.constexpr,
    VALUES: tl.constexpr,
    PLANE: tl.constexpr,
    GROUPING: tl.constexpr,
    SCALE_MODE: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m = tl.program_id(0)
    split = tl.program_id(2)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    r = tl.arange(0, PLANE)
    n_mask = n < N
    x_row = x_ptr + m.to(tl.int64) * stride_xm
    acc = tl.zeros((PLANE, BLOCK_N), dtype=tl.float32)

    if GROUPING == "channel":
        scale, zero = load_group(
            scales_ptr, zeros_ptr, channel_scales_ptr,
            nested_table_ptr, nested_absmax_ptr, nested_offset_ptr,
            n, n * 0, N, G, n_mask, SCALE_MODE,
        )  # fmt: skip

    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(K, VALUES * PLANE))
    for tile in range(first, last):
        row = (tile * PLANE + r)[:, None]  # [PLANE, 1]
        word_mask = n_mask[None, :] if BITS != 8 or EVEN_K else n_mask[None, :] & (row < K)
        # A weight is used once per row of x: first out of the cache, to leave x and the scales in.
        words = tl.load(
            words_ptr + (row.to(tl.int64) * N + n[None, :]),
            mask=word_mask,
            other=0,
            eviction_policy="evict_first",
        )
        if GROUPING == "tile":
            g = tl.minimum(tile * (VALUES * PLANE) // group_size, G - 1)
            scale, zero = load_group(
                scales_ptr, zeros_ptr, channel_scales_ptr,
                nested_table_ptr, nested_absmax_ptr, nested_offset_ptr,
                n, g, N, G, n_mask, SCALE_MODE,
            )  # fmt: skip
            part = tl.zeros((PLANE, BLOCK_N), dtype=tl.float32)
        for i in tl.static_range(VALUES):
            k0 = (tile * VALUES + i) * PLANE
            k = k0 + r
            if GROUPING == "plane":
                g = tl.minimum(k0 // group_size, G - 1)
                scale, zero = load_group(
                    scales_ptr, zeros_ptr, channel_scales_ptr,
                    nested_table_ptr, nested_absmax_ptr, nested_offset_ptr,
                    n, g, N, G, n_mask, SCALE_MODE,
                )  # fmt: skip
            elif GROUPING == "element":
                g = tl.minimum(k // group_size, G - 1)[:, None]
                scale, zero = load_group(
                    scales_ptr, zeros_ptr, channel_scales_ptr,
                    nested_table_ptr, nested_absmax_ptr, nested_offset_ptr,
                    n[None, :], g, N, G, n_mask[None, :], SCALE_MODE,
                )  # fmt: skip
            code = words.to(tl.int32)
            if BITS != 8:
                code = (code >> (BITS * i)) & ((1 << BITS) - 1)
            value = DECODE(code, codebook_ptr, BITS) - zero

            x_mask = None if EVEN_K else k < K
            x = tl.load(x_row + k.to(tl.int64) * stride_xk, mask=x_mask)
            if not EVEN_K:
                x = tl.where(x_mask, x, 0)
            x = x.to(tl.float32) if X_DECODE is None else X_DECODE(x.to(tl.int32), None, 8)
            if GROUPING == "channel":
                acc += value * x[:, None]
            elif GROUPING == "tile":
                part += value * x[:, None]
            else:
                acc += (value * scale) * x[:, None]
        if GROUPING == "tile":
            acc += part * scale

    y = tl.sum(acc, axis=0)  # [BLOCK_N]
    if GROUPING == "channel":
        y *= scale
    out = m.to(tl.int64) * N + n
    if SPLIT_K == 1:
        y = epilogue(y, m, n, None, n_mask, x_scale_ptr, x_scale_stride, None, bias_ptr)
        tl.store(out_ptr + out, round_to(y, out_ptr.dtype.element_ty), mask=n_mask)
    else:
        tl.store(out_ptr + split * (tl.cast(M, tl.int64) * N) + out, y, mask=n_mask)


def weight_only_gemv(
    x: Tensor,
    weight: PlanarWeight,
    bias: Tensor | None = None,
    *,
    x_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: GemvConfig | None = None,
) -> Tensor:
    """y [M, N] = x_scale * (x @ w.T) + bias in fp32, for small M (any M works, up to 2^31).

    Takes and raises what `weight_only_gemm` does. A row of y depends on its row of x alone, but
    with a split of K that is chosen by M its rounding may differ between calls with another M.
    """
    check_weight_only(weight)
    x, x_decode, out_dtype = float_operand(x, out_dtype)
    check_product(x, weight, bias, x_scale, out_dtype)
    (m, k), n = x.shape, weight.n
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if m == 0:
        return out
    config = config or gemv_config_for("weight_only_gemv", m, weight, x.device)
    plane = config.block_k if weight.bits == 8 else weight.plane
    tile = plane * values_per_word(weight.bits)
    tiles_per_split = triton.cdiv(triton.cdiv(k, tile), config.split_k)
    split_k = triton.cdiv(triton.cdiv(k, tile), tiles_per_split)
    target = out if split_k == 1 else new_partials(split_k, m, n, torch.float32, x)
    with torch.cuda.device_of(x):
        weight_only_gemv_kernel[(m, triton.cdiv(n, config.block_n), split_k)](
            x_ptr=x,
            bias_ptr=bias,
            x_scale_ptr=x_scale,
            out_ptr=target,
            M=m,
            stride_xm=x.stride(0),
            stride_xk=x.stride(1),
            x_scale_stride=x_scale_stride(x_scale),
            tiles_per_split=tiles_per_split,
            X_DECODE=None if x_decode is None else DECODE[x_decode],
            SPLIT_K=split_k,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
            enable_fp_fusion=True,  # multiply-adds are what this kernel does
            **weight_arguments(weight, tile, plane),
        )
        if split_k > 1:
            sum_partials(target, out, x_scale, None, bias)
    return out
