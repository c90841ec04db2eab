"""Mixtures of experts, written with a module an expert as other packages read them."""

import functools
import json
import re

import pytest
import torch
from safetensors.torch import load_file

import qkernels as qk
from qkernels.checkpoints import read_weights
from qkernels.errors import CheckpointError
from tests.checkpoints import experts
from tests.checkpoints.experts import CLASSES, mixture, outputs, save_dense
from tests.checkpoints.folders import same_weight

transformers = pytest.importorskip("transformers", reason="models come from transformers")

FORMATS = {
    "awq": "w4a16-g16",
    "gptq": "w4a16-g16-sym",
    "gptq_v2": "w8a16-g16",
    "compressed-tensors": "w4a16-g16",
}
# Words are of 8 numbers.
CHOSEN = ["*experts*", "*self_attn*_proj"]


def section_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def weights_of(model):
    return {n: m.to_weight() for n, m in model.named_modules() if isinstance(m, qk.WQLinear)}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", CLASSES)
def test_names_are_those_of_transformers_4(tmp_path, name, format):
    model = mixture(name)
    dense = save_dense(model, tmp_path / "dense")
    qk.quantize_model(model, scheme=FORMATS[format], include=CHOSEN, format=format)
    qk.save_model(model, tmp_path / "out", format=format)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    quantized = read_weights(tmp_path / "out")
    # Each tensor that Transformers stores of the dense model is there, or a layer in its place.
    assert {f"{layer}.weight" for layer in quantized} | set(stored) >= set(dense)
    assert {f"{layer}.weight" for layer in quantized} <= set(dense)
    assert sum(".experts." in layer for layer in quantized) == sum(map(experts.is_expert, dense))
    for layer, weight in quantized.items():
        assert weight.shape == tuple(dense[f"{layer}.weight"].shape)
    for tensor in set(dense) & set(stored):
        if tensor.removesuffix(".weight") not in quantized:
            assert torch.equal(stored[tensor], dense[tensor]), tensor
    again = qk.load_model(tmp_path / "out")
    before, after = weights_of(model), weights_of(again)
    assert before.keys() == after.keys()
    assert all(same_weight(before[layer], after[layer]) for layer in before)
    assert torch.equal(outputs(again), outputs(model))


def test_what_stays_dense_is_said_under_the_names_of_readers(tmp_path):
    model = mixture("Mixtral")
    qk.quantize_model(
        model, scheme="w4a16-g16", exclude=["*layers.0*gate_up_proj*", "*down_proj.expert_1"]
    )
    qk.save_model(model, tmp_path / "out", format="awq")
    dense = section_of(tmp_path / "out")["modules_to_not_convert"]
    for name in (
        "lm_head",
        "model.layers.0.block_sparse_moe.gate",
        "model.layers.0.block_sparse_moe.experts.2.w1",
        "model.layers.0.block_sparse_moe.experts.2.w3",
        "model.layers.1.block_sparse_moe.experts.1.w2",
    ):
        assert name in dense
    assert not any(re.search(r"layers\.1\..*w[13]$|_proj|norm", name) for name in dense)
    assert torch.equal(outputs(qk.load_model(tmp_path / "out")), outputs(model))
    for format in ("compressed-tensors", "gptq"):
        qk.save_model(model, tmp_path / format, format=format)
        assert torch.equal(outputs(qk.load_model(tmp_path / format)), outputs(model))
    assert section_of(tmp_path / "compressed-tensors")["ignore"] == dense
    targets = section_of(tmp_path / "compressed-tensors")["config_groups"]["group_0"]["targets"]
    assert "model.layers.1.block_sparse_moe.experts.1.w1" in targets


def test_what_was_read_is_written_again(tmp_path):
    """Also where the columns of an expert's projections are in different orders."""
    save_dense(mixture("Qwen3Moe"), tmp_path / "in")
    order = functools.partial(experts.gptq, order_of=lambda layer: sum(map(ord, layer)))
    experts.rewrite(tmp_path / "in", order, experts.GPTQ_SECTION)
    qk.save_model(qk.load_model(tmp_path / "in"), tmp_path / "out", format="gptq")
    before = load_file(tmp_path / "in" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        # Zero points less one are packed by fields there and by words here.
        if not name.endswith("qzeros"):
            assert torch.equal(after[name], tensor), name
    first, second = read_weights(tmp_path / "in"), read_weights(tmp_path / "out")
    assert all(same_weight(first[name], second[name]) for name in first)


def gpt_oss():
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **experts.SIZES, num_local_experts=3, num_experts_per_tok=2, head_dim=8
    )
    return transformers.GptOssForCausalLM(config).eval()


def test_experts_without_names_of_their_own_are_refused(tmp_path):
    """Transformers stores those of gpt-oss as it holds them."""
    message = r"experts in one parameter.*no such names.*formats that hold it: qkernels"
    model = gpt_oss()
    with pytest.raises(CheckpointError, match=message):
        qk.quantize_model(model, scheme="w4a16-g16", format="awq")
    qk.quantize_model(model, scheme="w4a16-g16")
    with pytest.raises(CheckpointError, match=message):
        qk.save_model(model, tmp_path / "out", format="compressed-tensors")
    assert not (tmp_path / "out").exists()
    qk.save_model(model, tmp_path / "own", format="qkernels")
    assert torch.equal(outputs(qk.load_model(tmp_path / "own")), outputs(model))


def test_our_own_format_keeps_the_models_names(tmp_path):
    model = mixture("Mixtral")
    qk.quantize_model(model, scheme="w4a16-g16")
    qk.save_model(model, tmp_path / "out", format="qkernels")
    assert "model.layers.0.mlp.experts.gate_up_proj.expert_0" in read_weights(tmp_path / "out")


def test_a_piece_that_a_format_does_not_hold_is_named(tmp_path):
    model = mixture("Mixtral", intermediate_size=36)
    qk.quantize_model(model, scheme="w4a16-g4", include=["*experts.gate_up*"])
    # 72 rows fill words of 8, and 36 do not.
    with pytest.raises(CheckpointError, match=r"experts\.0\.w1 is .*N is 36"):
        qk.save_model(model, tmp_path / "out", format="awq")
