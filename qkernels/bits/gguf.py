"""Blocks of GGUF files, as codes with their scales.

A row of a weight is a sequence of blocks: 32 numbers, or 256 in the K types, whose groups of 16 or
32 have scales (and least values) of 6 bits or so, multiplied by 16-bit ones of the block. All of it
is little-endian. What the K types multiply is exact in fp32.

Source: llama.cpp and its gguf package (MIT licence), read as documentation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GgufCodes:
    """Of blocks [..., B]: W = scale * (code - zero) + offset.

    Attributes:
        codes: uint8 [..., B * size].
        scales: [..., B * groups of a block], fp16 or fp32.
        offsets: like the scales, or None.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None = None


@dataclass(frozen=True)
class GgufType:
    """A row of the table of types.

    Attributes:
        size: numbers of a block.
        nbytes: bytes of a block.
        scheme: the scheme that holds them exactly; with offsets where it has zero points.
        decode: uint8 blocks [..., B, nbytes] -> their codes.
    """

    size: int
    nbytes: int
    scheme: str
    decode: Callable[[Tensor], GgufCodes]


def _halves(blocks: Tensor, start: int) -> Tensor:
    """The fp16 number at byte `start`: [..., B, 1]."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16)


def _spread(packed: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Fields of each byte, one shift after the other: [..., n] -> [..., shifts, n]."""
    steps = torch.tensor(shifts, dtype=torch.uint8, device=packed.device)
    return (packed[..., None, :] >> steps[:, None]) & mask


def _nibbles(packed: Tensor) -> Tensor:
    """Low halves of all bytes, then high ones: [..., n] -> [..., 2n]."""
    return _spread(packed, (0, 4), 15).flatten(-2)


def _fifth_bits(blocks: Tensor, start: int) -> Tensor:
    """Bit i of 32 bits that begin at byte `start`, for number i: [..., B, 32], 0 or 16."""
    return _spread(blocks[..., start : start + 4], tuple(range(8)), 1).mT.flatten(-2) << 4


def _q4_0(blocks: Tensor) -> GgufCodes:
    return GgufCodes(_nibbles(blocks[..., 2:18]).flatten(-2), _halves(blocks, 0).flatten(-2))


def _q4_1(blocks: Tensor) -> GgufCodes:
    codes = _nibbles(blocks[..., 4:20]).flatten(-2)
    return GgufCodes(codes, _halves(blocks, 0).flatten(-2), _halves(blocks, 2).flatten(-2))


def _q5_0(blocks: Tensor) -> GgufCodes:
    codes = _nibbles(blocks[..., 6:22]) | _fifth_bits(blocks, 2)
    return GgufCodes((codes + (128 - 16)).flatten(-2), _halves(blocks, 0).flatten(-2))


def _q5_1(blocks: Tensor) -> GgufCodes:
    codes = _nibbles(blocks[..., 8:24]) | _fifth_bits(blocks, 4)
    scales, least = _halves(blocks, 0).flatten(-2), _halves(blocks, 2).flatten(-2)
    return GgufCodes(codes.flatten(-2), scales, least)


