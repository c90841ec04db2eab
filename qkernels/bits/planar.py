"""planar: V = 32 // bits values a word, from V planes that lie `plane` columns apart.

One field of `plane` consecutive words is then a contiguous tile of K:

    word [t*plane + r, n], field i   holds   code[n, (t*V + i)*plane + r]

K is padded with zero codes to a multiple of V*plane.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.bits.implementation import check, fastest
from qkernels.errors import WeightError

PLANAR_BITS = (1, 2, 3, 4)


def planar_rows(k: int, bits: int, plane: int) -> int:
    """Rows of planar words for `k` columns."""
    values = 32 // bits
    return -(-k // (values * plane)) * plane


def pack_planar(codes: Tensor, bits: int, plane: int) -> Tensor:
    """uint8 codes [N, K] below 2^bits -> int32 words [planar_rows(K), N]; see `PLANAR_BITS`."""
    check(codes, torch.uint8, bits, PLANAR_BITS)
    fast = fastest(codes)
    if fast is not None:
        return fast.pack_planar(codes.contiguous(), bits, plane)
    return pack_planar_torch(codes, bits, plane)


def unpack_planar(words: Tensor, k: int, bits: int, plane: int) -> Tensor:
    """int32 words [planar_rows(k), N] -> uint8 codes [N, k]."""
    check(words, torch.int32, bits, PLANAR_BITS)
    if words.shape[0] != planar_rows(k, bits, plane):
        raise WeightError(
            f"{k} columns of {bits} bits in planes of {plane} take {planar_rows(k, bits, plane)} "
            f"rows of words, got {words.shape[0]}"
        )
    fast = fastest(words)
    if fast is not None:
        return fast.unpack_planar(words.contiguous(), k, bits, plane)
    return unpack_planar_torch(words, k, bits, plane)


def pack_planar_torch(codes: Tensor, bits: int, plane: int) -> Tensor:
    """`pack_planar` in plain torch."""
    n, k = codes.shape
    values, rows = 32 // bits, planar_rows(k, bits, plane)
    planes = F.pad(codes, (0, rows * values - k)).reshape(n, rows // plane, values, plane)
    words = torch.zeros(n, rows // plane, plane, dtype=torch.int32, device=codes.device)
    for i in range(values):
        words |= planes[:, :, i].int() << (bits * i)
    return words.view(n, rows).t().contiguous()


def unpack_planar_torch(words: Tensor, k: int, bits: int, plane: int) -> Tensor:
    """`unpack_planar` in plain torch."""
    rows, n = words.shape
    values = 32 // bits
    tiles = words.t().reshape(n, rows // plane, plane)
    codes = torch.empty(n, rows // plane, values, plane, dtype=torch.uint8, device=words.device)
    for i in range(values):
        codes[:, :, i] = ((tiles >> (bits * i)) & ((1 << bits) - 1)).to(torch.uint8)
    return codes.view(n, rows * values)[:, :k].contiguous()
