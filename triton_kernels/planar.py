"""The planar layout, which every GEMM and GEMV of this package reads.

A word holds V = 32 // bits codes of one output channel: 32, 16, 10 or 8 for 1 to 4 bits. The
columns of K are cut into tiles of V * P; P is the plane height. Word row r of tile t is

    words[t*P + r, n]:   | code[n, k0 + (V-1)*P + r] | ... | code[n, k0 + P + r] | code[n, k0 + r] |
                           field V-1 (high bits)             field 1               field 0
    with k0 = t*V*P, and each field `bits` wide.

So field i of P consecutive word rows is a tile of P neighbouring columns of K: a kernel loads a
word once and shifts out V operand tiles, with no value moving between lanes. N is contiguous, for
wide loads. K is padded with zero codes to a multiple of V*P.

8-bit types have V = 1 and no padding: `words` is uint8 [K, N], the codes; for int8 products it is
int8 [K, N], the codes minus 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .decode import CODE_BITS, DECODE, decode_raised, zero_as_stored, zero_raised
from .operands import NESTED_BLOCK, WeightOperand

PLANES = (16, 32, 64)
SMALLEST_GROUP = 16
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def values_per_word(bits: int) -> int:
    """Codes in one word of the planar layout; 1 for 8 bits, where a word is a byte."""
    return 1 if bits == 8 else 32 // bits


def word_rows(k: int, bits: int, plane: int) -> int:
    """Rows of `words` for `k` columns, the padding included."""
    if bits == 8:
        return k
    return -(-k // (values_per_word(bits) * plane)) * plane


def check_plane(plane: int) -> None:
    """Raises ValueError for a plane height that is not one of PLANES."""
    if plane not in PLANES:
        raise ValueError(f"plane {plane} is not one of {', '.join(map(str, PLANES))}")


@dataclass(frozen=True)
class PlanarWeight:
    """A quantized weight [N, K] in the planar layout: `w = scale * (value(code) - zero)`.

    Attributes:
        words: int32 [K_pad / V, N], or uint8 / int8 [K, N] for 8 bits; contiguous.
        scales: [G, N] contiguous, G = ceil(K / group_size); fp16, bf16 or fp32, or uint8 with
            `channel_scales` (two-level) or `nested`.
        zeros: [G, N] contiguous, uint8 or floating, in code units; or None.
        n, k: output and input channels, without padding.
        bits: those of `decode.CODE_BITS`.
        plane: 16, 32 or 64; ignored for 8 bits.
        group_size: columns of K that share a scale, 16 or more; 0 for one group.
        decode: "unsigned", "signed" (code - 2^(bits-1)), "codebook", "fp8e4m3" or "fp8e5m2".
        codebook: fp32 [2^bits], with decode "codebook".
        channel_scales: fp32 [N], makes the uint8 scales multipliers.
        nested: (table fp32 [256], absmax fp32 [ceil(N * G / 256)], offset fp32 [1]), makes the
            uint8 scales codes: scale = table[code] * absmax[(n * G + g) // 256] + offset.

    Raises:
        ValueError: for a part that does not fit, naming it and its values.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    n: int
    k: int
    bits: int
    plane: int
    group_size: int
    decode: str
    codebook: Tensor | None = None
    channel_scales: Tensor | None = None
    nested: tuple[Tensor, Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        _check(self)

    # What a launch needs of a weight is the same at every call.
    @cached_property
    def groups(self) -> int:
        """Number of scales of an output channel."""
        return -(-self.k // self.group_size) if self.group_size else 1

    @cached_property
    def scale_mode(self) -> str:
        """How the scales are stored: "float", "two_level" or "nested", see operands.py."""
        if self.nested is not None:
            return "nested"
        return "float" if self.channel_scales is None else "two_level"

    @cached_property
    def operand(self) -> WeightOperand:
        """The weight as a kernel takes it."""
        table, absmax, offset = self.nested if self.nested is not None else (None, None, None)
        decode, zero = DECODE[self.decode], zero_as_stored
        if self.decode == "unsigned" and self.zeros is not None and self.zeros.dtype == torch.uint8:
            decode, zero = decode_raised, zero_raised
        return WeightOperand(
            words=self.words,
            scales=self.scales,
            zeros=self.zeros,
            codebook=self.codebook,
            channel_scales=self.channel_scales,
            nested_table=table,
            nested_absmax=absmax,
            nested_offset=offset,
            decode=decode,
            zero=zero,
            N=self.n,
            K=self.k,
            group_size=self.group_size,
        )


def _check(weight: PlanarWeight) -> None:
    if weight.decode not in DECODE:
        raise ValueError(f"decode {weight.decode!r} is not one of {', '.join(DECODE)}")
    if weight.bits not in CODE_BITS[weight.decode]:
        accepted = ", ".join(map(str, CODE_BITS[weight.decode]))
        raise ValueError(f"{weight.decode} codes have {accepted} bits, got {weight.bits}")
    if weight.bits != 8:
        check_plane(weight.plane)
    if weight.n < 1 or weight.k < 1:
        raise ValueError(f"a weight has at least one row and column, got [{weight.n}, {weight.k}]")
    if weight.group_size != 0 and weight.group_size < SMALLEST_GROUP:
        raise ValueError(
            f"group size {weight.group_size} is too small: use {SMALLEST_GROUP} or more, "
            "or 0 for one group"
        )
    word_types: tuple[torch.dtype, ...] = (torch.int32,) if weight.bits != 8 else (torch.uint8,)
    if weight.bits == 8 and weight.decode == "signed":
        word_types = (torch.uint8, torch.int8)
    rows = word_rows(weight.k, weight.bits, weight.plane)
    _check_tensor("words", weight.words, (rows, weight.n), word_types, weight)
    per_group = (weight.groups, weight.n)
    scale_types = _FLOATS if weight.scale_mode == "float" else (torch.uint8,)
    _check_tensor("scales", weight.scales, per_group, scale_types, weight)
    if weight.zeros is not None:
        _check_tensor("zeros", weight.zeros, per_group, (torch.uint8, *_FLOATS), weight)
    if (weight.codebook is not None) != (weight.decode == "codebook"):
        has = "a" if weight.codebook is not None else "no"
        raise ValueError(f"decode {weight.decode!r} was given {has} codebook")
    if weight.codebook is not None:
        _check_tensor("codebook", weight.codebook, (1 << weight.bits,), (torch.float32,), weight)
    if weight.channel_scales is not None:
        if weight.nested is not None:
            raise ValueError("channel_scales and nested exclude each other: give one")
        _check_tensor(
            "channel_scales", weight.channel_scales, (weight.n,), (torch.float32,), weight
        )
    if weight.nested is not None:
        table, absmax, offset = weight.nested
        blocks = -(-weight.n * weight.groups // NESTED_BLOCK)
        _check_tensor("nested table", table, (256,), (torch.float32,), weight)
        _check_tensor("nested absmax", absmax, (blocks,), (torch.float32,), weight)
        _check_tensor("nested offset", offset.reshape(-1), (1,), (torch.float32,), weight)


def _check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    weight: PlanarWeight,
) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, expected {list(shape)} for a "
            f"{weight.bits}-bit weight [{weight.n}, {weight.k}] with group size {weight.group_size}"
        )
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tensor.device != weight.words.device:
        raise ValueError(f"{name} is on {tensor.device}, the words are on {weight.words.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}: make it contiguous")
