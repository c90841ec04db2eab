"""weight_only_mma with a weight for each expert: which rows go where, shares, what is read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels import rounding
from qkernels.backends.cuda import weight_arguments
from qkernels.layouts import FRAGMENT, pack
from tests.bounds import FROBENIUS_BOUND
from tests.emulated.emulator import (
    BLOCK_ROWS,
    counted,
    grouped_product,
    needs_emulator,
    product,
    set_seed,
    stacked,
    stacked_product,
)
from tests.emulated.test_weight_only import error, of_integers

pytestmark = needs_emulator


def rows_of(ends):
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def activations(m, k, dtype=torch.float16):
    x = torch.zeros(m, -(-k // 8) * 8, dtype=dtype)
    x[:, :k] = torch.randint(-2, 3, (m, k))
    return x


def exact(x, ends, weights):
    y = torch.zeros(len(x), weights[0].codes.shape[0], dtype=torch.float64)
    for rows, weight in zip(rows_of(ends), weights, strict=True):
        y[rows] = x[rows, : weight.k].double() @ weight.dequantize().double().t()
    return y


@given(
    sizes=st.lists(st.sampled_from([0, 0, 1, 2, 7, 8, 9, 20, 70]), min_size=1, max_size=12),
    rest=st.sampled_from([0, 0, 3]),
    n=st.integers(1, 150),
    k=st.integers(1, 900),
    group=st.integers(1, 8).map(lambda steps: 16 * steps),
    bits=st.sampled_from([2, 3, 4, 8]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    tokens=st.sampled_from([0, *BLOCK_ROWS]),
    blocks=st.integers(1, 9),
    each_tile=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=80)
def test_any_rows_in_any_schedule(
    sizes, rest, n, k, group, bits, dtype, tokens, blocks, each_tile, seed
):
    torch.manual_seed(seed)
    set_seed(seed)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    weights = [of_integers(n, k, group, bits) for _ in sizes]
    x = activations(ends[-1] + rest, k, dtype)
    schedule = {}
    if tokens and len(x):
        most = len(x) // tokens + min(len(sizes), len(x))
        units = -(-k // (128 if bits < 4 else 64)) * (
            1 if each_tile else most * -(-n // BLOCK_ROWS[tokens])
        )
        schedule = {"tokens": tokens, "blocks": min(blocks, units), "each_tile": each_tile}
    y = grouped_product(x, ends, [pack(weight, FRAGMENT) for weight in weights], **schedule)
    assert torch.equal(y, exact(x, ends, weights).float().to(dtype))


@pytest.mark.parametrize(
    "text", ["w4a16-g64", "nf4-g64", "fp8e4m3-g32", "w8a16-g48", "w4a16", "w3a16-g32"]
)
def test_every_expert_is_what_it_would_be_alone(text):
    """Bit for bit, where one block adds all of K."""
    torch.manual_seed(0)
    sizes, n, k = [3, 0, 17, 0, 0, 8], 100, 328
    ends = torch.tensor(sizes).cumsum(0).tolist()
    weights = [rounding.quantize(torch.randn(n, k), text) for _ in sizes]
    if text == "w8a16-g48":
        weights = [weight.replace(zeros=weight.zeros.float() + 0.25) for weight in weights]
    experts = [pack(weight, FRAGMENT) for weight in weights]
    x = torch.randn(ends[-1], k).half()
    for tokens in BLOCK_ROWS:
        y = grouped_product(x, ends, experts, tokens=tokens, parts=1)
        for rows, packed in zip(rows_of(ends), experts, strict=True):
            if len(x[rows]):
                assert torch.equal(y[rows], product(x[rows], packed, tokens=tokens, parts=1))
    y = grouped_product(x, ends, experts)
    for rows, weight in zip(rows_of(ends), weights, strict=True):
        if len(x[rows]):
            assert error(y[rows], x[rows], weight) <= FROBENIUS_BOUND[torch.float16]


def test_more_experts_than_threads():
    torch.manual_seed(0)
    sizes = [0] * 600
    sizes[0] = sizes[299] = sizes[599] = 1
    sizes[300] = 9
    ends = torch.tensor(sizes).cumsum(0).tolist()
    weights = [of_integers(32, 64, 32, 4) for _ in sizes]
    x = activations(ends[-1], 64)
    y = grouped_product(x, ends, [pack(weight, FRAGMENT) for weight in weights])
    assert torch.equal(y, exact(x, ends, weights).half())


@pytest.mark.parametrize("tokens", BLOCK_ROWS)
def test_an_expert_without_rows_costs_nothing(tokens):
    """The weights of one with rows are read once, those of the others never."""
    torch.manual_seed(0)
    n, k, ends = 256, 1024, [0, 3, 3, 3, 8, 8]
    weights = [rounding.quantize(torch.randn(n, k), "w4a16-g64") for _ in ends]
    experts = [pack(weight, FRAGMENT) for weight in weights]
    stacks, facts = stacked(experts), weight_arguments(experts[0])[1]
    regions = {f"words{e}": words for e, words in enumerate(stacks[0])}
    with counted(**regions) as counters:
        stacked_product(torch.randn(8, k).half(), ends, stacks, facts, tokens=tokens, blocks=5)
    for rows, name in zip(rows_of(ends), regions, strict=True):
        read = counters["regions"][name]["read"]
        assert read["least"] == read["most"] == (rows.start < rows.stop), name


def test_ends_that_are_none_do_no_harm():
    """What is written is undefined, and nothing else is."""
    torch.manual_seed(0)
    experts = [pack(of_integers(33, 64, 32, 4), FRAGMENT) for _ in range(4)]
    x = activations(20, 64)
    for ends in ([20, 0, 20, 0], [-5, 7, 1000, 3], [5, 4, 3, 2], [2**31 - 1] * 4, [-(2**31)] * 4):
        grouped_product(x, ends, experts)
        grouped_product(x, ends, experts, tokens=8, blocks=5)
        grouped_product(x, ends, experts, tokens=8, parts=1)


def test_the_same_call_gives_the_same_bits():
    torch.manual_seed(0)
    ends = [1, 4, 4, 30]
    experts = [pack(rounding.quantize(torch.randn(150, 600), "w4a16-g32"), FRAGMENT) for _ in ends]
    x = torch.randn(30, 600).half()
    results = []
    for seed in range(4):
        set_seed(seed)
        results.append(grouped_product(x, ends, experts, tokens=16, blocks=7))
    assert all(torch.equal(results[0], again) for again in results[1:])


def test_wrong_arguments():
    experts = [pack(of_integers(32, 64, 32, 4), FRAGMENT) for _ in range(2)]
    x = activations(4, 64)
    with pytest.raises(ValueError, match="of 3 experts"):
        grouped_product(x, [1, 2, 4], experts)
