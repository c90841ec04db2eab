"""Activations of 4 bits, simulated: rounded to -7..7, held as int8 and multiplied exactly."""

import pytest
import torch

import qkernels as qk
from qkernels import reference, rounding
from qkernels.backends import cpu
from qkernels.errors import CheckpointError, WeightError
from qkernels.layouts import PLAIN, VNNI, pack
from qkernels.select import KERNELS, make_problem
from tests.tiny_model import LINEAR_LAYERS, tiny_model

TOKENS = torch.arange(96).view(4, 24) % 60
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def random_weight(scheme, n=40, k=200, scale=None):
    source = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(n, k, generator=source), torch.randn(n, generator=source)
    return rounding.quantize(weight, scheme, bias=bias, activation_scale=scale)


def tokens(m, k=200, dtype=torch.float32):
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1))
    x[:, ::50] *= 20
    return x.to(dtype)


def by_hand(scheme, **fields):
    """The integers 1, 2, -1 and 0, with a scale of 1/2."""
    codes = torch.tensor([[129, 130, 127, 128]], dtype=torch.uint8)
    return qk.QuantizedWeight(
        scheme=qk.QuantScheme.parse(scheme),
        codes=codes,
        scales=torch.tensor([[0.5]]),
        **fields,
    )


@pytest.mark.parametrize("backend", [None, "reference"])
def test_by_hand(backend):
    x = torch.tensor(
        [
            [7.0, -3.4, 0.5, -0.5],  # s = 1: 7, -3, 0, 0
            [14.0, 7.0, -3.0, 1.0],  # s = 2: 7, 4, -2, 0; halves to even
            [0.0, 0.0, 0.0, 0.0],
            [float("nan"), 1.0, 1.0, 1.0],
        ]
    )
    y = qk.WQLinear.from_weight(by_hand("w8a4"), backend=backend)(x)
    assert y[:3].tolist() == [[0.5 * (7 - 6)], [2 * 0.5 * (7 + 8 + 2)], [0.0]]
    assert y[3].isnan().all()
    # One scale for all three rows, 2: 4 (of 3.5), -2, 0, 0; and 7, 4, -2, 0.
    y = qk.WQLinear.from_weight(by_hand("w8a4-tensor"), backend=backend)(x[:3])
    assert y.tolist() == [[2 * 0.5 * (4 - 4)], [17.0], [0.0]]
    # A calibrated scale of 1, at which 14 saturates: 7, 7, -3, 1.
    static = by_hand("w8a4-static", activation_scale=torch.tensor(1.0))
    y = qk.WQLinear.from_weight(static, backend=backend)(x)
    assert y[:3].tolist() == [[0.5], [0.5 * (7 + 14 + 3)], [0.0]]
    assert y[3].isnan().all()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_with_zero_points_by_hand(backend):
    # 15 steps of 1 from -3 to 12: zero = -8 + 3, q = x - 5 rounded.
    x = torch.tensor([[12.0, -3.0, 0.4, 5.6], [0.0, 0.0, 0.0, 0.0]])
    quantized, scale, zero = reference.quantize_rows_asymmetric(x, 7.0)
    assert quantized.tolist() == [[7, -8, -5, 1], [-8, -8, -8, -8]]
    assert scale.tolist() == [1.0, 1.0] and zero.tolist() == [-5, -8]
    y = qk.WQLinear.from_weight(by_hand("w8a4-tokenasym"), backend=backend)(x)
    assert y.tolist() == [[0.5 * (12 - 6 - 0)], [0.0]]
    fields = {"activation_scale": torch.tensor(1.0), "activation_zero": torch.tensor(-5).int()}
    static = by_hand("w8a4-staticasym", **fields)
    # 13 is beyond the 12 that the range reaches.
    x[0, 0] = 13
    y = qk.WQLinear.from_weight(static, backend=backend)(x)
    assert y.tolist() == [[0.5 * (12 - 6 - 0)], [0.0]]


@pytest.mark.parametrize("zero", [-9, 8])
def test_a_zero_point_beyond_4_bits_is_named(zero):
    fields = {"activation_scale": torch.tensor(1.0), "activation_zero": torch.tensor(zero).int()}
    with pytest.raises(WeightError, match=rf"activation_zero must be in -8\.\.7, got {zero}"):
        by_hand("w8a4-staticasym", **fields)
    assert by_hand("w8a8-staticasym", **fields).activation_zero == zero


@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("scheme", ["w4a4-g64", "w4a4-g64-flat", "w8a4", "w3a4-g24-asym-flat"])
def test_rows_are_multiplied_by_each_set_of_instructions(scheme, isa, monkeypatch):
    if cpu.why_no_isa(isa) is not None:
        pytest.skip(cpu.why_no_isa(isa))
    monkeypatch.setenv(cpu.ISA_VARIABLE, isa)
    weight = random_weight(scheme)
    (kernel,) = (row for row in KERNELS if row.name == "cpu_int4_activations")
    for m in (0, 1, 2, 12):
        for dtype in DTYPES:
            x = tokens(m, dtype=dtype)
            problem = make_problem(
                weight.scheme, n=40, k=200, m=m, device="cpu", layout="vnni", x_dtype=dtype
            )
            y = kernel.run(x, pack(weight, VNNI), weight.bias, problem)
            assert torch.equal(y, reference.linear(x, pack(weight, PLAIN), weight.bias))


