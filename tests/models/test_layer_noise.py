"""Signal to noise of layers against the formula, factors that methods put in, what is left out."""

import math

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.models.layer_noise import NoiseMeter, decibels, factors
from tests.bounds import FROBENIUS_BOUND
from tests.plain_model import TOKENS, Model
from tests.tiny_model import LINEAR_LAYERS, VOCABULARY, tiny_model

DECIBELS = 20 * math.log10(1 + FROBENIUS_BOUND[torch.float32]) * 1000
"""Noise of 4 bits is a thousandth and more of the output, whose error has that bound."""


def measure(dense, quantized, *inputs):
    meter = NoiseMeter(dense, quantized)
    with torch.no_grad(), meter:
        for x in inputs:
            dense(x)
    return {layer.name: layer.snr_db for layer in meter.results()}, meter.not_compared


def inputs_of(model, name, *inputs):
    seen = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    with torch.no_grad():
        for x in inputs:
            model(x)
    handle.remove()
    return seen


def test_it_is_the_formula_over_all_inputs():
    dense, quantized = Model(), Model()
    quantized.load_state_dict(dense.state_dict())
    qk.quantize_model(quantized, "rtn", "w4a16-g32")
    found, left_out = measure(dense, quantized, TOKENS, TOKENS.flip(0)[:1])
    assert list(found) == [f"blocks.{i}.{n}" for i in range(3) for n in ("up", "down")]
    assert left_out == {}
    for name, snr in found.items():
        signal = noise = 0.0
        layer = quantized.get_submodule(name)
        for x, y in inputs_of(dense, name, TOKENS, TOKENS.flip(0)[:1]):
            bias = 0 if layer.bias is None else layer.bias.double()
            difference = y.double() - (x.double() @ layer.dequantize().double().T + bias)
            signal += float(y.double().square().sum())
            noise += float(difference.square().sum())
        assert snr == pytest.approx(10 * math.log10(signal / noise), abs=DECIBELS)
        assert 15 < snr < 35


def test_the_dense_model_is_left_as_it_was():
    dense, quantized = tiny_model(), tiny_model()
    qk.quantize_model(quantized, "rtn", "w4a16-g32")
    ids = torch.arange(30)[None]
    modules, expected = list(dense.modules()), dense(ids).logits
    found, _ = measure(dense, quantized, ids)
    assert len(found) == LINEAR_LAYERS
    assert all(a is b for a, b in zip(dense.modules(), modules, strict=True))
    assert not any(module._forward_hooks for module in modules)
    assert torch.equal(dense(ids).logits, expected)


def test_factors_of_columns_and_rows_are_taken_out():
    dense, scaled = Model(), Model()
    scaled.load_state_dict(dense.state_dict())
    block = scaled.blocks[1]
    with torch.no_grad():
        rows, columns = torch.ones(96), torch.ones(72)
        rows[::5], rows[3], columns[7], columns[20:30] = 4.0, 0.25, 8.0, 0.5
        # What is in front would be divided by the factors: here that is of no account.
        block.up.weight.mul_(rows[:, None]).mul_(columns)
        block.up.bias.mul_(rows)
        block.down.weight.div_(rows)
    qk.quantize_model(scaled, "rtn", "w4a16-g24")
    found, left_out = measure(dense, scaled, TOKENS)
    assert left_out == {}
    for name, scales in (
        ("blocks.1.up", (columns, rows)),
        ("blocks.1.down", (1 / rows, 1)),
        ("blocks.0.up", (1, 1)),
    ):
        ((x, y),) = inputs_of(dense, name, TOKENS)
        with torch.no_grad():
            noise = scaled.get_submodule(name)(x / scales[0]) / scales[1] - y
        exact = decibels(float(y.square().sum()), float(noise.square().sum()))
        # Factors that are estimated cost a little, those that are not found all of it.
        assert found[name] == pytest.approx(exact, abs=1)
        assert exact > 14


def test_after_awq():
    torch.manual_seed(0)
    dense, quantized = tiny_model(), tiny_model()
    for model in (dense, quantized):
        with torch.no_grad():
            model.model.embed_tokens.weight[:, ::8].mul_(20)
    ids = torch.randint(VOCABULARY, (4, 64))
    before = quantized.model.layers[0].input_layernorm.weight.clone()
    qk.quantize_model(quantized, "awq", "w4a16-g32", calibration=[ids])
    assert not torch.equal(quantized.model.layers[0].input_layernorm.weight, before)
    found, left_out = measure(dense, quantized, ids[:1])
    assert left_out == {}
    assert len(found) == LINEAR_LAYERS
    assert min(found.values()) > 12


@pytest.mark.parametrize("scheme", ["w2a16-g32", "binary-g32", "w3a16-g32", "log3-g32", "nf4-g32"])
def test_coarse_rounding_has_no_factors(scheme):
    torch.manual_seed(0)
    for weight in (torch.randn(96, 128), torch.rand(96, 128) - 0.5, torch.randn(96, 128) ** 3):
        layer = nn.Linear(128, 96, bias=False)
        layer.weight.data.copy_(weight)
        rows, columns = factors(weight, qk.WQLinear.from_linear(layer, scheme).dequantize())
        assert (rows == 1).all()
        assert (columns == 1).all()


def test_zeros_have_no_factors():
    weight = torch.randn(8, 16)
    weight[2], weight[:, 5] = 0, 0
    for other in (weight, torch.zeros(8, 16)):
        rows, columns = factors(weight, other) or (None, None)
        if other is weight:
            assert (rows == 1).all() and (columns == 1).all()


def test_rotated_weights_and_other_models_are_said_to_be():
    dense, rotated = Model(), Model()
    rotated.load_state_dict(dense.state_dict())
    basis, _ = torch.linalg.qr(torch.randn(72, 72, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        rotated.blocks[0].up.weight.copy_(rotated.blocks[0].up.weight @ basis)
    qk.quantize_model(rotated, "rtn", "w8a16")
    found, left_out = measure(dense, rotated, TOKENS)
    assert left_out == {"blocks.0.up": "its weight is rotated, or that of another model"}
    assert "blocks.0.up" not in found and len(found) == 5


def test_layers_without_a_counterpart():
    dense, quantized = Model(), Model()
    qk.quantize_model(quantized, "rtn", "w8a16")
    dense.blocks[0].up = nn.Sequential(dense.blocks[0].up)
    dense.blocks[1].up = nn.Linear(72, 96)
    dense.blocks[1].down = nn.Linear(96, 80)
    dense.blocks[1].forward = lambda x: x
    dense.blocks[2].forward = lambda x: x
    _, left_out = measure(dense, quantized, TOKENS)
    assert left_out["blocks.0.up"] == "the dense model has no linear layer of this name"
    assert left_out["blocks.1.down"] == "the dense layer is [80, 96], this one [72, 96]"
    assert left_out["blocks.2.up"] == "its weight is rotated, or that of another model"


def test_layers_that_no_token_reaches():
    dense, quantized = Model(), Model()
    quantized.load_state_dict(dense.state_dict())
    qk.quantize_model(quantized, "rtn", "w8a16")
    dense.blocks[1].forward = lambda x: x
    found, left_out = measure(dense, quantized, TOKENS)
    assert len(found) == 4
    assert left_out == dict.fromkeys(("blocks.1.up", "blocks.1.down"), "no token reached it")


def test_decibels():
    assert decibels(100.0, 1.0) == pytest.approx(20)
    assert decibels(1.0, 0.0) == math.inf
    assert decibels(0.0, 1.0) == -math.inf
    assert decibels(0.0, 0.0) == math.inf
    assert math.isnan(decibels(1.0, math.nan))
