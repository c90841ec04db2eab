"""The order of tinygemm's 4-bit words, PyTorch's `_weight_int4pack_mm` for CUDA.

int32 words [N/8, K/128, 32, 4]: word i of lane t of a tile [8, 128] holds row t // 4, nibble m < 4
column 32i + 8m + 2(t % 4), and nibble m + 4 the column after that.

Source: PyTorch (BSD-3-Clause), aten/src/ATen/native/cuda/int4mm.cu, read as documentation.
"""

from __future__ import annotations

from torch import Tensor

from qkernels.bits.dense import unpack_dense

TILE_ROWS, TILE_COLUMNS = 8, 128


def unpack_tinygemm(words: Tensor) -> Tensor:
    """int32 words [N/8, K/128, 32, 4] -> uint8 codes [N, K]."""
    rows, columns = words.shape[:2]
    nibbles = unpack_dense(words.reshape(rows, -1), columns * TILE_ROWS * TILE_COLUMNS, 4)
    # [tile row, tile column, row, pair, i, which of the pair, m] -> [N, K].
    tiles = nibbles.view(rows, columns, TILE_ROWS, 4, 4, 2, 4)
    ordered = tiles.permute(0, 2, 1, 4, 6, 3, 5)
    return ordered.reshape(TILE_ROWS * rows, TILE_COLUMNS * columns)
