"""fragment_int8: the layout of the CUDA kernels for integer products, of 4 and 8 bits; weights in
the order of the A operand of mma.m16n8k32.

N is padded to 32 rows and K to 64 columns. A unit is a tile of 16 rows by 64 columns of 4 bits, or
by 32 columns of 8 bits: 512 bytes, of which each of a warp's 32 lanes takes 16 in one load.

words          int32 [N/16, units, 32, 4]; of 8 bits, code - 128 in each byte;
               csrc/cuda/weights/fragment_int8.cuh and docs/kernels.md draw them
scales, zeros  [G, N padded], as in the fragment layout

The kernels take groups of a multiple of 32 columns. Other groups are padded to one, each at its
end: see `padding`. Padding columns, those behind K too, repeat the last column of their group,
since decoding takes four codes at a time and is right where all four give a number of int8.

Lane 4g + t holds, of each step of 32 columns, rows g and g + 8 and columns 4t to 4t + 3 and 4t + 16
to 4t + 19.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.layouts import padding
from qkernels.layouts.fragment import (
    ROW_MULTIPLE,
    TILE_ROWS,
    in_fields,
    in_tile_order,
    in_words,
    load_groups,
    packing_operators,
    padded_columns,
    padded_rows,
    store_groups,
    take_groups,
    words_shape,
)
from qkernels.layouts.packed import Layout
from qkernels.scheme import QuantScheme

GROUP_MULTIPLE = 32

_STEP_COLUMNS = 32


def kernel_columns(scheme: QuantScheme, k: int) -> int:
    """`padding.kernel_columns` of this layout."""
    return padding.kernel_columns(scheme, k, GROUP_MULTIPLE)


def kernel_group(scheme: QuantScheme, k: int) -> int:
    """`padding.kernel_group` of this layout."""
    return padding.kernel_group(scheme, k, GROUP_MULTIPLE)


def column_order(scheme: QuantScheme, k: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """`padding.column_order` of this layout."""
    return padding.column_order(scheme, k, device, GROUP_MULTIPLE)


def _why_not(scheme: QuantScheme) -> str | None:
    if not scheme.integer_activation:
        return f"is for int8 and int4 activations, and the scheme has {_activations(scheme)} ones"
    if scheme.bits not in (4, 8):
        return f"holds weights of 4 and 8 bits, not of {scheme.bits}"
    return None


def _activations(scheme: QuantScheme) -> str:
    return "16-bit" if scheme.weight_only else scheme.activation.dtype


def _allocate(scheme: QuantScheme, n: int, k: int, device: torch.device) -> Tensor:
    shape = words_shape(n, kernel_columns(scheme, k), scheme.bits)
    return torch.empty(shape, dtype=torch.int32, device=device)


def _pack_rows(scheme: QuantScheme, words: Tensor, start: int, codes: Tensor) -> None:
    operators = packing_operators(words)
    order = column_order(scheme, codes.shape[1], codes.device)
    if order is not None:
        is_padding = order[0] == codes.shape[1]
        # A group's padding is behind its last column.
        codes = codes.index_select(1, order[0].masked_fill(is_padding, 0).cummax(0).values)
    (rows, k), bits = codes.shape, scheme.bits
    # Slices begin at multiples of 256 rows; only the last one has an odd number of them.
    if operators is not None:
        n = start + rows if rows % ROW_MULTIPLE else words.shape[0] * TILE_ROWS
        operators.pack_fragment_int8(codes.contiguous(), words, n, k, start, rows, bits)
        return
    first, count = start // TILE_ROWS, padded_rows(rows) // TILE_ROWS
    words[first : first + count] = pack_fragment_int8_torch(codes, bits)


def _unpack_rows(scheme: QuantScheme, words: Tensor, start: int, stop: int, k: int) -> Tensor:
    operators, width = packing_operators(words), kernel_columns(scheme, k)
    if operators is not None:
        n = words.shape[0] * TILE_ROWS
        codes = operators.unpack_fragment_int8(words, n, width, start, stop - start, scheme.bits)
    else:
        first, last = start // TILE_ROWS, -(-stop // TILE_ROWS)
        codes = unpack_fragment_int8_torch(words[first:last], scheme.bits)
        codes = codes[start - first * TILE_ROWS : stop - first * TILE_ROWS, :width]
    order = column_order(scheme, k, words.device)
    return codes.contiguous() if order is None else codes.index_select(1, order[1])


def _take_rows(scheme: QuantScheme, words: Tensor, rows: Tensor, k: int) -> Tensor:
    lanes = words.unflatten(2, (8, 4)).unflatten(4, (2, 2))  # [tile, unit, g, t, columns, half]
    # [R, unit, t, columns]
    taken = lanes[rows // TILE_ROWS, :, rows % 8]
    own = torch.arange(len(rows), device=words.device)
    fields = _codes_of(taken[own, ..., rows // 8 % 2], scheme.bits)
    # [R, unit, t, columns, byte, step] -> [R, unit, step, columns, t, byte]
    columns = fields.permute(0, 1, 5, 3, 2, 4).flatten(1)[:, : kernel_columns(scheme, k)]
    order = column_order(scheme, k, words.device)
    return columns if order is None else columns.index_select(1, order[1])


def _take_columns(scheme: QuantScheme, words: Tensor, columns: Tensor, n: int, k: int) -> Tensor:
    order = column_order(scheme, k, words.device)
    places = columns if order is None else order[1][columns]
    unit_columns = 256 // scheme.bits
    unit, rest = places // unit_columns, places % unit_columns
    step, rest = rest // _STEP_COLUMNS, rest % _STEP_COLUMNS
    lanes = words.unflatten(2, (8, 4)).unflatten(4, (2, 2))  # [tile, unit, g, t, columns, half]
    # [C, tile, half, g]
    taken = lanes.permute(1, 3, 4, 0, 5, 2)[unit, rest % 16 // 4, rest // 16]
    fields = _codes_of(taken.flatten(1), scheme.bits)  # [C, N, byte, step]
    own = torch.arange(len(columns), device=words.device)
    return fields[own, :n, rest % 4, step].t().contiguous()


def _codes_of(words: Tensor, bits: int) -> Tensor:
    """Words [...] -> their uint8 codes [..., byte, step]."""
    codes = in_fields(words, bits).unflatten(-1, (4, 8 // bits))
    return codes ^ 0x80 if bits == 8 else codes


def pack_fragment_int8_torch(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [N, K] below 2^bits -> their int32 words, in plain torch.

    N is padded with zero codes, K with those of the last column.
    """
    n, k = codes.shape
    behind = padded_columns(k, bits) - k
    codes = torch.cat([codes, codes[:, -1:].expand(n, behind)], dim=1)
    codes = F.pad(codes, (0, 0, 0, padded_rows(n) - n))
    if bits == 8:
        codes = codes ^ 0x80
    steps = 8 // bits  # of 32 columns, in a unit
    # [tile, half, g, unit, step, columns, t, byte]
    parts = codes.view(-1, 2, 8, codes.shape[1] // (steps * _STEP_COLUMNS), steps, 2, 4, 4)
    fields = parts.permute(0, 3, 2, 6, 5, 1, 7, 4).flatten(6)
    return in_words(fields, bits).flatten(4).flatten(2, 3)


def unpack_fragment_int8_torch(words: Tensor, bits: int) -> Tensor:
    """The words of whole rows of tiles -> uint8 codes [N padded, K padded], in plain torch."""
    # [tile, unit, g, t, columns, half, byte, step]
    fields = _codes_of(words.unflatten(2, (8, 4)).unflatten(4, (2, 2)), bits)
    codes = fields.permute(0, 5, 2, 1, 7, 4, 3, 6)
    return codes.reshape(words.shape[0] * TILE_ROWS, -1)


def _store_groups(scheme: QuantScheme, n: int, values: Tensor) -> Tensor:
    # Of two levels, the hub checks that the integers fit int8, and uint8 are multipliers too.
    store = in_tile_order if scheme.scale_levels == "two" else store_groups
    return store(scheme, n, values)


FRAGMENT_INT8 = Layout(
    name="fragment_int8",
    why_not=_why_not,
    allocate=_allocate,
    pack_rows=_pack_rows,
    unpack_rows=_unpack_rows,
    store_groups=_store_groups,
    load_groups=load_groups,
    take_rows=_take_rows,
    take_groups=take_groups,
    take_columns=_take_columns,
)
