"""The schedule of weight_only_mma, a pure function of the problem."""

import itertools

import pytest
import torch

from tests.emulated.emulator import needs_emulator

pytestmark = needs_emulator

H200 = (132, 227 * 1024)
RTX_3090 = (82, 99 * 1024)
SHAPES = (
    *((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192)),
    *((2048, 2048), (1024, 5120), (192, 576), (1, 16)),
)


def choose(m, n, k, group_size=128, bits=4, gpu=H200):
    return torch.ops.qkernels_emulated.choose_config(m, n, k, group_size, bits, 2, 1, *gpu)


@pytest.mark.parametrize("gpu", [H200, RTX_3090])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_problem_has_a_schedule_that_fits(gpu, bits):
    for (n, k), m, group_size in itertools.product(
        SHAPES, (1, 7, 16, 33, 64, 256), (16, 48, 128, 1 << 20)
    ):
        tokens, split_k, stages, shared = choose(m, n, k, min(group_size, k), bits, gpu)
        assert shared <= gpu[1]
        assert tokens in (8, 16, 32, 64) and split_k >= 1 and 2 <= stages <= 6
        assert tokens >= min(m, 8)


def test_few_tokens_take_narrow_tiles():
    for m, tokens in ((1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (33, 64), (256, 64)):
        assert choose(m, 8192, 8192)[0] == tokens


def test_small_layers_are_split_until_they_fill_the_card():
    rows = 64  # of a block, at M = 1
    for n, k in ((1024, 5120), (2048, 2048), (4096, 4096), (8192, 8192)):
        _, split_k, _, _ = choose(1, n, k)
        steps = -(-k // 512)
        blocks = -(-n // rows) * split_k
        # Every processor has work, or no part of K could be shorter.
        assert blocks >= H200[0] or split_k >= steps // 2, (n, k)
        assert split_k <= steps


def test_the_same_problem_gets_the_same_schedule():
    assert choose(3, 4096, 4096) == choose(3, 4096, 4096)
