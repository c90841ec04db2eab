"""The largest weights: addresses and grids of the kernels at sizes that fit no memory.

Their tensors are of memory that is only promised, and of each launch the last block runs alone:
it touches a few pages at the end of each tensor.
"""

import math
import mmap
from functools import partial

import pytest
import torch

from qkernels.backends.cuda import MOST_NUMBERS, MOST_SIZE
from qkernels.layouts import fragment
from tests.emulated.emulator import last_blocks_alone, needs_emulator, skipped_launches

pytestmark = needs_emulator

OPERATORS = torch.ops.qkernels_emulated
NO_RESERVE = 0x4000  # MAP_NORESERVE, which mmap does not name before Python 3.13


def promised(*shape, dtype):
    """A tensor of zeros that takes memory only where it is touched."""
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def words_of(n, k, bits):
    return promised(*fragment.words_shape(n, k, bits), dtype=torch.int32)


def weight_of(n, k, bits, group):
    groups, rows = -(-k // group), -(-n // 32) * 32
    scales = promised(groups, rows, dtype=torch.float16)
    zeros = promised(groups, rows, dtype=torch.uint8)
    return (words_of(n, k, bits), scales, zeros, None), (n, k, group, f"int{bits}")


# Numbers of weights, of words and of bytes beyond 2^31 and 2^32; each limit.
SIZES = (
    (MOST_SIZE, 64),
    (64, MOST_SIZE),
    (MOST_SIZE, 1024),
    (1024, MOST_SIZE - 24),
    (1 << 20, 1 << 20),
)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_the_last_codes_of_the_largest_weights(n, k, bits):
    words = words_of(n, k, bits)
    codes = torch.randint(1 << bits, (7, 40), dtype=torch.uint8)
    with last_blocks_alone():
        # A block packs 256 words: the last rows and columns are in the last of them.
        rows = n % 32 or 32
        source = promised(rows, k, dtype=torch.uint8)
        source[-7:, -40:] = codes
        OPERATORS.pack_fragment(source, None, words, n, k, n - rows, rows, bits, "codes")
        got = OPERATORS.unpack_fragment(words, n, k, n - 1, 1, bits)
    assert torch.equal(got[0, -40:], codes[-1])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_the_last_codes_of_the_largest_integer_weights(n, k, bits):
    words = words_of(n, k, bits)
    codes = torch.randint(1 << bits, (7, 40), dtype=torch.uint8)
    with last_blocks_alone():
        rows = n % 32 or 32
        source = promised(rows, k, dtype=torch.uint8)
        source[-7:, -40:] = codes
        OPERATORS.pack_fragment_int8(source, words, n, k, n - rows, rows, bits)
        got = OPERATORS.unpack_fragment_int8(words, n, k, n - 1, 1, bits)
    assert torch.equal(got[0, -40:], codes[-1])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_last_weights_that_are_dequantized(bits):
    """More rows than the y of a grid has blocks, and more numbers than an int."""
    n, k, group = 1_048_600, 2056, 64
    tensors, facts = weight_of(n, k, bits, group)
    words, scales, zeros, _ = tensors
    codes = torch.randint(1 << bits, (32, 64), dtype=torch.uint8)
    codes[24:] = codes[:, 8:] = 0
    with last_blocks_alone():
        tail = promised(24, k, dtype=torch.uint8)
        tail[:, -8:] = codes[:24, :8]
        OPERATORS.pack_fragment(tail, None, words, n, k, n - 24, 24, bits, "codes")
        # In the order of a lane's rows; the last group holds 8 columns.
        scales[-1, -32:] = torch.arange(32)
        zeros[-1, -32:] = 3
        out = OPERATORS.dequantize(*tensors, *facts, torch.float16)
    order = torch.tensor([row // 2 + row % 2 * 8 for row in range(16)]).argsort()
    last = codes[16:24, :8].float() - 3
    assert torch.equal(out[-8:, -8:], (last * (16 + order[:8, None])).half())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_last_gradients_of_large_weights(bits):
    """More bytes of words than 32 bits count."""
    n, k, group = 16_440, 524_296, 64
    tensors, facts = weight_of(n, k, bits, group)
    words, scales, zeros, _ = tensors
    assert words.nbytes > 1 << 32
    codes = torch.randint(1 << bits, (8, 8), dtype=torch.uint8)
    dy = torch.zeros(1, n, dtype=torch.float16)
    dy[0, -8:] = torch.randint(-2, 3, (8,))
    with last_blocks_alone():
        tail = promised(24, k, dtype=torch.uint8)
        tail[-8:, -8:] = codes
        OPERATORS.pack_fragment(tail, None, words, n, k, n - 24, 24, bits, "codes")
        scales[-1, -32:] = 1
        zeros[-1, -32:] = 3
        out = OPERATORS.weight_only_grad(dy, *tensors, *facts)
    assert out.shape == (1, k)
    assert torch.equal(out[0, -8:], (dy[0, -8:].float() @ (codes.float() - 3)).half())


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_a_grid_packs_the_largest_weights(n, k):
    source = promised(n, k, dtype=torch.uint8)
    with skipped_launches():
        OPERATORS.pack_fragment(source, None, words_of(n, k, 8), n, k, 0, n, 8, "codes")
        OPERATORS.pack_fragment_int8(source, words_of(n, k, 8), n, k, 0, n, 8)


@pytest.mark.parametrize(
    ("n", "k"), [(MOST_SIZE + 1, 64), (64, MOST_SIZE + 1), (MOST_NUMBERS // 1024 + 1, 1024)]
)
def test_larger_weights_are_refused(n, k):
    small = torch.zeros(1, dtype=torch.int32)
    message = f"must be {MOST_SIZE} at most, and their product {MOST_NUMBERS}, got {n} and {k}"
    calls = (
        partial(OPERATORS.dequantize, small, small, None, None, n, k, 64, "int4", torch.half),
        partial(OPERATORS.pack_fragment, small, None, small, n, k, 0, 32, 4, "codes"),
        partial(OPERATORS.unpack_fragment, small, n, k, 0, 32, 4),
        partial(OPERATORS.pack_fragment_int8, small, small, n, k, 0, 32, 4),
        partial(OPERATORS.unpack_fragment_int8, small, n, k, 0, 32, 4),
        partial(OPERATORS.weight_only_route, n, k, 64, 64, "int4", None, "fused", 0),
    )
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("name", ["tokens", "blocks", "stages", "unit"])
@pytest.mark.parametrize("value", [(1 << 32) + 8, 1 << 31])
def test_schedules_are_not_cut_to_32_bits(name, value):
    tensors, facts = weight_of(64, 64, 4, 64)
    schedule = {"tokens": 8, "blocks": 1, "stages": 2, name: value}
    x = torch.zeros(1, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match=f"{name} must be 0 or more, and fit 32 bits, got {value}"):
        OPERATORS.weight_only_mma(x, *tensors, None, *facts, **schedule)


def test_routes_of_groups_that_overflow_are_refused():
    make = partial(OPERATORS.weight_only_route, 64, 1 << 30, 1)
    with pytest.raises(ValueError, match=f"filled up to {MOST_SIZE} columns at most"):
        make(1 << 40, "int4", None, "fused", 0)


def test_ranges_of_rows_do_not_overflow():
    words, most = torch.zeros(4, 1, 32, 4, dtype=torch.int32), (1 << 63) - 32
    with pytest.raises(ValueError, match=f"{most} rows from 32 on are not in 0 to 64"):
        OPERATORS.unpack_fragment(words, 64, 64, 32, most, 4)
    codes = torch.zeros(32, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"{most} rows from 32 on, of 64, do not begin"):
        OPERATORS.pack_fragment(codes, None, words, 64, 64, 32, most, 4, "codes")
