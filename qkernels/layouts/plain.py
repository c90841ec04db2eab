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


def _take_rows(scheme: QuantScheme, words: Tensor, rows: Tensor, k: int) -> Tensor:
    taken = words.index_select(0, rows)
    if words.device.type == "cpu" or 32 % scheme.bits:
        return unpack_dense(taken, k, scheme.bits)
    # A few launches for all codes of a word: a few rows take no longer than these.
    shifts = torch.arange(0, 32, scheme.bits, dtype=torch.int32, device=words.device)
    fields = (taken[:, :, None] >> shifts) & ((1 << scheme.bits) - 1)
    return fields.to(torch.uint8).flatten(1)[:, :k]


def _take_groups(stored: Tensor, rows: Tensor) -> Tensor:
    return stored.index_select(0, rows)


PLAIN = Layout(
    name="plain",
    why_not=lambda scheme: None,
    allocate=_allocate,
    pack_rows=_pack_rows,
    unpack_rows=_unpack_rows,
    store_groups=_as_it_is,
    load_groups=_as_it_is,
    take_rows=_take_rows,
    take_groups=_take_groups,
)
