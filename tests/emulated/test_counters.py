"""What the kernels do to memory, counted in the emulator: performance facts that need no GPU."""

import pytest
import torch

from qkernels import rounding
from qkernels.backends.cuda import weight_arguments
from qkernels.layouts import FRAGMENT, pack
from tests.emulated.emulator import (
    BLOCK_ROWS,
    STAGE_COLUMNS,
    Way,
    counted,
    needs_emulator,
    product,
    sites,
)

pytestmark = needs_emulator

N, STAGES = 512, 3


def columns(tokens, parts):
    """K with which each part of it is twice as long as the pipeline."""
    return 2 * STAGES * parts * STAGE_COLUMNS[4][tokens]


def measured(text, m, *, tokens, parts):
    schedule = {"tokens": tokens, "parts": parts, "stages": STAGES}
    k = columns(tokens, parts)
    packed = pack(rounding.quantize(torch.randn(N, k), text), FRAGMENT)
    x = torch.randn(m, k, dtype=torch.float16)
    regions = {
        name: packed.buffers[name]
        for name in ("words", "scales", "zeros")
        if name in packed.buffers
    }
    with counted(x=x, **regions) as counters:
        product(x, packed, **schedule)
    way = Way.of(counters, m, N, tokens)
    assert way.parts == parts and way.stages >= 2 * STAGES * parts, way
    return counters


@pytest.mark.parametrize("text", ["w4a16-g128", "w4a16-g32-sym", "w8a16-g64", "nf4-g64"])
@pytest.mark.parametrize(
    ("m", "tokens", "parts"), [(1, 8, 1), (1, 8, 2), (13, 16, 2), (32, 32, 4), (64, 64, 2)]
)
def test_weights_and_scales_are_read_exactly_once(text, m, tokens, parts):
    counters = measured(text, m, tokens=tokens, parts=parts)
    for name in ("words", "scales", "zeros"):
        if name in counters["regions"]:
            region = counters["regions"][name]
            assert region["read"]["least"] == region["read"]["most"] == 1, name
            assert region["read"]["bytes"] == region["bytes"], name


@pytest.mark.parametrize(("m", "tokens"), [(1, 8), (13, 16), (32, 32), (64, 64)])
def test_the_next_kernel_may_start_at_once_and_finds_its_weights_in_the_cache(m, tokens):
    packed = pack(rounding.quantize(torch.randn(N, columns(tokens, 2)), "w4a16-g128"), FRAGMENT)
    x = torch.randn(m, packed.k, dtype=torch.float16)
    with sites() as found:
        product(x, packed, tokens=tokens, parts=2, stages=STAGES)
    threads = 256 * 2 * N // BLOCK_ROWS[tokens]
    for kind in ("start_next_kernel", "wait_for_kernels_before"):
        assert [site["passes"] for site in found[kind]] == [threads]
    # A lane for each tile of 16 rows.
    assert [site["passes"] for site in found["prefetch"]] == [2 * N // 16]


def test_scales_that_span_all_of_k_are_read_once_for_each_part_of_it():
    for parts in (1, 4):
        counters = measured("w8a16", 8, tokens=8, parts=parts)
        read = counters["regions"]["scales"]["read"]
        assert read["least"] == read["most"] == parts


@pytest.mark.parametrize(("m", "tokens"), [(8, 8), (16, 16), (32, 32), (64, 64)])
def test_activations_are_read_once_for_each_block_of_rows(m, tokens):
    counters = measured("w4a16-g128", m, tokens=tokens, parts=2)
    read = counters["regions"]["x"]["read"]
    assert read["least"] == read["most"] == N // BLOCK_ROWS[tokens]


@pytest.mark.parametrize("text", ["w4a16-g128", "w8a16-g64"])
@pytest.mark.parametrize(("m", "tokens"), [(1, 8), (8, 8), (16, 16), (32, 32), (64, 64)])
def test_every_sector_is_used_and_no_bank_conflicts(text, m, tokens):
    counters = measured(text, m, tokens=tokens, parts=2)
    assert counters["copy_async"]["bytes"] == 32 * counters["copy_async"]["sectors"]
    # The last block of each tile clears its counter: 4 bytes by one thread.
    tiles = N // BLOCK_ROWS[tokens]
    stored = counters["global_store"]
    assert stored["bytes"] - 4 * tiles == 32 * (stored["sectors"] - tiles)
    for site in counters["sites"]:
        if "wavefronts" in site:
            assert site["wavefronts"] == site["ideal_wavefronts"], site


@pytest.mark.parametrize(("m", "tokens"), [(8, 8), (16, 16), (32, 32), (64, 64)])
def test_tensor_core_operations(m, tokens):
    """One mma for 16 rows, 16 columns and 8 tokens; one ldmatrix for 32 columns and 8 tokens."""
    counters = measured("w4a16-g128", m, tokens=tokens, parts=1)
    k = columns(tokens, 1)
    assert counters["mma"] == N // 16 * (k // 16) * (tokens // 8)
    # Two tiles of 16 rows share each fragment of x.
    assert counters["ldmatrix"]["instructions"] == N // 32 * (k // 32) * (tokens // 8)


@pytest.mark.parametrize("text", ["w4a16-g128", "w8a16-g64"])
def test_dequantizing_reads_and_writes_once(text):
    k = 1024
    packed = pack(rounding.quantize(torch.randn(N, k), text), FRAGMENT)
    tensors, facts = weight_arguments(packed)
    with counted(words=packed.buffers["words"]) as counters:
        torch.ops.qkernels_emulated.dequantize(*tensors, *facts, torch.float16)
    read = counters["regions"]["words"]["read"]
    assert read["least"] == read["most"] == 1
    assert (
        counters["global_store"]["bytes"] == N * k * 2 == 32 * counters["global_store"]["sectors"]
    )
    for site in counters["sites"]:
        if "wavefronts" in site:
            assert site["wavefronts"] == site["ideal_wavefronts"], site
