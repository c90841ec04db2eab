"""SmoothQuant: its formula, where its factors go, and that a model with them is a whole one."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import qkernels as qk
from qkernels.errors import LayerError, RecipeError, SchemeError
from tests.bounds import SMOOTHED_ERROR
from tests.plain_model import TOKENS as PLAIN_TOKENS
from tests.plain_model import Model, snapshot, unchanged
from tests.quantizers.test_awq import TOKENS, outlying
from tests.quantizers.test_resume import interrupt_at
from tests.tiny_model import VOCABULARY, tiny_model

FACTOR = "input_factor"


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" in name and name.endswith("weight"):
                parameter[::16] *= 12
    return model


MODELS = {"norms": lambda: outlying(tiny_model()), "factors": gpt2}


def with_factor(model):
    """The names of layers with a factor of their input."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, qk.WQLinear)}
    return [name for name, layer in layers.items() if FACTOR in layer.packed.buffers]


def logits_error(make, method, scheme="w8a8"):
    model = make()
    with torch.no_grad():
        wanted = model(TOKENS).logits
        report = qk.quantize_model(model, method, scheme, calibration=[TOKENS], check_kernels=False)
        error = (model(TOKENS).logits - wanted).norm() / wanted.norm()
    return float(error), report, model


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.8])
def test_the_factor_is_the_formula(alpha):
    """Two tokens, three columns, two outputs; nothing is in front of the layer."""
    x = torch.tensor([[1.0, -30.0, 0.5], [-2.0, 10.0, 0.25]])
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    model[0].weight.data = torch.tensor([[0.5, 0.1, -4.0], [-1.0, 0.2, 2.0]])
    before = model[0].weight.detach().clone()
    qk.quantize_model(model, f"smoothquant(alpha={alpha})", "w8a8", calibration=[x])
    largest_x, largest_w = torch.tensor([2.0, 30.0, 0.5]), torch.tensor([1.0, 0.2, 4.0])
    s = largest_x**alpha / largest_w ** (1 - alpha)
    hub = model[0].to_weight()
    # But for one number for all columns, which changes nothing.
    ratio = s * hub.input_factor
    assert torch.allclose(ratio, ratio[:1].expand(3), rtol=1e-6)
    scaled = before / hub.input_factor
    steps = scaled.abs().amax(dim=1, keepdim=True) / 127.5
    wrong = (hub.dequantize() - before) / hub.input_factor
    assert (wrong.abs() <= 0.51 * steps).all()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-tensor", "smoothquant-o3", "w4a4-g16"])
def test_outlying_columns_cost_less(name, scheme):
    nearest, _, _ = logits_error(MODELS[name], "rtn", scheme)
    for method in ("smoothquant", "smoothquant(steps=11)"):
        smoothed, _, _ = logits_error(MODELS[name], method, scheme)
        assert smoothed < SMOOTHED_ERROR * nearest, method


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scheme", ["w8a8-tokenasym", "w8a8-staticasym"])
def test_zero_points_of_activations_are_searched_with(name, scheme):
    nearest, _, _ = logits_error(MODELS[name], "rtn", scheme)
    smoothed, _, _ = logits_error(MODELS[name], "smoothquant(steps=11)", scheme)
    assert smoothed < nearest


def test_norms_and_rows_in_front_take_the_factors():
    _, _, model = logits_error(MODELS["norms"], "smoothquant")
    assert with_factor(model) == []
    before = MODELS["norms"]().model.layers[0]
    after = model.model.layers[0]
    assert not torch.equal(before.input_layernorm.weight, after.input_layernorm.weight)


def test_layers_keep_what_nothing_in_front_can_take():
    error, _, model = logits_error(MODELS["factors"], "smoothquant")
    # Behind GELU; attention's output takes its own into the rows of the values.
    assert with_factor(model) == [f"transformer.h.{i}.mlp.c_proj" for i in range(2)]
    folded, _, other = logits_error(MODELS["factors"], "smoothquant(fold=true)")
    assert with_factor(other) == [] and error < folded


