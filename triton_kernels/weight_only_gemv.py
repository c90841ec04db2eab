"""Weight-only GEMV for few rows of x: y = x @ w.T + b on the fp32 units.

    y[m, n] = x_scale[m] * sum_k x[m, k] * scale[n, g] * (value(code[n, k]) - zero[n, g]) + b[n]

The weights are read once per row and used once, so nothing is gained by tensor cores: a program
owns BLOCK_N outputs of one row and one of SPLIT_K parts of K, keeps products in a [P, BLOCK_N] tile
of fp32 registers and sums the tile over P once, at its end: only there do its warps, which have
rows of P each, wait for each other. Where a group covers whole planes, the scale is applied to the
sum of those that it has in a word tile instead of the weights. Decoded weights are not rounded.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import GemvConfig, fields_at_once, gemv_config_for
from .launch import Launch, ceil_div, run
from .operands import code_of, load_codebook, load_group, load_words
from .partition import tiles_of
from .planar import PlanarWeight
from .product import Product, fields_of_a_group, float_product, plane_of, product_launches
from .reduce import store_product


@triton.jit(do_not_specialize=["M", "G", "tiles_per_split"])
def weight_only_gemv_kernel(
    x,
    weight,
    ending,
    out_ptr,
    M,
    G,
    tiles_per_split,
    BITS: tl.constexpr,
    VALUES: tl.constexpr,
    PLANE: tl.constexpr,
    GROUPING: tl.constexpr,
    EVEN_K: tl.constexpr,
    UNROLL: tl.constexpr,
    SHARED: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m = tl.program_id(0)
    split = tl.program_id(2)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    r = tl.arange(0, PLANE)
    n_mask = n < weight.N
    x_row = x.ptr + m.to(tl.int64) * x.stride_m
    acc = tl.zeros((PLANE, BLOCK_N), dtype=tl.float32)

    codebook = load_codebook(weight, 0, BITS)
    if GROUPING == "channel":
        scale, zero = load_group(weight, n, 0, G, n_mask, GROUPING)
    first, last = tiles_of(split, tiles_per_split, weight.K, VALUES * PLANE)
    for tile in range(first, last):
        # A weight is used once per row of x: first out of the cache, to leave x and the scales in.
        words = load_words(
            weight,
            (tile * PLANE + r)[:, None],
            n[None, :],
            n_mask[None, :],
            BITS,
            EVEN_K,
            "evict_first",
        )
        if GROUPING == "tile":
            scale, zero = load_group(weight, n, tile * (VALUES * PLANE), G, n_mask, GROUPING)
            part = tl.zeros((PLANE, BLOCK_N), dtype=tl.float32)
        for field in range(0, VALUES, UNROLL):
            for j in tl.static_range(UNROLL):
                i = field + j
                k0 = (tile * VALUES + i) * PLANE
                k = k0 + r
                if GROUPING == "plane" and j % SHARED == 0:
                    scale, zero = load_group(weight, n, k0, G, n_mask, GROUPING)
                    part = tl.zeros((PLANE, BLOCK_N), dtype=tl.float32)
                elif GROUPING == "element":
                    scale, zero = load_group(
                        weight, n[None, :], k[:, None], G, n_mask[None, :], GROUPING
                    )
                value = weight.decode(code_of(words, i, BITS), codebook, BITS) - zero
                x_mask = None if EVEN_K else k < weight.K
                x_tile = tl.load(x_row + k.to(tl.int64) * x.stride_k, mask=x_mask)
                if not EVEN_K:
                    x_tile = tl.where(x_mask, x_tile, 0)
                if x.decode is None:
                    x_tile = x_tile.to(tl.float32)
                else:
                    x_tile = x.decode(x_tile.to(tl.int32), None, 8)
                if GROUPING == "channel":
                    acc += value * x_tile[:, None]
                elif GROUPING == "element":
                    acc += (value * scale) * x_tile[:, None]
                else:
                    part += value * x_tile[:, None]
                if GROUPING == "plane" and j % SHARED == SHARED - 1:
                    acc += part * scale
        if GROUPING == "tile":
            acc += part * scale

    y = tl.sum(acc, axis=0)  # [BLOCK_N]
    if GROUPING == "channel":
        y *= scale
    store_product(out_ptr, y, m, n, None, n_mask, split, M, weight.N, ending, SPLIT_K)


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
    product = float_product(x, weight, bias, x_scale, out_dtype)
    if product.m:
        config = config or gemv_config_for("weight_only_gemv", product.m, weight, x.device)
        run(*gemv_launches(product, config), on=x)
    return product.out


def gemv_launches(product: Product, config: GemvConfig) -> list[Launch]:
    """The launches of a weight-only GEMV."""
    weight = product.weight
    plane = plane_of(weight, config)
    fields = fields_at_once(weight.bits)
    if weight.group_size % plane != 0:
        # Each weight loads a scale and an address: those of all fields at once spill registers.
        fields = math.gcd(fields, 4)
    return product_launches(
        weight_only_gemv_kernel,
        (product.m, ceil_div(weight.n, config.block_n)),
        product,
        config,
        {"enable_fp_fusion": True},  # multiply-adds are what this kernel does
        UNROLL=fields,
        SHARED=fields_of_a_group(fields, plane, weight.group_size),
    )
