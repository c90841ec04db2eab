"""The orders of bits, in every implementation, against their definitions code by code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels.bits import awq, dense, gptq, marlin, planar
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


def nibble(words, row, column, i):
    return (words[row, column].item() >> (4 * i)) & 15


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_words_are_streams_along_columns_for_codes_and_rows_for_zero_points(bits):
    codes, zeros = random_codes(5, 96, bits), random_codes(64, 3, bits)
    words = gptq.pack_gptq(codes, bits)
    for column, row in enumerate(codes.tolist()):
        assert words[:, column].tolist() == bit_stream(row, bits)
    assert torch.equal(gptq.unpack_gptq(words, 96, bits), codes)
    for less_one in (None, "fields", "words"):
        words = gptq.pack_gptq_zeros(zeros, bits, less_one)
        assert torch.equal(gptq.unpack_gptq_zeros(words, 64, bits, less_one), zeros)
        if less_one is None:
            assert words.tolist() == [bit_stream(row, bits) for row in zeros.t().tolist()]
    less = ((zeros.t().int() - 1) % (1 << bits)).tolist()
    fields = gptq.pack_gptq_zeros(zeros, bits, "fields")
    assert fields.tolist() == [bit_stream(row, bits) for row in less]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_whole_words_less_one_borrow_from_the_fields_above(bits):
    count = 32 // bits
    zeros = torch.ones(count, 1, dtype=torch.uint8)
    zeros[0] = 0
    ones = sum(1 << (bits * i) for i in range(count))
    (word,) = gptq.pack_gptq_zeros(zeros, bits, "words").flatten().tolist()
    assert word % 2**32 == (ones - 1 - ones) % 2**32 == 0xFFFFFFFF
    in_fields = gptq.pack_gptq_zeros(zeros, bits, "fields")
    assert in_fields.item() % 2**32 == (1 << bits) - 1
    zeros[0] = 1
    assert gptq.pack_gptq_zeros(zeros, bits, "words").tolist() == [[0]]


def test_fast_awq_words_follow_their_formula():
    words = torch.randint(-(2**15), 2**15, (3, 192), dtype=torch.int16)
    codes = awq.unpack_awq_fast(words)
    assert codes.shape == (12, 192)
    for r in range(3):
        for column in range(192):
            block, i, h, u = column // 64, column // 16 % 4, column // 8 % 2, column % 8
            for j in range(4):
                k = 64 * block + 32 * h + 8 * j + u
                assert codes[4 * r + i, k] == nibble(words, r, column, j)


def test_marlin_words_follow_their_formula():
    words = torch.randint(-(2**31), 2**31, (2, 256), dtype=torch.int32)
    codes = marlin.unpack_marlin(words)
    assert codes.shape == (128, 32)
    for kt in range(2):
        for nt in range(2):
            for t in range(32):
                for w in range(4):
                    rows = [16 * kt + 2 * (t % 4) + more for more in (0, 1, 8, 9)]
                    n = 64 * nt + 16 * w + t // 4
                    v = [codes[column, k] for column in (n, n + 8) for k in rows]
                    for i, order in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                        assert v[order] == nibble(words, kt, nt * 128 + 4 * t + w, i)


@pytest.mark.parametrize("groups", [1, 2])
def test_marlin_scales_are_put_in_order(groups):
    scales = torch.randn(groups, 128)
    if groups > 1:
        order = [i + 8 * j for i in range(8) for j in range(8)]
    else:
        order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    stored = scales.reshape(-1, len(order))[:, order].reshape(groups, 128)
    assert torch.equal(marlin.marlin_scales(stored), scales.t())
