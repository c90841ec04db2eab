"""Codes to packed words and back: the only place that knows bit order.

Two orders, each with three implementations that agree bit for bit: plain torch (the truth), C++ on
the CPU (`qkernels._C`) and Triton on a GPU. `pack_*` and `unpack_*` take the fastest there is.

dense: each row is one little-endian bit stream along K; value k starts at bit k*bits, so 3-bit
values straddle words. This is the order of GPTQ (along K) and of compressed-tensors.

    bits = 4    word 0: k7 k6 k5 k4 k3 k2 k1 k0    word 1: k15 ... k8

planar: V = 32 // bits values a word, from V planes that lie `plane` columns apart, so that one
field of `plane` consecutive words is a contiguous tile of K:

    word [t*plane + r, n], field i   holds   code[n, (t*V + i)*plane + r]

K is padded with zero codes to a multiple of V*plane.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.errors import WeightError

PACKED_BITS = (2, 3, 4, 8)
PLANAR_BITS = (2, 3, 4)


def dense_words(k: int, bits: int) -> int:
    """32-bit words that hold `k` values of `bits` bits."""
    return -(-k * bits // 32)


def planar_rows(k: int, bits: int, plane: int) -> int:
    """Rows of planar words for `k` columns."""
    values = 32 // bits
    return -(-k // (values * plane)) * plane


@lru_cache(maxsize=1)
def compiled() -> ModuleType | None:
    """qkernels._C, or None where it was not built."""
    try:
        return importlib.import_module("qkernels._C")
    except ImportError:
        return None


@lru_cache(maxsize=1)
def _triton() -> ModuleType | None:
    try:
        importlib.import_module("triton")
    except ImportError:
        return None
    return importlib.import_module("qkernels.triton_kernels.pack")


def _implementation(tensor: Tensor) -> ModuleType | None:
    if tensor.device.type == "cpu":
        return compiled()
    return _triton() if tensor.device.type == "cuda" else None


def _check(tensor: Tensor, dtype: torch.dtype, bits: int, accepted: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.dim() != 2:
        raise WeightError(
            f"expected a 2-D tensor of {dtype}, got {tensor.dtype} of shape {list(tensor.shape)}"
        )
    if bits not in accepted:
        raise WeightError(f"{bits} bits do not pack: accepted are {accepted}")


def pack_dense(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [R, K] below 2^bits -> int32 words [R, ceil(K*bits/32)]; bits 2, 3, 4 or 8."""
    _check(codes, torch.uint8, bits, PACKED_BITS)
    fast = _implementation(codes)
    if fast is not None:
        return fast.pack_dense(codes.contiguous(), bits)
    return pack_dense_torch(codes, bits)


def unpack_dense(words: Tensor, k: int, bits: int) -> Tensor:
    """int32 words [R, ceil(k*bits/32)] -> uint8 codes [R, k]."""
    _check(words, torch.int32, bits, PACKED_BITS)
    if words.shape[1] != dense_words(k, bits):
        raise WeightError(
            f"{k} values of {bits} bits take {dense_words(k, bits)} words a row, "
            f"got {words.shape[1]}"
        )
    fast = _implementation(words)
    if fast is not None:
        return fast.unpack_dense(words.contiguous(), k, bits)
    return unpack_dense_torch(words, k, bits)


def pack_planar(codes: Tensor, bits: int, plane: int) -> Tensor:
    """uint8 codes [N, K] below 2^bits -> int32 words [planar_rows(K), N]; bits 2, 3 or 4."""
    _check(codes, torch.uint8, bits, PLANAR_BITS)
    fast = _implementation(codes)
    if fast is not None:
        return fast.pack_planar(codes.contiguous(), bits, plane)
    return pack_planar_torch(codes, bits, plane)


def unpack_planar(words: Tensor, k: int, bits: int, plane: int) -> Tensor:
    """int32 words [planar_rows(k), N] -> uint8 codes [N, k]."""
    _check(words, torch.int32, bits, PLANAR_BITS)
    if words.shape[0] != planar_rows(k, bits, plane):
        raise WeightError(
            f"{k} columns of {bits} bits in planes of {plane} take {planar_rows(k, bits, plane)} "
            f"rows of words, got {words.shape[0]}"
        )
    fast = _implementation(words)
    if fast is not None:
        return fast.unpack_planar(words.contiguous(), k, bits, plane)
    return unpack_planar_torch(words, k, bits, plane)


def pack_dense_torch(codes: Tensor, bits: int) -> Tensor:
    """`pack_dense` in plain torch."""
    k = codes.shape[1]
    # 32 values fill exactly `bits` words, also where single values straddle two of them.
    blocks = F.pad(codes, (0, -k % 32)).unflatten(1, (-(-k // 32), 32))
    words = torch.zeros(*blocks.shape[:2], bits, dtype=torch.int32, device=codes.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = blocks[:, :, i].int()
        words[:, :, word] |= value << shift
        if shift + bits > 32:
            words[:, :, word + 1] |= value >> (32 - shift)
    return words.flatten(1)[:, : dense_words(k, bits)].contiguous()


def unpack_dense_torch(words: Tensor, k: int, bits: int) -> Tensor:
    """`unpack_dense` in plain torch."""
    count = words.shape[1]
    blocks = F.pad(words, (0, -count % bits)).unflatten(1, (-(-count // bits), bits))
    codes = torch.empty(*blocks.shape[:2], 32, dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        # The shift of a signed word drags its sign in from the left: mask what it must not fill.
        value = (blocks[:, :, word] >> shift) & (mask if shift + bits <= 32 else _low(32 - shift))
        if shift + bits > 32:
            value = value | (blocks[:, :, word + 1] << (32 - shift)) & mask
        codes[:, :, i] = value.to(torch.uint8)
    return codes.flatten(1)[:, :k].contiguous()


def _low(bits: int) -> int:
    return (1 << bits) - 1


def pack_planar_torch(codes: Tensor, bits: int, plane: int) -> Tensor:
    """`pack_planar` in plain torch."""
    n, k = codes.shape
    values, rows = 32 // bits, planar_rows(k, bits, plane)
    planes = F.pad(codes, (0, rows * values - k)).view(n, rows // plane, values, plane)
    words = torch.zeros(n, rows // plane, plane, dtype=torch.int32, device=codes.device)
    for i in range(values):
        words |= planes[:, :, i].int() << (bits * i)
    return words.view(n, rows).t().contiguous()


def unpack_planar_torch(words: Tensor, k: int, bits: int, plane: int) -> Tensor:
    """`unpack_planar` in plain torch."""
    rows, n = words.shape
    values = 32 // bits
    tiles = words.t().reshape(n, rows // plane, plane)
    codes = torch.empty(n, rows // plane, values, plane, dtype=torch.uint8, device=words.device)
    for i in range(values):
        codes[:, :, i] = ((tiles >> (bits * i)) & _low(bits)).to(torch.uint8)
    return codes.view(n, rows * values)[:, :k].contiguous()
