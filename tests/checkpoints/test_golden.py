"""Checkpoints that other packages, and earlier commits, wrote: tests/golden/README.md."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qkernels as qk
from qkernels.checkpoints import open_checkpoint
from qkernels.checkpoints.format import WeightKind
from qkernels.errors import CheckpointError
from tests.bounds import FOREIGN_LOGITS

GOLDEN = Path(__file__).parents[1] / "golden"
ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."
FOLDERS = {
    "ct-pack-w4a16-sym-g128": {"k_proj": "w4a16-g128-sym-sbf16"},
    "ct-pack-w4a16-asym-g128": {"k_proj": "w4a16-g128-sbf16"},
    "ct-int-w8a8-dynamic": {"k_proj": "w8a8-sbf16"},
    "ct-int-w4a8": {"k_proj": "w4a8-g128-flat-sbf16"},
    "ct-int-w8a8-asym-token-act": {"k_proj": "w8a8-tokenasym-sbf16"},
    "ct-pack-w4a16-sym-g32-gptq-static": {"k_proj": "w4a16-g32-sym-sbf16"},
    "ct-float-fp8-dynamic": {"k_proj": "fp8-a8-sbf16"},
    "ct-kv-cache-fp8": {"k_proj": "fp8-a8-sbf16"},
    "ct-mixed-w4a16-w8a8": {"k_proj": "w8a8-sbf16", "up_proj": "w4a16-g128-sym-sbf16"},
}


def read(folder: str) -> dict[str, qk.QuantizedWeight]:
    checkpoint = open_checkpoint(GOLDEN / folder)
    return {name: checkpoint.read(name) for name in checkpoint.layers}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_numbers_are_those_of_the_package(folder):
    oracle, weights = load_file(GOLDEN / folder / "oracle.safetensors"), read(folder)
    assert {n.rpartition(".")[2]: str(w.scheme) for n, w in weights.items()} == FOLDERS[folder]
    for name, weight in weights.items():
        # The package computes in bf16, where only the product is rounded.
        assert torch.equal(weight.dequantize().to(torch.bfloat16), oracle[f"{name}.weight"])
        assert (weight.bias is not None) == name.startswith(ATTENTION)


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_written_is_what_the_package_wrote(folder):
    checkpoint = open_checkpoint(GOLDEN / folder)
    for name, layer in checkpoint.layers.items():
        written = checkpoint.format.write_layer(checkpoint.read(name))
        assert {f"{name}.{part}" for part in written} == set(layer.tensors)
        for part, tensor in written.items():
            stored = checkpoint.store.get(f"{name}.{part}")
            assert (tensor.dtype, tensor.shape) == (stored.dtype, stored.shape), part
            assert torch.equal(tensor, stored), part


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_config_that_is_written_says_what_the_package_said(folder):
    checkpoint = open_checkpoint(GOLDEN / folder)
    kinds = {name: WeightKind.of(checkpoint.read(name)) for name in checkpoint.layers}
    ours = checkpoint.format.write_config(kinds, ["lm_head"])
    theirs = checkpoint.config["quantization_config"]
    for key in ("quant_method", "quantization_status", "format", "ignore"):
        assert ours[key] == theirs[key], key
    groups = {group["format"]: group for group in theirs["config_groups"].values()}
    for group in ours["config_groups"].values():
        same = groups[group["format"]]
        for part in ("weights", "input_activations"):
            assert (group[part] is None) == (same[part] is None)
            assert all(same[part][key] == value for key, value in (group[part] or {}).items())


def test_a_sharded_model_gives_the_logits_of_the_package():
    folder = GOLDEN / "ct-sharded-w4a16"
    oracle = load_file(folder / "oracle.safetensors")
    model = qk.load_model(folder)
    with torch.no_grad():
        logits = model(oracle["input_ids"]).logits.float()
    layer = ATTENTION + "k_proj"
    weight = model.get_submodule(layer).dequantize()
    assert torch.equal(weight.to(torch.bfloat16), oracle[f"{layer}.weight"])
    error = (logits - oracle["logits"]).norm() / oracle["logits"].norm()
    assert error < FOREIGN_LOGITS
    # The tensors of one layer may lie in several files.
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    parts = [files[f"{MLP}down_proj.{part}"] for part in ("weight_packed", "weight_scale")]
    assert parts[0] != parts[1]


def test_a_checkpoint_of_commit_4ba1d62():
    folder = GOLDEN / "qkernels-4ba1d62"
    oracle = load_file(folder / "oracle.safetensors")
    model = qk.load_model(folder)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, qk.WQLinear):
            weight = module.to_weight()
            assert torch.equal(module.dequantize(), oracle[f"{name}.weight"]), name
            for part in ("bias", "activation_scale"):
                value = getattr(weight, part)
                assert (value is None) == (f"{name}.{part}" not in oracle)
                assert value is None or torch.equal(value, oracle[f"{name}.{part}"])
            found[name.rpartition(".")[2]] = str(module.scheme)
    assert found == {
        "q_proj": "w4a16-gtensor",
        "k_proj": "w8a8-static",
        "v_proj": "w4a8-g16-flat",
        "o_proj": "w8a16",
        "gate_proj": "w3a16-g16-sym",
        "up_proj": "fp8-a8",
        "down_proj": "w4a16-g16",
    }
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(model.state_dict()[name], oracle[name])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        logits = model(oracle["input_ids"]).logits.float()
    error = (logits - oracle["logits"].float()).norm() / oracle["logits"].float().norm()
    assert error < FOREIGN_LOGITS


def test_rotations_are_refused_by_name(tmp_path):
    shutil.copy(GOLDEN / "refused" / "ct-transform-quip-w4a16.json", tmp_path / "config.json")
    shutil.copy(GOLDEN / "ct-float-fp8-dynamic" / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match="transform_config"):
        qk.load_model(tmp_path)
