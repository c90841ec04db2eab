"""Layers that quantize what they give for the one that reads it: the bits of the two apart."""

import copy

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels import ops, reference
from qkernels.backends import cpu
from qkernels.errors import WeightError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = (1, 2, 7, 33, 130)
FIRST = (
    *("w8a8-static", "w8a8-staticasym", "w8a8-gtensor-static", "w4a8-g64-static", "w4a8-static"),
    *("w4a8-g32-flat-static", "w8a8", "w4a8-g64", "w8a8-tensor", "w8a8-tokenasym"),
    *("w4a16-g64", "w3a16-g32", "nf4-g64", "fp8-a8", "w8a8-position", "w4a4-g64"),
)
SECOND = ("w8a8-static", "w8a8-staticasym", "w8a8-gtensor-static", "w4a8-g64-static")
NAN, INF = float("nan"), float("inf")


def quantized(k, n, scheme, scale=0.05, zero=7):
    """A layer of random numbers, with some static scale where its scheme has one."""
    dense, activation = nn.Linear(k, n), qk.QuantScheme.parse(scheme).activation
    if not activation.is_static:
        return qk.WQLinear.from_linear(dense, scheme)
    scales = torch.full((3,) if activation.by_position else (), scale)
    symmetric = scheme.replace("staticasym", "static")
    weight = qk.rounding.quantize(dense.weight.detach(), symmetric, activation_scale=scales)
    fields = {**weight.fields, "bias": dense.bias.detach()}
    if activation.has_zeros:
        fields["activation_zero"] = torch.tensor(zero, dtype=torch.int32)
    scheme = qk.QuantScheme.parse(scheme)
    return qk.WQLinear.from_weight(qk.QuantizedWeight(scheme=scheme, codes=weight.codes, **fields))


def same(a, b):
    return torch.equal(a.nan_to_num(1e4), b.nan_to_num(1e4)) and torch.equal(a.isnan(), b.isnan())


def rows_of(m, k, dtype):
    x = torch.randn(m, k).to(dtype)
    if m > 2:
        x[1] *= 100  # beyond the scale
    return x


def by_hand(integers, scales, bias, activation_scale, zero=None):
    """A layer of weights that are these integers times the scale of their row."""
    scheme = "w8a8-static" if zero is None else "w8a8-staticasym"
    fields = {} if zero is None else {"activation_zero": torch.tensor(zero, dtype=torch.int32)}
    weight = qk.QuantizedWeight(
        scheme=qk.QuantScheme.parse(scheme),
        codes=(torch.tensor(integers) + 128).to(torch.uint8),
        scales=torch.tensor(scales)[:, None],
        bias=torch.tensor(bias),
        activation_scale=torch.tensor(activation_scale),
        **fields,
    )
    return qk.WQLinear.from_weight(weight)


def test_by_hand():
    # y = 0.1 x + 0.2 for both numbers of x, and -x for the first: 0.1 and -1 are 127 steps each.
    first = by_hand(
        [[127, 0], [0, 127], [-127, 0]], [0.1 / 127, 0.1 / 127, 1 / 127], [0.2, 0.2, 0.0], 2 / 127
    )
    second = by_hand([[127, 127, 127]], [1 / 127], [0.0], 0.4 / 127)
    x = torch.tensor([[-1.0, 0.0], [2.0, 0.5]])
    # x / s_x = -63.5, 0 and 127, 31.75 is rounded to -64 (half to even), 0 and 127, 32.
    # So y = 0.2 - 0.1 * 128/127 = 0.09921, 0.2, 128/127; and 0.4, 0.2 + 0.1 * 64/127 = 0.25039, -2.
    y = first(x)
    assert y.tolist() == [
        pytest.approx([0.0992126, 0.2, 1.0078740]),
        pytest.approx([0.4, 0.2503937, -2.0]),
    ]
    # y / s_y = 31.5, 63.5, 320; and 127, 79.5, -635. The halves are none in fp32: what is next to
    # them decides, and the reader alone says how.
    rows = first.quantized_for(x, second)
    assert rows.values.dtype == torch.int8 and rows.values.shape == (2, 3)
    assert rows.values[0, 0] in (31, 32) and rows.values[0, 1] in (63, 64)
    assert rows.values[1, 1] in (79, 80)
    assert rows.values[:, 2].tolist() == [127, -127] and rows.values[1, 0] == 127
    assert rows.scale.tolist() == [[pytest.approx(0.4 / 127)]] * 2 and rows.dtype == torch.float32
    assert second(rows).flatten().tolist() == pytest.approx([222 * 0.4 / 127, 80 * 0.4 / 127], 0.01)
    assert torch.equal(second(rows), second(y))
    # Negative numbers are 0 behind a ReLU.
    positive = first.quantized_for(x, second, relu=True)
    assert positive.values[1, 2] == 0 and torch.equal(second(positive), second(y.relu()))
    # With 0.6 over 255 steps and -43 for 0: 0.25039 * 425 - 43 = 63.4, and from -128 on.
    shifted = first.quantized_for(x, by_hand([[127] * 3], [1 / 127], [0.0], 0.6 / 255, -43))
    assert shifted.values.tolist() == [[-1, 42, 127], [127, 63, -128]]
    assert shifted.static_zero.item() == -43


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("first", FIRST)
def test_the_bits_of_the_two_apart(first, second, dtype):
    torch.manual_seed(0)
    # 37 outputs: the last panel has few.
    layer, reader = quantized(200, 37, first), quantized(37, 24, second, 0.01)
    for m in ROWS:
        x = rows_of(m, 200, dtype)
        for relu in (False, True):
            y = layer(x).relu() if relu else layer(x)
            rows = layer.quantized_for(x, reader, relu=relu)
            want, scale = reference.quantize_output(
                y, rows.static_scale, rows.static_zero, relu=False
            )
            assert torch.equal(rows.values, want) and torch.equal(rows.scale, scale)
            assert rows.dtype == dtype
            assert torch.equal(reader(rows), reader(y))