def _q8_0(blocks: Tensor) -> GgufCodes:
    # Signed bytes, 128 more.
    return GgufCodes((blocks[..., 2:34] ^ 128).flatten(-2), _halves(blocks, 0).flatten(-2))


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The eight scales and the eight least values of 12 bytes: fp32 [..., B, 8] each."""
    first, second, high = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = torch.cat([first & 63, (high & 15) | (first >> 6 << 4)], dim=-1)
    least = torch.cat([second & 63, (high >> 4) | (second >> 6 << 4)], dim=-1)
    return scales.float(), least.float()


def _two_levels(blocks: Tensor, d: int, scales: Tensor, dmin: int, least: Tensor) -> list[Tensor]:
    factors = (_halves(blocks, d).float(), _halves(blocks, dmin).float())
    return [(factors[0] * scales).flatten(-2), -(factors[1] * least).flatten(-2)]


def _q4_k(blocks: Tensor) -> GgufCodes:
    scales, least = _six_bits(blocks[..., 4:16])
    # 32 bytes hold two groups, one in their low halves.
    codes = _nibbles(blocks[..., 16:144].unflatten(-1, (4, 32)))
    return GgufCodes(codes.flatten(-3), *_two_levels(blocks, 0, scales, 2, least))


def _q5_k(blocks: Tensor) -> GgufCodes:
    scales, least = _six_bits(blocks[..., 4:16])
    low = _nibbles(blocks[..., 48:176].unflatten(-1, (4, 32))).flatten(-2)
    # Bit j of byte i is that of number i of group j.
    high = _spread(blocks[..., 16:48], tuple(range(8)), 1).flatten(-2)
    codes = low | (high << 4)
    return GgufCodes(codes.flatten(-2), *_two_levels(blocks, 0, scales, 2, least))


def _q6_k(blocks: Tensor) -> GgufCodes:
    low = _nibbles(blocks[..., 0:128].unflatten(-1, (2, 64)))
    high = _spread(blocks[..., 128:192].unflatten(-1, (2, 32)), (0, 2, 4, 6), 3).flatten(-2)
    codes = (low | (high << 4)) + (128 - 32)
    scales = blocks[..., 192:208].contiguous().view(torch.int8).float()
    return GgufCodes(codes.flatten(-3), (_halves(blocks, 208).float() * scales).flatten(-2))


def _q2_k(blocks: Tensor) -> GgufCodes:
    codes = _spread(blocks[..., 16:80].unflatten(-1, (2, 32)), (0, 2, 4, 6), 3)
    scales, least = (blocks[..., 0:16] & 15).float(), (blocks[..., 0:16] >> 4).float()
    return GgufCodes(codes.flatten(-4), *_two_levels(blocks, 80, scales, 82, least))


def _q3_k(blocks: Tensor) -> GgufCodes:
    low = _spread(blocks[..., 32:96].unflatten(-1, (2, 32)), (0, 2, 4, 6), 3).flatten(-3)
    # A set bit is for numbers that are not 4 less: codes are numbers and 4.
    high = _spread(blocks[..., 0:32], tuple(range(8)), 1).flatten(-2)
    packed = blocks[..., 96:108]
    fields = _spread(packed[..., 0:8], (0, 4), 15).flatten(-2)
    fields |= _spread(packed[..., 8:12], (0, 2, 4, 6), 3).flatten(-2) << 4
    scales = _halves(blocks, 108).float() * (fields.float() - 32)
    return GgufCodes((low | (high << 2)).flatten(-2), scales.flatten(-2))


GGUF_TYPES: dict[str, GgufType] = {
    "Q4_0": GgufType(32, 18, "w4a16-g32-sym", _q4_0),
    "Q4_1": GgufType(32, 20, "w4a16-g32", _q4_1),
    "Q5_0": GgufType(32, 22, "w8a16-g32-sym", _q5_0),
    "Q5_1": GgufType(32, 24, "w8a16-g32-asym", _q5_1),
    "Q8_0": GgufType(32, 34, "w8a16-g32-sym", _q8_0),
    "Q2_K": GgufType(256, 84, "w2a16-g16-sfp32", _q2_k),
    "Q3_K": GgufType(256, 110, "w3a16-g16-sym-sfp32", _q3_k),
    "Q4_K": GgufType(256, 144, "w4a16-g32-sfp32", _q4_k),
    "Q5_K": GgufType(256, 176, "w8a16-g32-asym-sfp32", _q5_k),
    "Q6_K": GgufType(256, 210, "w8a16-g16-sym-sfp32", _q6_k),
}
"""The types of GGUF that schemes hold, by the names of the gguf package. Codes of 5 and 6 bits take
8."""
