"""dense: each row is one little-endian bit stream along K; value k starts at bit k*bits.

3-bit values straddle words. This is the order of GPTQ (along K) and of compressed-tensors.

    bits = 4    word 0: k7 k6 k5 k4 k3 k2 k1 k0    word 1: k15 ... k8
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.bits.implementation import check, fastest
from qkernels.errors import WeightError

DENSE_BITS = (1, 2, 3, 4, 8)


def dense_words(k: int, bits: int) -> int:
    """32-bit words that hold `k` values of `bits` bits."""
    return -(-k * bits // 32)


def pack_dense(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [R, K] below 2^bits -> int32 words [R, ceil(K*bits/32)]; see `DENSE_BITS`."""
    check(codes, torch.uint8, bits, DENSE_BITS)
    fast = fastest(codes)
    if fast is not None:
        return fast.pack_dense(codes.contiguous(), bits)
    return pack_dense_torch(codes, bits)


def unpack_dense(words: Tensor, k: int, bits: int) -> Tensor:
    """int32 words [R, ceil(k*bits/32)] -> uint8 codes [R, k] of 1 to 8 bits."""
    check(words, torch.int32, bits, tuple(range(1, 9)))
    if words.shape[1] != dense_words(k, bits):
        raise WeightError(
            f"{k} values of {bits} bits take {dense_words(k, bits)} words a row, "
            f"got {words.shape[1]}"
        )
    fast = fastest(words) if bits in DENSE_BITS else None
    if fast is not None:
        return fast.unpack_dense(words.contiguous(), k, bits)
    return unpack_dense_torch(words, k, bits)


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
