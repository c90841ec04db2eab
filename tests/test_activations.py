"""Quantization of activations against its references, and shared by layers."""

import pytest
import torch

import qkernels as qk
from qkernels import reference
from qkernels.backends import cpu
from qkernels.errors import WeightError
from tests.bounds import FROBENIUS_BOUND, GATE_NEAR_BOUND

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = ((1, 1), (3, 16), (5, 100), (2, 4099))
NAN, INF = float("nan"), float("inf")


def difficult_rows(dtype):
    """Rows of every size, of zeros, with NaN and infinity, and with ties of the rounding."""
    x = torch.randn(9, 200).to(dtype)
    x[0] = 0
    x[1] *= 1e-4
    x[2] *= 300
    x[3, 7], x[4, 9] = NAN, -INF
    x[5] = torch.arange(200).to(dtype) / 2  # scale 99.5 / 127
    x[6] = 127
    x[6, ::2] = 0.5  # ties
    x[7] = torch.finfo(dtype).tiny
    return x


@pytest.mark.parametrize("dtype", DTYPES)
def test_per_token_is_the_reference_bit_for_bit(dtype):
    for x in (difficult_rows(dtype), *(torch.randn(shape).to(dtype) for shape in SHAPES)):
        q, s = qk.quantize_per_token(x)
        want_q, want_s = reference.quantize_rows(x, torch.int8)
        assert torch.equal(q, want_q)
        assert torch.equal(s[:, 0].nan_to_num(-1.0), want_s.nan_to_num(-1.0))


@pytest.mark.parametrize("isa", cpu.ISAS)
def test_divisions_are_rounded_as_the_reference_rounds_them(isa):
    if cpu.why_no_isa(isa) is not None:
        pytest.skip(cpu.why_no_isa(isa))
    compiled = cpu._compiled()
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()].float()
    # Every bf16 number within some scale, most of them near ties of some row.
    rows = torch.stack([x.clamp(-top, top) for top in (1.0, 127.0, 3.3, 1e-20, 1e30, 0.7)])
    q, s, *_ = compiled.quantize_rows_cpu(
        *(rows, "plain", None, None, None, 0.0, "token", None, False, isa),
    )
    want_q, want_s = reference.quantize_rows(rows, torch.int8)
    assert torch.equal(q, want_q) and torch.equal(s, want_s)


