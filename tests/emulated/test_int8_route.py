"""Integer products through a layer in the emulator: the bits of the reference, however x comes."""

import pytest
import torch
from torch.library import opcheck

import qkernels as qk
from qkernels import QuantScheme, WQLinear, activations, reference, rounding
from qkernels.errors import NoKernelError
from qkernels.weight import integer_rows
from tests import truth
from tests.bounds import FROBENIUS_BOUND
from tests.emulated.emulator import needs_emulator, set_seed
from tests.test_ops import TESTS
from tests.test_preparation import FORMS

pytestmark = needs_emulator

N, K = 40, 200
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GRANULARITIES = ("", "-tensor", "-static", "-tokenasym", "-staticasym")
WHOLE = ("w8a8", "w8a8-gtensor", "w4a8", "w4a8-g64", "w4a8-g64-asym", "w4a8-g24", "w4a8-asym")
"""Weights whose integers are summed over all of K."""
GROUPED = ("w8a8-g64", "w8a8-g6", "w4a8-g64-flat", "w4a8-g40-asym-flat")
"""Those with a floating scale for each group."""


def weight_of(text, n=N, k=K, optional=(), scale=0.05, zero=-7):
    scheme = QuantScheme.parse(text)
    activation = scheme.activation
    weight = rounding.quantize(
        torch.randn(n, k),
        text.replace("staticasym", "static"),
        bias=torch.randn(n),
        perm=torch.randperm(k) if "perm" in optional else None,
        activation_scale=scale if activation.is_static else None,
    )
    fields = {}
    if "input_factor" in optional:
        fields["input_factor"] = torch.rand(k) + 0.5
    if activation.granularity == "staticasym":
        fields["activation_zero"] = torch.tensor(zero, dtype=torch.int32)
    return weight.replace(scheme=scheme, **fields)


def layers_of(weight, **options):
    emulated = WQLinear.from_weight(weight, backend="emulated", **options)
    assert emulated.packed.layout.name == "fragment_int8"
    return emulated, WQLinear.from_weight(weight, backend="reference", **options)