@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("first", ["w8a8-static", "w4a8-g64", "w4a16-g64", "nf4-g64"])
def test_each_set_of_instructions(first, isa, monkeypatch):
    if cpu.why_no_isa(isa) is not None:
        pytest.skip(cpu.why_no_isa(isa))
    monkeypatch.setenv(cpu.ISA_VARIABLE, isa)
    cpu._compiled().forget_routes()
    try:
        torch.manual_seed(0)
        layer, reader = quantized(200, 37, first), quantized(37, 24, "w8a8-staticasym", 0.01)
        for m, dtype in ((2, torch.float16), (16, torch.bfloat16), (130, torch.bfloat16)):
            x = rows_of(m, 200, dtype)
            rows = layer.quantized_for(x, reader, relu=True)
            want, scale = reference.quantize_output(
                layer(x), rows.static_scale, rows.static_zero, relu=True
            )
            assert torch.equal(rows.values, want) and torch.equal(rows.scale, scale)
    finally:
        monkeypatch.undo()
        cpu._compiled().forget_routes()


@pytest.mark.parametrize("first", ["w8a8-static", "w8a8", "w4a8-g64-static"])
@pytest.mark.parametrize("second", SECOND)
def test_int8_in_and_out(first, second):
    torch.manual_seed(0)
    a, b, c = quantized(64, 80, "w4a16-g32"), quantized(80, 37, first), quantized(37, 24, second)
    for m in ROWS:
        x = rows_of(m, 64, torch.bfloat16).view(1, m, 64)
        y = a(x)
        given = qk.quantize_activation(y) if first == "w8a8" else a.quantized_for(x, b)
        rows = b.quantized_for(given, c, relu=True)
        assert torch.equal(b(given), b(y))
        assert torch.equal(c(rows), c(b(y).relu()))
        assert rows.scale.shape == (1, m, 1) and rows.dtype == torch.bfloat16


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("second", ["w8a8-static", "w8a8-staticasym"])
@pytest.mark.parametrize("first", ["w8a8-static", "w4a16-g64"])
def test_nan_and_infinity_are_told(first, second, relu):
    torch.manual_seed(0)
    layer, reader = quantized(64, 37, first), quantized(37, 24, second)
    x = torch.randn(70, 64)
    x[3, 5], x[4, 6], x[69, 7] = NAN, INF, -INF
    y = layer(x).relu() if relu else layer(x)
    rows = layer.quantized_for(x, reader, relu=relu)
    assert rows.scale.isnan().flatten().nonzero().flatten().tolist() == [3, 4, 69]
    assert same(reader(rows), reader(y))


def test_minus_infinity_behind_a_relu_is_a_number():
    layer, reader = quantized(64, 37, "w4a16-g64"), quantized(37, 24, "w8a8-static")
    layer.bias.fill_(-INF)
    x = torch.randn(3, 64)
    assert torch.equal(reader(layer.quantized_for(x, reader, relu=True)), reader(layer(x).relu()))
    assert layer.quantized_for(x, reader).scale.isnan().all()


def test_ties_of_y_in_its_own_type():
    # y is rounded to bf16 first, where 0.5 and its neighbours in fp32 become one.
    dense = nn.Linear(1, 3, bias=False)
    dense.weight.data = torch.tensor([[0.5], [0.5 + 2**-12], [1.5 + 2**-12]])
    layer = qk.WQLinear.from_linear(dense, "w8a16-sym-sfp32")
    reader = quantized(3, 8, "w8a8-static", 1.0)
    x = torch.ones(1, 1)
    exact = layer.quantized_for(x, reader).values.tolist()
    rounded = layer.quantized_for(x.bfloat16(), reader).values.tolist()
    assert exact == [(layer(x).round()).int().tolist()[0]]
    assert rounded == [layer(x.bfloat16()).float().round().int().tolist()[0]]


@pytest.mark.parametrize("first", ["w8a8-static", "w4a16-g64"])
def test_any_number_of_threads(first):
    torch.manual_seed(0)
    layer, reader = quantized(256, 1030, first), quantized(1030, 24, "w8a8-staticasym")
    x = rows_of(70, 256, torch.bfloat16)
    x[5] = NAN
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(layer.quantized_for(x, reader, relu=True))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other.values, found[0].values)
        assert same(other.scale, found[0].scale)


