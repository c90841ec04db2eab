"""The order of AutoAWQ's GEMM words: nibble i of word c holds column 8c + [0,2,4,6,1,3,5,7][i].

Source: AutoAWQ (Casper Hansen, MIT licence), awq/modules/linear, for the order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.bits.dense import pack_dense, unpack_dense

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)


def pack_awq(codes: Tensor) -> Tensor:
    """uint8 codes [R, N] below 16, N a multiple of 8 -> int32 words [R, N/8]."""
    return pack_dense(_reordered(codes, _ORDER), 4)


def unpack_awq(words: Tensor) -> Tensor:
    """int32 words [R, N/8] -> uint8 codes [R, N]."""
    return _reordered(unpack_dense(words, 8 * words.shape[1], 4), _INVERSE)


def _reordered(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    index = torch.tensor(order, device=codes.device)
    return codes.unflatten(1, (-1, 8)).index_select(2, index).flatten(1)