@pytest.mark.parametrize("dtype", DTYPES)
def test_asymmetric_is_the_reference_bit_for_bit(dtype):
    x = difficult_rows(dtype)
    x[8] = x[8].abs()  # a range that begins at 0
    q, s, zero = qk.quantize_per_token_asymmetric(x)
    want_q, want_s, want_zero = reference.quantize_rows_asymmetric(x)
    assert torch.equal(s[:, 0].nan_to_num(-1.0), want_s.nan_to_num(-1.0))
    assert torch.equal(zero[:, 0], want_zero) and torch.equal(q, want_q)
    finite = [0, 1, 2, 5, 6, 7, 8]
    restored = s[finite] * (q[finite].float() - zero[finite])
    assert (restored - x[finite].float()).abs().amax() <= s[finite].amax()
    assert zero[8] == -128 and s[3].isnan() and s[4].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_per_tensor_dynamic_and_static(dtype):
    x = torch.randn(7, 100).to(dtype)
    q, s = qk.quantize_per_tensor(x)
    assert s == x.float().abs().max() / 127 and q.abs().max() == 127
    scale = torch.tensor(0.01)
    x[0, 0], x[1, 1], x[2, 2] = INF, -INF, NAN
    q, s = qk.quantize_per_tensor(x, scale)
    assert torch.equal(q, reference.quantize_rows(x, torch.int8, scale)[0])
    assert s == scale and q[0, 0] == 127 and q[1, 1] == -127 and q[2, 2] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_is_the_reference_bit_for_bit(dtype):
    x, scale = difficult_rows(dtype), torch.tensor(0.01)
    float8 = torch.float8_e4m3fn
    q, s = qk.quantize_per_token(x.view(3, 3, -1), float8)
    want, want_s = reference.quantize_rows(x, float8)
    assert q.dtype == float8 and q.shape == (3, 3, 200) and s.shape == (3, 3, 1)
    assert torch.equal(q.view(9, -1).view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(s.flatten().nan_to_num(-1.0), want_s.nan_to_num(-1.0))
    for given in (None, scale):
        rows = x[:3] if given is None else x
        q, s = qk.quantize_per_tensor(rows, given, float8)
        assert s == (rows.float().abs().max() / 448 if given is None else scale)
        want, _ = reference.quantize_rows(rows, float8, s)
        assert torch.equal(q.view(torch.uint8), want.view(torch.uint8))


def close(got, values):
    """Whether int8 rows are `values` rounded: sums of squares may round otherwise in torch."""
    q, s = reference.quantize_rows(values, torch.int8)
    assert torch.allclose(got.scale[..., 0].flatten(), s.flatten(), rtol=1e-5)
    assert (got.values.flatten(0, -2).int() - q.int()).abs().max() <= 1
    assert (got.values.flatten(0, -2) == q).float().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_forms_are_their_references(dtype):
    x, other = torch.randn(2, 3, 300).to(dtype), torch.randn(2, 3, 300).to(dtype) * 3
    gain = torch.rand(300).to(dtype)
    rows, others = x.flatten(0, 1), other.flatten(0, 1)
    for factor in (None, gain, gain.float()):
        close(qk.rms_norm_quantize(x, factor), reference.rms_norm(rows, factor, 1e-6)[0])
        got, total = qk.add_rms_norm_quantize(x, other, factor)
        values, want = reference.rms_norm(rows, factor, 1e-6, others)
        assert total.shape == x.shape and torch.equal(total.flatten(0, 1), want)
        close(got, values)
        for bias in (None, gain.float()):
            got = qk.layer_norm_quantize(x, factor, bias)
            close(got, reference.layer_norm(rows, factor, bias, 1e-5)[0])
    for form in ("none", "tanh"):
        close(qk.gelu_mul_quantize(x, other, form), reference.gelu_mul(rows, others, form))
    got = qk.silu_mul_quantize(x, other)
    close(got, reference.silu_mul(rows, others))
    assert got.dtype == dtype and got.values.shape == x.shape and got.scale.shape == (2, 3, 1)
    strided = torch.stack([x, other], dim=-1)
    assert torch.equal(qk.silu_mul_quantize(strided[..., 0], strided[..., 1]).values, got.values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_quantized_is_given_too(dtype):
    x, other = torch.randn(2, 2, 3, 300).to(dtype)
    gain, bias = torch.rand(2, 300).to(dtype)
    F = torch.nn.functional
    for got, want in (
        (qk.rms_norm_quantize(x, gain, rounded=True), F.rms_norm(x, (300,), gain, 1e-6)),
        (qk.layer_norm_quantize(x, gain, bias, rounded=True), F.layer_norm(x, (300,), gain, bias)),
        (qk.silu_mul_quantize(x, other, rounded=True), F.silu(x) * other),
        (qk.gelu_mul_quantize(x, other, rounded=True), F.gelu(x) * other),
        (
            qk.gelu_mul_quantize(x, other, "tanh", rounded=True),
            F.gelu(x, approximate="tanh") * other,
        ),
    ):
        assert got.rounded.dtype == dtype and got.rounded.shape == x.shape
        assert int8_of(got.rounded, got.values, got.scale)
        error = (got.rounded.double() - want.double()).norm() / want.double().norm()
        assert error <= 2 * FROBENIUS_BOUND[dtype]
    got, total = qk.add_rms_norm_quantize(x, other, gain, rounded=True)
    assert torch.equal(total, x + other) and int8_of(got.rounded, got.values, got.scale)
    assert qk.rms_norm_quantize(x, gain).rounded is None


def test_the_exponential_holds_over_its_whole_range():
    gate = torch.linspace(-200, 200, 4001)[None]
    got = qk.silu_mul_quantize(gate, torch.ones_like(gate))
    close(got, reference.silu_mul(gate, torch.ones_like(gate)))
    small = torch.linspace(-80, -1, 2000)[None]
    got = qk.silu_mul_quantize(small, 1 / torch.nn.functional.silu(small))
    assert (got.values == 127).all() and torch.allclose(got.scale, torch.tensor(1 / 127), rtol=1e-5)


@pytest.mark.parametrize("isa", cpu.ISAS)
def test_gelu_is_good_to_some_roundings_over_its_whole_range(isa):
    if cpu.why_no_isa(isa) is not None:
        pytest.skip(cpu.why_no_isa(isa))
    x = torch.linspace(-13, 20, 20_001)[None]
    gelu = cpu._compiled().quantize_rows_cpu(
        *(x, "gelu_mul", torch.ones_like(x), None, None, 0.0, "token", None, True, isa),
    )[-1]
    exact = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    error = ((gelu.double() - exact) / exact)[x != 0].abs()
    assert error.max() <= GATE_NEAR_BOUND


@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_and_infinity_stay_visible_in_fused_forms(bad):
    x, one = torch.randn(3, 64), torch.ones(3, 64)
    x[1, 5] = bad
    for got in (
        qk.rms_norm_quantize(x, None),
        qk.add_rms_norm_quantize(x, one, None)[0],
        qk.layer_norm_quantize(x, None, None),
        qk.silu_mul_quantize(x, one),
        qk.gelu_mul_quantize(x, one),
        qk.gelu_mul_quantize(x, one, "tanh"),
    ):
        assert not got.scale[1].isfinite().any() and got.scale[[0, 2]].isfinite().all()


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-g64", "w4a8-g64", "w4a8-g64-flat", "w4a8"])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("rows", [1, 40])
def test_layers_share_one_quantization(scheme, backend, rows):
    x = torch.randn(2, rows, 192).bfloat16()
    shared = qk.quantize_activation(x)
    for out_features in (48, 33):
        linear = torch.nn.Linear(192, out_features).bfloat16()
        layer = qk.WQLinear.from_linear(linear, scheme, backend=backend)
        assert torch.equal(layer(shared), layer(x))
        assert layer(shared).dtype == torch.bfloat16


def test_activation_order_applies_to_quantized_x():
    weight = qk.rounding.quantize(torch.randn(24, 64), "w8a8", perm=torch.randperm(64))
    layer = qk.WQLinear.from_weight(weight)
    x = torch.randn(3, 64)
    assert torch.equal(layer(qk.quantize_activation(x)), layer(x))


def test_wrong_input_is_named():
    x = torch.randn(2, 64)
    shared = qk.quantize_activation(x)
    layer = qk.WQLinear.from_linear(torch.nn.Linear(64, 8), "w4a16-g32")
    with pytest.raises(WeightError, match="layers of w4a16-g32 do not take"):
        layer(shared)
    layer = qk.WQLinear.from_linear(torch.nn.Linear(32, 8), "w8a8")
    with pytest.raises(WeightError, match=r"int8 \[..., 32\], got torch.int8 \[2, 64\]"):
        layer(shared)
    broken = qk.QuantizedActivation(shared.values[:, :32], shared.scale[:, 0], torch.float32)
    with pytest.raises(WeightError, match=r"float32 \[2, 1\], got torch.float32 \[2\]"):
        layer(broken)
    for call, message in (
        (lambda: qk.quantize_per_token(x.double()), "float64"),
        (lambda: qk.quantize_per_token(x, torch.uint8), "float8_e4m3fn, got torch.uint8"),
        (lambda: qk.quantize_per_tensor(x, torch.ones(1)), r"scale must be float32 \[\]"),
        (lambda: qk.rms_norm_quantize(x, torch.ones(3)), r"gain must be \[64\]"),
        (lambda: qk.add_rms_norm_quantize(x, x[:1], None), "residual must be like x"),
        (lambda: qk.silu_mul_quantize(x, x.half()), "up must be like x"),
        (lambda: qk.layer_norm_quantize(x, None, torch.ones(3)), r"bias must be \[64\]"),
        (lambda: qk.gelu_mul_quantize(x, x, "sigmoid"), "one of none, tanh, got 'sigmoid'"),
    ):
        with pytest.raises(WeightError, match=message):
            call()


def test_no_rows():
    shared = qk.quantize_activation(torch.randn(0, 64))
    layer = qk.WQLinear.from_linear(torch.nn.Linear(64, 8), "w8a8")
    assert layer(shared).shape == (0, 8)


def int8_of(y, q, s):
    """Whether int8 rows and scales are what `quantize_per_token` makes of y, bit for bit."""
    want_q, want_s = reference.quantize_rows(y.flatten(0, -2), torch.int8)
    return (
        torch.equal(q.flatten(0, -2), want_q)
        and torch.equal(s.flatten(), want_s)
        and q.shape == y.shape
        and s.shape == (*y.shape[:-1], 1)
    )


@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_norms_are_their_reference_bit_for_bit(isa, dtype):
    if cpu.why_no_isa(isa) is not None:
        pytest.skip(cpu.why_no_isa(isa))
    for rounds_first in (False, True):
        for adds_one in (False, True):
            for shape in ((1, 576), (2, 3, 300), (7, 19), (130, 1000)):
                x, gain = (torch.randn(shape) * 3).to(dtype), torch.randn(shape[-1]).to(dtype)
                y, q, s = cpu.norm_rows(x, gain, 1e-5, rounds_first, adds_one, isa)
                form = {"rounds_first": rounds_first, "adds_one": adds_one}
                assert torch.equal(y, reference.rounded_norm(x, gain, 1e-5, **form))
                assert y.dtype == dtype and int8_of(y, q, s)


@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_torchs_bit_for_bit(isa, dtype):
    if cpu.why_no_isa(isa) is not None:
        pytest.skip(cpu.why_no_isa(isa))
    both = torch.randn(2, 5, 600).to(dtype)
    # Halves of rows, which are further apart than they are long; and one row of them.
    for gate, up in (both.chunk(2, -1), both[:1, :1].chunk(2, -1), (both, both[:, :, :])):
        y, q, s = cpu.product_rows(gate, up, isa)
        assert torch.equal(y, gate * up) and int8_of(y, q, s)
    uneven = torch.randn(2, 10, 64).to(dtype)[:, ::2]  # rows of two halves at other distances
    y, q, s = cpu.product_rows(uneven, uneven, isa)
    assert torch.equal(y, uneven * uneven) and int8_of(y, q, s)


@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norms_and_gates_are_rounded_once(isa, dtype):
    if cpu.why_no_isa(isa) is not None:
        pytest.skip(cpu.why_no_isa(isa))
    x, up = (torch.randn(2, 2, 3, 300) * 3).to(dtype)
    gain, bias = torch.rand(2, 300).to(dtype)
    rows, others = x.flatten(0, 1), up.flatten(0, 1)
    for made, want in (
        (
            cpu.layer_norm_rows(x, gain, bias, 1e-5, isa),
            reference.layer_norm(rows, gain, bias, 1e-5)[0],
        ),
        (
            cpu.layer_norm_rows(x, gain, None, 1e-5, isa),
            reference.layer_norm(rows, gain, None, 1e-5)[0],
        ),
        (cpu.product_rows(x, up, isa, "silu_mul"), reference.silu_mul(rows, others)),
        (cpu.product_rows(x, up, isa, "gelu_mul"), reference.gelu_mul(rows, others, "none")),
        (cpu.product_rows(x, up, isa, "gelu_tanh_mul"), reference.gelu_mul(rows, others, "tanh")),
    ):
        y, q, s = made
        assert y.dtype == dtype and y.shape == x.shape and int8_of(y, q, s)
        error = (y.flatten(0, 1).double() - want.double()).norm() / want.double().norm()
        assert error <= FROBENIUS_BOUND[dtype]


def test_rounded_rows_are_of_ordinary_tensors_alone():
    isa = cpu.best_isa()
    x, gain = torch.randn(4, 64), torch.randn(64)

    def made(x, gain=gain):
        norm = cpu.norm_rows(x, gain, 1e-5, True, False, isa)
        layer_norm = cpu.layer_norm_rows(x, gain, None, 1e-5, isa)
        assert (layer_norm is None) == (norm is None) or gain.dtype != x.dtype
        return norm, cpu.product_rows(x, x, isa)

    assert all(rows is not None for rows in made(x))
    leaf = x.clone().requires_grad_()
    assert made(leaf) == (None, None)
    assert made(x.double(), gain.double()) == (None, None)
    assert made(x.to("meta")) == (None, None)
    assert made(x.new_empty(0, 64)) == (None, None)
    assert made(x[0, 0]) == (None, None)
    assert made(torch.randn(64, 4).t()) == (None, None)
    assert made(x, gain[:32])[0] is None and made(x, gain.bfloat16())[0] is None
    assert cpu.product_rows(x, x[:, :32], isa) is None
    assert cpu.product_rows(x, x.bfloat16(), isa) is None
    with torch.no_grad():
        assert all(rows is not None for rows in made(leaf))
    with torch.inference_mode():
        assert all(rows is not None for rows in made(x * 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x) == (None, None)
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert made(x) == (None, None)
    seen = []
    torch.vmap(lambda row: (seen.append(made(row)), row)[1])(x)
    assert seen == [(None, None)]
