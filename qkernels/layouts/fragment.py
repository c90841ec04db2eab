"""fragment: the layout of the CUDA kernels; weights in the order of a tensor core's A operand.

N is padded to 32 rows and K to 64 columns. A unit is a tile of 16 rows by 64 columns of 4 bits, or
by 32 columns of 8 bits: 512 bytes, of which each of a warp's 32 lanes takes 16 in one load.

words          int32 [N/16, units, 32, 4]; csrc/cuda/weights/fragment.cuh and docs/kernels.md
               draw them
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
"""Up to which code - zero is exact in bf16, where a 4-bit code is held as 128 + code."""


def code_name(scheme: QuantScheme) -> str:
    """What the kernels call the weight type of `scheme`; codebooks but FP4 are looked up."""
    weight = scheme.weight
    return "table4" if weight.kind == "codebook" and weight.name != "fp4" else weight.name


def padded_rows(n: int) -> int:
    return -(-n // ROW_MULTIPLE) * ROW_MULTIPLE


def whole_chunks(k: int) -> int:
    return -(-k // CHUNK_COLUMNS) * CHUNK_COLUMNS


def _why_not(scheme: QuantScheme) -> str | None:
    if scheme.bits not in (4, 8):
        return f"holds weights of 4 or 8 bits, not of {scheme.bits}"
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


def _operators(tensor: Tensor) -> Any:
    return _cuda_operators() if tensor.device.type == "cuda" else None


def _allocate(scheme: QuantScheme, n: int, k: int, device: torch.device) -> Tensor:
    units = whole_chunks(kernel_columns(scheme, k)) * scheme.bits // 256
    shape = (padded_rows(n) // TILE_ROWS, units, 32, 4)
    return torch.empty(shape, dtype=torch.int32, device=device)


def _pack_rows(scheme: QuantScheme, words: Tensor, start: int, codes: Tensor) -> None:
    operators = _operators(words)
    order = column_order(scheme, codes.shape[1], codes.device)
    if order is not None:
        codes = F.pad(codes, (0, 1)).index_select(1, order[0])
    (rows, k), bits = codes.shape, scheme.bits
    # Slices begin at multiples of 256 rows; only the last one has an odd number of them.
    if operators is not None:
        n = start + rows if rows % ROW_MULTIPLE else words.shape[0] * TILE_ROWS
        operators.pack_fragment(codes.contiguous(), None, words, n, k, start, rows, bits, "codes")
        return
    tile = start // TILE_ROWS
    words[tile : tile + padded_rows(rows) // TILE_ROWS] = pack_fragment_torch(codes, bits)


def _unpack_rows(scheme: QuantScheme, words: Tensor, start: int, stop: int, k: int) -> Tensor:
    operators, width = _operators(words), kernel_columns(scheme, k)
    if operators is not None:
        n = words.shape[0] * TILE_ROWS
        codes = operators.unpack_fragment(words, n, width, start, stop - start, scheme.bits)
    else:
        first, last = start // TILE_ROWS, -(-stop // TILE_ROWS)
        codes = unpack_fragment_torch(words[first:last], scheme.bits)
        codes = codes[start - first * TILE_ROWS : stop - first * TILE_ROWS, :width]
    order = column_order(scheme, k, words.device)
    return codes.contiguous() if order is None else codes.index_select(1, order[1])


def _take_rows(scheme: QuantScheme, words: Tensor, rows: Tensor, k: int) -> Tensor:
    bits, lanes = scheme.bits, words.unflatten(2, (8, 4))  # [tile, unit, g, t, word]
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
    columns = parts.to(torch.uint8).flatten(1)[:, : kernel_columns(scheme, k)]
    order = column_order(scheme, k, words.device)
    return columns if order is None else columns.index_select(1, order[1])


def pack_words(packed: PackedWeight, source: Tensor, kind: str, perm: Tensor | None = None) -> None:
    """Writes the words of `packed` from those of another format, on the device, with no copy.

    Args:
        packed: as `allocate` gives it, on a GPU for which `select` has a CUDA kernel.
        source: the int32 words of the whole weight, on the same device. kind "awq": [K, N/8],
            nibble i of a word is column 8c + [0,2,4,6,1,3,5,7][i]. kind "gptq": [K*bits/32, N],
            little-endian along K.
        perm: int64 [K] or None; column j of `packed` is column perm[j] of `source`.

    Raises:
        WeightError: for groups that must be padded.
        ValueError: for words of another shape, dtype or device.
    """
    words = packed.buffers["words"]
    operators = _operators(words)
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
    """uint8 codes [N, K] below 2^bits -> int32 words [N/16, units, 32, 4], in plain torch.

    bits is 4 or 8; N and K are padded with zero codes.
    """
    n, k = codes.shape
    codes = F.pad(codes, (0, whole_chunks(k) - k, 0, padded_rows(n) - n))
    steps = 4 if bits == 4 else 2  # of 16 columns, in a unit
    # [tile, row half, g, unit, step, column half, t, odd]
    parts = codes.view(-1, 2, 8, whole_chunks(k) // (steps * GROUP_MULTIPLE), steps, 2, 4, 2)
    if bits == 4:
        # A word is a step; nibble = row half + 2 * column half + 4 * odd.
        fields = parts.permute(0, 3, 2, 6, 4, 7, 5, 1).flatten(5)
    else:
        # A word is a step's column half; byte = row half + 2 * odd.
        fields = parts.permute(0, 3, 2, 6, 4, 5, 7, 1).flatten(6).flatten(4, 5)
    words = torch.zeros(fields.shape[:-1], dtype=torch.int32, device=codes.device)
    for i in range(32 // bits):
        words |= fields[..., i].int() << (bits * i)
    return words.flatten(2, 3)


def unpack_fragment_torch(words: Tensor, bits: int) -> Tensor:
    """int32 words [tiles, units, 32, 4] -> uint8 codes [16 * tiles, K padded], in plain torch."""
    tiles, units = words.shape[:2]
    fields = torch.stack(
        [(words >> (bits * i)) & ((1 << bits) - 1) for i in range(32 // bits)], dim=-1
    ).to(torch.uint8)
    if bits == 4:
        parts = fields.view(tiles, units, 8, 4, 4, 2, 2, 2)  # unit, g, t, step, odd, columns, rows
        codes = parts.permute(0, 7, 2, 1, 4, 6, 3, 5)
    else:
        parts = fields.view(tiles, units, 8, 4, 2, 2, 2, 2)  # unit, g, t, step, columns, odd, rows
        codes = parts.permute(0, 7, 2, 1, 4, 5, 3, 6)
    return codes.reshape(tiles * TILE_ROWS, -1)


def _store_groups(scheme: QuantScheme, n: int, values: Tensor) -> Tensor:
    is_zeros = values.dtype == torch.uint8
    if is_zeros and scheme.bits == 4 and values.numel() and int(values.max()) > _LARGEST_ZERO:
        raise WeightError(
            f"zero points of 4-bit weights go up to {_LARGEST_ZERO}, got {int(values.max())}"
        )
    rows = values.expand(n, -1) if scheme.per_tensor else values
    rows = F.pad(rows, (0, 0, 0, padded_rows(n) - n))
    return rows.t().unflatten(1, (-1, 2, 8)).transpose(2, 3).flatten(1).contiguous()


def _load_groups(scheme: QuantScheme, n: int, stored: Tensor) -> Tensor:
    rows = stored.unflatten(1, (-1, 8, 2)).transpose(2, 3).flatten(1).t()
    return rows[:1, :1].contiguous() if scheme.per_tensor else rows[:n].contiguous()


def _take_groups(stored: Tensor, rows: Tensor) -> Tensor:
    return stored.index_select(1, rows // 16 * 16 + rows % 8 * 2 + rows // 8 % 2).t()


FRAGMENT = Layout(
    name="fragment",
    why_not=_why_not,
    allocate=_allocate,
    pack_rows=_pack_rows,
    unpack_rows=_unpack_rows,
    store_groups=_store_groups,
    load_groups=_load_groups,
    take_rows=_take_rows,
    take_groups=_take_groups,
)
