"""vnni: the layout of the CPU kernels; a lane of a vector is a row of the weight.

words           int32 [N/16, steps, 16]; a step is 8 columns of up to 4 bits or 4 columns of 8 bits
scales, zeros   [N/16, G, 16]

    up to 4 bits   bit 31  28  24  20  16  12   8   4   0
                        c7  c3  c6  c2  c5  c1  c4  c0
    8 bits         bit 31      24      16       8       0
                        c3      c2      c1      c0

N is padded to 16 rows and K to 64 columns, with zero codes; groups to a multiple of 16 columns (see
`padding`). Codes of 2 and 3 bits take 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels import compiled
from qkernels.layouts.packed import Layout
from qkernels.layouts.padding import column_order, kernel_columns
from qkernels.scheme import QuantScheme

LANES = 16
_COLUMN_MULTIPLE = 64


def panels(n: int) -> int:
    """Panels of 16 rows that `n` rows take."""
    return -(-n // LANES)


def _is_nibble(scheme: QuantScheme) -> bool:
    return scheme.bits <= 4


def _steps(scheme: QuantScheme, k: int) -> int:
    columns = -(-kernel_columns(scheme, k) // _COLUMN_MULTIPLE) * _COLUMN_MULTIPLE
    return columns // (8 if _is_nibble(scheme) else 4)


def _allocate(scheme: QuantScheme, n: int, k: int, device: torch.device) -> Tensor:
    return torch.empty(panels(n), _steps(scheme, k), LANES, dtype=torch.int32, device=device)


def _pack_rows(scheme: QuantScheme, words: Tensor, start: int, codes: Tensor) -> None:
    order = column_order(scheme, codes.shape[1], codes.device)
    if order is not None:
        codes = F.pad(codes, (0, 1)).index_select(1, order[0])
    fast = compiled.extension() if words.device.type == "cpu" else None
    # Slices begin at multiples of 256 rows; only the last one has an odd number of them.
    if fast is not None:
        fast.pack_vnni(codes.contiguous(), words, start, _is_nibble(scheme))
        return
    first = start // LANES
    packed = pack_vnni_torch(codes, _is_nibble(scheme))
    words[first : first + packed.shape[0]] = packed


def _unpack_rows(scheme: QuantScheme, words: Tensor, start: int, stop: int, k: int) -> Tensor:
    width = kernel_columns(scheme, k)
    fast = compiled.extension() if words.device.type == "cpu" else None
    if fast is not None:
        codes = fast.unpack_vnni(words, start, stop - start, width, _is_nibble(scheme))
    else:
        first, last = start // LANES, panels(stop)
        codes = unpack_vnni_torch(words[first:last], _is_nibble(scheme))
        codes = codes[start - first * LANES : stop - first * LANES, :width]
    order = column_order(scheme, k, words.device)
    return codes.contiguous() if order is None else codes.index_select(1, order[1])


def _take_rows(scheme: QuantScheme, words: Tensor, rows: Tensor, k: int) -> Tensor:
    # [R, steps], which are panels of one row each.
    taken = words[rows // LANES, :, rows % LANES]
    codes = _unpack_fields(taken, _is_nibble(scheme))[:, : kernel_columns(scheme, k)]
    order = column_order(scheme, k, words.device)
    return codes if order is None else codes.index_select(1, order[1])


def _take_columns(scheme: QuantScheme, words: Tensor, columns: Tensor, n: int, k: int) -> Tensor:
    order = column_order(scheme, k, words.device)
    places = columns if order is None else order[1][columns]
    nibbles = _is_nibble(scheme)
    step, field = places // (8 if nibbles else 4), places % (8 if nibbles else 4)
    shifts = 8 * (field % 4) + 4 * (field // 4)
    # [panels, C, 16]
    taken = (words[:, step] >> shifts[None, :, None]) & (15 if nibbles else 255)
    return taken.transpose(1, 2).flatten(0, 1)[:n].to(torch.uint8)


def pack_vnni_torch(codes: Tensor, nibbles: bool) -> Tensor:
    """uint8 codes [N, K] -> int32 words [N/16, steps, 16], in plain torch."""
    n, k = codes.shape
    codes = F.pad(codes, (0, -k % _COLUMN_MULTIPLE, 0, -n % LANES))
    # [panel, lane, step, half, column]
    halves = 2 if nibbles else 1
    parts = codes.view(panels(n), LANES, -1, halves, 4)
    words = torch.zeros(*parts.shape[:3], dtype=torch.int32, device=codes.device)
    for half in range(halves):
        for column in range(4):
            words |= parts[:, :, :, half, column].int() << (8 * column + 4 * half)
    return words.transpose(1, 2).contiguous()


def unpack_vnni_torch(words: Tensor, nibbles: bool) -> Tensor:
    """int32 words [panels, steps, 16] -> uint8 codes [16 * panels, K padded], in plain torch."""
    return _unpack_fields(words.transpose(1, 2), nibbles).flatten(0, 1)


def _unpack_fields(words: Tensor, nibbles: bool) -> Tensor:
    """int32 words [..., steps] of rows -> uint8 codes [..., K padded]."""
    shifts = [8 * c + 4 * h for h in range(2 if nibbles else 1) for c in range(4)]
    mask = 15 if nibbles else 255
    fields = torch.stack([(words >> shift) & mask for shift in shifts], dim=-1)
    return fields.to(torch.uint8).flatten(-2)


def _store_groups(scheme: QuantScheme, n: int, values: Tensor) -> Tensor:
    rows = values.expand(n, -1) if scheme.per_tensor else values
    rows = F.pad(rows, (0, 0, 0, -n % LANES))
    return rows.unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()


def _load_groups(scheme: QuantScheme, n: int, stored: Tensor) -> Tensor:
    rows = stored.transpose(1, 2).flatten(0, 1)
    return rows[:1, :1].contiguous() if scheme.per_tensor else rows[:n].contiguous()


def _take_groups(stored: Tensor, rows: Tensor) -> Tensor:
    return stored[rows // LANES, :, rows % LANES]


VNNI = Layout(
    name="vnni",
    why_not=lambda scheme: None,
    allocate=_allocate,
    pack_rows=_pack_rows,
    unpack_rows=_unpack_rows,
    store_groups=_store_groups,
    load_groups=_load_groups,
    take_rows=_take_rows,
    take_groups=_take_groups,
    take_columns=_take_columns,
)
