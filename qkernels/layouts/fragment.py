"""fragment: the layout of the CUDA kernels; weights in the order of a tensor core's A operand.

N is padded to 32 rows and K to 64 columns, of 2 and 3 bits to 128. A unit is a tile of 16 rows by
64 columns of 4 bits, or by 32 columns of 8 bits: 512 bytes, of which each of a warp's 32 lanes
takes 16 in one load. 2 and 3 bits lie in units of 16 rows by 128 columns of the two low bits, those
of two tiles one behind the other, and of 3 bits the third ones of both in a unit behind these.

words          int32 [N/16, units, 32, 4], of 2 and 3 bits [N/32, units, 32, 4];
               csrc/cuda/weights/fragment.cuh and docs/kernels.md draw them
scales, zeros  [G, N padded]; the rows of a tile in the order 0, 8, 1, 9, ..., 7, 15

The kernels take groups of a multiple of 16 columns. Other groups are padded to one, each at its
end, with columns of code 0 whose x is zero: see `padding`.

Lane 4g + t holds, of each step of 16 columns, rows g and g + 8 and columns 2t, 2t + 1, 2t + 8,
2t + 9: what mma.m16n8k16 takes of A, and what a warp holds of A for wgmma.m64nNk16.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels import compiled
from qkernels.errors import WeightError
from qkernels.layouts.packed import Layout, PackedWeight
from qkernels.layouts.padding import GROUP_MULTIPLE, column_order, kernel_columns
from qkernels.scheme import QuantScheme

TILE_ROWS = 16
CHUNK_COLUMNS = 64
ROW_MULTIPLE = 32

_LARGEST_ZERO = 128
"""Up to which code - zero is exact in bf16, where a 4-bit code is held as 128 + code, and a number
of int8."""


def code_name(scheme: QuantScheme) -> str:
    """What the kernels call the weight type of `scheme`; codebooks but FP4 are looked up."""
    weight = scheme.weight
    return "table4" if weight.kind == "codebook" and weight.name != "fp4" else weight.name


def padded_rows(n: int) -> int:
    return -(-n // ROW_MULTIPLE) * ROW_MULTIPLE


def padded_columns(k: int, bits: int) -> int:
    multiple = CHUNK_COLUMNS if bits >= 4 else 2 * CHUNK_COLUMNS
    return -(-k // multiple) * multiple


def words_shape(n: int, k: int, bits: int) -> tuple[int, int, int, int]:
    """Of the words of a weight [n, k], whose groups need no padding."""
    units = padded_columns(k, bits) * bits
    if bits < 4:
        return padded_rows(n) // ROW_MULTIPLE, units // 128, 32, 4
    return padded_rows(n) // TILE_ROWS, units // 256, 32, 4


def _why_not(scheme: QuantScheme) -> str | None:
    if scheme.bits not in (4, 8) and scheme.weight.kind != "linear":
        return f"holds codebooks of 4 bits, not of {scheme.bits}"
    if not scheme.weight_only:
        return f"is for 16-bit activations, and the scheme has {scheme.activation.dtype} ones"
    if scheme.scale_levels != "one":
        return f"holds one level of scales, not {scheme.scale_levels}"
    return None


@lru_cache(maxsize=1)
def _cuda_operators() -> Any:
    """The operators for CUDA tensors, or None where qkernels._C lacks them."""
    if compiled.extension() is None:
        return None
    operators = torch.ops.qkernels_cuda
    return operators if hasattr(operators, "pack_fragment") else None


def packing_operators(tensor: Tensor) -> Any:
    """The operators that pack words such as `tensor` where they are, or None."""
    return _cuda_operators() if tensor.device.type == "cuda" else None


def _allocate(scheme: QuantScheme, n: int, k: int, device: torch.device) -> Tensor:
    shape = words_shape(n, kernel_columns(scheme, k), scheme.bits)
    return torch.empty(shape, dtype=torch.int32, device=device)


def _row_step(bits: int) -> int:
    """Rows that the first dimension of the words counts."""
    return TILE_ROWS if bits >= 4 else ROW_MULTIPLE


def _pack_rows(scheme: QuantScheme, words: Tensor, start: int, codes: Tensor) -> None:
    operators = packing_operators(words)
    order = column_order(scheme, codes.shape[1], codes.device)
    if order is not None:
        codes = F.pad(codes, (0, 1)).index_select(1, order[0])
    (rows, k), bits = codes.shape, scheme.bits
    # Slices begin at multiples of 256 rows; only the last one has an odd number of them.
    if operators is not None:
        n = start + rows if rows % ROW_MULTIPLE else words.shape[0] * _row_step(bits)
        operators.pack_fragment(codes.contiguous(), None, words, n, k, start, rows, bits, "codes")
        return
    first, count = start // _row_step(bits), padded_rows(rows) // _row_step(bits)
    words[first : first + count] = pack_fragment_torch(codes, bits)


def _unpack_rows(scheme: QuantScheme, words: Tensor, start: int, stop: int, k: int) -> Tensor:
    operators, width = packing_operators(words), kernel_columns(scheme, k)
    step = _row_step(scheme.bits)
    if operators is not None:
        n = words.shape[0] * step
        codes = operators.unpack_fragment(words, n, width, start, stop - start, scheme.bits)
    else:
        first, last = start // step, -(-stop // step)
        codes = unpack_fragment_torch(words[first:last], scheme.bits)
        codes = codes[start - first * step : stop - first * step, :width]
    order = column_order(scheme, k, words.device)
    return codes.contiguous() if order is None else codes.index_select(1, order[1])


def _take_rows(scheme: QuantScheme, words: Tensor, rows: Tensor, k: int) -> Tensor:
    take = _take_codes if scheme.bits >= 4 else _take_low_codes
    columns = take(words, rows, scheme.bits)[:, : kernel_columns(scheme, k)]
    order = column_order(scheme, k, words.device)
    return columns if order is None else columns.index_select(1, order[1])


def _take_low_codes(words: Tensor, rows: Tensor, bits: int) -> Tensor:
    """Of the rows, all columns: of 2 or 3 bits."""
    lanes = words.unflatten(1, (-1, bits)).unflatten(3, (8, 4))  # [32 rows, span, unit, g, t, word]
    taken = lanes[rows // ROW_MULTIPLE, :, :, rows % 8]  # [R, span, unit, t, word]
    own, tile, half = torch.arange(len(rows), device=words.device), rows // 16 % 2, rows // 8 % 2

    def fields(lanes: Tensor, counts: tuple[int, ...], places: list[int], mask: int) -> Tensor:
        shifts = torch.tensor(places, device=words.device) + 2 * half[:, None]
        codes = (lanes[..., None] >> shifts[:, None, None, None].int()) & mask
        return codes.unflatten(-1, counts)

    low_places = [16 * odd + 8 * step + 4 * h for odd in (0, 1) for step in (0, 1) for h in (0, 1)]
    # [R, span, t, word, odd, step, columns]
    codes = fields(taken[own, :, tile], (2, 2, 2), low_places, 3).permute(0, 1, 3, 5, 6, 2, 4)
    codes = codes.flatten(1)
    if bits == 3:
        third = taken[:, :, 2].unflatten(3, (2, 2))[own, :, :, tile]
        places = [16 * odd + 4 * step + h for odd in (0, 1) for step in range(4) for h in (0, 1)]
        top = fields(third, (2, 4, 2), places, 1).permute(0, 1, 3, 5, 6, 2, 4).flatten(1)
        codes = codes | top << 2
    return codes.to(torch.uint8)


def _take_codes(words: Tensor, rows: Tensor, bits: int) -> Tensor:
    """Of the rows, all columns: of 4 or 8 bits."""
    lanes = words.unflatten(2, (8, 4))  # [tile, unit, g, t, word]
    # [R, unit, t, word]: those of the lanes that hold the row, beside the one 8 rows from it.
    taken = lanes[rows // TILE_ROWS, :, rows % 8]
    half = (rows // 8 % 2).int()
    fields = torch.arange(0, 32 // bits, 2, dtype=torch.int32, device=words.device)
    shifts = bits * (half[:, None] + fields)
    codes = (taken[..., None] >> shifts[:, None, None, None]) & ((1 << bits) - 1)
    if bits == 4:
        # [R, unit, t, step, odd, columns]
        parts = codes.unflatten(4, (2, 2)).permute(0, 1, 3, 5, 2, 4)
    else:
        # [R, unit, t, step, columns, odd]
        parts = codes.unflatten(3, (2, 2)).permute(0, 1, 3, 4, 2, 5)
    return parts.to(torch.uint8).flatten(1)


def pack_words(packed: PackedWeight, source: Tensor, kind: str, perm: Tensor | None = None) -> None:
    """Writes the words of `packed` from those of another format, on the device, with no copy.

    Args:
        packed: as `allocate` gives it, on a GPU for which `select` has a CUDA kernel.
        source: the int32 words of the whole weight, on the same device. kind "awq": [K, N/8],
            nibble i of a word is column 8c + [0,2,4,6,1,3,5,7][i]. kind "gptq": [K*bits/32, N],
            little-endian along K, of 3 bits without gaps.
        perm: int64 [K] or None; column j of `packed` is column perm[j] of `source`.

    Raises:
        WeightError: for groups that must be padded.
        ValueError: for words of another shape, dtype or device.
    """
    words = packed.buffers["words"]
    operators = packing_operators(words)
    assert operators is not None and packed.layout is FRAGMENT
    if column_order(packed.scheme, packed.k, words.device) is not None:
        raise WeightError(
            f"{kind} words go to groups of a multiple of {GROUP_MULTIPLE} columns, not of "
            f"{packed.scheme.group_size}: unpack and pack them"
        )
    order = None if perm is None else perm.int()
    n, k, bits = packed.n, packed.k, packed.scheme.bits
    operators.pack_fragment(source, order, words, n, k, 0, n, bits, kind)


def pack_fragment_torch(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [N, K] below 2^bits -> their int32 words, in plain torch.

    N and K are padded with zero codes.
    """
    n, k = codes.shape
    columns = padded_columns(k, bits)
    codes = F.pad(codes, (0, columns - k, 0, padded_rows(n) - n))
    if bits < 4:
        return _pack_low(codes, bits)
    steps = 4 if bits == 4 else 2  # of 16 columns, in a unit
    # [tile, row half, g, unit, step, column half, t, odd]
    parts = codes.view(-1, 2, 8, columns // (steps * GROUP_MULTIPLE), steps, 2, 4, 2)
    if bits == 4:
        # A word is a step; nibble = row half + 2 * column half + 4 * odd.
        fields = parts.permute(0, 3, 2, 6, 4, 7, 5, 1).flatten(5)
    else:
        # A word is a step's column half; byte = row half + 2 * odd.
        fields = parts.permute(0, 3, 2, 6, 4, 5, 7, 1).flatten(6).flatten(4, 5)
    return in_words(fields, bits).flatten(2, 3)


def in_words(fields: Tensor, bits: int) -> Tensor:
    """[..., 32 / bits] small numbers -> int32 [...], the first in the lowest bits."""
    words = torch.zeros(fields.shape[:-1], dtype=torch.int32, device=fields.device)
    for i in range(32 // bits):
        words |= fields[..., i].int() << (bits * i)
    return words


def in_fields(words: Tensor, bits: int) -> Tensor:
    """The reverse: uint8 [..., 32 / bits]."""
    shifts = range(0, 32, bits)
    return torch.stack([(words >> i) & ((1 << bits) - 1) for i in shifts], dim=-1).to(torch.uint8)


def _pack_low(codes: Tensor, bits: int) -> Tensor:
    """Codes of 2 or 3 bits [N, K], whole rows of tiles and spans of 128 columns."""
    # [32 rows, tile, row half, g, span, word, step, column half, t, odd]
    low = (codes & 3).view(-1, 2, 2, 8, codes.shape[1] // 128, 4, 2, 2, 4, 2)
    # Bit 16 * odd + 8 * step + 4 * column half + 2 * row half.
    low = low.permute(0, 4, 1, 3, 8, 5, 9, 6, 7, 2).flatten(6)
    units = in_words(low, 2).flatten(3, 4)
    if bits == 3:
        # [32 rows, tile, row half, g, span, word, step, column half, t, odd], of 4 steps a word
        third = (codes >> 2).view(-1, 2, 2, 8, codes.shape[1] // 128, 2, 4, 2, 4, 2)
        # Bit 16 * odd + 4 * step + 2 * row half + column half; words of either tile.
        third = third.permute(0, 4, 3, 8, 1, 5, 9, 6, 2, 7).flatten(6)
        unit = in_words(third, 1).flatten(4, 5).flatten(2, 3)
        units = torch.cat([units, unit[:, :, None]], dim=2)
    return units.flatten(1, 2)


def _unpack_low(words: Tensor, bits: int) -> Tensor:
    """The reverse."""
    rows, spans = words.shape[0], words.shape[1] // bits
    units = words.unflatten(1, (spans, bits))
    # [32 rows, span, tile, g, t, word, odd, step, column half, row half]
    low = in_fields(units[:, :, :2], 2).view(rows, spans, 2, 8, 4, 4, 2, 2, 2, 2)
    codes = low.permute(0, 2, 9, 3, 1, 5, 7, 8, 4, 6).reshape(rows * ROW_MULTIPLE, -1)
    if bits == 3:
        # [32 rows, span, g, t, tile, word, odd, step, row half, column half]
        third = in_fields(units[:, :, 2], 1).view(rows, spans, 8, 4, 2, 2, 2, 4, 2, 2)
        top = third.permute(0, 4, 8, 2, 1, 5, 7, 9, 3, 6).reshape(codes.shape)
        codes = codes | top << 2
    return codes


def unpack_fragment_torch(words: Tensor, bits: int) -> Tensor:
    """The words of whole rows of tiles -> uint8 codes [N padded, K padded], in plain torch."""
    if bits < 4:
        return _unpack_low(words, bits)
    tiles, units = words.shape[:2]
    fields = in_fields(words, bits)
    if bits == 4:
        parts = fields.view(tiles, units, 8, 4, 4, 2, 2, 2)  # unit, g, t, step, odd, columns, rows
        codes = parts.permute(0, 7, 2, 1, 4, 6, 3, 5)
    else:
        parts = fields.view(tiles, units, 8, 4, 2, 2, 2, 2)  # unit, g, t, step, columns, odd, rows
        codes = parts.permute(0, 7, 2, 1, 4, 5, 3, 6)
    return codes.reshape(tiles * TILE_ROWS, -1)


def store_groups(scheme: QuantScheme, n: int, values: Tensor) -> Tensor:
    """Scales or zero points of the hub: see `Layout`."""
    is_zeros = values.dtype == torch.uint8
    if is_zeros and scheme.bits <= 4 and values.numel() and int(values.max()) > _LARGEST_ZERO:
        raise WeightError(
            f"zero points of weights of up to 4 bits go up to {_LARGEST_ZERO}, got "
            f"{int(values.max())}"
        )
    return in_tile_order(scheme, n, values)


def in_tile_order(scheme: QuantScheme, n: int, values: Tensor) -> Tensor:
    """[N, G], or [1, 1] of a whole weight -> [G, N padded], rows in the order of tiles."""
    rows = values.expand(n, -1) if scheme.per_tensor else values
    rows = F.pad(rows, (0, 0, 0, padded_rows(n) - n))
    return rows.t().unflatten(1, (-1, 2, 8)).transpose(2, 3).flatten(1).contiguous()


def load_groups(scheme: QuantScheme, n: int, stored: Tensor) -> Tensor:
    """The reverse."""
    rows = stored.unflatten(1, (-1, 8, 2)).transpose(2, 3).flatten(1).t()
    return rows[:1, :1].contiguous() if scheme.per_tensor else rows[:n].contiguous()


def take_groups(stored: Tensor, rows: Tensor) -> Tensor:
    """Those of some rows: see `Layout`."""
    return stored.index_select(1, rows // 16 * 16 + rows % 8 * 2 + rows // 8 % 2).t()


FRAGMENT = Layout(
    name="fragment",
    why_not=_why_not,
    allocate=_allocate,
    pack_rows=_pack_rows,
    unpack_rows=_unpack_rows,
    store_groups=store_groups,
    load_groups=load_groups,
    take_rows=_take_rows,
    take_groups=take_groups,
)
