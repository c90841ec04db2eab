"""Packing of codes into 32-bit words and back, on the device.

    planar   see planar.py: words [K_pad / V, N], K in planes, for the kernels of this package
    dense    words [R, ceil(K * bits / 32)]: per row a little-endian bit stream along K, value k at
             bit k * bits; 3-bit values straddle words

One program writes a tile of the destination, so that every word is stored once. Codes are uint8 and
exact both ways; bits above the width of a code are dropped.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import fields_at_once
from .launch import Launch, ceil_div, run
from .operands import code_of
from .planar import check_plane, values_per_word, word_rows

_BITS = (1, 2, 3, 4, 8)
_BLOCK = 128  # words of a program along the contiguous axis: 512 bytes per warp and store
_BLOCK_ROWS = 8


@triton.jit
def planar_block(PLANE: tl.constexpr, BLOCK_N: tl.constexpr):
    """(tile, r, n) of a program: a word tile, its word rows [PLANE, 1], channels [1, BLOCK_N]."""
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return tl.program_id(0), tl.arange(0, PLANE)[:, None], n


@triton.jit
def pack_planar_kernel(
    words_ptr,
    codes_ptr,
    N,
    K,
    BITS: tl.constexpr,
    VALUES: tl.constexpr,
    UNROLL: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile, r, n = planar_block(PLANE, BLOCK_N)
    words = tl.zeros((PLANE, BLOCK_N), dtype=tl.int32)
    for field in range(0, VALUES, UNROLL):
        for j in tl.static_range(UNROLL):
            i = field + j
            k = (tile * VALUES + i) * PLANE + r
            code = tl.load(codes_ptr + n.to(tl.int64) * K + k, mask=(n < N) & (k < K), other=0)
            words |= (code.to(tl.int32) & ((1 << BITS) - 1)) << (BITS * i)
    row = (tile * PLANE + r).to(tl.int64)
    tl.store(words_ptr + row * N + n, words, mask=n < N)


@triton.jit
def unpack_planar_kernel(
    words_ptr,
    codes_ptr,
    N,
    K,
    BITS: tl.constexpr,
    VALUES: tl.constexpr,
    UNROLL: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile, r, n = planar_block(PLANE, BLOCK_N)
    row = (tile * PLANE + r).to(tl.int64)
    words = tl.load(words_ptr + row * N + n, mask=n < N, other=0)
    for field in range(0, VALUES, UNROLL):
        for j in tl.static_range(UNROLL):
            i = field + j
            k = (tile * VALUES + i) * PLANE + r
            code = code_of(words, i, BITS).to(tl.uint8)
            tl.store(codes_ptr + n.to(tl.int64) * K + k, code, mask=(n < N) & (k < K))


@triton.jit
def pack_dense_kernel(
    words_ptr,
    codes_ptr,
    R,
    K,
    W,
    BITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]  # [BLOCK_R, 1]
    w = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]  # [1, BLOCK]
    start = w.to(tl.int64) * 32  # the first bit of the word
    first = start // BITS
    words = tl.zeros((BLOCK_R, BLOCK), dtype=tl.uint32)
    for i in tl.static_range((32 + BITS - 1) // BITS + (1 if 32 % BITS else 0)):
        k = first + i
        shift = (k * BITS - start).to(tl.int32)  # negative where the value began in the word before
        mask = (row < R) & (k < K) & (shift < 32)
        code = tl.load(codes_ptr + row.to(tl.int64) * K + k, mask=mask, other=0)
        code = (code & ((1 << BITS) - 1)).to(tl.uint32)
        up = tl.minimum(tl.maximum(shift, 0), 31).to(tl.uint32)
        down = tl.maximum(-shift, 0).to(tl.uint32)
        words |= (code >> down) << up
    target = words_ptr + row.to(tl.int64) * W + w
    tl.store(target, words.to(tl.int32, bitcast=True), mask=(row < R) & (w < W))


@triton.jit
def unpack_dense_kernel(
    words_ptr,
    codes_ptr,
    R,
    K,
    W,
    BITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]  # [BLOCK_R, 1]
    k = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]  # [1, BLOCK]
    bit = k.to(tl.int64) * BITS
    w = bit // 32
    shift = (bit % 32).to(tl.uint32)
    mask = (row < R) & (k < K)
    source = words_ptr + row.to(tl.int64) * W + w
    code = tl.load(source, mask=mask, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:
        straddles = shift > 32 - BITS
        high = tl.load(source + 1, mask=mask & straddles, other=0).to(tl.uint32, bitcast=True)
        code |= tl.where(straddles, high << ((32 - shift) & 31), 0)
    code = (code & ((1 << BITS) - 1)).to(tl.uint8)
    tl.store(codes_ptr + row.to(tl.int64) * K + k, code, mask=mask)


def pack_planar(codes: Tensor, bits: int, plane: int) -> Tensor:
    """Codes uint8 [N, K] -> planar words: int32 [K_pad / V, N], or uint8 [K, N] for 8 bits.

    Raises:
        ValueError: for another dtype, shape, number of bits or plane, with the values.
    """
    codes = _check_codes(codes, bits)
    if bits == 8:
        return codes.t().contiguous()
    check_plane(plane)
    n, k = codes.shape
    words = torch.empty((word_rows(k, bits, plane), n), dtype=torch.int32, device=codes.device)
    if words.numel():
        run(planar_launch(pack_planar_kernel, words, codes, bits, plane), on=codes)
    return words


def unpack_planar(words: Tensor, k: int, bits: int, plane: int) -> Tensor:
    """Planar words -> codes uint8 [N, k]: the inverse of `pack_planar`.

    Raises:
        ValueError: for another dtype, shape, number of bits or plane, with the values.
    """
    _check_bits(bits)
    if bits != 8:
        check_plane(plane)
    dtype = torch.uint8 if bits == 8 else torch.int32
    _check_words(words, dtype, f"[{word_rows(k, bits, plane)}, N]", word_rows(k, bits, plane), 0)
    if bits == 8:
        return words.t().contiguous()
    words = words.contiguous()
    codes = torch.empty((words.shape[1], k), dtype=torch.uint8, device=words.device)
    if codes.numel():
        run(planar_launch(unpack_planar_kernel, words, codes, bits, plane), on=words)
    return codes


def planar_launch(kernel: Any, words: Tensor, codes: Tensor, bits: int, plane: int) -> Launch:
    """The launch of `pack_planar_kernel` or `unpack_planar_kernel`."""
    n, k = codes.shape
    values = values_per_word(bits)
    arguments = {
        "words_ptr": words,
        "codes_ptr": codes,
        "N": n,
        "K": k,
        "BITS": bits,
        "VALUES": values,
        "UNROLL": fields_at_once(bits),
        "PLANE": plane,
        "BLOCK_N": _BLOCK,
    }
    return Launch(kernel, (words.shape[0] // plane, ceil_div(n, _BLOCK)), arguments, {})


def pack_dense(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [R, K] -> int32 [R, ceil(K * bits / 32)], a little-endian bit stream per row.

    Raises:
        ValueError: for another dtype, shape or number of bits, with the values.
    """
    codes = _check_codes(codes, bits)
    rows, k = codes.shape
    words = torch.empty((rows, -(-k * bits // 32)), dtype=torch.int32, device=codes.device)
    if words.numel():
        run(dense_launch(pack_dense_kernel, words, codes, bits), on=codes)
    return words


def unpack_dense(words: Tensor, k: int, bits: int) -> Tensor:
    """int32 [R, ceil(k * bits / 32)] -> codes uint8 [R, k]: the inverse of `pack_dense`.

    Raises:
        ValueError: for another dtype, shape or number of bits, with the values.
    """
    _check_bits(bits)
    width = -(-k * bits // 32)
    _check_words(words, torch.int32, f"[R, {width}]", width, 1)
    words = words.contiguous()
    codes = torch.empty((words.shape[0], k), dtype=torch.uint8, device=words.device)
    if codes.numel():
        run(dense_launch(unpack_dense_kernel, words, codes, bits), on=words)
    return codes


def dense_launch(kernel: Any, words: Tensor, codes: Tensor, bits: int) -> Launch:
    """The launch of `pack_dense_kernel` or `unpack_dense_kernel`."""
    (rows, k), width = codes.shape, words.shape[1]
    columns = width if kernel is pack_dense_kernel else k
    arguments = {
        "words_ptr": words,
        "codes_ptr": codes,
        "R": rows,
        "K": k,
        "W": width,
        "BITS": bits,
        "BLOCK_R": _BLOCK_ROWS,
        "BLOCK": _BLOCK,
    }
    grid = (ceil_div(columns, _BLOCK), ceil_div(rows, _BLOCK_ROWS))
    return Launch(kernel, grid, arguments, {})


def _check_bits(bits: int) -> None:
    if bits not in _BITS:
        raise ValueError(f"codes have {', '.join(map(str, _BITS[:-1]))} or 8 bits, got {bits}")


def _check_codes(codes: Tensor, bits: int) -> Tensor:
    _check_bits(bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(
            f"codes are uint8 with two dimensions, got {codes.dtype} {list(codes.shape)}"
        )
    return codes.contiguous()


def _check_words(words: Tensor, dtype: torch.dtype, shape: str, size: int, dim: int) -> None:
    if words.dtype != dtype or words.dim() != 2 or words.shape[dim] != size:
        raise ValueError(f"words are {dtype} {shape}, got {words.dtype} {list(words.shape)}")
