"""plain: every row a dense bit stream along K; for checkpoints, `state_dict` and the reference.

words  int32 [N, ceil(K*bits/32)]     value k of row n at bit k*bits of the row
scales, zeros  [N, G]
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.bits import dense_words, pack_dense, unpack_dense
from qkernels.layouts.packed import Layout
from qkernels.scheme import QuantScheme


def _allocate(scheme: QuantScheme, n: int, k: int, device: torch.device) -> Tensor:
    return torch.empty(n, dense_words(k, scheme.bits), dtype=torch.int32, device=device)


def _pack_rows(scheme: QuantScheme, words: Tensor, start: int, codes: Tensor) -> None:
    words[start : start + codes.shape[0]] = pack_dense(codes, scheme.bits)


def _unpack_rows(scheme: QuantScheme, words: Tensor, start: int, stop: int, k: int) -> Tensor:
    return unpack_dense(words[start:stop], k, scheme.bits)


def _as_it_is(scheme: QuantScheme, n: int, values: Tensor) -> Tensor:
    return values


PLAIN = Layout(
    "plain", lambda scheme: None, _allocate, _pack_rows, _unpack_rows, _as_it_is, _as_it_is
)
