"""The schedule of weight_only_mma and int8_mma, a pure function of the problem."""

import itertools

import pytest
import torch

from bench import cli
from bench.schedule import GPUS, SCHEMES, schedule
from tests.emulated.emulator import BLOCK_ROWS

A100, H200, B200 = (GPUS[name] for name in ("A100", "H200", "B200"))
SHAPES = (
    *((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192)),
    *((2048, 2048), (1024, 5120), (192, 576), (1, 16)),
)


def choose(m, n, k, group_size=128, bits=4, gpu=H200, each_tile=False):
    return schedule(m, n, k, gpu, group_size=group_size, bits=bits, each_tile=each_tile)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("each_tile", [False, True])
def test_every_problem_has_a_schedule_that_fits(gpu, bits, each_tile):
    for (n, k), m, group_size in itertools.product(
        SHAPES, (1, 7, 16, 33, 64, 256), (16, 48, 128, 1 << 20)
    ):
        found = choose(m, n, k, min(group_size, k), bits, GPUS[gpu], each_tile)
        assert found.shared_bytes <= GPUS[gpu].shared_bytes
        assert found.tokens in BLOCK_ROWS and 2 <= found.stages <= 6 and found.unit in (1, 2)
        assert found.tokens >= min(m, 8)
        units = -(-k // (64 * found.unit))
        if not each_tile:
            units *= -(-n // BLOCK_ROWS[found.tokens]) * -(-m // found.tokens)
        assert 1 <= found.blocks <= units


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("scheme", ["w4a8-g128", "w8a8"])
@pytest.mark.parametrize("each_tile", [False, True])
def test_integer_products_have_schedules_that_fit(gpu, scheme, each_tile):
    for (n, k), m in itertools.product(SHAPES, (1, 7, 16, 33, 64, 256, 4096)):
        weight = SCHEMES[scheme]._asdict()
        found = schedule(m, n, k, GPUS[gpu], **weight, each_tile=each_tile)
        assert found.shared_bytes <= GPUS[gpu].shared_bytes
        assert found.tokens in BLOCK_ROWS and 2 <= found.stages <= 6
        assert found.tokens >= min(m, 8) and found.blocks >= 1


def test_few_tokens_take_narrow_tiles():
    for m, tokens in ((1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (33, 64), (256, 64)):
        assert choose(m, 8192, 8192).tokens == tokens


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("m", [1, 8, 16])
def test_multiprocessors_are_busy(gpu, m):
    """By the chooser's own count of work, which knows of no cache and no clock."""
    # 2048 x 2048 is 1024 chunks of 64 columns: 7.2 for each of an L40S's multiprocessors. Shared
    # out by a B200's, pieces of two tiles would cost more than the 14% that 128 blocks leave idle.
    smallest = {"L40S": 0.9, "B200": 0.86}.get(gpu, 0.92)
    for n, k in SHAPES[:6]:
        least = smallest if n == 2048 else 0.92
        assert choose(m, n, k, gpu=GPUS[gpu]).busy >= least, (n, k)
    assert choose(m, 1024, 5120, gpu=GPUS[gpu]).busy >= 0.8


def test_two_blocks_share_a_multiprocessor_where_they_fit():
    """Few tokens on an A100: three stages and not four, of which there would be room for one."""
    for gpu, stages in ((A100, 3), (H200, 4), (B200, 4)):
        found = choose(1, 8192, 8192, gpu=gpu)
        assert found.stages == stages
        assert 2 * (found.shared_bytes + 1024) <= gpu.multiprocessor_shared_bytes
        assert found.blocks > gpu.multiprocessors


def test_small_products_are_not_shared_out_further_than_that_pays():
    assert choose(1, 64, 256).blocks == 1
    assert choose(1, 192, 256).blocks == 3


def test_the_parts_of_a_tile_do_not_depend_on_m():
    problem = {"n": 4096, "k": 4096, "each_tile": True}
    assert choose(64, **problem) == choose(64, **problem)
    assert choose(64, **problem).blocks > 1


def test_the_same_problem_gets_the_same_schedule():
    assert choose(3, 4096, 4096) == choose(3, 4096, 4096)


@pytest.mark.parametrize("name", ["m", "n", "k", "group_size", "multiprocessors"])
@pytest.mark.parametrize("value", [0, -1, (1 << 30) + 1])
def test_problems_that_are_none_have_no_schedule(name, value):
    right = {"m": 1, "n": 64, "k": 64, "group_size": 64, "bits": 4, "scale_bytes": 2}
    right |= {"zero_bytes": 1, **H200._asdict()}
    torch.ops.qkernels.weight_only_schedule(**right)
    with pytest.raises(ValueError, match=f"sizes must be 1 to {1 << 30}, got {value}"):
        torch.ops.qkernels.weight_only_schedule(**right | {name: value})
    with pytest.raises(ValueError, match="a number of x has 1 or 2 bytes, got 3"):
        torch.ops.qkernels.weight_only_schedule(**right, x_bytes=3)


def test_schedules_are_printed_without_a_gpu(capsys):
    assert cli.run(["--schedule", "--shapes", "8192,8192", "--m", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = itertools.product(SCHEMES, GPUS)
    assert [line.split()[:4] for line in lines[2:]] == [[*row, "8192x8192", "1"] for row in rows]
    assert cli.run(["--schedule", "--m", "0"]) == 2
