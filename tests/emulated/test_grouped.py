"""Experts on the CUDA kernels in the emulator: each slice of a stack is a weight of its own."""

import pytest
import torch

from qkernels import WQLinear, linear_grouped, ops
from qkernels.errors import NoKernelError
from tests.emulated.emulator import needs_emulator

pytestmark = needs_emulator
N, K = 40, 72
COUNTS = {
    "few": [0, 3, 1, 0, 2],
    "one": [9],
    "many of one": [0, 257, 1],
    "none": [0, 0],
    "60": [1, 0] * 30,
}


def experts_of(text, count):
    return [
        WQLinear.from_linear(torch.nn.Linear(K, N, bias=False), text, backend="emulated")
        for _ in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", ["w4a16-g16", "nf4-g24", "w8a16-g32"])
@pytest.mark.parametrize("counts", COUNTS)
def test_the_bits_are_those_of_each_expert_alone(counts, text, dtype):
    counts = COUNTS[counts]
    layers = experts_of(text, len(counts))
    x = torch.randn(sum(counts) + 2, K).to(dtype)
    ends = torch.tensor(counts).cumsum(0).int()
    y = linear_grouped(x, ends, [layer.packed for layer in layers], backend="emulated")
    want = torch.zeros(len(x), N, dtype=dtype)
    for layer, count, stop in zip(layers, counts, ends.tolist(), strict=True):
        if count:
            want[stop - count : stop] = layer(x[stop - count : stop])
    assert torch.equal(y, want)


def test_a_type_that_no_kernel_takes_is_named():
    layers = experts_of("w4a16-g16", 2)
    stacks = [
        torch.stack(held) for held in zip(*(e._packed_buffers() for e in layers), strict=True)
    ]
    ends = torch.tensor([1, 2], dtype=torch.int32)
    with pytest.raises(NoKernelError, match="takes x of fp16 or bf16"):
        ops.linear_grouped_operator(torch.randn(2, K), ends, stacks, layers[0]._spec)
