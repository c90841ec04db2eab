"""The words of Marlin: tiles of 16 rows of K and 64 columns of N, as its tensor cores take them.

Word 128*j + 16*n + 4*t + w of row i (n < 8, t < 4, w < 4) holds the codes of columns
64*j + 16*w + n (+ 8) and rows 16*i + 2*t (+ 1, + 8): nibble 4*r + 2*c + s is that of one row more
for r, eight columns more for c and eight rows more for s. Scales lie in an order of columns of
their own, one for several groups and one for a single group.
Source: Marlin (Frantar et al. 2024, Apache-2.0), for the order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.bits.dense import unpack_dense

TILE_K, TILE_N = 16, 64

_SEVERAL = tuple(i + 8 * j for i in range(8) for j in range(8))
_SINGLE = tuple(2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25))


def unpack_marlin(words: Tensor) -> Tensor:
    """int32 words [K/16, 2*N] -> uint8 codes [N, K] of 4 bits; N a multiple of 64."""
    tiles, width = words.shape
    k, n = TILE_K * tiles, width // 2
    codes = unpack_dense(words, 8 * width, 4).view(tiles, n // TILE_N, 8, 4, 4, 2, 2, 2)
    # [i, j, n, t, w, r, c, s] -> columns [j, w, c, n], rows [i, s, t, r].
    return codes.permute(1, 4, 6, 2, 0, 7, 3, 5).reshape(n, k)


def marlin_scales(stored: Tensor) -> Tensor:
    """Scales [G, N] as they are stored -> [N, G]."""
    order = torch.tensor(_SEVERAL if stored.shape[0] > 1 else _SINGLE, device=stored.device)
    blocks = stored.unflatten(1, (-1, len(order)))
    return blocks.index_select(2, order.argsort()).flatten(1).t().contiguous()