def test_each_bit_of_x_counts():
    weight, x = random_weight("w8a16-sym-sfp32"), tokens(20)
    exact = x @ weight.dequantize().T + weight.bias

    def error(scheme):
        y = qk.WQLinear.from_weight(random_weight(scheme))(x)
        return float((y - exact).norm() / exact.norm())

    assert 10 < error("w8a4") / error("w8a8") < 30  # 127 / 7 is 18
    assert error("w8a4-tokenasym") < error("w8a4")
    assert error("w8a4-outliers6") < 0.3 * error("w8a4")


def test_explain_says_what_rounds_x():
    for scheme in ("w4a4-g64", "w4a4-g64-flat", "w8a4", "w8a4-tensor", "w8a4-static"):
        rows = {row.kernel: row for row in qk.explain(scheme, n=64, k=256, m=20)}
        assert rows["cpu_int4_activations"].chosen, scheme
        refusal = rows["cpu_portable_int8"].reason
        assert "multiplies int8 activations, and the scheme has int4 ones" in refusal
        for name, row in rows.items():
            runs = row.reason is None
            assert runs == (name in ("cpu_int4_activations", "reference")) or name.startswith(
                "interpreted"
            )
    rows = {row.kernel: row for row in qk.explain("w8a8", n=64, k=256)}
    assert "multiplies int4 activations" in rows["cpu_int4_activations"].reason
    rows = {row.kernel: row for row in qk.explain("w8a4-tokenasym", n=64, k=256)}
    assert rows["cpu_int4_activations"].reason == "knows no zero points of activations"
    assert rows["reference"].chosen
    rows = {row.kernel: row for row in qk.explain("w4a4-g64-outliers6", n=64, k=256)}
    assert rows["cpu_int8_outliers"].chosen


@pytest.mark.parametrize("scheme", ["w4a4-g64", "w8a4", "w8a4-outliers6", "w8a4-tokenasym"])
def test_int8_rows_are_refused(scheme):
    layer, x = qk.WQLinear.from_weight(random_weight(scheme)), tokens(3)
    wanted = layer(x)  # which leaves a route behind
    with pytest.raises(WeightError, match=f"8 bits per token, which layers of {scheme} do not"):
        layer(qk.quantize_activation(x))
    assert torch.equal(layer(x), wanted)


def test_compiled_code_takes_no_4_bit_activations():
    scheme = qk.QuantScheme.parse("w4a4-g64")
    with pytest.raises(ValueError, match="activation must be none, int8 or fp8, got int4"):
        cpu._made(scheme, 40, 200, "portable", False, False)


def test_rows_do_not_see_each_other():
    layer = qk.WQLinear.from_weight(random_weight("w4a4-g64-flat"), batch_invariant=True)
    x = tokens(20)
    whole = layer(x)
    for row in range(20):
        assert torch.equal(layer(x[row : row + 1])[0], whole[row])


def test_gradients_pass_rounding():
    layer, x = qk.WQLinear.from_weight(random_weight("w4a4-g64")), tokens(3).requires_grad_()
    grad = torch.randn(3, 40)
    layer(x).backward(grad)
    assert torch.allclose(x.grad, grad @ layer.dequantize(), atol=1e-4)


@pytest.mark.parametrize("scheme", ["w4a4-g32", "w4a4-g32-flat", "w8a4-static", "w8a4-staticasym"])
def test_a_model_is_quantized_saved_and_loaded(scheme, tmp_path):
    model = tiny_model()
    report = qk.quantize_model(
        model, "smoothquant(steps=3)+gptq", scheme, calibration=[TOKENS], observer="mse"
    )
    assert {layer.scheme for layer in report.layers} == {scheme}
    assert len(report.layers) == LINEAR_LAYERS
    qk.save_model(model, tmp_path / "own", format="qkernels")
    with torch.no_grad():
        wanted = model(TOKENS).logits
        assert torch.equal(qk.load_model(tmp_path / "own")(TOKENS).logits, wanted)


def test_other_formats_refuse_it_by_name(tmp_path):
    model = tiny_model()
    qk.quantize_model(model, "rtn", "w4a4-g32-flat")
    wanted = r"rounds 4-bit activations to -8\.\.7 with scales of max\|x\| / 7\.5"
    with pytest.raises(CheckpointError, match=wanted):
        qk.save_model(model, tmp_path / "other", format="compressed-tensors")
    with pytest.raises(CheckpointError, match="has no quantized activations"):
        qk.save_model(model, tmp_path / "other", format="gptq")
