"""Weight-only GEMM: y = x @ w.T + b with w decoded from 2, 3, 4 or 8 bits on the way.

    w[n, k] = scale[n, g] * (value(code[n, k]) - zero[n, g])   fp32, then rounded to the type of x
    y[m, n] = x_scale[m] * sum_k x[m, k] * w[n, k] + b[n]      accumulated in fp32

Computed as y^T = w @ x^T: the weights are the A operand, which tensor cores take from registers,
where they were decoded; and the tokens are on the narrow side of the instruction, so that few of
them waste little. One program owns a [BLOCK_N, BLOCK_M] tile of y^T and one of SPLIT_K parts of K:

    for each tile of V*P columns of K:
        words  [BLOCK_N, P]                          loaded once
        for each field i of the words:
            w  [BLOCK_N, P] = decode(words >> bits*i)
            acc += w @ x[:, k0 + i*P : k0 + (i+1)*P]^T
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import GemmConfig, gemm_config_for, unrolled_fields
from .decode import DECODE, load_group
from .launch import (
    FLOAT_TYPES,
    check_product,
    check_weight_only,
    device_facts,
    float_operand,
    weight_arguments,
)
from .numerics import dot, grouped_block, round_to
from .planar import PlanarWeight, values_per_word
from .reduce import epilogue, new_partials, sum_partials, x_scale_stride


@triton.jit(do_not_specialize=["M", "G", "tiles_per_split"])
def weight_only_gemm_kernel(
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
    COMPUTE: tl.constexpr,
    BITS: tl.constexpr,
    VALUES: tl.constexpr,
    PLANE: tl.constexpr,
    GROUPING: tl.constexpr,
    SCALE_MODE: tl.constexpr,
    EVEN_K: tl.constexpr,
    UNROLL: tl.constexpr,
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
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)

    if GROUPING == "channel":
        scale, zero = load_group(
            scales_ptr, zeros_ptr, channel_scales_ptr,
            nested_table_ptr, nested_absmax_ptr, nested_offset_ptr,
            n, n * 0, N, G, n_mask, SCALE_MODE,
        )  # fmt: skip

    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(K, VALUES * PLANE))
    for tile in range(first, last):
        row = (tile * PLANE + r)[None, :]  # [1, PLANE]
        word_mask = n_mask if BITS != 8 or EVEN_K else n_mask & (row < K)
        words = tl.load(words_ptr + (row.to(tl.int64) * N + n), mask=word_mask, other=0)
        if GROUPING == "tile":
            g = tl.minimum(tile * (VALUES * PLANE) // group_size, G - 1)
            scale, zero = load_group(
                scales_ptr, zeros_ptr, channel_scales_ptr,
                nested_table_ptr, nested_absmax_ptr, nested_offset_ptr,
                n, g, N, G, n_mask, SCALE_MODE,
            )  # fmt: skip
        for field in range(0, VALUES, UNROLL):
            for j in tl.static_range(UNROLL):
                i = field + j
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
                    g = tl.minimum(k // group_size, G - 1)[None, :]
                    scale, zero = load_group(
                        scales_ptr, zeros_ptr, channel_scales_ptr,
                        nested_table_ptr, nested_absmax_ptr, nested_offset_ptr,
                        n, g, N, G, n_mask, SCALE_MODE,
                    )  # fmt: skip
                code = words.to(tl.int32)
                if BITS != 8:
                    code = (code >> (BITS * i)) & ((1 << BITS) - 1)
                w = round_to(scale * (DECODE(code, codebook_ptr, BITS) - zero), COMPUTE)

                # Padded columns: x is 0 there, and the weight of code 0 is finite.
                x_mask = m_mask if EVEN_K else m_mask & (k < K)[:, None]
                x = tl.load(x_rows + k[:, None].to(tl.int64) * stride_xk, mask=x_mask, other=0)
                if X_DECODE is not None:
                    x = X_DECODE(x.to(tl.int32), None, 8).to(COMPUTE)
                acc = dot(w, x, acc)

    out = m.to(tl.int64) * N + n
    if SPLIT_K == 1:
        y = epilogue(acc, m, n, m_mask, n_mask, x_scale_ptr, x_scale_stride, None, bias_ptr)
        tl.store(out_ptr + out, round_to(y, out_ptr.dtype.element_ty), mask=m_mask & n_mask)
    else:
        tl.store(out_ptr + split * (tl.cast(M, tl.int64) * N) + out, acc, mask=m_mask & n_mask)


def weight_only_gemm(
    x: Tensor,
    weight: PlanarWeight,
    bias: Tensor | None = None,
    *,
    x_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: GemmConfig | None = None,
) -> Tensor:
    """y [M, N] = x_scale * (x @ w.T) + bias, accumulated in fp32.

    Args:
        x: [M, K] fp16, bf16, fp32, float8_e4m3fn or float8_e5m2; any strides, M may be 0. The
            weights are rounded to this type; for float8 x, to the output type.
        weight: the packed weight [N, K].
        bias: [N] fp16, bf16, fp32 or None.
        x_scale: fp32 [M] or [1], multiplies the rows of y; or None.
        out_dtype: fp16, bf16 or fp32; by default that of x, bf16 for float8 x.
        config: tile sizes; by default from the tuned table or the heuristic.

    Raises:
        ValueError: where shapes, types or devices do not fit, with their values.
    """
    check_weight_only(weight)
    x, x_decode, out_dtype = float_operand(x, out_dtype)
    check_product(x, weight, bias, x_scale, out_dtype)
    (m, k), n = x.shape, weight.n
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if m == 0:
        return out
    compute = out_dtype if x_decode is not None else x.dtype
    config = config or gemm_config_for("weight_only_gemm", m, weight, x.device, compute.itemsize)
    plane = config.block_k if weight.bits == 8 else weight.plane
    tile = plane * values_per_word(weight.bits)
    tiles_per_split = triton.cdiv(triton.cdiv(k, tile), config.split_k)
    split_k = triton.cdiv(triton.cdiv(k, tile), tiles_per_split)
    target = out if split_k == 1 else new_partials(split_k, m, n, torch.float32, x)
    blocks = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    with torch.cuda.device_of(x):
        weight_only_gemm_kernel[(blocks, split_k)](
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
            COMPUTE=FLOAT_TYPES[compute],
            UNROLL=unrolled_fields(
                config, weight.bits, compute.itemsize, device_facts(x.device)[1]
            ),
            SPLIT_K=split_k,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            # The scale of nested quantization is a product and a sum: fused, its rounding would
            # differ from that of the reference.
            enable_fp_fusion=weight.scale_mode != "nested",
            **weight_arguments(weight, tile, plane),
        )
        if split_k > 1:
            sum_partials(target, out, x_scale, None, bias)
    return out
