"""What is said of a folder that something is wrong with, by the file and the tensor."""

import pytest
import torch

import qkernels as qk
from qkernels.errors import CheckpointError
from tests.checkpoints.folders import edit_config, edit_tensors
from tests.checkpoints.models import LAYER, UP, change, change_quantization, drop, logits, put

pytest.importorskip("transformers", reason="models come from transformers")


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def poison(tensors):
    tensors[UP + ".weight_scale"][0, 0] = float("nan")


DAMAGES = {
    "config gone": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "config cut": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "config a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "holds a list, not an",
    ),
    "config deep": (lambda f: (f / "config.json").write_text("[" * 10**5), "not valid JSON"),
    "config a long number": (
        lambda f: (f / "config.json").write_text("1" * 10**4),
        "not valid JSON",
    ),
    "config a folder": (lambda f: replace_by_folder(f / "config.json"), "cannot be read: Is a dir"),
    "weights gone": (lambda f: (f / "model.safetensors").unlink(), "no .safetensors"),
    "weights cut": (truncate, "damaged or truncated"),
    "weights a folder": (
        lambda f: replace_by_folder(f / "model.safetensors"),
        "model.safetensors cannot be read",
    ),
    "not quantized": (
        lambda f: edit_config(f, lambda c: c.pop("quantization_config")),
        "no quantization_config",
    ),
    "quantization a string": (
        change(quantization_config="int4"),
        "quantization_config must be an object, got 'int4'",
    ),
    "unknown format": (
        change_quantization(quant_method="foo"),
        "in the format 'foo'; known are compressed-tensors, qkernels",
    ),
    "unknown model": (change(model_type="nonesuch"), "no known model"),
    "no model type": (lambda f: edit_config(f, lambda c: c.pop("model_type")), "no known model"),
    "unknown class": (change(architectures=["Nonesuch"]), "no known model"),
    "no class": (change(architectures=[]), "no known model"),
    "class a number": (change(architectures=7), "no known model"),
    "no class, and of no known type": (
        change(architectures=None, model_type="clip"),
        "names no architectures, and model_type 'clip' is no language model",
    ),
    "size a string": (
        change(hidden_size="64"),
        "no known model",
    ),
    "words gone": (drop(UP + ".weight_packed"), "up_proj.weight_packed is missing"),
    "scale gone": (drop(UP + ".weight_scale"), "up_proj.weight_scale is missing"),
    "shape gone": (drop(UP + ".weight_shape"), "up_proj.weight_shape is missing"),
    "zeros gone": (drop(UP + ".weight_zero_point"), "up_proj.weight_zero_point is missing"),
    "words of another type": (
        put(UP + ".weight_packed", torch.zeros(3, 3)),
        r"up_proj.weight_packed must be int32 \[96, 8\], got float32 \[3, 3\]",
    ),
    "NaN": (lambda f: edit_tensors(f, poison), "up_proj: scales .* holds NaN or infinity"),
    "norm gone": (drop("model.norm.weight"), r"missing \['model.norm.weight'\]"),
    "head gone": (drop("lm_head.weight"), r"missing \['lm_head.weight'\]"),
    "norm of another shape": (
        put("model.norm.weight", torch.ones(63)),
        r"model.norm.weight is \[63\] in the file and \[64\] in the model's config",
    ),
    "norm of integers": (
        put("model.norm.weight", torch.ones(64, dtype=torch.int32)),
        r"model.norm.weight is torch.int32 in the file, and in the model torch.float32",
    ),
    "norm of 8 bits": (
        put("model.norm.weight", torch.ones(64).to(torch.float8_e4m3fn)),
        r"model.norm.weight is torch.float8_e4m3fn in the file",
    ),
    "layers without end": (
        change(num_hidden_layers=10**30),
        r"config.json says num_hidden_layers=10+, and the files hold 59 tensors",
    ),
    "layers too many": (
        change(num_hidden_layers=999),
        "a model with more than 1236 parameters, many more than the files hold",
    ),
    "words without end": (
        change(vocab_size=10**15),
        r"(embed_tokens|lm_head).weight is \[128, 64\] in the file and \[10+, 64\]",
    ),
    "type of no layer": (
        change(qkernels_layer_dtypes={"float32": ["model.norm"]}),
        "qkernels_layer_dtypes names 'model.norm', which is no quantized layer",
    ),
    "type that is none": (
        change(qkernels_layer_dtypes={"int8": [UP]}),
        "qkernels_layer_dtypes names 'int8', which is not one of float16",
    ),
    "types a list": (change(qkernels_layer_dtypes=[UP]), "qkernels_layer_dtypes must be an obj"),
    "bias gone": (
        drop(LAYER + "self_attn.q_proj.bias"),
        "q_proj has a bias in the model, and none in the file",
    ),
    "bias too many": (
        put(UP + ".bias", torch.zeros(96)),
        "up_proj has a bias in the file, and none in the model",
    ),
    "a tensor too many": (put("model.extra", torch.ones(1)), r"unexpected \['model.extra'\]"),
    "a layer too many": (
        put("model.layers.7.mlp.up_proj.weight_packed", torch.zeros(1, 1, dtype=torch.int32)),
        "layers.7.mlp.up_proj is quantized, but no config group names it",
    ),
    "zero points of symmetric weights": (
        put(LAYER + "mlp.down_proj.weight_zero_point", torch.ones(8, 3, dtype=torch.int32)),
        "down_proj.weight_zero_point is not zero, and the config says symmetric",
    ),
    "another width": (
        change(intermediate_size=128),
        r"down_proj is \[64, 96\] in the file and \[64, 128\] in the model's config",
    ),
    "a tied head that differs": (
        change(tie_word_embeddings=True),
        "embed_tokens.weight and lm_head",
    ),
    "generation config cut": (
        lambda f: (f / "generation_config.json").write_text('{"max'),
        "generation_config.json cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(saved, damage):
    edit, named = DAMAGES[damage]
    edit(saved)
    with pytest.raises(CheckpointError, match=named):
        qk.load_model(saved)


def test_what_changes_nothing_is_passed_over(saved):
    want = logits(qk.load_model(saved))
    for name in (
        LAYER + "self_attn.k_scale",
        LAYER + "self_attn.v_scale",
        LAYER + "self_attn.k_proj.output_scale",
        LAYER + "self_attn.rotary_emb.inv_freq",
    ):
        put(name, torch.ones(1))(saved)
    put(LAYER + "mlp.down_proj.weight_zero_point", torch.zeros(8, 3, dtype=torch.int32))(saved)
    put(UP + ".weight_g_idx", torch.full((64,), -1, dtype=torch.int32))(saved)
    change_quantization(
        kv_cache_scheme={"num_bits": 8}, version="0.19.0", provider="auto-round", sparsity_config={}
    )(saved)
    assert torch.equal(logits(qk.load_model(saved)), want)
