"""The words of GPTQ: dense words of each output channel's codes, in columns.

    codes        int32 [K*b/32, N], a bit stream along K in each column
    zero points  int32 [G, N*b/32], a bit stream along N in each row

The first version of the format stores a zero point less one, in one of two ways: field by field, or
(with 2, 4 and 8 bits) as the whole word less the word of ones, so that a zero point of 0 borrows
from the fields above it. Both agree where no zero point is 0.
Source: GPTQ (Frantar et al. 2022) and GPTQModel (Apache-2.0), read as documentation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.bits.dense import pack_dense, unpack_dense

_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""A one in each field of a word; 3-bit fields straddle words and go one by one."""


def pack_gptq(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [N, K] -> int32 words [ceil(K*bits/32), N]."""
    return pack_dense(codes, bits).t().contiguous()


def unpack_gptq(words: Tensor, k: int, bits: int) -> Tensor:
    """int32 words [ceil(k*bits/32), N] -> uint8 codes [N, k]."""
    return unpack_dense(words.t().contiguous(), k, bits)


def pack_gptq_zeros(zeros: Tensor, bits: int, less_one: str | None = None) -> Tensor:
    """uint8 zero points [N, G] -> int32 words [G, ceil(N*bits/32)].

    Args:
        less_one: how one is taken off: "fields", "words" or, where it is not, None.
    """
    rows = zeros.t().contiguous()
    if _in_words(bits, less_one):
        return pack_dense(rows, bits) - _ONES[bits]
    return pack_dense(rows if less_one is None else _shifted(rows, -1, bits), bits)


def unpack_gptq_zeros(words: Tensor, n: int, bits: int, less_one: str | None = None) -> Tensor:
    """int32 words [G, ceil(n*bits/32)] -> uint8 zero points [n, G]; see `pack_gptq_zeros`."""
    if _in_words(bits, less_one):
        rows = unpack_dense(words + _ONES[bits], n, bits)
    else:
        rows = unpack_dense(words, n, bits)
        rows = rows if less_one is None else _shifted(rows, 1, bits)
    return rows.t().contiguous()


def _in_words(bits: int, less_one: str | None) -> bool:
    assert less_one in (None, "fields", "words"), less_one
    return less_one == "words" and bits in _ONES


def _shifted(codes: Tensor, by: int, bits: int) -> Tensor:
    return ((codes.short() + by) & ((1 << bits) - 1)).to(torch.uint8)
