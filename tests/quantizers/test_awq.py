"""AWQ and HQQ, and that neither is worse than rounding to nearest at what it searches."""

import pytest
import torch

import qkernels as qk
from qkernels import rounding
from qkernels.errors import CheckpointError, RecipeError, SchemeError
from qkernels.quantizers.awq import AWQ, AwqParameters
from qkernels.quantizers.hqq import HQQ, HqqParameters
from qkernels.quantizers.method import LayerTask
from qkernels.quantizers.recipe import Recipe
from qkernels.scheme import QuantScheme
from tests.quantizers.test_gptq import correlated_inputs, output_error, task_of, weight_of
from tests.tiny_model import tiny_model

TOKENS = torch.arange(96).view(4, 24) % 60


def encoded(parameters, weight):
    codes = rounding.encode_rows(weight, parameters, 0)
    return qk.QuantizedWeight(scheme=parameters.scheme, codes=codes, **parameters.fields)


def outlying(model):
    """Makes a few columns of every norm's output large, as those of trained models are."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter[::16] *= 12
    return model


def logits_error(method, scheme="w3a16-g32"):
    torch.manual_seed(0)
    model = outlying(tiny_model())
    with torch.no_grad():
        wanted = model(TOKENS).logits
        report = qk.quantize_model(model, method, scheme, calibration=[TOKENS], check_kernels=False)
        error = (model(TOKENS).logits - wanted).norm() / wanted.norm()
    return float(error), report


def test_scales_protect_the_columns_with_large_inputs():
    nearest, _ = logits_error("rtn")
    scaled, _ = logits_error("awq(grid=minmax)")
    both, report = logits_error("awq")
    assert scaled < 0.8 * nearest
    assert both < 0.8 * nearest
    assert report.method == "awq"


def test_without_quantization_a_scaled_model_computes_the_same():
    torch.manual_seed(0)
    model = outlying(tiny_model())
    norm = model.model.layers[0].input_layernorm.weight.detach().clone()
    with torch.no_grad():
        wanted = model(TOKENS).logits
        qk.quantize_model(model, "awq(grid=minmax)", "w8a16-g16", calibration=[TOKENS])
        error = (model(TOKENS).logits - wanted).norm() / wanted.norm()
    assert error < 0.01
    assert not torch.equal(model.model.layers[0].input_layernorm.weight, norm)


def test_columns_kept_in_16_bits_are_as_they_were():
    weight, x = weight_of(), correlated_inputs()
    x[:, 7] *= 30
    parameters = AwqParameters(keep=0.05)
    made = encoded(AWQ.quantize(task_of(weight, "w3a16-g16", x), parameters), weight)
    assert 7 in made.outlier_columns and len(made.outlier_columns) == 4
    kept = made.outlier_columns
    assert torch.equal(made.dequantize()[:, kept], weight[:, kept].half().float())
    without = encoded(AWQ.quantize(task_of(weight, "w3a16-g16", x), AwqParameters()), weight)
    wanted = x @ weight.T
    assert output_error(made, x, wanted) < 0.8 * output_error(without, x, wanted)


def test_a_model_with_columns_kept_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = tiny_model()
    qk.quantize_model(model, "awq(keep=0.05)", "w4a16-g32", calibration=[TOKENS])
    qk.save_model(model, tmp_path / "out", "qkernels")
    with torch.no_grad():
        again = qk.load_model(tmp_path / "out")
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def spiked(n=32, k=128):
    """Rows with a few weights far from the others, which move a range and its zero point."""
    weight = weight_of(n, k)
    weight[:, ::29] *= 4
    weight[:, 3::31] += 2
    return weight


@pytest.mark.parametrize("zeros", ["integer", "real"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_is_nearer_than_the_range_in_each_group(bits, zeros):
    weight, scheme = spiked(), QuantScheme.parse(f"w{bits}a16-g32")
    task = LayerTask("layer", weight, None, scheme, None, None)
    made = HQQ.quantize(task, HqqParameters(zeros=zeros))
    assert made.zeros.is_floating_point() == (zeros == "real")

    def errors(parameters):
        error = encoded(parameters, weight).dequantize() - weight
        return error.square().unflatten(1, (-1, 32)).sum(dim=2)

    found, nearest = errors(made), errors(rounding.fit(weight, scheme))
    assert (found <= nearest * 1.0001).all()
    assert found.sum() < (0.9 if bits < 4 else 0.98) * nearest.sum()


def test_mse_is_nearer_than_the_range_in_each_group():
    weight = spiked()
    for scheme in ("w4a16-g32", "w3a16-g32-sym", "nf4-g32", "binary-g32", "fp8e4m3-a16"):
        errors = {}
        for method in ("rtn", "rtn(grid=mse)"):
            part = Recipe.parse(method).parts[0]
            task = LayerTask("layer", weight, None, QuantScheme.parse(scheme), None, None)
            made = part.method.quantize(task, part.parameters)
            length = made.scheme.group_length(128)
            error = (encoded(made, weight).dequantize() - weight).square()
            errors[method] = error.unflatten(1, (-1, length)).sum(dim=2)
        assert (errors["rtn(grid=mse)"] <= errors["rtn"] * 1.0001).all(), scheme
        # The mean of |w| is the best scale of signs already.
        best = 1.0001 if scheme.startswith("binary") else 0.99
        assert errors["rtn(grid=mse)"].sum() < best * errors["rtn"].sum(), scheme


def test_hqq_says_what_it_does_not_make():
    model = tiny_model()
    for scheme in ("w4a16-g32-sym", "nf4-g32", "w4a16-gtensor"):
        with pytest.raises(SchemeError, match="hqq does not make"):
            qk.quantize_model(model, "hqq", scheme)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("hqq(p=0)", r"p must be in \(0, 1\]"),
        ("hqq(kappa=0.5)", "kappa >= 1"),
        ("hqq(steps=0)", "steps must be 1 or more"),
        ("awq(steps=-1)", "steps must be 0 or more"),
        ("awq(keep=1)", "keep must be in"),
    ],
)
def test_parameters_out_of_range_are_named(text, what):
    with pytest.raises(RecipeError, match=what):
        Recipe.parse(text)


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_a_weight_that_two_blocks_share_is_left_alone(method):
    scheme = "w8a16-g32" if method == "awq" else "w8a8"
    torch.manual_seed(0)
    model = outlying(tiny_model())
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    with torch.no_grad():
        wanted = model(TOKENS).logits
        qk.quantize_model(model, method, scheme, calibration=[TOKENS], check_kernels=False)
        error = (model(TOKENS).logits - wanted).norm() / wanted.norm()
    assert error < 0.05


def test_columns_are_kept_beside_codes_that_have_a_zero():
    for scheme in ("binary-g16", f"table({','.join(map(str, range(1, 17)))})-g16"):
        with pytest.raises(SchemeError, match="has no zero, which columns in 16 bits have"):
            qk.quantize_model(tiny_model(), "awq(keep=0.05)", scheme, calibration=[TOKENS])


@pytest.mark.parametrize(
    ("method", "format", "what"),
    [
        ("gptq(act_order=full)", "compressed-tensors", "perm"),
        ("gptq(act_order=full)", "awq", "perm"),
        ("awq(keep=0.05)", "gptq", "outlier_columns, outlier_values"),
    ],
)
def test_what_a_format_does_not_hold_is_said_beforehand(method, format, what):
    def too_far(done, total, name):
        raise AssertionError("layers are quantized")

    with pytest.raises(CheckpointError, match=f"{format} has no tensor for {what}"):
        qk.quantize_model(
            tiny_model(),
            method,
            "w4a16-g32",
            calibration=[TOKENS],
            format=format,
            progress=too_far,
        )
