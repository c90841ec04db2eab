"""LLM.int8(): columns of x with outliers are multiplied in 16 bits, the others as int8."""

import pytest
import torch

import qkernels as qk
from qkernels import reference, rounding
from qkernels.backends.cuda import emulator_is_loaded
from qkernels.errors import CheckpointError, SchemeError, WeightError
from qkernels.layouts import LAYOUTS, pack
from tests import schemes
from tests.bounds import FROBENIUS_BOUND
from tests.tiny_model import tiny_model

TOKENS = torch.arange(96).view(4, 24) % 60


def layer_of(scheme, n=40, k=100, backend=None, **options):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.05
    return qk.WQLinear.from_weight(rounding.quantize(weight, scheme), backend=backend, **options)


def outlying(m=7, k=100, dtype=torch.float32):
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1))
    x[:, 5] *= 30
    x[m // 2, 77] = -9
    return x.to(dtype)


BACKENDS = (
    *("cpu", "reference"),
    pytest.param(
        "emulated",
        marks=pytest.mark.skipif(
            not emulator_is_loaded(), reason="the emulator is not loaded: run make emulated"
        ),
    ),
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """Two tokens, three columns, one output; the second column holds an outlier in one of them."""
    x = torch.tensor([[1.0, 10.0, -2.0], [0.5, 0.25, 4.0]])
    weight = torch.tensor([[0.5, -1.0, 2.0]])
    hub = rounding.quantize(weight, "w8a8-outliers6")
    w = hub.dequantize()
    left = x.clone()
    left[:, 1] = 0
    scale = torch.tensor([2.0, 4.0]) / 127
    rounded = (left / scale[:, None]).round() * scale[:, None]
    wanted = rounded @ w.T + x[:, 1:2] @ w[:, 1:2].T
    layer = qk.WQLinear.from_weight(hub, backend=backend)
    assert torch.allclose(layer(x), wanted, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a8-g20", "w4a8-g20-flat", "w8a8-gtensor"])
def test_outliers_cost_the_others_nothing(backend, scheme):
    x = outlying()
    layer = layer_of(f"{scheme}-outliers6", backend=backend)
    exact = x @ layer.dequantize().T
    error = (layer(x) - exact).norm() / exact.norm()
    plain = (layer_of(scheme, backend=backend)(x) - exact).norm() / exact.norm()
    assert error < 0.5 * plain
    # With none, it is int8 bit for bit.
    quiet = torch.randn(7, 100, generator=torch.Generator().manual_seed(1)).clamp(-5, 5)
    assert torch.equal(layer(quiet), layer_of(scheme, backend=backend)(quiet))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("m", [0, 1, 2, 17])
@pytest.mark.parametrize(
    "scheme",
    [
        *("w8a8-outliers6", "w4a8-g20-outliers6", "w8a8-outliers0.01", "w4a4-g64-outliers6"),
        *("w4a8-g20-asym-outliers6", "w4a8-g20-flat-outliers6", "w3a8-g64-outliers6"),
    ],
)
def test_the_kernel_gives_what_the_reference_does(scheme, m, dtype):
    x, bias = outlying(max(1, m), dtype=dtype)[:m], torch.randn(40, dtype=dtype)
    weight = torch.randn(40, 100, generator=torch.Generator().manual_seed(0)) * 0.05
    hub = rounding.quantize(weight, scheme, bias=bias)
    fast = qk.WQLinear.from_weight(hub, backend="cpu")
    slow = qk.WQLinear.from_weight(hub, backend="reference")
    got, wanted = fast(x).double(), slow(x).double()
    assert got.shape == (m, 40)
    assert (got - wanted).norm() <= FROBENIUS_BOUND[dtype] * wanted.norm()


@pytest.mark.parametrize("text", schemes.ALL)
@pytest.mark.parametrize("name", LAYOUTS)
def test_columns_of_a_packed_weight(text, name):
    scheme = qk.QuantScheme.parse(text)
    if LAYOUTS[name].why_not(scheme) is not None:
        return
    weight = torch.randn(37, 100, generator=torch.Generator().manual_seed(0))
    hub = rounding.quantize(
        weight, scheme, activation_scale=1.0 if scheme.activation.is_static else None
    )
    packed = pack(hub, LAYOUTS[name])
    columns = torch.tensor([99, 0, 5, 64, 23, 24])
    assert torch.equal(packed.columns(columns), packed.dequantize_rows(0, 37)[:, columns])
    assert packed.columns(columns[:0]).shape == (37, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_thresholds_that_are_no_numbers_of_a_type(dtype):
    """The kernel finds the columns that the reference finds: others would show as roundings."""
    near = torch.tensor(6.05).to(dtype)
    x = torch.stack([near, near.nextafter(near * 0), near.nextafter(near * 2), -near]).repeat(25)
    x = torch.diag(x)
    fast, slow = (layer_of("w8a8-outliers6.05", backend=name) for name in ("cpu", "reference"))
    got, wanted = fast(x).double(), slow(x).double()
    assert (got - wanted).norm() <= FROBENIUS_BOUND[dtype] * wanted.norm()


def test_any_shape_and_strides():
    layer = layer_of("w8a8-outliers6")
    x = outlying(24).view(2, 12, 100)
    y = layer(x)
    assert y.shape == (2, 12, 40) and torch.equal(y.view(24, 40), layer(x.view(24, 100)))
    for other in (x.transpose(0, 1), torch.stack([x, x], -1)[..., 0]):
        assert torch.equal(layer(other), layer(other.contiguous()))


def test_the_order_of_columns_and_a_factor_of_them_come_first():
    hub = rounding.quantize(torch.randn(40, 100) * 0.05, "w4a8-g64-outliers6")
    hub = hub.replace(perm=torch.randperm(100), input_factor=torch.rand(100) + 0.5)
    x = outlying()
    fast, slow = (qk.WQLinear.from_weight(hub, backend=name) for name in ("cpu", "reference"))
    got, wanted = fast(x).double(), slow(x).double()
    assert (got - wanted).norm() <= FROBENIUS_BOUND[torch.float32] * wanted.norm()


def test_products_are_of_fp32_whatever_torch_is_set_to():
    layer, x = layer_of("w8a8-outliers6"), outlying()
    want = layer(x)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(layer(x), want)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_batch_invariant_rows_do_not_see_each_other(backend):
    layer = layer_of("w8a8-outliers6", batch_invariant=True, backend=backend)
    x = outlying()
    whole = layer(x)
    for row in range(len(x)):
        assert torch.equal(layer(x[row : row + 1])[0], whole[row])
    # Elsewhere a column is one for all rows: those that have no outlier in it are nearer to exact.
    exact = x @ layer.dequantize().T
    together = layer_of("w8a8-outliers6")(x)
    assert (together - exact).norm() < (whole - exact).norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_row(value, backend):
    x = outlying()
    x[2, 3] = value
    y = layer_of("w8a8-outliers6", backend=backend)(x)
    assert not y[2].isfinite().any()
    assert y[[0, 1, 3, 4, 5, 6]].isfinite().all()


def test_outlier_columns():
    x = torch.tensor([[1.0, -6.0, 0.0, 5.99], [float("nan"), 0.0, 0.0, 0.0]])
    assert reference.outlier_columns(x, 6.0).tolist() == [0, 1]


def test_spelled_and_read():
    scheme = qk.QuantScheme.parse("w8a8-outliers5.5")
    assert scheme.activation.outliers == 5.5 and str(scheme) == "w8a8-outliers5.5"
    for wrong in (
        *("w4a16-g64-outliers6", "w8a8-static-outliers6", "w8a8-tokenasym-outliers6"),
        *("fp8-a8-outliers6", "w8a8-outliers", "w8a8-outliers6-outliers7", "w8a8-outliers-1"),
    ):
        with pytest.raises(SchemeError):
            qk.QuantScheme.parse(wrong)


def test_activations_that_are_quantized_already_are_refused():
    layer = layer_of("w8a8-outliers6")
    with pytest.raises(WeightError, match="keep columns of x in 16 bits: pass x itself"):
        layer(qk.quantize_activation(outlying()))


def test_a_model_is_quantized_saved_and_loaded(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter[::16] *= 12
    wanted = model(TOKENS).logits
    report = qk.quantize_model(model, "gptq", "w8a8-outliers6", calibration=[TOKENS])
    assert all(layer.scheme == "w8a8-outliers6" for layer in report.layers)
    with pytest.raises(CheckpointError, match="keeps no columns of activations in 16 bits"):
        qk.save_model(model, tmp_path / "other", format="compressed-tensors")
    qk.save_model(model, tmp_path / "own", format="qkernels")
    with torch.no_grad():
        got = model(TOKENS).logits
        assert torch.equal(qk.load_model(tmp_path / "own")(TOKENS).logits, got)
    assert (got - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("m", [0, 1, 5, 64])
@pytest.mark.parametrize("scheme", ["w4a16-g20", "w3a16-g64-sym", "nf4-g64-dq", "fp8e4m3-a16"])
@pytest.mark.parametrize("ordered", [False, True])
def test_columns_in_16_bits_beside_the_codes(scheme, m, dtype, ordered):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 100, generator=generator) * 0.05
    perm = torch.randperm(100, generator=generator) if ordered else None
    hub = rounding.quantize(weight, scheme, perm=perm, bias=torch.randn(40, dtype=dtype))
    values = torch.randn(40, 3, generator=generator).half()
    hub = hub.replace(outlier_columns=torch.tensor([99, 0, 31]), outlier_values=values)
    x = torch.randn(m, 100, generator=generator).to(dtype)
    fast = qk.WQLinear.from_weight(hub, dtype=dtype)
    (chosen,) = (
        row.kernel
        for row in qk.explain(
            scheme, m=m, n=40, k=100, x_dtype=dtype, fields=("outlier_columns", "outlier_values")
        )
        if row.chosen
    )
    assert chosen == "cpu_float_beside"
    exact = x.double() @ hub.dequantize().double().T + hub.bias.double()
    assert (fast(x).double() - exact).norm() <= FROBENIUS_BOUND[dtype] * exact.norm()