def same(a, b):
    """Bit for bit, but for the bits of NaN."""
    return (
        a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


def rows_of(m, k=K, dtype=torch.float32):
    x = torch.randn(m, k)
    x[:, ::50] *= 20
    return x.to(dtype)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("text", WHOLE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_sums_have_the_bits_of_the_reference(text, granularity, dtype):
    emulated, plain = layers_of(weight_of(text + granularity))
    for m in (1, 7, 40):
        x = rows_of(m, dtype=dtype)
        for _ in range(2):
            assert torch.equal(emulated(x), plain(x))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("text", GROUPED)
def test_sums_of_groups_are_as_good(text, granularity):
    weight = weight_of(text + granularity)
    emulated, _ = layers_of(weight)
    for m, dtype in ((1, torch.float16), (7, torch.float32), (40, torch.bfloat16)):
        x = rows_of(m, dtype=dtype)
        y = emulated(x)
        assert y.dtype == dtype
        assert truth.error(y, truth.product(weight, x)) <= FROBENIUS_BOUND[dtype]


@pytest.mark.parametrize("optional", [("perm",), ("input_factor",), ("input_factor", "perm")])
@pytest.mark.parametrize("text", ["w8a8", "w8a8-static", "w4a8-g24-tokenasym", "w8a8-tensor"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_and_orders_of_columns(text, optional, dtype):
    emulated, plain = layers_of(weight_of(text, optional=optional))
    x = rows_of(5, dtype=dtype)
    assert torch.equal(emulated(x), plain(x))


@pytest.mark.parametrize("k", [64, 100, 201])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [(), (1,), (5,), (2, 3), (0,)])
def test_any_shape_and_strides(k, form, rows):
    emulated, plain = layers_of(weight_of("w8a8", k=k))
    x = FORMS[form](torch.randn(*rows, k, dtype=torch.float16))
    y = emulated(x)
    assert y.shape == (*rows, N) and y.is_contiguous()
    assert torch.equal(y, plain(x))


def with_unit_scales(weight):
    """The same integers, with scales of one: multipliers of two levels stay."""
    if weight.channel_scales is not None:
        return weight.replace(channel_scales=torch.ones_like(weight.channel_scales), bias=None)
    return weight.replace(scales=torch.ones_like(weight.scales), bias=None)


@pytest.mark.parametrize("text", [*WHOLE, *GROUPED])
@pytest.mark.parametrize("m", [1, 3, 33])
def test_integers_are_the_same_on_every_backend(text, m):
    weight = with_unit_scales(weight_of(text, k=300))
    values = torch.randint(-127, 128, (m, 300), dtype=torch.int8)
    x = activations.QuantizedActivation(values, torch.ones(m, 1), torch.float32)
    want = values.long() @ integer_rows(weight, weight.codes, 0).long().t()
    assert want.abs().max() < 1 << 24
    for backend in ("emulated", "interpreted", "cpu", "reference"):
        if backend == "interpreted" and text == "w8a8-g6":
            continue  # Triton's kernels take no groups so small
        y = WQLinear.from_weight(weight, backend=backend)(x)
        assert torch.equal(y.long(), want) and torch.equal(y, y.round()), backend


@pytest.mark.parametrize(
    ("least", "most", "zero", "multiplier"),
    [
        (1, 15, 8, 17),  # a code of 0 would be -136
        (0, 7, 7, 18),  # one of 15 would be 144
        (9, 15, 15, 21),
        (0, 15, 0, 8),
        (3, 3, 3, 255),
        (7, 8, 128 // 16, 128),  # -128 and 0
    ],
)
@pytest.mark.parametrize("text", ["w4a8-g24-asym", "w4a8-g64-asym", "w4a8-g100-asym"])
def test_padding_is_decoded_beside_the_last_column(text, least, most, zero, multiplier):
    """Four codes are decoded at a time: one that leaves int8 would carry into its neighbour."""
    weight = weight_of(text, k=101)
    codes = torch.randint(least, most + 1, weight.codes.shape, dtype=torch.uint8)
    weight = with_unit_scales(
        weight.replace(
            codes=codes,
            zeros=torch.full_like(weight.zeros, zero),
            scales=torch.full_like(weight.scales, multiplier),
        )
    )
    values = torch.randint(-127, 128, (3, 101), dtype=torch.int8)
    x = activations.QuantizedActivation(values, torch.ones(3, 1), torch.float32)
    want = values.long() @ (multiplier * (codes.long() - zero)).t()
    assert torch.equal(WQLinear.from_weight(weight, backend="emulated")(x).long(), want)


@pytest.mark.parametrize("text", ["w8a8", "w4a8", "w4a8-g64"])
def test_the_largest_sums(text):
    """Every product of a sum is the largest there is: far beyond what fp32 adds exactly."""
    k = 4096
    weight = with_unit_scales(weight_of(text, n=33, k=k))
    codes = torch.zeros_like(weight.codes)
    codes[1::2] = (1 << weight.scheme.bits) - 1
    scales = weight.scales
    if weight.channel_scales is not None:
        scales = torch.full_like(scales, 16)
    weight = weight.replace(codes=codes, scales=scales)
    values = torch.full((9, k), 127, dtype=torch.int8)
    values[3:] = -127
    want = values.long() @ integer_rows(weight, codes, 0).long().t()
    assert want.abs().max() > 1 << 25 or text == "w4a8"
    x = activations.QuantizedActivation(values, torch.ones(9, 1), torch.float32)
    assert torch.equal(WQLinear.from_weight(weight, backend="emulated")(x), want.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optional", [(), ("perm",)])
@pytest.mark.parametrize("text", ["w8a8", "w4a8-g24", "w8a8-g64"])
def test_x_that_is_quantized(text, optional, dtype):
    emulated, _ = layers_of(weight_of(text, optional=optional))
    for shape in ((5, K), (2, 3, K), (0, K), (K,)):
        x = torch.randn(shape).to(dtype)
        y = emulated(qk.quantize_activation(x))
        assert torch.equal(y, emulated(x)) and y.dtype == dtype


SECOND = ("w8a8-static", "w8a8-staticasym", "w4a8-g64-static")


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("first", ["w8a8", "w8a8-tokenasym", "w8a8-static", "w4a8-g24", "w8a8-g64"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_between_layers(first, second, dtype):
    layer, _ = layers_of(weight_of(first, n=37))
    reader, plain = layers_of(weight_of(second, n=24, k=37, scale=0.5))
    for m in (1, 6):
        x = rows_of(m, dtype=dtype)
        for relu in (False, True):
            y = layer(x).relu() if relu else layer(x)
            rows = layer.quantized_for(x, reader, relu=relu)
            want, scale = reference.quantize_output(
                y, rows.static_scale, rows.static_zero, relu=False
            )
            assert torch.equal(rows.values, want) and torch.equal(rows.scale, scale)
            assert rows.dtype == dtype
            assert torch.equal(reader(rows), reader(y)) and torch.equal(reader(y), plain(y))


@pytest.mark.parametrize("first", ["w8a8", "w8a8-static"])
def test_int8_in_and_out(first):
    a, _ = layers_of(weight_of("w8a8", n=80, k=64))
    b, _ = layers_of(weight_of(first, n=37, k=80, scale=0.5))
    c, _ = layers_of(weight_of("w8a8-staticasym", n=24, k=37, scale=0.5))
    x = rows_of(6, 64, torch.bfloat16).view(1, 6, 64)
    y = a(x)
    given = qk.quantize_activation(y) if first == "w8a8" else a.quantized_for(x, b)
    rows = b.quantized_for(given, c, relu=True)
    assert torch.equal(b(given), b(y))
    assert torch.equal(c(rows), c(b(y).relu()))
    assert rows.scale.shape == (1, 6, 1) and rows.dtype == torch.bfloat16


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_is_no_number_stays_in_its_row(granularity):
    emulated, plain = layers_of(weight_of("w8a8" + granularity))
    x = torch.randn(6, K)
    x[1, 3], x[3, 0], x[5, K - 1] = float("nan"), float("inf"), float("-inf")
    assert same(emulated(x), plain(x))
    reader, _ = layers_of(weight_of("w8a8-static", n=8, k=N))
    rows = emulated.quantized_for(x, reader)
    want, scale = reference.quantize_output(emulated(x), rows.static_scale, None, relu=False)
    assert torch.equal(rows.values, want) and same(rows.scale, scale)


@pytest.mark.parametrize("text", ["w8a8-g64", "w4a8-g64-flat", "w8a8-tokenasym"])
def test_a_batch_invariant_row_is_what_it_is_alone(text):
    emulated, _ = layers_of(weight_of(text, n=97, k=1500), batch_invariant=True)
    x = rows_of(70, 1500, torch.float16)
    y = emulated(x)
    for row in (0, 8, 69):
        set_seed(row)
        assert torch.equal(emulated(x[row : row + 1])[0], y[row])


@pytest.mark.parametrize("text", ["w8a8", "w4a8-g24", "w8a8-staticasym"])
def test_x_has_a_gradient(text):
    emulated, plain = layers_of(weight_of(text, optional=("perm",)))
    grads = []
    for layer in (emulated, plain):
        x = torch.linspace(-1, 1, 3 * K).view(3, K).bfloat16().requires_grad_()
        layer(x).backward(torch.ones(3, N, dtype=torch.bfloat16))
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("text", ["w8a8", "w4a8-g24-tokenasym", "w8a8-g64"])
def test_experts_run_one_by_one(text):
    weights = [weight_of(text).replace(bias=None) for _ in range(4)]
    layers = [WQLinear.from_weight(weight, backend="emulated") for weight in weights]
    ends = torch.tensor([3, 3, 9, 10], dtype=torch.int32)
    x = rows_of(12, dtype=torch.float16)
    y = qk.linear_grouped(x, ends, [layer.packed for layer in layers], backend="emulated")
    for layer, start, stop in zip(layers, [0, 3, 3, 9], ends.tolist(), strict=True):
        assert torch.equal(y[start:stop], layer(x[start:stop]))
    assert not y[10:].any()


@pytest.mark.parametrize("text", ["w8a8", "w4a8-g24", "w8a8-staticasym"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(text, requires_grad):
    layer, _ = layers_of(weight_of(text))
    buffers, spec = list(layer.packed.buffers.values()), layer._spec
    x, given = torch.randn(2, 3, K, requires_grad=requires_grad), torch.ops.qkernels
    opcheck(given.linear, (x, buffers, layer.bias, spec), test_utils=TESTS)
    opcheck(given.linear_grad_input, (torch.randn(2, 3, N), buffers, spec), test_utils=TESTS)
    opcheck(given.dequantize, (buffers, spec), test_utils=TESTS)
    x = x.detach()
    reader = (torch.tensor(0.1), torch.tensor(5).int(), True)
    plain = (x, None, buffers, layer.bias, spec, None, *reader)
    opcheck(given.linear_to_int8, plain, test_utils=TESTS)
    if layer.scheme.activation.granularity == "token":
        quantized = (*given.quantize_per_token(x), buffers, layer.bias, spec, x.dtype)
        opcheck(given.linear_quantized, quantized, test_utils=TESTS)
        opcheck(given.linear_to_int8, (*quantized, *reader), test_utils=TESTS)


def test_state_dicts_go_from_one_layout_to_another():
    for text in ("w8a8", "w4a8-g24-asym", "w8a8-staticasym"):
        weight = weight_of(text, optional=("perm",))
        emulated, _ = layers_of(weight)
        state = emulated.state_dict()
        assert "words_fragment_int8" in state
        other = WQLinear.from_weight(weight_of(text, optional=("perm",)))
        other.load_state_dict(state)
        back, _ = layers_of(weight_of(text, optional=("perm",)))
        back.load_state_dict(other.state_dict())
        for layer in (other, back):
            held = layer.to_weight()
            assert torch.equal(held.codes, weight.codes) and torch.equal(held.bias, weight.bias)
            for name, value in weight.fields.items():
                assert torch.equal(held.fields[name], value), name


def test_what_these_kernels_leave_to_others():
    for text, reason in (
        ("w8a8-positionasym", "knows no scales of activations per position"),
        ("w3a8-g64", "holds weights of 4 and 8 bits, not of 3"),
        ("w4a4-tokenasym", "knows no zero points of activations"),
    ):
        with pytest.raises(NoKernelError, match=reason):
            qk.explain(text, n=N, k=K, backend="emulated")
