"""The estimate of what a layer's scheme costs, against what it costs."""

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.errors import LayerError, QuantizationError, SchemeError, WeightError
from qkernels.quantizers.method import Method
from qkernels.quantizers.methods import METHODS
from qkernels.quantizers.sensitivity import measure_sensitivity
from tests.plain_model import Model, snapshot, unchanged
from tests.tiny_model import LINEAR_LAYERS, tiny_model

SCHEMES = ("w2a16-g32", "w4a16-g32-sym", "nf4-g64")


def batches(count=4, rows=4, length=48, vocabulary=128):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, vocabulary, (rows, length), generator=generator) for _ in range(count)]


def sharp_model():
    """A model that is surer of its tokens than one of small random weights, and unevenly built."""
    model = tiny_model()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                size = 1 + 6 * torch.rand((), generator=generator)
                parameter.mul_(size).add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


@torch.no_grad()
def divergence(model, dense, ids):
    mine, theirs = (m(ids).logits.double().log_softmax(dim=-1) for m in (model, dense))
    return float((theirs.exp() * (theirs - mine)).sum(dim=-1).mean())


def test_the_estimate_is_the_divergence_that_is_measured():
    model, dense = sharp_model(), sharp_model()
    names = [name for name, m in dense.named_modules() if isinstance(m, nn.Linear)][:-1]
    found = measure_sensitivity(model, ("w4a16-g32",), batches(count=16, rows=8, length=24))
    assert list(found.layers) == names and len(names) == LINEAR_LAYERS
    logarithms = []
    for name in names:
        model = sharp_model()
        qk.quantize_model(model, "rtn", "w4a16-g32", include=[name])
        measured = divergence(model, dense, torch.cat(batches(count=8, rows=8, length=24)))
        guessed = found.layers[name].choices[0].loss
        logarithms.append(torch.tensor([measured, guessed]).log())
    # Each of 128 samples is a square: their mean is right to an eighth.
    apart = torch.stack(logarithms).diff(dim=1).abs()
    assert apart.median() < 0.25 and apart.max() < 0.5
    assert torch.corrcoef(torch.stack(logarithms).T)[0, 1] > 0.9


def test_choices_have_less_loss_with_more_bits():
    model = sharp_model()
    before = snapshot(model)
    gradients = [p.requires_grad for p in model.parameters()]
    told = []
    found = measure_sensitivity(
        model, ("w3a16-g32", "w8a16-g32"), batches(1), progress=lambda *a: told.append(a)
    )
    unchanged(model, before)
    assert [p.requires_grad for p in model.parameters()] == gradients
    assert all(p.grad is None for p in model.parameters())
    total = LINEAR_LAYERS + 1
    assert told[0][:2] == (0, total) and told[-1] == (total, total, "")
    for layer in found.layers.values():
        three, eight, dense = layer.choices
        groups = layer.n * (layer.k // 32)
        assert three.bits == 3 * layer.n * layer.k + (16 + 3) * groups
        assert eight.bits == 8 * layer.n * layer.k + (16 + 8) * groups
        assert three.loss > 20 * eight.loss > 0 == dense.loss
        assert dense.scheme is None and dense.bits == 32 * layer.n * layer.k


def test_layers_that_read_one_tensor_are_told():
    found = measure_sensitivity(sharp_model(), ("w4a16-g32",), batches(1))
    block = {
        n.removeprefix("model.layers.1."): s.reads for n, s in found.layers.items() if "s.1." in n
    }
    q, gate = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.gate_proj"
    assert [block[f"self_attn.{p}_proj"] for p in "qkvo"] == [q, q, q, q.replace("q_p", "o_p")]
    assert [block[f"mlp.{p}_proj"] for p in ("gate", "up")] == [gate, gate]


def test_the_result_is_the_same_again():
    one, two = (measure_sensitivity(sharp_model(), SCHEMES, batches()) for _ in range(2))
    assert one == two
    assert one != measure_sensitivity(sharp_model(), SCHEMES, batches(), seed=1)


class Shared(Model):
    """One layer under two names, and outputs that are no logits."""

    def __init__(self):
        super().__init__()
        self.blocks[2].up = self.blocks[0].up


def test_a_layer_of_two_names_counts_once():
    found = measure_sensitivity(Shared(), ("w4a16-g24",), [torch.arange(40).view(2, 20)])
    again = found.layers["blocks.2.up"]
    assert again.same_as == "blocks.0.up"
    assert all(choice.bits == choice.loss == 0 for choice in again.choices)
    assert found.numbers == 5 * 72 * 96
    assert found.layers["blocks.0.up"].choices[0].loss > 0


class Idle(Model):
    def forward(self, tokens):
        x = self.embed(tokens)
        with torch.no_grad():
            x = self.blocks[0](x)
        return self.blocks[1](x)


class Huge(Model):
    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.blocks[0].up.weight[0, 0] = 1e7


def test_what_cannot_be_measured_is_named(monkeypatch):
    tokens = [torch.arange(40).view(2, 20)]
    with pytest.raises(LayerError, match="no gradient of the model's output reaches any"):
        measure_sensitivity(Idle(), ("w4a16",), tokens, include=["blocks.0.*"])
    with pytest.raises(LayerError, match="no batch"):
        measure_sensitivity(Model(), ("w4a16",), [])
    with pytest.raises(LayerError, match="no scheme"):
        measure_sensitivity(Model(), (), tokens)
    for method in ("gptq", "rtn(grid=hessian)"):
        with pytest.raises(SchemeError, match="learns from inputs, and sensitivity judges methods"):
            measure_sensitivity(Model(), ("w4a16",), tokens, method=method)
    with pytest.raises(SchemeError, match="w8a8-static has static activations, which sensitivity"):
        measure_sensitivity(Model(), ("w4a16", "w8a8-static"), tokens)
    for budget in (2.0, float("nan"), -1.0):
        with pytest.raises(QuantizationError, match=r"too small|is a number of bits a weight"):
            measure_sensitivity(Model(), ("w4a16",), tokens, budget=budget)
    smooth = Method(name="smooth", title="", prepare_block=lambda task, parameters: None)
    monkeypatch.setitem(METHODS, "smooth", smooth)
    with pytest.raises(LayerError, match="under one method"):
        measure_sensitivity(Model(), ("w4a16",), tokens, method="smooth+rtn")
    with pytest.raises(WeightError, match=r"blocks\.0\.up: a scale of .* overflows"):
        measure_sensitivity(Huge(), ("w4a16",), tokens)
    with pytest.raises(SchemeError, match="does not parse"):
        measure_sensitivity(Model(), ("w5",), tokens)
    model = Model()
    with torch.no_grad():
        model.embed.weight[3] = torch.inf
    with pytest.raises(LayerError, match=r"blocks\.0\.up: .* not finite"):
        measure_sensitivity(model, ("w4a16",), tokens)


def test_what_no_gradient_reaches_loses_what_others_like_it_do():
    tokens, model = [torch.arange(40).view(2, 20)], Idle()
    found = measure_sensitivity(model, ("w4a16", "w8a16"), tokens).layers
    like = measure_sensitivity(model, ("w4a16", "w8a16"), tokens, include=["blocks.1.*"]).layers
    assert found["blocks.1.up"] == like["blocks.1.up"]
    losses = [choice.loss for choice in found["blocks.0.up"].choices]
    reached = [
        choice.loss for name in found if name.endswith("up") for choice in found[name].choices
    ]
    assert losses[0] > losses[1] > losses[2] == 0 and losses[0] in reached
