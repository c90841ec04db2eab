"""The words of Marlin: tiles of 16 rows of K and 64 columns of N, as its tensor cores take them.

4 bits  word 128*j + 16*n + 4*t + w of row i (n < 8, t < 4, w < 4) holds the codes of columns
        64*j + 16*w + n (+ 8) and rows 16*i + 2*t (+ 1, + 8): nibble 4*r + 2*c + s is that of one
        row more for r, eight columns more for c and eight rows more for s
8 bits  word 256*j + 32*n + 8*t + 2*w + c, with the same letters; byte 2*r + s

Scales, zero points and biases lie in orders of columns of their own: `_SEVERAL` for several groups
and for all zero points, `_SINGLE` for a single group and for biases. Zero points are then packed
along N, each eight (8 bits: four) of them in the order of AutoAWQ.
Source: Marlin (Frantar et al. 2024, Apache-2.0) and vLLM (Apache-2.0), for the orders.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.bits.awq import unpack_awq
from qkernels.bits.dense import pack_dense, unpack_dense

TILE_K, TILE_N = 16, 64

_SEVERAL = tuple(i + 8 * j for i in range(8) for j in range(8))
_SINGLE = tuple(2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25))

# Of a row of tiles, after [i, j, n, t, w] with the letters above: [r, c, s] or [c, r, s].
_LETTERS = {4: "ijntwrcs", 8: "ijntwcrs"}
_ROWS_FIRST = "jwcnistr"
"""Columns [j, w, c, n], rows [i, s, t, r]: a weight [N, K]."""
_SIZES = {"n": 8, "t": 4, "w": 4, "r": 2, "c": 2, "s": 2}


def unpack_marlin(words: Tensor, bits: int = 4) -> Tensor:
    """int32 words [K/16, N*bits/2] of 4 or 8 bits -> uint8 codes [N, K]; N a multiple of 64."""
    letters = _LETTERS[bits]
    tiles, width = words.shape
    k, n = TILE_K * tiles, 2 * width // bits
    codes = unpack_dense(words, 32 * width // bits, bits)
    shape = {**_SIZES, "i": tiles, "j": n // TILE_N}
    codes = codes.view([shape[letter] for letter in letters])
    return codes.permute([letters.index(letter) for letter in _ROWS_FIRST]).reshape(n, k)


def pack_marlin(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [N, K] -> int32 words [K/16, N*bits/2]; N a multiple of 64, K of 16."""
    letters = _LETTERS[bits]
    n, k = codes.shape
    shape = {**_SIZES, "i": k // TILE_K, "j": n // TILE_N}
    tiles = codes.reshape([shape[letter] for letter in _ROWS_FIRST])
    tiles = tiles.permute([_ROWS_FIRST.index(letter) for letter in letters])
    return pack_dense(tiles.reshape(k // TILE_K, TILE_K * n), bits)


def marlin_scales(stored: Tensor) -> Tensor:
    """Scales [G, N] as they are stored -> [N, G]."""
    order = _SEVERAL if stored.shape[0] > 1 else _SINGLE
    return _restored(stored, order).t().contiguous()


def marlin_zeros(words: Tensor, bits: int) -> Tensor:
    """int32 words [G, N*bits/32] -> uint8 zero points [N, G]; N a multiple of 64."""
    return _restored(unpack_awq(words, bits), _SEVERAL).t().contiguous()


def marlin_bias(stored: Tensor) -> Tensor:
    """A bias [N] as it is stored -> [N] in the order of the weight; N a multiple of 32."""
    return _restored(stored[None], _SINGLE)[0]


def _restored(stored: Tensor, order: tuple[int, ...]) -> Tensor:
    """[R, N] whose every len(order) columns were put into that order."""
    back = torch.tensor(order, device=stored.device).argsort()
    return stored.unflatten(1, (-1, len(order))).index_select(2, back).flatten(1)
