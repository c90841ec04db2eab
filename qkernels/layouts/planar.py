"""planar: the layout of the Triton kernels; N contiguous, each word loaded once, no lane shuffles.

bits 1 to 4    words  int32 [K_pad/V, N], V = 32 // bits; see `bits` for the bit order
bits 8         words  uint8 [K, N] codes; int8 [K, N] = code - 128 for int8 products
scales, zeros  [G, N]
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.bits import pack_planar, planar_rows, unpack_planar
from qkernels.layouts.packed import Layout
from qkernels.scheme import QuantScheme

_MOST_PADDING = 0.07
"""Padding of K accepted for taller planes. Taller ones need fewer and longer matrix products; the
shortest possible plane is taken where even that pads more than this."""


def plane_height(scheme: QuantScheme, k: int) -> int:
    """Columns of K in a plane: 16, 32 or 64; a pure function, so that nothing has to store it.

    16 is the shortest tile of K that a 16-bit matrix product takes, 32 that an int8 one takes.
    """
    smallest = 32 if scheme.integer_activation else 16
    for plane in (64, 32):
        padded = planar_rows(k, scheme.bits, plane) * (32 // scheme.bits)
        if plane > smallest and padded <= k * (1 + _MOST_PADDING):
            return plane
    return smallest


def _holds_integers(scheme: QuantScheme) -> bool:
    return scheme.bits == 8 and scheme.integer_activation


def _allocate(scheme: QuantScheme, n: int, k: int, device: torch.device) -> Tensor:
    if scheme.bits == 8:
        dtype = torch.int8 if _holds_integers(scheme) else torch.uint8
        return torch.empty(k, n, dtype=dtype, device=device)
    rows = planar_rows(k, scheme.bits, plane_height(scheme, k))
    return torch.empty(rows, n, dtype=torch.int32, device=device)


def _pack_rows(scheme: QuantScheme, words: Tensor, start: int, codes: Tensor) -> None:
    n, k = codes.shape
    target = words[:, start : start + n]
    if scheme.bits == 8:
        # code ^ 128 read as a signed byte is code - 128.
        target.copy_((codes ^ 128).view(torch.int8).t() if _holds_integers(scheme) else codes.t())
    else:
        target.copy_(pack_planar(codes, scheme.bits, plane_height(scheme, k)))


def _unpack_rows(scheme: QuantScheme, words: Tensor, start: int, stop: int, k: int) -> Tensor:
    return _unpack(scheme, words[:, start:stop], k)


def _take_rows(scheme: QuantScheme, words: Tensor, rows: Tensor, k: int) -> Tensor:
    return _unpack(scheme, words.index_select(1, rows), k)


def _unpack(scheme: QuantScheme, source: Tensor, k: int) -> Tensor:
    if scheme.bits == 8:
        codes = source.t().contiguous()
        return codes.view(torch.uint8) ^ 128 if _holds_integers(scheme) else codes
    return unpack_planar(source.contiguous(), k, scheme.bits, plane_height(scheme, k))


def _store_groups(scheme: QuantScheme, n: int, values: Tensor) -> Tensor:
    return values.expand(n, -1).t() if scheme.per_tensor else values.t()


def _load_groups(scheme: QuantScheme, n: int, stored: Tensor) -> Tensor:
    return stored[:1, :1] if scheme.per_tensor else stored.t().contiguous()


def _take_groups(stored: Tensor, rows: Tensor) -> Tensor:
    return stored.index_select(1, rows).t()


def _why_not(scheme: QuantScheme) -> str | None:
    if scheme.scale_levels == "blocks":
        return "holds no scales that are quantized in blocks of rows"
    return None


PLANAR = Layout(
    name="planar",
    why_not=_why_not,
    allocate=_allocate,
    pack_rows=_pack_rows,
    unpack_rows=_unpack_rows,
    store_groups=_store_groups,
    load_groups=_load_groups,
    take_rows=_take_rows,
    take_groups=_take_groups,
)
