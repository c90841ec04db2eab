"""Weight-only GEMM: y = x @ w.T + b with w decoded from 1, 2, 3, 4 or 8 bits on the way.

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
from .launch import Launch, ceil_div, device_facts, run
from .numerics import dot, round_to
from .operands import code_of, load_codebook, load_group, load_words, load_x
from .partition import output_tile, tiles_of
from .planar import PlanarWeight
from .product import (
    FLOAT_TYPES,
    Product,
    fields_of_a_group,
    float_product,
    plane_of,
    product_launches,
)
from .reduce import store_product


@triton.jit(do_not_specialize=["M", "G", "tiles_per_split"])
def weight_only_gemm_kernel(
    x,
    weight,
    ending,
    out_ptr,
    M,
    G,
    tiles_per_split,
    COMPUTE: tl.constexpr,
    BITS: tl.constexpr,
    VALUES: tl.constexpr,
    PLANE: tl.constexpr,
    GROUPING: tl.constexpr,
    EVEN_K: tl.constexpr,
    UNROLL: tl.constexpr,
    SHARED: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    m, n, m_mask, n_mask = output_tile(tl.program_id(0), M, weight.N, BLOCK_M, BLOCK_N, GROUP_M)
    split = tl.program_id(1)
    r = tl.arange(0, PLANE)
    x_rows = x.ptr + m.to(tl.int64) * x.stride_m
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)

    codebook = load_codebook(weight, n * 0, BITS)
    if GROUPING == "channel":
        scale, zero = load_group(weight, n, 0, G, n_mask, GROUPING)
    first, last = tiles_of(split, tiles_per_split, weight.K, VALUES * PLANE)
    for tile in range(first, last):
        words = load_words(weight, (tile * PLANE + r)[None, :], n, n_mask, BITS, EVEN_K, "")
        if GROUPING == "tile":
            scale, zero = load_group(weight, n, tile * (VALUES * PLANE), G, n_mask, GROUPING)
        for field in range(0, VALUES, UNROLL):
            for j in tl.static_range(UNROLL):
                i = field + j
                k0 = (tile * VALUES + i) * PLANE
                k = k0 + r
                if GROUPING == "plane" and j % SHARED == 0:
                    scale, zero = load_group(weight, n, k0, G, n_mask, GROUPING)
                elif GROUPING == "element":
                    scale, zero = load_group(weight, n, k[None, :], G, n_mask, GROUPING)
                value = weight.decode(code_of(words, i, BITS), codebook, BITS)
                w = round_to(scale * (value - zero), COMPUTE)
                # Padded columns: x is 0 there, and the weight of code 0 is finite.
                x_tile = load_x(x, x_rows, k, m_mask, weight.K, EVEN_K)
                if x.decode is not None:
                    x_tile = x.decode(x_tile.to(tl.int32), None, 8).to(COMPUTE)
                acc = dot(w, x_tile, acc)

    store_product(out_ptr, acc, m, n, m_mask, n_mask, split, M, weight.N, ending, SPLIT_K)


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
    product = float_product(x, weight, bias, x_scale, out_dtype)
    if product.m:
        config = config or gemm_config_for(
            "weight_only_gemm", product.m, weight, x.device, product.compute.itemsize
        )
        _, capability, _ = device_facts(x.device)
        run(*gemm_launches(product, config, capability), on=x)
    return product.out


def gemm_launches(
    product: Product, config: GemmConfig, capability: tuple[int, int]
) -> list[Launch]:
    """The launches of a weight-only GEMM on a device of that compute capability."""
    weight, compute = product.weight, product.compute
    fields = unrolled_fields(config, weight.bits, compute.itemsize, capability)
    blocks = ceil_div(product.m, config.block_m) * ceil_div(weight.n, config.block_n)
    return product_launches(
        weight_only_gemm_kernel,
        (blocks,),
        product,
        config,
        {
            "num_stages": config.num_stages,
            # The scale of nested quantization is a product and a sum: fused, its rounding would
            # differ from that of the reference.
            "enable_fp_fusion": weight.scale_mode != "nested",
        },
        COMPUTE=FLOAT_TYPES[compute],
        UNROLL=fields,
        SHARED=fields_of_a_group(fields, plane_of(weight, config), weight.group_size),
        BLOCK_M=config.block_m,
        GROUP_M=config.group_m,
    )
