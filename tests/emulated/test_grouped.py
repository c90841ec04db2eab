"""torch.ops.qkernels.linear_grouped on the CUDA kernels in the emulator."""

import pytest
import torch

from qkernels import WQLinear, linear_grouped, ops, rounding
from qkernels.errors import NoKernelError
from tests import truth
from tests.bounds import FROBENIUS_BOUND
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


def experts_of(text, count, **options):
    return [
        WQLinear.from_linear(torch.nn.Linear(K, N, bias=False), text, backend="emulated", **options)
        for _ in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", ["w4a16-g16", "nf4-g24", "w8a16-g32"])
@pytest.mark.parametrize("counts", COUNTS)
def test_each_expert_multiplies_its_rows(counts, text, dtype):
    counts = COUNTS[counts]
    layers = experts_of(text, len(counts))
    x = torch.randn(sum(counts) + 2, K).to(dtype)
    ends = torch.tensor(counts).cumsum(0).int()
    y = linear_grouped(x, ends, [layer.packed for layer in layers], backend="emulated")
    for layer, count, stop in zip(layers, counts, ends.tolist(), strict=True):
        if count:
            rows = x[stop - count : stop]
            want = rows.double() @ layer.to_weight().dequantize().double().t()
            assert truth.error(y[stop - count : stop], want) <= FROBENIUS_BOUND[dtype]
    assert not y[ends[-1] :].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_batch_invariant_row_is_what_it_is_alone(dtype):
    counts = COUNTS["few"]
    layers = experts_of("w4a16-g16", len(counts), batch_invariant=True)
    x = torch.randn(sum(counts), K).to(dtype)
    ends = torch.tensor(counts).cumsum(0).int()
    y = linear_grouped(
        x, ends, [layer.packed for layer in layers], backend="emulated", batch_invariant=True
    )
    experts = [layer for layer, count in zip(layers, counts, strict=True) for _ in range(count)]
    for row, layer in enumerate(experts):
        assert torch.equal(y[row], layer(x[row : row + 1])[0])


def test_orders_of_columns_go_expert_by_expert():
    """Each expert's own meets its rows alone."""
    counts = COUNTS["few"]
    weights = [
        truth.with_order(rounding.quantize(torch.randn(N, K), "w4a16-g16"), torch.randperm(K))
        for _ in counts
    ]
    layers = [WQLinear.from_weight(weight, backend="emulated") for weight in weights]
    x = torch.randn(sum(counts), K).half()
    ends = torch.tensor(counts).cumsum(0).int()
    y = linear_grouped(x, ends, [layer.packed for layer in layers], backend="emulated")
    for layer, count, stop in zip(layers, counts, ends.tolist(), strict=True):
        if count:
            assert torch.equal(y[stop - count : stop], layer(x[stop - count : stop]))


def test_a_type_that_no_kernel_takes_is_named():
    layers = experts_of("nf4-g16", 2)
    stacks = [
        torch.stack(held) for held in zip(*(e._packed_buffers() for e in layers), strict=True)
    ]
    ends = torch.tensor([1, 2], dtype=torch.int32)
    with pytest.raises(NoKernelError, match="which those of nf4-g16 are not"):
        ops.linear_grouped_operator(torch.randn(2, K), ends, stacks, layers[0]._spec)
