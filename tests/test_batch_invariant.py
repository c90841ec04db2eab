"""`batch_invariant` reaches the choice of a kernel, and holds, however a layer is called."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import qkernels as qk
from qkernels import select

# No other test has them: the choice is made anew.
N, K = 21, 184


@pytest.fixture
def problems() -> Iterator[list]:
    """The problems put to the first row of the table, which takes none."""
    seen = []

    def look(problem):
        seen.append(problem)
        return "only looks"

    row = next(row for row in select.KERNELS if row.backend == "reference")
    looking = replace(row, name="looking", why_not=look)
    select.KERNELS.insert(0, looking)
    select.forget_choices()
    yield seen
    select.KERNELS.remove(looking)
    select.forget_choices()


def layer_of(text, **kwargs):
    return qk.WQLinear.from_linear(torch.nn.Linear(K, N), text, **kwargs)


CALLS = {
    "layer": lambda layer, x: layer(x),
    "copy": lambda layer, x: copy.deepcopy(layer)(x),
    "function": lambda layer, x: qk.linear(
        x, layer.packed, layer.bias, batch_invariant=layer.batch_invariant
    ),
    "from_weight": lambda layer, x: qk.WQLinear.from_weight(
        layer.to_weight(), batch_invariant=layer.batch_invariant
    )(x),
    "quantized": lambda layer, x: layer(qk.quantize_activation(x)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("invariant", [False, True])
def test_kernels_are_asked_for_it(call, invariant, problems):
    # Rows of another number for each call, for which nothing is remembered yet.
    m = 5 + 2 * list(CALLS).index(call) + invariant
    layer = layer_of("w8a8", batch_invariant=invariant)
    del problems[:]
    CALLS[call](layer, torch.randn(m, K))
    asked = [problem for problem in problems if problem.m == m]
    assert asked and all(problem.batch_invariant == invariant for problem in asked)


@pytest.mark.parametrize(
    "text", ["w4a16-g64", "nf4-g64", "fp8e4m3-a16", "fp8-a8", "w8a8", "w4a8-g64"]
)
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_does_not_depend_on_the_others(text, backend, dtype):
    layer = layer_of(text, backend=backend, batch_invariant=True)
    x = torch.randn(150, K).to(dtype)
    together = layer(x)
    for rows in (slice(0, 1), slice(7, 12), slice(3, 50), slice(10, 150)):
        assert torch.equal(layer(x[rows]), together[rows])
        alone = qk.linear(x[rows], layer.packed, layer.bias, backend=backend, batch_invariant=True)
        assert torch.equal(alone, together[rows])


@pytest.mark.parametrize("text", ["w4a16-g64", "fp8-a8", "w8a8", "w8a8-g64"])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("k", [33, 100, 184])
def test_a_row_does_not_depend_on_where_it_lies(text, backend, k):
    for n in (2, 7, 21):
        linear = torch.nn.Linear(k, n)
        layer = qk.WQLinear.from_linear(linear, text, backend=backend, batch_invariant=True)
        x = torch.randn(9, k)
        together = layer(x)
        for shift in range(8):
            moved = torch.empty(8 + x.numel())[shift : shift + x.numel()].view_as(x).copy_(x)
            assert torch.equal(layer(moved), together)
        assert torch.equal(layer(x.t().contiguous().t()), together)
        apart = torch.stack([x, x], dim=-1)[..., 0]
        assert all(torch.equal(layer(apart[i : i + 1])[0], together[i]) for i in range(len(x)))
