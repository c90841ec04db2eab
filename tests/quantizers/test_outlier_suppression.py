"""Gamma migration: where norms' weights go, and that without rounding nothing changes."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

import qkernels as qk
from qkernels.errors import LayerError, RecipeError, SchemeError
from tests.bounds import MIGRATED_ERROR
from tests.plain_model import snapshot, unchanged
from tests.quantizers.test_awq import TOKENS, outlying
from tests.quantizers.test_resume import interrupt_at
from tests.quantizers.test_smoothquant import gpt2, with_factor
from tests.tiny_model import VOCABULARY, tiny_model

METHOD = "outlier_suppression"


def bert():
    """Norms behind the residual, whose outputs the next residual reads as well."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm.weight" in name:
                parameter[::16] *= 12
            if "LayerNorm.bias" in name:
                parameter.uniform_(-0.2, 0.2)
    return model


MODELS = {"Llama": lambda: outlying(tiny_model()), "GPT2": gpt2, "BERT": bert}


def output(model):
    with torch.no_grad():
        result = model(TOKENS)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def error_of(make, method, scheme, **options):
    model = make()
    wanted = output(model)
    qk.quantize_model(model, method, scheme, calibration=[TOKENS], check_kernels=False, **options)
    return float((output(model) - wanted).norm() / wanted.norm()), model


def test_by_hand():
    """One token of two columns, the second of which the norm makes eight times as large."""
    model, x = nn.Sequential(nn.LayerNorm(2, eps=1e-12), nn.Linear(2, 1, bias=False)), [[3.0, 1.0]]
    model[0].weight.data, model[0].bias.data = torch.tensor([1.0, 8.0]), torch.tensor([0.0, 0.8])
    model[1].weight.data = torch.tensor([[0.5, 0.25]])
    x = torch.tensor(x)
    # Normalized 1 and -1, so the norm gives 1 and -7.2.
    assert torch.allclose(model(x), torch.tensor([[0.5 - 7.2 / 4]]))
    qk.quantize_model(model, METHOD, "w8a8-static", calibration=[x])
    assert model[0].weight.tolist() == [1, 1]
    assert torch.allclose(model[0].bias, torch.tensor([0, 0.1]))
    # The layer is given 1 and -0.9, of which 1 is the largest; its weight is 0.5 and 2.
    hub = model[1].to_weight()
    assert float(hub.activation_scale) == pytest.approx(1 / 127)
    step = 2 / 127.5
    assert torch.allclose(hub.dequantize(), torch.tensor([[32 * step, 127 * step]]), rtol=1e-3)
    wanted = 32 * step - 114 / 127 * 127 * step
    assert model(x).item() == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_outlying_columns_cost_less(name):
    nearest, _ = error_of(MODELS[name], "rtn", "w8a8-static")
    migrated, _ = error_of(MODELS[name], METHOD, "w8a8-static")
    assert migrated < MIGRATED_ERROR * nearest


def test_norms_that_linear_layers_alone_read_have_a_weight_of_one():
    _, model = error_of(MODELS["Llama"], METHOD, "w8a8-static")
    assert with_factor(model) == []
    for block in model.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            assert torch.allclose(norm.weight, torch.ones_like(norm.weight))


def test_what_the_head_reads_stays():
    """The head is in 16 bits."""

    def make():
        model = MODELS["Llama"]()
        model.model.norm.weight.data.fill_(2)
        return model

    _, model = error_of(make, METHOD, "w8a8-static")
    assert (model.model.norm.weight == 2).all()


def test_norms_that_residuals_read_stay():
    """Also such as stand in another block than the layers that read them."""
    before, (_, model) = bert(), error_of(MODELS["BERT"], METHOD, "w8a8-static")
    inside = [f"attention.self.{part}" for part in ("query", "key", "value")]
    readers = [*inside, "intermediate.dense"]
    assert with_factor(model) == [f"encoder.layer.{i}.{name}" for i in range(2) for name in readers]
    gamma = before.embeddings.LayerNorm.weight.detach()
    assert torch.equal(model.embeddings.LayerNorm.weight, gamma)
    hub = model.encoder.layer[0].attention.self.query.to_weight()
    assert torch.allclose(hub.input_factor, 1 / gamma)
    weight = before.encoder.layer[0].attention.self.query.weight
    assert (hub.dequantize() - weight).norm() < 0.05 * weight.norm()


def test_an_interrupted_run_leaves_the_model():
    model = bert()
    before, wanted = snapshot(model), output(model)
    with pytest.raises(KeyboardInterrupt):
        qk.quantize_model(
            model, METHOD, "w8a8-static", calibration=[TOKENS], progress=interrupt_at(5)
        )
    unchanged(model, before)
    assert torch.equal(output(model), wanted)


def test_resumed(tmp_path):
    _, expected = error_of(bert, METHOD, "w8a8-static")
    with pytest.raises(KeyboardInterrupt):
        error_of(bert, METHOD, "w8a8-static", progress=interrupt_at(8), resume=tmp_path)
    _, again = error_of(bert, METHOD, "w8a8-static", resume=tmp_path)
    state = again.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())


def test_no_hook_is_left():
    _, model = error_of(bert, METHOD, "w8a8-static")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_both_parts_together():
    """With token-wise clipping, and a few tokens that are 30 times the others."""

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(32), nn.Linear(32, 16)

        def forward(self, x):
            return self.linear(self.norm(x) * (1 + 29 * (x[:, :1] > 2.5)))

    def lost(**options):
        torch.manual_seed(0)
        model, x = Reader(), torch.randn(2000, 32)
        wanted = model(x)
        qk.quantize_model(model, "rtn", "w8a8-static", calibration=[x], **options)
        usual = x[:, 0] <= 2.5
        return float((model(x) - wanted)[usual].norm() / wanted[usual].norm())

    assert lost(observer="tokenwise(percent=99)") < 0.2 * lost()


@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a8-staticasym", "fp8-a8-static"])
def test_clipping_by_the_output_is_never_worse_where_it_was_measured(scheme):
    nearest, _ = error_of(MODELS["Llama"], "rtn", scheme)
    clipped, _ = error_of(MODELS["Llama"], "rtn", scheme, observer="tokenwise")
    assert clipped < 1.05 * nearest


def test_wrong_input():
    with pytest.raises(SchemeError, match="w4a16-g32 leaves activations in 16 bits; choose"):
        error_of(MODELS["Llama"], METHOD, "w4a16-g32")
    with pytest.raises(RecipeError, match="percent"):
        error_of(MODELS["Llama"], "rtn", "w8a8-static", observer="tokenwise(percent=101)")
    with pytest.raises(LayerError, match="pass calibration"):
        qk.quantize_model(tiny_model(), METHOD, "w8a8-static")
