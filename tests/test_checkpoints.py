import json

import pytest
import torch

import qkernels as qk
from qkernels import rounding
from qkernels.checkpoints import compressed_tensors, folders
from qkernels.errors import CheckpointError
from qkernels.weight import QuantizedWeight

transformers = pytest.importorskip("transformers", reason="models come from transformers")

SAVED = (
    *("w4a16-g64", "w4a16-g32-sym", "w3a16-g64", "w8a16", "w4a16-gtensor"),
    *("w8a8", "w8a8-static", "w8a8-tensor", "fp8-a8", "fp8e4m3-a16", "w4a8-g64-flat"),
)


def tiny_model(tied=True):
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=tied,
        attention_bias=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


TOKENS = torch.arange(24).view(1, 24)


@pytest.mark.parametrize("text", SAVED)
def test_a_layer_comes_back_exactly(text):
    scale = 0.05 if "static" in text else None
    before = rounding.quantize(
        torch.randn(40, 72), text, activation_scale=scale, bias=torch.randn(40)
    )
    tensors = compressed_tensors.write_layer(before)
    config = compressed_tensors.write_config({"up": before.scheme}, [])
    scheme = compressed_tensors.read_scheme(config["config_groups"]["group_0"])
    after = compressed_tensors.read_layer("up", tensors, scheme)
    assert after.scheme == before.scheme
    for name in ("codes", "scales", "zeros", "activation_scale", "bias"):
        a, b = getattr(before, name), getattr(after, name)
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_comes_back_exactly(tied, tmp_path):
    model = tiny_model(tied)
    qk.quantize_model(
        model, scheme="w4a16-g32", overrides={"*.down_proj": "w8a8", "*.o_proj": None}
    )
    want = model(TOKENS).logits
    qk.save_model(model, tmp_path / "out")
    loaded = qk.load_model(tmp_path / "out")
    assert torch.equal(loaded(TOKENS).logits, want)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert "lm_head" in config["ignore"] and "model.layers.0.self_attn.o_proj" in config["ignore"]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    weights = folders.read_weights(tmp_path / "out")
    assert len(weights) == 12
    assert all(isinstance(weight, QuantizedWeight) for weight in weights.values())


def test_the_package_that_defines_the_format_reads_it(tmp_path):
    """Unpacks our words with compressed-tensors itself, where it is installed."""
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers",
        reason="compressed-tensors is not installed",
    )
    weight = rounding.quantize(torch.randn(40, 64), "w4a16-g32-sym")
    tensors = compressed_tensors.write_layer(weight)
    codes = helpers.unpack_from_int32(tensors["weight_packed"], 4, torch.Size(weight.shape))
    assert torch.equal(codes.int() + 8, weight.codes.int())


@pytest.fixture
def saved(tmp_path):
    model = tiny_model()
    qk.quantize_model(model, scheme="w4a16-g32")
    folder = tmp_path / "out"
    qk.save_model(model, folder)
    return folder


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def edit_tensors(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


UP = "model.layers.0.mlp.up_proj"
PACKED = UP + ".weight_packed"


def poison(tensors):
    tensors[UP + ".weight_scale"][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "no .safetensors"),
        (truncate, "damaged or truncated"),
        (
            lambda f: edit_config(f, lambda c: c.pop("quantization_config")),
            "no quantization_config",
        ),
        (
            lambda f: edit_config(f, lambda c: c["quantization_config"].update(quant_method="foo")),
            "'foo'",
        ),
        (lambda f: edit_config(f, lambda c: c.update(model_type="nonesuch")), "no known model"),
        (
            lambda f: edit_tensors(f, lambda t: t.pop(UP + ".weight_packed")),
            "weight_packed is missing",
        ),
        (
            lambda f: edit_tensors(
                f, lambda t: t.update({UP + ".weight_packed": torch.zeros(3, 3)})
            ),
            "up_proj.weight_packed must be int32",
        ),
        (lambda f: edit_tensors(f, poison), "NaN or infinity"),
        (lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")), "model.norm.weight"),
    ],
)
def test_damage_is_named(saved, damage, named):
    damage(saved)
    with pytest.raises(CheckpointError, match=named):
        qk.load_model(saved)


def test_what_cannot_be_saved_is_named_and_nothing_is_written(saved, tmp_path):
    model = tiny_model()
    with pytest.raises(CheckpointError, match="no WQLinear"):
        qk.save_model(model, tmp_path / "dense")
    qk.quantize_model(model, scheme="nf4-g32")
    with pytest.raises(CheckpointError, match="nf4 codebooks"):
        qk.save_model(model, tmp_path / "nf4")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        qk.save_model(model, saved)
    with pytest.raises(CheckpointError, match="gguf"):
        qk.save_model(model, tmp_path / "x", format="gguf")
    assert not (tmp_path / "nf4").exists()
    assert not (tmp_path / "dense").exists()
