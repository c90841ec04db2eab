"""Loading folders and GGUF files, and what is said of those that do not load."""

import builtins
import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.checkpoints import is_quantized
from qkernels.checkpoints.dense_folder import UnusedTensorsWarning
from qkernels.errors import CheckpointError
from qkernels.models.loading import (
    load_dense,
    load_model_and_tokenizer,
)
from tests.checkpoints.folders import edit_config, edit_tensors
from tests.tiny_model import LINEAR_LAYERS, tiny_model, write_folder, write_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def linears(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.modules() if type(layer) is nn.Linear]


def rounded_to_q8(value: torch.Tensor) -> np.ndarray:
    kind = gguf.GGMLQuantizationType.Q8_0
    return gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), kind), kind)


@pytest.mark.parametrize("load", [load_dense, load_model_and_tokenizer])
def test_a_folder(folder, load, capfd):
    model, tokenizer = load(folder, torch.float16)
    expected = tiny_model(torch.float16).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert tokenizer("ab")["input_ids"] == [97, 98]
    assert capfd.readouterr() == ("", "")


def test_a_gguf_file_is_unpacked_and_silent(gguf_file, capfd):
    model, tokenizer = load_dense(gguf_file, torch.float32)
    assert len(linears(model)) == LINEAR_LAYERS + 1
    loaded = model.state_dict()
    for name, value in tiny_model().state_dict().items():
        # llama.cpp stores the rows of q and k in another order, which the file made here does not.
        if "q_proj" not in name and "k_proj" not in name:
            stored = rounded_to_q8(value) if value.dim() == 2 else value.numpy()
            assert np.array_equal(loaded[name].numpy(), stored), name
    assert tokenizer("abacd")["input_ids"] == [3, ord("a"), 4]
    assert capfd.readouterr() == ("", "")


def test_the_gguf_reader_is_itself_again(gguf_file):
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    load_dense(gguf_file)
    assert gguf.GGUFReader is reader
    assert gguf.get_tensor_name_map is names


def test_a_folder_with_one_gguf_file(gguf_file):
    model, _ = load_dense(gguf_file.parent)
    assert linears(model)[0].weight.dtype == torch.bfloat16


def test_a_folder_with_two_gguf_files(gguf_file, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(gguf_file, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"exactly one .gguf file \(found: a.gguf, b.gguf\)"):
        load_dense(tmp_path)


def test_paths_that_hold_no_model(tmp_path):
    with pytest.raises(CheckpointError, match="missing does not exist: give a model folder"):
        load_dense(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"is no model folder: .*\(found: none\)"):
        load_dense(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"not a GGUF file \(it begins with b'hell'\)"):
        load_dense(tmp_path / "notes.txt")


def test_a_truncated_gguf_file(gguf_file, tmp_path):
    for size in (4, 100, 3000, gguf_file.stat().st_size - 1000):
        cut = tmp_path / f"cut{size}.gguf"
        cut.write_bytes(gguf_file.read_bytes()[:size])
        with pytest.raises(CheckpointError, match=f"cut{size}.gguf cannot be loaded"):
            load_dense(cut)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{"),
        ("config.json", '{"model_type": "no-such-model"}'),
        ("model.safetensors", "not safetensors"),
        ("model.safetensors", None),
        ("tokenizer.json", "{}"),
    ],
)
def test_a_damaged_folder(folder, tmp_path, file: str, content: str | None):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_text(content)
    with pytest.raises(CheckpointError, match="copy cannot be loaded"):
        load_dense(copy)


def test_a_quantized_folder_is_no_dense_model(folder, tmp_path):
    copy = tmp_path / "quantized"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (copy / "config.json").write_text(json.dumps(config))
    assert is_quantized(copy)
    assert not is_quantized(folder)
    assert not is_quantized(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="quantized model: start from the original"):
        load_dense(copy)


def test_a_folder_without_a_tokenizer_says_so(folder, tmp_path):
    model = tiny_model(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    qk.quantize_model(model, scheme="w4a16-g32")
    qk.save_model(model, tmp_path / "quantized")
    for name in ("dense", "quantized"):
        with pytest.raises(CheckpointError, match=f"{name} holds no tokenizer: write it there by"):
            load_model_and_tokenizer(tmp_path / name)
        loaded, tokenizer = load_model_and_tokenizer(tmp_path / name, tokenizer=False)
        assert len(linears(loaded)) == (1 if name == "quantized" else LINEAR_LAYERS + 1)
        assert tokenizer is None


def edited(folder, target, change):
    """A copy of a folder with other tensors."""
    shutil.copytree(folder, target)
    edit_tensors(target, change)
    return target


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.0.mlp.up"])
def test_a_folder_that_lacks_tensors(folder, tmp_path, name):
    def remove(tensors):
        for key in [key for key in tensors if key.startswith(name)]:
            del tensors[key]

    named = rf"copy lacks {name}\S* of a LlamaForCausalLM, which would be random numbers"
    with pytest.raises(CheckpointError, match=named):
        load_dense(edited(folder, tmp_path / "copy", remove))


def test_a_folder_with_more_tensors_than_the_model_has(folder, tmp_path):
    more = {"model.layers.0.mlp.up_proj.bias": torch.ones(96)}
    copy = edited(folder, tmp_path / "copy", lambda tensors: tensors.update(more))
    with pytest.warns(UnusedTensorsWarning, match=r"copy holds \S*up_proj.bias, which a Llama"):
        load_dense(copy)


@pytest.mark.parametrize("named", [None, [], ["NoSuchClass"], ["pipeline"]])
def test_a_config_that_names_no_class_is_a_causal_language_model(folder, tmp_path, named):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    edit_config(copy, lambda config: config.update(architectures=named))
    assert type(load_dense(copy)[0]).__name__ == "LlamaForCausalLM"


def test_layers_that_transformers_keeps_packed(gguf_file, monkeypatch):
    class GgufLinear(nn.Module):
        pass

    def packed(*args, **kwargs):
        model = tiny_model()
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and layer is not model.lm_head:
                model.set_submodule(name, GgufLinear())
        return model, {"missing_keys": set(), "unexpected_keys": set()}

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", packed)
    with pytest.raises(CheckpointError, match=r"without any nn.Linear .*found: GgufLinear.*5\.17"):
        load_dense(gguf_file)


@pytest.mark.parametrize("missing", ["transformers", "accelerate", "gguf"])
def test_missing_packages(gguf_file, monkeypatch, missing: str):
    real = builtins.__import__
    import importlib

    def imported(name: str, *args):
        if name == missing:
            raise ImportError(f"No module named {name!r}")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", imported)
    with pytest.raises(CheckpointError, match=rf"needs {missing} .*qkernels\[models\]"):
        load_dense(gguf_file)