def test_errors_of_layers_with_a_factor_are_those_of_their_outputs():
    _, report, model = logits_error(MODELS["factors"], "smoothquant")
    _, nearest, _ = logits_error(MODELS["factors"], "rtn")
    errors = {layer.name: layer.output_error for layer in report.layers}
    before = {layer.name: layer.output_error for layer in nearest.layers}
    assert all(0 < errors[name] < 2 * before[name] for name in with_factor(model))
    assert all(layer.weight_error < 0.02 for layer in report.layers)


def test_with_weights_of_one_scale_no_method_is_lost():
    """Rotated, smoothed and rounded by GPTQ, and the scales distilled, in one recipe."""
    recipe = "rotate+smoothquant+gptq(act_order=full)+distill(steps=1)"
    error, report, _ = logits_error(MODELS["norms"], recipe)
    nearest, _, _ = logits_error(MODELS["norms"], "rtn")
    assert report.method == recipe and error < nearest


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded(tmp_path, name):
    _, _, model = logits_error(MODELS[name], "smoothquant")
    qk.save_model(model, tmp_path / "saved", format="qkernels")
    loaded = qk.load_model(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("last", range(1, 6))
def test_an_interrupted_run_leaves_the_model_and_goes_on(tmp_path, last):
    def quantized(model, **options):
        qk.quantize_model(model, "smoothquant+gptq", "w8a8", calibration=[PLAIN_TOKENS], **options)
        return model

    torch.manual_seed(7)
    expected = quantized(Model())
    assert with_factor(expected)
    torch.manual_seed(7)
    model = Model()
    before, wanted = snapshot(model), model(PLAIN_TOKENS)
    with pytest.raises(KeyboardInterrupt):
        quantized(model, resume=tmp_path / "run", progress=interrupt_at(last))
    unchanged(model, before)
    assert torch.equal(model(PLAIN_TOKENS), wanted)
    again = quantized(model, resume=tmp_path / "run").state_dict()
    assert all(torch.equal(again[key], value) for key, value in expected.state_dict().items())


def test_no_hook_is_left():
    _, _, model = logits_error(MODELS["factors"], "smoothquant")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_with_two_names_is_scaled_once():
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    model = nn.Sequential(layer, nn.GELU(), layer)
    x = torch.randn(32, 16)
    x[:, 3] *= 50
    wanted = model(x)
    qk.quantize_model(model, "smoothquant", "w8a8", calibration=[x])
    assert model[0] is model[2]
    assert (model(x) - wanted).norm() <= 0.05 * wanted.norm()


def test_layers_whose_activations_stay_are_left_alone():
    model = MODELS["norms"]()
    norm = model.model.layers[0].input_layernorm.weight.detach().clone()
    qk.quantize_model(
        model,
        "smoothquant",
        "w8a16",
        calibration=[TOKENS],
        overrides={"*.1.mlp.down_proj": "w8a8"},
    )
    assert torch.equal(model.model.layers[0].input_layernorm.weight, norm)


def test_nothing_to_smooth_is_said():
    with pytest.raises(
        SchemeError, match="w4a16-g32 leaves activations in 16 bits; choose a scheme"
    ):
        logits_error(MODELS["norms"], "smoothquant", "w4a16-g32")


@pytest.mark.parametrize("wrong", ["alpha=1.5", "alpha=-0.1", "steps=1", "steps=-2"])
def test_values_out_of_range(wrong):
    with pytest.raises(RecipeError, match=wrong.partition("=")[0]):
        logits_error(MODELS["norms"], f"smoothquant({wrong})")


def test_without_calibration():
    with pytest.raises(LayerError, match="pass calibration"):
        qk.quantize_model(tiny_model(), "smoothquant", "w8a8")


def test_where_the_format_holds_no_factors_layers_have_none():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    x = torch.randn(64, 32)
    x[:, 3] *= 50
    with pytest.warns(UserWarning, match="compressed-tensors has no tensor for input_factor"):
        qk.quantize_model(
            model, "smoothquant", "w8a8", calibration=[x], format="compressed-tensors"
        )
    assert with_factor(model) == []