def test_without_rows_and_of_one_row():
    layer, reader = quantized(64, 37, "w8a8-static"), quantized(37, 24, "w8a8-static")
    none = layer.quantized_for(torch.randn(2, 0, 64), reader)
    assert none.values.shape == (2, 0, 37) and none.scale.shape == (2, 0, 1)
    assert reader(none).shape == (2, 0, 24)
    one = torch.randn(64)
    assert layer.quantized_for(one, reader).values.shape == (37,)
    assert torch.equal(reader(layer.quantized_for(one, reader)), reader(layer(one)))


def test_x_of_any_strides():
    layer, reader = quantized(64, 37, "w8a8-static"), quantized(37, 24, "w8a8-static")
    x = torch.randn(64, 9).t()
    assert torch.equal(reader(layer.quantized_for(x, reader)), reader(layer(x)))


def test_the_order_of_codes_of_the_reader():
    torch.manual_seed(0)
    layer, reader = quantized(64, 48, "w4a16-g64"), quantized(48, 24, "w4a8-g16-static")
    weight = reader.to_weight()
    weight = weight.replace(perm=torch.randperm(48))
    reader = qk.WQLinear.from_weight(weight)
    x = torch.randn(5, 64)
    assert torch.equal(reader(layer.quantized_for(x, reader)), reader(layer(x)))


def test_under_autocast():
    layer, reader = quantized(64, 37, "w4a16-g64"), quantized(37, 24, "w8a8-static")
    x = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        rows = layer.quantized_for(x, reader, relu=True)
        assert rows.dtype == torch.bfloat16
        assert torch.equal(reader(rows), reader(layer(x).relu()))


def test_compiled_without_a_break():
    layer, reader = quantized(64, 37, "w8a8-static"), quantized(37, 24, "w8a8-static")

    def both(x):
        return reader(layer.quantized_for(x, reader, relu=True))

    x = torch.randn(5, 64)
    assert torch.equal(torch.compile(both, backend="eager", fullgraph=True)(x), both(x))


def test_mistakes():
    layer, reader = quantized(64, 37, "w8a8-static"), quantized(37, 24, "w8a8-static")
    x = torch.randn(5, 64)
    for scheme in ("w8a8", "w4a16-g32", "w8a8-tensor", "w8a8-position", "w4a4-g64", "fp8-a8"):
        with pytest.raises(WeightError, match=f"layers of {scheme}.* have no one static scale"):
            layer.quantized_for(x, quantized(37, 24, scheme))
    with pytest.raises(WeightError, match="37 outputs gives no x for one that reads 38"):
        layer.quantized_for(x, quantized(38, 24, "w8a8-static"))
    with pytest.raises(WeightError, match=r"\[..., 64\], got \[5, 63\]"):
        layer.quantized_for(x[:, 1:], reader)
    with pytest.raises(WeightError, match="float64"):
        layer.quantized_for(x.double(), reader)
    plain = quantized(37, 24, "w8a8-static").to_weight()
    scaled = qk.WQLinear.from_weight(plain.replace(input_factor=torch.rand(37) + 0.5))
    with pytest.raises(WeightError, match="input_factor comes before that"):
        layer.quantized_for(x, scaled)


def test_rows_for_another_layer_are_refused():
    layer, reader = quantized(64, 37, "w8a8-static"), quantized(37, 24, "w8a8-static", 0.05)
    rows = layer.quantized_for(torch.randn(5, 64), reader)
    twin = copy.deepcopy(reader)
    assert torch.equal(twin(rows), reader(rows))
    with pytest.raises(WeightError, match=r"static scale 0\.05.*this layer of w8a8-static has 0.0"):
        quantized(37, 24, "w8a8-static", 0.06)(rows)
    with pytest.raises(WeightError, match=r"static zero point none.*has 7"):
        quantized(37, 24, "w8a8-staticasym", 0.05)(rows)
    with pytest.raises(WeightError, match=r"static scale 0\.05.*has none"):
        quantized(37, 24, "w8a8")(rows)
    with pytest.raises(WeightError, match=r"static scale none.*has 0\.05"):
        reader(qk.quantize_activation(torch.randn(5, 37)))


def test_mistakes_with_the_operator():
    layer = quantized(64, 37, "w8a8")
    buffers, spec = list(layer.packed.buffers.values()), layer._spec
    x, scale = torch.randn(5, 64), torch.tensor(0.1)
    run = ops.linear_to_int8_operator
    with pytest.raises(ValueError, match="go together"):
        run(x, None, buffers, None, spec, torch.float32, scale, None, False)
    with pytest.raises(ValueError, match="scale must be"):
        run(x, None, buffers, None, spec, None, scale[None], None, False)
    with pytest.raises(ValueError, match="zero must be int32"):
        run(x, None, buffers, None, spec, None, scale, scale, False)
    with pytest.raises(WeightError, match="scale of x must be"):
        run(x.to(torch.int8), scale, buffers, None, spec, torch.float32, scale, None, False)
