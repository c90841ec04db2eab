"""Packing on the device, against the formula of each layout, and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qkernels.triton_kernels import pack_dense, pack_planar, unpack_dense, unpack_planar
from tests.triton_kernels.planar_oracle import pack_words, poisoned_outputs

SHAPES = ((1, 1), (5, 31), (130, 257), (3, 576))


def random_codes(shape: tuple[int, int], bits: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8).to(device)


def dense_words(codes: Tensor, bits: int) -> Tensor:
    """The bit stream of each row, a bit at a time."""
    rows, k = codes.shape
    stream = torch.zeros(rows, -(-k * bits // 32) * 32, dtype=torch.int64)
    for bit in range(bits):
        stream[:, bit : k * bits : bits] = (codes.cpu().long() >> bit) & 1
    words = (stream.view(rows, -1, 32) << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).to(codes.device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("plane", [16, 32, 64])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_planar(bits: int, plane: int, shape: tuple[int, int], device: torch.device) -> None:
    codes = random_codes(shape, bits, device)
    words = pack_planar(codes, bits, plane)
    assert torch.equal(words, pack_words(codes, bits, plane))
    assert torch.equal(unpack_planar(words, shape[1], bits, plane), codes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_dense(bits: int, shape: tuple[int, int], device: torch.device) -> None:
    codes = random_codes(shape, bits, device)
    words = pack_dense(codes, bits)
    assert torch.equal(words, dense_words(codes, bits))
    assert torch.equal(unpack_dense(words, shape[1], bits), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_high_bits_of_codes_are_dropped(bits: int, device: torch.device) -> None:
    codes = random_codes((3, 100), 8, device)
    low = codes & ((1 << bits) - 1)
    assert torch.equal(unpack_planar(pack_planar(codes, bits, 16), 100, bits, 16), low)
    assert torch.equal(unpack_dense(pack_dense(codes, bits), 100, bits), low)


def test_writes_all_of_the_output_and_nothing_else(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = random_codes((9, 131), 3, device)
    with poisoned_outputs(monkeypatch):
        planar, dense = pack_planar(codes, 3, 32), pack_dense(codes, 3)
        assert torch.equal(unpack_planar(planar, 131, 3, 32), codes)
        assert torch.equal(unpack_dense(dense, 131, 3), codes)
    assert torch.equal(planar, pack_words(codes, 3, 32))
    assert torch.equal(dense, dense_words(codes, 3))


def test_views_and_empty_rows(device: torch.device) -> None:
    codes = random_codes((40, 7), 4, device)
    assert torch.equal(pack_dense(codes.t(), 4), pack_dense(codes.t().contiguous(), 4))
    assert torch.equal(pack_planar(codes.t(), 4, 16), pack_planar(codes.t().contiguous(), 4, 16))
    empty = codes[:0]
    assert unpack_dense(pack_dense(empty, 4), 7, 4).shape == (0, 7)
    assert unpack_planar(pack_planar(empty, 4, 16), 7, 4, 16).shape == (0, 7)


def test_wrong_operands_are_named(device: torch.device) -> None:
    codes = random_codes((4, 40), 4, device)
    with pytest.raises(ValueError, match=r"codes have 1, 2, 3, 4 or 8 bits, got 5"):
        pack_planar(codes, 5, 16)
    with pytest.raises(ValueError, match=r"plane 8 is not one of 16, 32, 64"):
        pack_planar(codes, 4, 8)
    with pytest.raises(ValueError, match=r"codes are uint8 with two dimensions, got torch.int32"):
        pack_dense(codes.int(), 4)
    with pytest.raises(ValueError, match=r"words are torch.int32 \[R, 5\], got torch.int32 \[4, 4"):
        unpack_dense(pack_dense(codes, 4)[:, 1:], 40, 4)
    with pytest.raises(ValueError, match=r"words are torch.int32 \[16, N\], got torch.uint8"):
        unpack_planar(codes, 40, 4, 16)
