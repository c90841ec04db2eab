"""Launches that do nothing, or fail: what stands between the operators and the kernels."""

import pytest
import torch

from qkernels import rounding
from qkernels.backends.cuda import weight_arguments
from qkernels.layouts import FRAGMENT, pack
from tests.emulated.emulator import (
    counted,
    failing_launches,
    needs_emulator,
    product,
    skipped_launches,
)

pytestmark = needs_emulator

SCHEDULES = ({"tokens": 8, "parts": 1}, {"tokens": 16, "parts": 3})


@pytest.fixture
def problem():
    packed = pack(rounding.quantize(torch.randn(40, 1024), "w4a16-g64"), FRAGMENT)
    return torch.randn(3, 1024, dtype=torch.float16), packed


def dequantized(packed):
    tensors, facts = weight_arguments(packed)
    return torch.ops.qkernels_emulated.dequantize(*tensors, *facts, torch.float16)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_skipped_product_costs_a_launch_and_no_block(problem, schedule):
    expected = product(*problem, **schedule)
    with skipped_launches(), counted() as counters:
        assert product(*problem, **schedule).shape == expected.shape
    assert (counters["launches"], counters["blocks"]) == (1, 0)
    assert torch.equal(product(*problem, **schedule), expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_failing_launch_is_an_error_with_its_words(problem, schedule):
    expected, weight = product(*problem, **schedule), dequantized(problem[1])
    with failing_launches("no kernel image is available"):
        with pytest.raises(RuntimeError, match="no kernel image is available"):
            product(*problem, **schedule)
        with pytest.raises(RuntimeError, match="no kernel image is available"):
            dequantized(problem[1])
    # Nothing of it is left behind: neither an error nor a counter of blocks.
    assert torch.equal(product(*problem, **schedule), expected)
    assert torch.equal(dequantized(problem[1]), weight)


def test_one_kernel_fails_and_the_others_do_not(problem):
    expected, weight = product(*problem), dequantized(problem[1])
    with failing_launches("out of memory", "weight_only/mma.cuh"):
        with pytest.raises(RuntimeError, match="out of memory"):
            product(*problem)
        assert torch.equal(dequantized(problem[1]), weight)
    with failing_launches("out of memory", "weight_only/dequantize.cu"):
        with pytest.raises(RuntimeError, match="out of memory"):
            dequantized(problem[1])
        assert torch.equal(product(*problem), expected)
