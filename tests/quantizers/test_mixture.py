"""Schemes under a budget: through quantize_model, and saved and read back."""

import json
from dataclasses import replace

import pytest
import torch

import qkernels as qk
from qkernels.errors import CheckpointError, LayerError, QuantizationError
from qkernels.quantizers.allocation import Choice
from qkernels.quantizers.mixture import mix, read_overrides
from qkernels.quantizers.sensitivity import LayerSensitivity, Sensitivity, measure_sensitivity
from qkernels.scheme import QuantScheme
from tests.quantizers.test_sensitivity import batches, divergence, sharp_model

SCHEMES = ("w3a16-g32", "w4a16-g32", "w8a16-g32")


@pytest.fixture(scope="module")
def found():
    return measure_sensitivity(sharp_model(), SCHEMES, batches())


def quantized(overrides, **options):
    model = sharp_model()
    return model, qk.quantize_model(model, "rtn", "w4a16-g32", overrides=overrides, **options)


def test_the_model_has_the_bits_of_the_budget_and_is_nearer_than_a_uniform_one(found):
    uniform, _ = quantized(None)
    budget = sum(layer.choices[1].bits for layer in found.layers.values()) / found.numbers
    mixture = mix(found, budget)
    model, report = quantized(mixture.overrides)
    assert 0.99 * budget < mixture.bits_per_weight <= budget
    assert {layer.name: layer.scheme for layer in report.layers} == mixture.schemes
    assert len(set(mixture.schemes.values())) > 1
    ids = torch.cat(batches())
    ours, theirs = (divergence(m, sharp_model(), ids) for m in (model, uniform))
    assert ours < 0.7 * theirs
    assert mixture.loss < 0.7 * sum(layer.choices[1].loss for layer in found.layers.values())


def test_layers_are_left_alone_where_the_budget_has_room(found):
    mixture = mix(found, 20)
    left = [name for name, scheme in mixture.schemes.items() if scheme is None]
    assert 0 < len(left) < len(mixture.schemes)
    _, report = quantized(mixture.overrides)
    assert not {layer.name for layer in report.layers} & set(left)
    assert set(mix(found, 32).schemes.values()) == {None}


def test_layers_that_read_one_tensor_go_together_where_asked(found):
    def kinds(mixture):
        prefix = "model.layers.{}.self_attn.{}_proj"
        return [{mixture.schemes[prefix.format(i, p)] for p in "qkv"} for i in (0, 1)]

    budget = 6.0
    apart, joined = mix(found, budget), mix(found, budget, together=True)
    assert any(len(schemes) > 1 for schemes in kinds(apart))
    assert all(len(schemes) == 1 for schemes in kinds(joined))
    assert apart.loss < joined.loss and joined.bits_per_weight <= budget


def test_a_layer_of_two_names_gets_one_scheme():
    choices = (Choice("w3a16", 30, 1.0), Choice("w4a16", 40, 0.0))
    again = tuple(Choice(choice.scheme, 0, 0.0) for choice in choices)
    layers = {
        "a": LayerSensitivity(2, 5, "a", choices),
        "b": LayerSensitivity(2, 5, "a", again, same_as="a"),
    }
    assert set(mix(Sensitivity(layers), 4.0).schemes.values()) == {"w4a16"}
    assert set(mix(Sensitivity(layers), 3.9).schemes.values()) == {"w3a16"}


def test_saved_and_read_back(found, tmp_path):
    mixture = mix(found, 6)
    layers = {"experts[0].up": "w4a16", "experts[1].up": None}
    for each in (mixture, replace(mixture, schemes=layers)):
        each.save(tmp_path / "bits.json", found)
        read = read_overrides(tmp_path / "bits.json")
        assert read == {
            name: None if text is None else QuantScheme.parse(text)
            for name, text in each.overrides.items()
        }
    mixture.save(tmp_path / "bits.json")
    _, report = quantized(read_overrides(tmp_path / "bits.json"))
    assert {layer.name: layer.scheme for layer in report.layers} == mixture.schemes


def test_names_are_no_patterns():
    import fnmatch

    schemes = {"experts[0].up": "w4a16"}
    (pattern,) = replace(mix(_one(), 4), schemes=schemes).overrides
    assert fnmatch.fnmatchcase("experts[0].up", pattern)
    assert not fnmatch.fnmatchcase("experts0.up", pattern)


def _one():
    return Sensitivity({"a": LayerSensitivity(2, 5, "a", (Choice("w3a16", 30, 1.0),))})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "are no JSON"),
        ("[]", 'hold no "schemes"'),
        ('{"schemes": {}}', 'hold no "schemes"'),
        ('{"schemes": {"up": "w5"}}', "up: scheme 'w5' does not parse"),
        ('{"schemes": {"up": 4}}', "scheme of up is 4"),
    ],
)
def test_files_that_hold_something_else(tmp_path, content, message):
    path = tmp_path / "bits.json"
    path.write_text(content)
    with pytest.raises(QuantizationError, match=message):
        read_overrides(path)
    with pytest.raises(QuantizationError, match="cannot read"):
        read_overrides(tmp_path / "missing.json")


def test_what_cannot_be(found):
    least = sum(layer.choices[0].bits for layer in found.layers.values()) / found.numbers
    with pytest.raises(QuantizationError, match=f"3.5 bits a weight .* takes {least:.4f}"):
        mix(found, 3.5)
    with pytest.raises(LayerError, match="matches none"):
        quantized({"other.layer": "w4a16"})
    with pytest.raises(CheckpointError, match="awq"):
        quantized(mix(found, 6).overrides, format="awq")


def test_the_file_holds_what_it_was_chosen_by(found, tmp_path):
    mix(found, 6).save(tmp_path / "bits.json", found)
    content = json.loads((tmp_path / "bits.json").read_text())
    assert content["budget"] == 6
    name, layer = next(iter(found.layers.items()))
    assert content["sensitivity"][name]["choices"][1]["loss"] == layer.choices[1].loss
