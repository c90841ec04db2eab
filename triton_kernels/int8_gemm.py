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

from .config import GemmConfig, gemm_config_for, unrolled_fields
from .launch import Launch, ceil_div, device_facts, run
from .numerics import dot
from .operands import code_of, group_of, load_words, load_x
from .partition import output_tile, tiles_of
from .planar import PlanarWeight
from .product import Product, fields_of_a_group, new_output, plane_of, product_launches
from .reduce import ending_of, store_product


@triton.jit
def int8_weight(
    weight,
    words,
    i,
    n,
    g,
    mask,
    SIGNED: tl.constexpr,
    BITS: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """Field `i` of the words as int8 [BLOCK_N, PLANE]; `g` broadcasts to its groups."""
    value = words
    if BITS != 8:
        value = code_of(words, i, BITS)
        index = g.to(tl.int64) * weight.N + n
        if SIGNED:
            value -= 1 << (BITS - 1)
        if weight.zeros is not None:
            value -= tl.load(weight.zeros + index, mask=mask, other=0).to(tl.int32)
        if EPILOGUE == "two_level":
            value *= tl.load(weight.scales + index, mask=mask, other=0).to(tl.int32)
    return value.to(tl.int8)


@triton.jit
def scaled(weight, sums, n, g, mask):
    """fp32 products of int32 sums with the scales of group `g`."""
    index = g.to(tl.int64) * weight.N + n
    scale = tl.load(weight.scales + index, mask=mask, other=0.0)
    return scale.to(tl.float32) * sums.to(tl.float32)


@triton.jit(do_not_specialize=["M", "G", "tiles_per_split"])
def int8_gemm_kernel(
    x,
    weight,
    ending,
    out_ptr,
    M,
    G,
    tiles_per_split,
    SIGNED: tl.constexpr,
    EPILOGUE: tl.constexpr,
    BITS: tl.constexpr,
    VALUES: tl.constexpr,
    PLANE: tl.constexpr,
    GROUPING: tl.constexpr,
    GROUPS_PER_PLANE: tl.constexpr,
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
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    if EPILOGUE == "group":
        total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)

    first, last = tiles_of(split, tiles_per_split, weight.K, VALUES * PLANE)
    for tile in range(first, last):
        words = load_words(weight, (tile * PLANE + r)[None, :], n, n_mask, BITS, EVEN_K, "")
        if EPILOGUE == "group" and GROUPING == "tile":
            acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
        for field in range(0, VALUES, UNROLL):
            for j in tl.static_range(UNROLL):
                i = field + j
                k0 = (tile * VALUES + i) * PLANE
                k = k0 + r
                g = group_of(weight, n, k[None, :] if GROUPING == "element" else k0, G, GROUPING)
                w = int8_weight(weight, words, i, n, g, n_mask, SIGNED, BITS, EPILOGUE)
                # Padded columns: x is 0 there.
                x_tile = load_x(x, x_rows, k, m_mask, weight.K, EVEN_K)
                if EPILOGUE != "group" or GROUPING == "tile":
                    acc = dot(w, x_tile, acc)
                elif GROUPING == "plane":
                    if j % SHARED == 0:
                        part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
                    part = dot(w, x_tile, part)
                    if j % SHARED == SHARED - 1:
                        total += scaled(weight, part, n, g, n_mask)
                else:
                    for touched in range(GROUPS_PER_PLANE):
                        one = k0 // weight.group_size + touched
                        x_one = tl.where((k // weight.group_size == one)[:, None], x_tile, 0)
                        part = dot(w, x_one, tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32))
                        total += scaled(weight, part, n, tl.minimum(one, G - 1), n_mask)
        if EPILOGUE == "group" and GROUPING == "tile":
            g = group_of(weight, n, tile * (VALUES * PLANE), G, GROUPING)
            total += scaled(weight, acc, n, g, n_mask)

    sums = total if EPILOGUE == "group" else acc
    store_product(out_ptr, sums, m, n, m_mask, n_mask, split, M, weight.N, ending, SPLIT_K)


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
    product = int8_product(xq, x_scale, weight, bias, out_dtype)
    if product.m:
        config = config or gemm_config_for("int8_gemm", product.m, weight, xq.device, x_bytes=1)
        _, capability, _ = device_facts(xq.device)
        run(*int8_launches(product, config, capability), on=xq)
    return product.out


def int8_product(
    xq: Tensor, x_scale: Tensor, weight: PlanarWeight, bias: Tensor | None, out_dtype: torch.dtype
) -> Product:
    """The product of int8 x and a weight, `out` not yet written; raises what `int8_gemm` does."""
    if xq.dtype != torch.int8:
        raise ValueError(f"xq is {xq.dtype}, expected torch.int8: see quantize_rows")
    _check_int8_weight(weight)
    w_scales = {"channel": weight.scales, "two_level": weight.channel_scales, "group": None}
    out = new_output(xq, weight, bias, x_scale, out_dtype)
    return Product(
        xq, weight, ending_of(x_scale, w_scales[_epilogue(weight)], bias), out, torch.int8
    )


def int8_launches(
    product: Product, config: GemmConfig, capability: tuple[int, int]
) -> list[Launch]:
    """The launches of an int8 GEMM on a device of that compute capability.

    Raises:
        ValueError: for a `config` whose steps are shorter than those of the tensor core.
    """
    weight, plane = product.weight, plane_of(product.weight, config)
    if plane < 32:
        raise ValueError(f"block_k {plane} is too small for int8 products: use 32 or more")
    epilogue = _epilogue(weight)
    fields = unrolled_fields(config, weight.bits, 1, capability)
    blocks = ceil_div(product.m, config.block_m) * ceil_div(weight.n, config.block_n)
    return product_launches(
        int8_gemm_kernel,
        (blocks,),
        product,
        config,
        {"num_stages": config.num_stages, "enable_fp_fusion": True},
        partials=torch.float32 if epilogue == "group" else torch.int32,
        SIGNED=weight.decode == "signed",
        EPILOGUE=epilogue,
        GROUPS_PER_PLANE=groups_per_plane(plane, weight.group_size),
        UNROLL=fields,
        SHARED=fields_of_a_group(fields, plane, weight.group_size),
        BLOCK_M=config.block_m,
        GROUP_M=config.group_m,
    )


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
