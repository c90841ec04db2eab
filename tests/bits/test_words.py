"""The orders of bits, in every implementation, against their definitions code by code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels.bits import dense, planar
from qkernels.errors import WeightError


def bit_stream(codes: list[int], bits: int) -> list[int]:
    """Words of a little-endian bit stream, one bit at a time."""
    stream = sum(code << (bits * i) for i, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def random_codes(n, k, bits, device="cpu"):
    return torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, device=device)


@given(
    n=st.integers(0, 5),
    k=st.integers(0, 200),
    bits=st.sampled_from(dense.DENSE_BITS),
    s=st.integers(0),
)
@settings(deadline=None)
def test_dense_is_a_bit_stream_in_every_implementation(n, k, bits, s):
    torch.manual_seed(s % 2**63)
    codes = random_codes(n, k, bits)
    words = dense.pack_dense_torch(codes, bits)
    assert words.tolist() == [bit_stream(row, bits) for row in codes.tolist()]
    assert torch.equal(dense.unpack_dense_torch(words, k, bits), codes)
    assert torch.equal(dense.pack_dense(codes, bits), words)
    assert torch.equal(dense.unpack_dense(words, k, bits), codes)


@given(
    n=st.integers(1, 5),
    k=st.integers(1, 1200),
    bits=st.sampled_from(planar.PLANAR_BITS),
    plane=st.sampled_from([16, 32, 64]),
    s=st.integers(0),
)
@settings(deadline=None)
def test_planar_follows_its_formula_in_every_implementation(n, k, bits, plane, s):
    torch.manual_seed(s % 2**63)
    codes = random_codes(n, k, bits)
    words = planar.pack_planar_torch(codes, bits, plane)
    values = 32 // bits
    for column in {0, k // 2, k - 1}:
        field, r = divmod(column % (values * plane), plane)
        word = words[column // (values * plane) * plane + r, n - 1].item()
        assert (word >> (bits * field)) & ((1 << bits) - 1) == codes[n - 1, column]
    assert torch.equal(planar.unpack_planar_torch(words, k, bits, plane), codes)
    assert torch.equal(planar.pack_planar(codes, bits, plane), words)
    assert torch.equal(planar.unpack_planar(words, k, bits, plane), codes)


def test_wrong_packing_input():
    codes = random_codes(2, 32, 4)
    with pytest.raises(WeightError, match="5 bits"):
        dense.pack_dense(codes, 5)
    with pytest.raises(WeightError, match="8 bits"):
        planar.pack_planar(codes, 8, 16)
    with pytest.raises(WeightError, match="uint8"):
        dense.pack_dense(codes.int(), 4)
    with pytest.raises(WeightError, match="take 4 words a row, got 3"):
        dense.unpack_dense(torch.zeros(2, 3, dtype=torch.int32), 32, 4)
    with pytest.raises(WeightError, match="rows of words, got 3"):
        planar.unpack_planar(torch.zeros(3, 2, dtype=torch.int32), 32, 4, 16)
