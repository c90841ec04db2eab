"""The orders of AutoAWQ's words.

GEMM       nibble i of an int32 word c holds column 8c + [0,2,4,6,1,3,5,7][i]; of 8 bits, which
           vLLM alone has, byte i column 4c + [0,2,1,3][i]
GEMV_FAST  int16 words [N/4, K]: word 64B + 16i + 8h + u of row r (i < 4, h < 2, u < 8) holds row
           4r + i, nibble j column 64B + 32h + 8j + u; for zero points z, products -s*z, rounded

Its GEMV words are dense. Source: AutoAWQ (Casper Hansen, MIT licence), awq/modules/linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.bits.dense import pack_dense, unpack_dense
from qkernels.errors import WeightError

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = {4: (0, 4, 1, 5, 2, 6, 3, 7), 8: (0, 2, 1, 3)}


def pack_awq(codes: Tensor) -> Tensor:
    """uint8 codes [R, N] below 16, N a multiple of 8 -> int32 words [R, N/8]."""
    return pack_dense(_reordered(codes, _ORDER), 4)


def unpack_awq(words: Tensor, bits: int = 4) -> Tensor:
    """int32 words [R, N*bits/32] of 4 or 8 bits -> uint8 codes [R, N]."""
    return _reordered(unpack_dense(words, 32 * words.shape[1] // bits, bits), _INVERSE[bits])


def unpack_awq_fast(words: Tensor) -> Tensor:
    """int16 words [N/4, K] -> uint8 codes [N, K]; K a multiple of 64."""
    rows, k = words.shape
    nibbles = unpack_dense(words.contiguous().view(torch.int32), 4 * k, 4)
    # [r, B, i, h, u, j] -> rows [r, i], columns [B, h, j, u].
    tiles = nibbles.view(rows, k // 64, 4, 2, 8, 4)
    return tiles.permute(0, 2, 1, 3, 5, 4).reshape(4 * rows, k)


def pack_awq_fast(codes: Tensor) -> Tensor:
    """uint8 codes [N, K] below 16 -> int16 words [N/4, K]; N a multiple of 4, K of 64."""
    n, k = codes.shape
    # Rows [r, i], columns [B, h, j, u] -> [r, B, i, h, u, j].
    tiles = codes.reshape(n // 4, 4, k // 64, 2, 4, 8).permute(0, 2, 1, 3, 5, 4)
    return pack_dense(tiles.reshape(n // 4, 4 * k), 4).view(torch.int16)


def divide_awq_fast(products: Tensor, scales: Tensor) -> Tensor | None:
    """The zero points z, uint8, of products -s*z and scales s; None where a product was rounded.

    Raises:
        WeightError: for zero points outside of 0..15.
    """
    products, scales = products.float(), scales.float()
    zeros = torch.where(products == 0, 0.0, -products / scales)
    # A product is rounded to within one part in 256.
    outside = ~((zeros > -0.1) & (zeros < 15.1))
    if outside.any():
        raise WeightError(f"zero points outside of 0..15, such as {float(zeros[outside][0])}")
    whole = zeros.round()
    return whole.to(torch.uint8).contiguous() if torch.equal(-whole * scales, products) else None


def _reordered(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    index = torch.tensor(order, device=codes.device)
    return codes.unflatten(1, (-1, len(order))).index_select(2, index).flatten(1)
