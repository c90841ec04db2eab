"""qkernels._C: packing on the CPU against the definition of the bit order, code by code."""

from collections.abc import Iterator
from threading import Thread
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qkernels

DENSE_BITS = (1, 2, 3, 4, 8)
PLANAR_BITS = (1, 2, 3, 4)
PLANES = (16, 32, 64)
# More codes than one thread is given, and tails in both dimensions.
LARGE = (261, 1031)


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return pytest.importorskip("qkernels._C", reason="qkernels._C was not built")


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def codes_of(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)


def to_int32(rows: list[list[int]], width: int) -> Tensor:
    words = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), width)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def dense_oracle(codes: Tensor, bits: int) -> Tensor:
    """A row as one long integer, cut into words from its low end."""
    width = -(-codes.shape[1] * bits // 32)
    rows = []
    for row in codes.tolist():
        stream = sum(code << (bits * k) for k, code in enumerate(row))
        rows.append([stream >> (32 * word) & 0xFFFFFFFF for word in range(width)])
    return to_int32(rows, width)


def planar_oracle(codes: Tensor, bits: int, plane: int) -> Tensor:
    n, k = codes.shape
    fields = 32 // bits
    height = -(-k // (fields * plane)) * plane
    words = [[0] * n for _ in range(height)]
    for row, values in enumerate(codes.tolist()):
        for column, code in enumerate(values):
            tile, rest = divmod(column, fields * plane)
            field, r = divmod(rest, plane)
            words[tile * plane + r][row] |= code << (bits * field)
    return to_int32(words, n)


shapes = st.tuples(st.integers(0, 5), st.integers(0, 300), st.integers(0, 2**32 - 1))


@pytest.mark.parametrize("bits", DENSE_BITS)
@given(shape=shapes)
@settings(deadline=None, max_examples=60)
def test_dense(native: ModuleType, bits: int, shape: tuple[int, int, int]):
    rows, columns, seed = shape
    codes = codes_of(rows, columns, bits, seed)
    words = native.pack_dense(codes, bits)
    assert words.dtype == torch.int32
    assert torch.equal(words, dense_oracle(codes, bits))
    assert torch.equal(native.unpack_dense(words, columns, bits), codes)


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("bits", PLANAR_BITS)
@given(shape=shapes)
@settings(deadline=None, max_examples=30)
def test_planar(native: ModuleType, bits: int, plane: int, shape: tuple[int, int, int]):
    n, k, seed = shape
    codes = codes_of(n, k, bits, seed)
    words = native.pack_planar(codes, bits, plane)
    assert words.dtype == torch.int32
    assert torch.equal(words, planar_oracle(codes, bits, plane))
    assert torch.equal(native.unpack_planar(words, k, bits, plane), codes)


@pytest.mark.parametrize("bits", DENSE_BITS)
def test_dense_in_threads(native: ModuleType, threads: int, bits: int):
    codes = codes_of(*LARGE, bits)
    words = native.pack_dense(codes, bits)
    assert torch.equal(words, dense_oracle(codes, bits))
    assert torch.equal(native.unpack_dense(words, LARGE[1], bits), codes)


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("bits", PLANAR_BITS)
def test_planar_in_threads(native: ModuleType, threads: int, bits: int, plane: int):
    codes = codes_of(*LARGE, bits)
    words = native.pack_planar(codes, bits, plane)
    assert torch.equal(words, planar_oracle(codes, bits, plane))
    assert torch.equal(native.unpack_planar(words, LARGE[1], bits, plane), codes)


@pytest.mark.parametrize("bits", DENSE_BITS)
@pytest.mark.parametrize("k", [1, 7, 8, 11, 33])
def test_unpacking_ignores_padding_bits(native: ModuleType, bits: int, k: int):
    """Words of other programs may hold anything after the last code."""
    width = -(-k * bits // 32)
    ones = torch.full((3, width), -1, dtype=torch.int32)
    assert torch.equal(
        native.unpack_dense(ones, k, bits), torch.full((3, k), (1 << bits) - 1, dtype=torch.uint8)
    )


@pytest.mark.parametrize("k", [0, 1, 2, 50])
def test_a_code_that_does_not_fit_is_found_anywhere(native: ModuleType, k: int):
    for at in range(k):
        codes = torch.zeros(2, k, dtype=torch.uint8)
        codes[1, at] = 9
        with pytest.raises(ValueError, match="codes must be below 8 for 3 bits, got 9"):
            native.pack_dense(codes, 3)
        with pytest.raises(ValueError, match="codes must be below 8 for 3 bits, got 9"):
            native.pack_planar(codes, 3, 16)


CODES = torch.zeros(6, 40, dtype=torch.uint8)
WORDS = torch.zeros(6, 5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        ("pack_dense", (CODES, 5), "bits must be one of 1 2 3 4 8, got 5"),
        ("pack_planar", (CODES, 8, 16), "bits must be one of 1 2 3 4, got 8"),
        ("pack_planar", (CODES, 4, 48), "plane must be one of 16 32 64, got 48"),
        ("pack_dense", (CODES.int(), 4), r"codes must be torch\.uint8, got torch\.int32"),
        ("pack_dense", (CODES[0], 4), r"codes must have 2 dimensions, got shape \[40\]"),
        ("pack_planar", (CODES.T, 4, 16), r"codes must be contiguous, .* strides \[1, 40\]"),
        ("pack_dense", (CODES.to("meta"), 4), "codes must be on the CPU, got meta"),
        ("unpack_dense", (CODES, 40, 4), r"words must be torch\.int32, got torch\.uint8"),
        ("unpack_dense", (WORDS, 41, 4), r"shape \[6, 6\] for k=41 and 4 bits, got \[6, 5\]"),
        ("unpack_dense", (WORDS, -1, 4), "k must not be negative, got -1"),
        ("unpack_planar", (WORDS, 7, 4, 16), r"shape \[16, 5\] for k=7, 4 bits .*got \[6, 5\]"),
        ("unpack_planar", (WORDS, -7, 4, 16), "k must not be negative, got -7"),
    ],
)
def test_bad_input(native: ModuleType, call: str, arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        getattr(native, call)(*arguments)


def test_python_threads_at_once(native: ModuleType):
    codes = codes_of(2048, 4096, 3)
    results: list[Tensor] = []
    workers = [Thread(target=lambda: results.append(native.pack_dense(codes, 3))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 3
    assert all(torch.equal(native.unpack_dense(each, 4096, 3), codes) for each in results)


def test_build_info(native: ModuleType):
    info = native.build_info()
    assert info["version"] == qkernels.__version__
    assert info["torch_version"] == torch.__version__.split("+")[0]
    assert info["cuda"] == bool(info["cuda_architectures"])
    assert info["compiler"]
    assert info["cpp_standard"] >= 17
    assert isinstance(info["openmp"], bool)
