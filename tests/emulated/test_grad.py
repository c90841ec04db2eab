"""weight_only_grad in the emulator: the gradient of x, of every weight type, tails, parts of N."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels import WQLinear
from qkernels.backends.cuda import weight_arguments
from qkernels.backends.kernel import PREPARED
from qkernels.errors import NoKernelError
from qkernels.layouts import FRAGMENT, pack
from qkernels.scheme import QuantScheme
from qkernels.select import make_problem, select_grad_input
from qkernels.weight import QuantizedWeight
from tests import truth
from tests.bounds import FROBENIUS_BOUND
from tests.emulated.emulator import counted, gradient, needs_emulator, set_seed
from tests.emulated.test_weight_only import of_integers, quantized
from tests.schemes import TABLE

pytestmark = needs_emulator

HALVES = (torch.float16, torch.bfloat16)
SCHEMES = (
    *("w4a16-g32", "w4a16-g16-sym", "w4a16-g48", "w4a16", "w4a16-gtensor", "w4a16-g64-sfp32"),
    *("w8a16-g48", "w8a16-sym", "w8a16-g64-sbf16", "nf4-g64", TABLE, "fp4-g32"),
    *("fp8e4m3-a16", "fp8e5m2-a16-g64"),
)
ROWS, COLUMNS = 64, 256  # of a stage, and of a block


def exact(dy, weight):
    return dy.double() @ truth.dense(weight)


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_weight_type_and_tails(text, dtype):
    for m, n, k in ((1, 33, 72), (7, 97, 300), (16, 64, 256), (33, 130, 47), (70, 201, 520)):
        weight = quantized(n, k, text)
        dy = torch.randn(m, n).to(dtype)
        dx = gradient(dy, pack(weight, FRAGMENT))
        assert dx.shape == (m, k) and dx.dtype == dtype
        assert truth.error(dx, exact(dy, weight)) <= FROBENIUS_BOUND[dtype], (m, n, k)


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("dtype", HALVES)
def test_weights_are_those_of_dequantize_bit_for_bit(text, dtype):
    n, k = 70, 328
    packed = pack(quantized(n, k, text), FRAGMENT)
    tensors, facts = weight_arguments(packed)
    want = torch.ops.qkernels_emulated.dequantize(*tensors, *facts, dtype)
    one = torch.eye(n, dtype=dtype)
    # Where all else that is added is 0, a weight of -0 gives 0.
    assert torch.equal(gradient(one, packed), want)
    assert torch.equal(gradient(one[:16], packed), want[:16])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("zero_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
def test_real_zero_points(dtype, zero_dtype, bits):
    n, k = 72, 300
    base = quantized(n, k, f"w{bits}a16-g16")
    zeros = ((1 << bits) / 2 + 3 * torch.randn(base.zeros.shape)).to(zero_dtype)
    weight = base.replace(zeros=zeros)
    dy = torch.randn(5, n).to(dtype)
    dx = gradient(dy, pack(weight, FRAGMENT))
    assert truth.error(dx, exact(dy, weight)) <= FROBENIUS_BOUND[dtype]


@given(
    m=st.integers(1, 150),
    n=st.integers(1, 700),
    k=st.integers(1, 600),
    group=st.integers(1, 16).map(lambda steps: 16 * steps),
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from(HALVES),
    tokens=st.sampled_from([16, 64]),
    parts=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_any_shape_and_schedule(m, n, k, group, bits, dtype, tokens, parts, seed):
    """Integers, whose sums fp32 holds: the only rounding is that of the result."""
    torch.manual_seed(seed)
    set_seed(seed)
    weight = of_integers(n, k, group, bits)
    dy = torch.randint(-2, 3, (m, n)).to(dtype)
    stages = -(-n // ROWS)
    with counted() as counters:
        dx = gradient(dy, pack(weight, FRAGMENT), tokens=tokens, parts=min(parts, stages))
    assert counters["blocks"] == -(-m // tokens) * -(-k // COLUMNS) * min(parts, stages)
    assert torch.equal(dx, exact(dy, weight).float().to(dtype))


@given(
    m=st.integers(1, 80),
    n=st.integers(1, 300),
    k=st.integers(1, 400),
    group=st.integers(16, 256),
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from(HALVES),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=30)
def test_any_shape_and_group_through_the_layer(m, n, k, group, bits, dtype, seed):
    torch.manual_seed(seed)
    weight = of_integers(n, k, group, bits)
    layer = WQLinear.from_weight(weight, backend="emulated")
    x = torch.randint(-2, 3, (m, k)).to(dtype).requires_grad_()
    dy = torch.randint(-2, 3, (m, n)).to(dtype)
    layer(x).backward(dy)
    assert torch.equal(x.grad, exact(dy, weight).float().to(dtype))


@pytest.mark.parametrize("text", ["w4a16-g64", "w8a16", "nf4-g64", "w4a16-g24"])
@pytest.mark.parametrize("optional", [(), ("perm",), ("input_factor", "perm")])
@pytest.mark.parametrize("rows", [(5,), (2, 3), (257,), (0,)])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_order_of_columns_and_their_factors_are_undone(text, optional, rows, dtype):
    n, k = 40, 200
    weight = quantized(n, k, text, bias=True)
    if "perm" in optional:
        weight = weight.replace(perm=torch.randperm(k))
    matrix = truth.dense(weight)
    if "input_factor" in optional:
        weight = weight.replace(input_factor=torch.rand(k) + 0.5)
        matrix = matrix * weight.input_factor.double()
    layer = WQLinear.from_weight(weight, backend="emulated")
    assert layer.packed.layout is FRAGMENT
    x = torch.randn(*rows, k, dtype=dtype, requires_grad=True)
    dy = torch.randn(*rows, n, dtype=dtype)
    with counted() as counters:
        layer(x).backward(dy)
    assert x.grad.shape == x.shape and x.grad.dtype == dtype
    if rows == (0,):
        return
    # One launch each way, of the product or, where torch multiplies, of dequantize.
    assert counters["launches"] == 2
    bound = FROBENIUS_BOUND[dtype] * (2 if "input_factor" in optional else 1)  # rounded twice
    assert truth.error(x.grad, dy.double() @ matrix) <= bound


def test_gradients_of_any_strides():
    layer = WQLinear.from_weight(of_integers(44, 100, 32, 4), backend="emulated")
    x = torch.randint(-2, 3, (6, 100)).half().requires_grad_()
    weight = layer.dequantize().double()
    (of_sum,) = torch.autograd.grad(layer(x).sum(), x)  # one number, expanded
    assert torch.equal(of_sum, weight.sum(0).half().expand(6, -1))
    turned = torch.randint(-2, 3, (44, 6)).half().t()
    wide = torch.randint(-2, 3, (6, 60)).half()
    for dy in (turned, wide[:, 3:47], wide[:, 8:52]):
        (dx,) = torch.autograd.grad(layer(x), x, dy)
        assert torch.equal(dx, (dy.double() @ weight).half())


def test_nothing_but_the_packed_weight_is_kept_for_backward():
    layer = WQLinear.from_weight(quantized(40, 128), backend="emulated")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda held: held):
        y = layer(torch.randn(3, 128, dtype=torch.float16, requires_grad=True))
    assert y.requires_grad and not kept


@pytest.mark.parametrize("tokens", [16, 64])
def test_the_same_bits_in_every_order_of_blocks_and_threads(tokens):
    """Each row of the weight comes twice, with dy of either sign: the exact gradient is 0.

    So what is left are the roundings of the sums, which another order of adding makes differ.
    """
    m, k, parts = 3, 300, 4
    half = parts * ROWS
    order = torch.randperm(2 * half)
    codes = torch.randint(0, 16, (half, k), dtype=torch.uint8).repeat(2, 1)[order]
    scales = torch.ones(2 * half, 1, dtype=torch.float16)
    weight = QuantizedWeight(scheme=QuantScheme.parse("w4a16-sym"), codes=codes, scales=scales)
    packed = pack(weight, FRAGMENT)
    dy = (torch.randn(m, half) * torch.randint(-8, 8, (m, half)).exp2()).half()
    dy = torch.cat([dy, -dy], 1)[:, order].contiguous()
    results = []
    for seed in range(16):
        set_seed(seed)
        results.append(gradient(dy, packed, tokens=tokens, parts=parts))
    assert results[0].count_nonzero() > results[0].numel() / 2
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_row_does_not_depend_on_others_where_results_must_not():
    weight = quantized(700, 300)
    layer = WQLinear.from_weight(weight, backend="emulated", batch_invariant=True)
    x = torch.randn(300, 300, dtype=torch.float16, requires_grad=True)
    dy = torch.randn(300, 700, dtype=torch.float16)
    (together,) = torch.autograd.grad(layer(x), x, dy)
    for rows in (slice(0, 1), slice(5, 70)):
        (alone,) = torch.autograd.grad(
            layer(x), x, torch.zeros_like(dy).index_copy(0, torch.arange(300)[rows], dy[rows])
        )
        assert torch.equal(alone[rows], together[rows])
        part = x.detach()[rows].requires_grad_()
        (alone,) = torch.autograd.grad(layer(part), part, dy[rows])
        assert torch.equal(alone, together[rows])


@pytest.mark.parametrize(
    ("m", "n", "k", "blocks"),
    [
        (3, 1024, 256, 4),  # four stages a part at least
        (3, 4096, 512, 8),  # two blocks each on four multiprocessors
        (33, 4096, 512, 4),  # one block of 64 tokens each
        (33, 4096, 1280, 15),  # four waves of a third each, and not two, of which one is short
        (70, 1024, 1280, 10),  # waves enough
        (3, 255, 256, 1),
    ],
)
def test_parts_of_n_where_tiles_leave_multiprocessors_idle(m, n, k, blocks):
    packed = pack(quantized(n, k), FRAGMENT)
    with counted() as counters:
        gradient(torch.randn(m, n, dtype=torch.float16), packed)
    assert counters["blocks"] == blocks


@pytest.mark.parametrize("text", ["w4a16-g128", "w4a16-g32-sym", "w8a16-g64", "nf4-g64"])
@pytest.mark.parametrize(
    ("m", "tokens", "parts"), [(16, 16, 1), (13, 16, 2), (64, 64, 4), (150, 64, 1)]
)
def test_memory(text, m, tokens, parts):
    """Weights and scales are read once for each tile of tokens, dy once for 256 columns."""
    n, k = 8 * ROWS, 2 * COLUMNS
    packed = pack(quantized(n, k, text), FRAGMENT)
    dy = torch.randn(m, n, dtype=torch.float16)
    names = [name for name in ("words", "scales", "zeros") if name in packed.buffers]
    with counted(dy=dy, **{name: packed.buffers[name] for name in names}) as counters:
        gradient(dy, packed, tokens=tokens, parts=parts)
    regions = counters["regions"]
    for name in names:
        assert regions[name]["read"]["least"] == regions[name]["read"]["most"] == -(-m // tokens)
    assert regions["dy"]["read"]["least"] == regions["dy"]["read"]["most"] == k // COLUMNS
    assert counters["copy_async"]["bytes"] == 32 * counters["copy_async"]["sectors"]
    assert counters["mma"] == -(-m // tokens) * tokens // 16 * (n // 16) * (k // 8)
    conflicting = [
        site
        for site in counters["sites"]
        if "wavefronts" in site and site["wavefronts"] != site["ideal_wavefronts"]
    ]
    # Two warps share a lane's 16 bytes of 4-bit words, of which each reads 8.
    if text.startswith("w8"):
        assert not conflicting
    else:
        (words,) = conflicting
        assert words["kind"] == "load_shared" and words["lane_bytes"] == 8
        assert words["wavefronts"] == 2 * words["ideal_wavefronts"]


@pytest.mark.parametrize(("m", "kernel"), [(256, "mma"), (257, "dequantize")])
def test_the_kernel_of_the_product_gives_the_gradient(m, kernel):
    def chosen(dtype=torch.float16, backend="emulated", fields=()):
        problem = make_problem(
            QuantScheme.parse("w4a16-g64"),
            n=64,
            k=128,
            m=m,
            device="cpu",
            layout="fragment",
            x_dtype=dtype,
            fields=fields,
        )
        return select_grad_input(problem, backend)

    for fields in ((), tuple(PREPARED)):
        assert kernel in chosen(fields=fields).name
    # The reference: it alone knows of these, of fp32, and of what another backend was asked for.
    assert chosen(fields=("outlier_columns", "outlier_values")) is None
    assert chosen(dtype=torch.float32) is None
    assert chosen(backend=None) is None and chosen(backend="reference") is None
    with pytest.raises(NoKernelError, match="'emulate' is not one of"):
        chosen(backend="emulate")


def test_a_gradient_in_fp32_is_that_of_the_reference():
    weight = quantized(40, 128)
    layer = WQLinear.from_weight(weight, backend="emulated")
    dy = torch.randn(3, 40)
    with counted() as counters:
        dx = torch.ops.qkernels.linear_grad_input(
            dy, list(layer.packed.buffers.values()), layer._spec
        )
    assert counters["launches"] == 0 and dx.dtype == torch.float32
    assert truth.error(dx, exact(dy, weight)) <= FROBENIUS_BOUND[torch.float32]


def test_wrong_input_is_named():
    packed = pack(quantized(100, 128), FRAGMENT)
    dy = torch.randn(2, 100, dtype=torch.float16)
    for bad, message in (
        (dy[:, :64], r"shape \[M, 100\], got \[2, 64\]"),
        (dy.float(), "fp16 or bf16"),
        (dy[0], r"shape \[M, 100\]"),
    ):
        with pytest.raises(ValueError, match=message):
            gradient(bad, packed)
    for schedule, message in (
        ({"tokens": 8}, "16 or 64 tokens, got 8"),
        ({"tokens": 16, "parts": 3}, "1 to 2 parts, got 3"),
        ({"tokens": 16, "parts": 0}, "1 to 2 parts, got 0"),
        ({"schedule_m": -1}, "schedule_m must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            gradient(dy, packed, **schedule)
