"""`linear_grouped`: rows sorted by their expert, each with the weight of its own.

Its bits are those of `linear` for the rows of each expert alone.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.library import opcheck

import qkernels as qk
from qkernels import compiled, ops, reference, rounding, select
from qkernels.backends import cpu
from qkernels.errors import NoKernelError, WeightError
from qkernels.layouts import PLAIN, pack
from tests import schemes, truth
from tests.bounds import FROBENIUS_BOUND
from tests.test_ops import TESTS

N, K = 33, 72
SCHEMES = ("w4a16-g32", "w8a8", "nf4-g32")
COUNTS = {
    "one expert": [7],
    "an expert without rows first": [0, 3, 1, 2],
    "in the middle": [2, 0, 0, 21],
    "and last": [2, 19, 1, 0],
    "all rows of one": [0, 0, 17, 0],
    "none at all": [0, 0, 0, 0],
    "many": [(3 * e) % 7 if e % 4 else 0 for e in range(60)],
}
BEHIND = (0, 5)


def experts_of(text, count, device, n=N, k=K, **options):
    """A layer for each expert, with scales of x that are different where it has one."""
    is_static = qk.QuantScheme.parse(text).activation.is_static
    return [
        qk.WQLinear.from_linear(
            torch.nn.Linear(k, n, bias=False, device=device),
            text,
            activation_scale=0.02 + 0.01 * e if is_static else None,
            **options,
        )
        for e in range(count)
    ]


def arguments(layers, counts, behind=0, dtype=torch.float32):
    """x, ends, stacks and spec for so many rows of each expert, and some behind the last."""
    device = layers[0].packed.device
    x = torch.randn(sum(counts) + behind, layers[0].in_features, device=device).to(dtype)
    ends = torch.tensor(counts, device=device).cumsum(0).int()
    buffers = [layer.packed.buffers for layer in layers]
    stacks = [torch.stack([each[name] for each in buffers]) for name in buffers[0]]
    return x, ends, stacks, layers[0]._spec


def one_by_one(layers, x, ends):
    y, start = x.new_zeros(len(x), layers[0].out_features), 0
    for layer, stop in zip(layers, ends.tolist(), strict=True):
        if stop > start:
            y[start:stop] = layer(x[start:stop])
        start = stop
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("text", SCHEMES)
def test_the_bits_are_those_of_each_expert_alone(text, counts, behind, dtype, device):
    counts = COUNTS[counts]
    layers = experts_of(text, len(counts), device)
    x, ends, stacks, spec = arguments(layers, counts, behind, dtype)
    y = ops.linear_grouped_operator(x, ends, stacks, spec)
    assert y.shape == (len(x), N) and y.dtype == dtype
    assert torch.equal(y, one_by_one(layers, x, ends))
    packed = [layer.packed for layer in layers]
    assert torch.equal(qk.linear_grouped(x, ends, packed), y)
    # What installations without qkernels._C run.
    assert torch.equal(ops._linear_grouped(x, ends, stacks, spec), y)


@pytest.mark.parametrize("text", [s for s in schemes.ALL if "position" not in s])
def test_every_scheme(text, device):
    counts = [2, 0, 20, 1]
    layers = experts_of(text, len(counts), device)
    x, ends, stacks, spec = arguments(layers, counts, 2, torch.bfloat16)
    y = ops.linear_grouped_operator(x, ends, stacks, spec)
    assert torch.equal(y, one_by_one(layers, x, ends))


@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("text", SCHEMES)
def test_every_level_of_instructions(isa, text, monkeypatch):
    if cpu.why_no_isa(isa) is not None:
        pytest.skip(cpu.why_no_isa(isa))
    monkeypatch.setenv(cpu.ISA_VARIABLE, isa)
    select.forget_choices()
    try:
        # One row, and more than where kernels for many rows begin.
        counts = [1, 0, 50, 3]
        layers = experts_of(text, len(counts), "cpu")
        for dtype in (torch.float32, torch.bfloat16):
            x, ends, stacks, spec = arguments(layers, counts, 1, dtype)
            y = ops.linear_grouped_operator(x, ends, stacks, spec)
            assert torch.equal(y, one_by_one(layers, x, ends))
    finally:
        select.forget_choices()


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("counts", ["an expert without rows first", "all rows of one", "many"])
def test_the_reference_gives_the_true_product(text, counts, device):
    counts = COUNTS[counts]
    weights = [rounding.quantize(torch.randn(N, K, device=device), text) for _ in counts]
    packed = [pack(weight, PLAIN) for weight in weights]
    x = torch.randn(sum(counts) + 3, K, device=device)
    ends = torch.tensor(counts, device=device).cumsum(0).int()
    y = reference.linear_grouped(x, ends, packed)
    exact = torch.zeros(len(x), N, dtype=torch.float64, device=device)
    for e, stop in enumerate(ends.tolist()):
        if counts[e]:
            rows = slice(stop - counts[e], stop)
            exact[rows] = truth.product(weights[e], x[rows])
    assert truth.error(y, exact) < FROBENIUS_BOUND[torch.float32]
    assert not y[sum(counts) :].any()
    assert torch.equal(qk.linear_grouped(x, ends, packed, backend="reference"), y)
    best = [qk.WQLinear.from_weight(weight).packed for weight in weights]
    assert truth.error(qk.linear_grouped(x, ends, best), exact) < FROBENIUS_BOUND[torch.float32]


def test_rows_of_any_strides(device):
    layers = experts_of("w4a16-g32", 3, device)
    x, ends, stacks, spec = arguments(layers, [2, 0, 3], 1)
    want = ops.linear_grouped_operator(x, ends, stacks, spec)
    wide = torch.cat([x, x], dim=1)[:, :K]
    for other in (wide, x.t().contiguous().t()):
        assert torch.allclose(ops.linear_grouped_operator(other, ends, stacks, spec), want)
    strided = torch.stack([ends, ends], dim=1)[:, 0]
    assert torch.equal(ops.linear_grouped_operator(x, strided, stacks, spec), want)


def test_a_row_does_not_depend_on_the_others(device):
    layers = experts_of("w4a16-g32", 3, device, batch_invariant=True)
    x, ends, stacks, spec = arguments(layers, [40, 1, 3], dtype=torch.bfloat16)
    y = ops.linear_grouped_operator(x, ends, stacks, spec)
    fewer = torch.tensor([1, 1, 2], dtype=torch.int32, device=device)
    few = ops.linear_grouped_operator(x[[7, 43]], fewer, stacks, spec)
    assert torch.equal(few, y[[7, 43]])


@pytest.mark.parametrize("text", ["w4a16-g32", "w8a8"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(text, requires_grad, device):
    layers = experts_of(text, 4, device)
    x, ends, stacks, spec = arguments(layers, [2, 0, 3, 1], 2)
    x.requires_grad_(requires_grad)
    given = torch.ops.qkernels
    opcheck(given.linear_grouped, (x, ends, stacks, spec), test_utils=TESTS)
    grad = torch.randn(len(x), N, device=device)
    opcheck(given.linear_grouped_grad_input, (grad, ends, stacks, spec), test_utils=TESTS)


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("counts", COUNTS)
def test_the_gradient_is_that_of_each_expert_alone(text, counts, device):
    counts = COUNTS[counts]
    layers = experts_of(text, len(counts), device)
    x, ends, stacks, spec = arguments(layers, counts, 2)
    assert ops.linear_grouped_operator(x, ends, stacks, spec).grad_fn is None
    grad = torch.randn(len(x), N, device=device)
    gradients = []
    for product in (
        lambda x: ops.linear_grouped_operator(x, ends, stacks, spec),
        lambda x: one_by_one(layers, x, ends),
    ):
        again = x.clone().requires_grad_()
        y = product(again)
        gradients.append(
            torch.autograd.grad(y, again, grad)[0] if y.requires_grad else torch.zeros_like(x)
        )
    assert torch.equal(*gradients)
    assert not gradients[0][sum(counts) :].any()


def test_it_is_one_operator_to_compilers(device):
    layers = experts_of("nf4-g32", 4, device)
    x, ends, stacks, spec = arguments(layers, [2, 0, 3, 1], 2)

    def product(x, ends):
        return ops.linear_grouped_operator(x * 2, ends, stacks, spec) + 1

    whole = torch.compile(product, backend="aot_eager", fullgraph=True, dynamic=True)
    gradients = []
    for run in (product, whole):
        again = x.clone().requires_grad_()
        y = run(again, ends)
        y.square().sum().backward()
        gradients.append(again.grad)
    assert torch.equal(y, product(x, ends)) and torch.equal(*gradients)
    other, other_ends, _, _ = arguments(layers, [0, 9, 1, 1])
    assert torch.equal(whole(other, other_ends), product(other, other_ends))


def test_backward_is_compiled_with_the_rest(device):
    layers = experts_of("w4a16-g32", 2, device)
    x, ends, stacks, spec = arguments(layers, [2, 1])

    def compiler(graph):
        return torch.compile(graph, backend="aot_eager", fullgraph=True)

    wanted, got = x.clone().requires_grad_(), x.clone().requires_grad_()
    ops.linear_grouped_operator(wanted, ends, stacks, spec).sum().backward()
    with torch._dynamo.compiled_autograd._enable(compiler):
        ops.linear_grouped_operator(got, ends, stacks, spec).sum().backward()
    assert torch.equal(got.grad, wanted.grad)


def test_autocast_casts_x(device):
    layers = experts_of("w4a16-g32", 2, device)
    x, ends, stacks, spec = arguments(layers, [2, 1])
    want = ops.linear_grouped_operator(x.bfloat16(), ends, stacks, spec)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(ops.linear_grouped_operator(x, ends, stacks, spec), want)
        again = x.clone().requires_grad_()
        ops.linear_grouped_operator(again, ends, stacks, spec).sum().backward()
    assert again.grad.dtype == torch.float32


def test_experts_are_slices_and_not_copied(device):
    """A kernel is given memory of the stack itself."""
    layers = experts_of("w4a16-g32", 3, device, backend="reference")
    x, ends, stacks, spec = arguments(layers, [2, 0, 1])
    seen = []
    kernel = next(each for each in select.KERNELS if each.backend == "reference")

    def run(x, packed, bias, problem):
        seen.append(packed.buffers["words"].data_ptr())
        return kernel.run(x, packed, bias, problem)

    position = select.KERNELS.index(kernel)
    select.KERNELS[position] = replace(kernel, run=run)
    select.forget_choices()
    try:
        ops.linear_grouped_operator(x, ends, stacks, spec)
    finally:
        select.KERNELS[position] = kernel
        select.forget_choices()
    assert seen == [stacks[0][0].data_ptr(), stacks[0][2].data_ptr()]


def test_what_is_wrong_is_named(device):
    layers = experts_of("w4a16-g32", 3, device)
    x, ends, stacks, spec = arguments(layers, [2, 0, 3])
    cases = (
        ((x[0], ends, stacks), r"x must have shape \[M, "),
        ((x[None], ends, stacks), r"x must have shape \[M, "),
        ((x[:, :9], ends, stacks), r"72\], got \[[25], 9\]"),
        ((x.double(), ends, stacks), "float64"),
        ((x, ends.long(), stacks), "ends must be int32"),
        ((x, ends[None], stacks), r"ends must be int32 \[E\]"),
        ((x, ends[:0], [stack[:0] for stack in stacks]), "with a number for each expert"),
        ((x, ends[:2], stacks), "ends has 2 experts"),
        ((x, ends, [stacks[0], *(stack[:2] for stack in stacks[1:])]), "ends has 3 experts"),
    )
    for _ in range(2):
        for operator in (ops.linear_grouped_operator, ops._linear_grouped):
            for given, message in cases:
                with pytest.raises(ValueError, match=message):
                    operator(*given, spec)
        ops.linear_grouped_operator(x, ends, stacks, spec)
    if compiled.extension() is not None:
        with pytest.raises(ValueError, match="words must have shape"):
            ops.linear_grouped_operator(x, ends, [stacks[0][:, :1], *stacks[1:]], spec)
    with pytest.raises(ValueError, match="unpack"):
        ops.linear_grouped_operator(x, ends, stacks, "nonsense")
    with pytest.raises(NoKernelError, match="needs a CUDA GPU"):
        ops.linear_grouped_operator(x, ends, stacks, spec.replace("||", "|triton|"))
    mixed = [layer.packed for layer in (*layers[:2], *experts_of("w8a16", 1, device))]
    with pytest.raises(WeightError, match="of one kind, got w4a16"):
        qk.linear_grouped(x, ends, mixed)
    with pytest.raises(WeightError, match="of one kind, got none"):
        qk.linear_grouped(x, ends, [])


@pytest.mark.parametrize("wrong", [[2, 1, 5], [-1, 2, 5], [2, 2, 6], [0, 9, 5]])
def test_ends_that_decrease_or_lie_behind_x_are_refused(wrong):
    """On a GPU nobody promises to look."""
    layers = experts_of("w4a16-g32", 3, "cpu")
    x, _, stacks, spec = arguments(layers, [2, 0, 3])
    ends = torch.tensor(wrong, dtype=torch.int32)
    for operator in (ops.linear_grouped_operator, ops._linear_grouped):
        with pytest.raises(ValueError, match=r"must not decrease, and be 5 at most.*expert [0-2]"):
            operator(x, ends, stacks, spec)


@pytest.mark.skipif(compiled.extension() is None, reason="routes are those of qkernels._C")
def test_a_route_that_takes_groups_is_given_all_of_them():
    """It is asked for with the mean of the rows, and nobody reads the ends before it does."""
    layers = experts_of("w4a16-g32", 3, "cpu")
    x, ends, stacks, spec = arguments(layers, [2, 0, 5], 1)
    asked, given = [], []

    def answer(x, scale, buffers, spec, dtype):
        asked.append((len(x), [buffer.shape for buffer in buffers]))
        return route, 0, None

    def run_grouped(x, ends, buffers):
        given.append((x, ends, buffers))
        return x[:, :2] + ends[0]

    route = compiled.extension().PythonRoute(None, None, run_grouped)
    select.forget_choices()
    compiled.extension().answer_with(answer)
    try:
        wrong = ends.flip(0)  # which only an expert by expert would notice
        y = ops.linear_grouped_operator(x, wrong, stacks, spec)
    finally:
        compiled.extension().answer_with(ops._answer)
        select.forget_choices()
    assert asked == [(3, [stack.shape[1:] for stack in stacks])]
    ((rows, held, buffers),) = given
    assert torch.equal(y, x[:, :2] + 7) and torch.equal(held, wrong)
    assert [buffer.data_ptr() for buffer in buffers] == [stack.data_ptr() for stack in stacks]
    assert rows.data_ptr() == x.data_ptr()


WITHOUT = """
import sys
sys.modules["qkernels._C"] = None
import torch
import qkernels as qk

layers = [qk.WQLinear.from_linear(torch.nn.Linear(64, 8, bias=False), "w4a16-g32") for _ in "abc"]
ends = torch.tensor([2, 2, 5], dtype=torch.int32)

def one_by_one(x):
    return torch.cat([layers[0](x[:2]), layers[2](x[2:5])])

def grouped(x):
    return qk.linear_grouped(x, ends, [layer.packed for layer in layers])

x = torch.randn(5, 64)
both = []
for product in (one_by_one, grouped):
    again = x.clone().requires_grad_()
    y = product(again)
    y.square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        both.append((y, again.grad, product(x)))
assert all(torch.equal(*pair) for pair in zip(*both))
assert both[0][2].dtype == torch.bfloat16
assert torch.equal(grouped(torch.cat([x, x]))[5:], torch.zeros(5, 8))
"""


def test_installations_without_their_compiled_part():
    environment = {**os.environ, "QKERNELS_CPU_ISA": "portable"}
    command = [sys.executable, "-c", WITHOUT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
