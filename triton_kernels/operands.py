"""The operands of a product as its kernel sees them, and how it loads them.

A kernel takes x and the weight as tuples of pointers and sizes; a pointer that is None is left out
of the code. Scales are [G, N] (N contiguous) and come in three modes:

    float       fp16, bf16 or fp32
    two_level   uint8 multiplier [G, N] times an fp32 channel scale [N]
    nested      uint8 code [G, N]: table[code] * absmax[(n * G + g) // 256] + offset (QLoRA's double
                quantization: blocks of 256 run along the groups of a row, then to the next row)
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

NESTED_BLOCK = 256
"""Scales that share one nested absmax. Fixed by bitsandbytes, whose checkpoints carry it."""

_NESTED_BLOCK = tl.constexpr(NESTED_BLOCK)


class XOperand(NamedTuple):
    """x [M, K] and its strides; `decode` is the decode function of float8 bytes, or None."""

    ptr: Any
    stride_m: Any
    stride_k: Any
    decode: Any


class WeightOperand(NamedTuple):
    """A `PlanarWeight`; the pointers of the scale mode and of the decode that it has not are None.

    `decode` is its decode function, `zero` that of its zero points, `group_size` 0 where one group
    covers K.
    """

    words: Any
    scales: Any
    zeros: Any
    codebook: Any
    channel_scales: Any
    nested_table: Any
    nested_absmax: Any
    nested_offset: Any
    decode: Any
    zero: Any
    N: Any
    K: Any
    group_size: Any


@triton.jit
def load_x(x, rows, k, m_mask, K, EVEN_K: tl.constexpr):
    """Columns `k` [P] of x as [P, BLOCK_M], 0 beyond K; `rows` point to the rows of x."""
    mask = m_mask if EVEN_K else m_mask & (k < K)[:, None]
    return tl.load(rows + k[:, None].to(tl.int64) * x.stride_k, mask=mask, other=0)


@triton.jit
def load_words(
    weight,
    row,
    n,
    n_mask,
    BITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Words in rows `row` of channels `n`, index tiles that broadcast to each other.

    EVICTION is that of the caches, "" for the usual one.
    """
    mask = n_mask if BITS != 8 or EVEN_K else n_mask & (row < weight.K)
    return tl.load(
        weight.words + (row.to(tl.int64) * weight.N + n),
        mask=mask,
        other=0,
        eviction_policy=EVICTION,
    )


@triton.jit
def code_of(words, i, BITS: tl.constexpr):
    """Field `i` of each word, int32."""
    code = words.to(tl.int32)
    if BITS != 8:
        code = (code >> (BITS * i)) & ((1 << BITS) - 1)
    return code


@triton.jit
def load_codebook(weight, places, BITS: tl.constexpr):
    """The codebook as `weight.decode` takes it: of 1 and 2 bits its values, else its address.

    `places` are zeros, as many as there shall be copies of a value. Where a tensor core reads what
    is decoded, that is one for each channel, [BLOCK_N, 1]: Triton decodes in the registers that the
    tensor core reads where all that a weight depends on was loaded as a tile, and a number that is
    the same for all would send each tile through shared memory.
    """
    codebook = weight.codebook
    if weight.codebook is not None:
        address = weight.codebook + places
        if BITS == 1:
            codebook = tl.load(address), tl.load(address + 1)
        elif BITS == 2:
            codebook = (
                tl.load(address),
                tl.load(address + 1),
                tl.load(address + 2),
                tl.load(address + 3),
            )
    return codebook


@triton.jit
def group_of(weight, n, k, G, GROUPING: tl.constexpr):
    """The groups, of G, that columns `k` of channels `n` are in; the last one beyond K."""
    return n * 0 if GROUPING == "channel" else tl.minimum(k // weight.group_size, G - 1)


@triton.jit
def load_group(weight, n, k, G, mask, GROUPING: tl.constexpr):
    """fp32 (scale, zero) of channels `n` at columns `k`, that broadcast to each other.

    The zero is as `weight.zero` gives it, for values as `weight.decode` does.
    """
    g = group_of(weight, n, k, G, GROUPING)
    index = g.to(tl.int64) * weight.N + n
    stored = tl.load(weight.scales + index, mask=mask, other=0)
    scale = stored.to(tl.float32)
    if weight.channel_scales is not None:
        scale = scale * tl.load(weight.channel_scales + n, mask=mask, other=0.0)
    elif weight.nested_table is not None:
        block = (n.to(tl.int64) * G + g) // _NESTED_BLOCK
        absmax = tl.load(weight.nested_absmax + block, mask=mask, other=0.0)
        value = tl.load(weight.nested_table + stored.to(tl.int32))
        scale = value * absmax + tl.load(weight.nested_offset)
    zero = 0.0
    if weight.zeros is not None:
        zero = weight.zero(tl.load(weight.zeros + index, mask=mask, other=0))
    return scale, zero
