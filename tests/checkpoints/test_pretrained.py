"""`save_pretrained` of Transformers writes what `save_model` writes, or refuses."""

import copy
import io
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.errors import CheckpointError
from tests.checkpoints.folders import edit_config
from tests.tiny_model import tiny_config

transformers = pytest.importorskip("transformers", reason="models come from transformers")

TOKENS = torch.arange(24).view(1, 24)
pytestmark = pytest.mark.filterwarnings("ignore:saved in the qkernels format")


def quantized(scheme="w4a16-g32", tied=False, **options):
    config = tiny_config()
    config.tie_word_embeddings = tied
    model = transformers.LlamaForCausalLM(config).eval()
    qk.quantize_model(model, scheme=scheme, **options)
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("head", [None, "w8a16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("scheme", "format"),
    [
        ("w4a16-g32", "compressed-tensors"),
        ("w4a16-g128", "compressed-tensors"),
        ("w4a16-g24", "qkernels"),
        ("nf4-g32", "qkernels"),
    ],
)
def test_a_model_comes_back_exactly(scheme, format, tied, head, tmp_path):
    model = quantized(scheme, tied, overrides={"lm_head": head})
    want = logits(model)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert torch.equal(logits(model), want)
    for name in ("one", "shards"):
        assert config_of(tmp_path / name)["quantization_config"]["quant_method"] == format
        loaded = qk.load_model(tmp_path / name)
        assert torch.equal(logits(loaded), want)
        assert loaded.config.tie_word_embeddings == (
            tied and (head is None or format == "qkernels")
        )
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(qk.load_model(tmp_path / "again")), want)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", [None, "w8a16"])
def test_transformers_itself_reads_it(tmp_path, head, tied):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    model = quantized(tied=tied, overrides={"lm_head": head, "*.down_proj": "w8a16-g128"})
    model.save_pretrained(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    error = (logits(theirs) - logits(model)).norm() / logits(model).norm()
    assert error < 1e-5
    for name, layer in model.named_modules():
        if isinstance(layer, qk.WQLinear):
            assert torch.equal(theirs.get_submodule(name).weight, layer.dequantize()), name


def test_it_says_where_only_our_own_format_holds_the_layers(tmp_path):
    with pytest.warns(UserWarning, match=r"in the qkernels format, since .*qkernels\.load_model"):
        quantized("nf4-g32").save_pretrained(tmp_path / "out")


def test_a_model_that_is_loaded_with_other_names_than_it_has(tmp_path):
    config = transformers.MixtralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        vocab_size=128,
    )
    # Transformers stores each expert by itself and holds them as one tensor.
    transformers.MixtralForCausalLM(config).eval().save_pretrained(tmp_path / "dense")
    model = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "dense")
    qk.quantize_model(model, scheme="w8a16")
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(qk.load_model(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("said", [5, {"float32": 5}, {"float32": [["lm_head"]]}])
def test_types_of_layers_that_are_none_are_an_error_for_every_class(tmp_path, said):
    qk.save_model(quantized(), tmp_path / "out", format="qkernels")
    edit_config(tmp_path / "out", lambda config: config.update(qkernels_layer_dtypes=said))
    with pytest.raises(CheckpointError, match=r"qkernels_layer_dtypes.* must be"):
        transformers.AutoModel.from_pretrained(tmp_path / "out")


ORDERS = {
    "this package first": "import qkernels, transformers",
    "models first": "from transformers import LlamaForCausalLM; import qkernels, transformers",
    "quantizers first": "import qkernels; from transformers.quantizers import HfQuantizer",
}


@pytest.mark.parametrize("order", ORDERS)
def test_transformers_takes_no_random_weights_where_this_package_is_imported(order, tmp_path):
    model = quantized("nf4-g32")
    qk.save_model(model, tmp_path / "out", format="qkernels")
    torch.save(logits(model), tmp_path / "logits")
    script = f"""
{ORDERS[order]}
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r})
with torch.no_grad():
    found = model(torch.arange(24).view(1, 24)).logits
assert torch.equal(found, torch.load({str(tmp_path / "logits")!r}))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.language = transformers.LlamaForCausalLM(tiny_config()).eval()
        self.other = transformers.LlamaForCausalLM(tiny_config()).eval()


def test_a_model_inside_another_is_saved_right(tmp_path):
    pair = Pair()
    qk.quantize_model(pair, scheme="w4a16-g32", include=["language.*"])
    pair.language.save_pretrained(tmp_path / "language")
    loaded = qk.load_model(tmp_path / "language")
    assert torch.equal(logits(loaded), logits(pair.language))
    pair.other.save_pretrained(tmp_path / "other")
    assert "quantization_config" not in config_of(tmp_path / "other")


def test_layers_that_were_made_dense_again_are_saved_so(tmp_path):
    model = quantized()
    model.save_pretrained(tmp_path / "quantized")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, qk.WQLinear):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            dense.weight.data = layer.dequantize()
            model.set_submodule(name, dense)
    model.save_pretrained(tmp_path / "dense")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(loaded), logits(model))


def test_the_model_is_copied_and_pickled_as_before(tmp_path):
    model = quantized()
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copied, torch.load(file, weights_only=False)):
        other.save_pretrained(tmp_path / "out")
        assert torch.equal(logits(qk.load_model(tmp_path / "out")), logits(model))


def test_other_models_import_no_transformers():
    script = """
import sys, torch, qkernels
model = torch.nn.Sequential(torch.nn.Linear(64, 64))
qkernels.quantize_model(model, scheme="w4a16-g32")
sys.exit("transformers" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_tensors_that_transformers_leaves_out_are_saved(tmp_path):
    config = transformers.MarianConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = transformers.MarianMTModel(config).eval()
    qk.quantize_model(model, scheme="w8a16")
    ids = {name: torch.arange(5, 15)[None] for name in ("input_ids", "decoder_input_ids")}
    with torch.no_grad():
        want = model(**ids).logits
        model.save_pretrained(tmp_path / "out")
        assert torch.equal(qk.load_model(tmp_path / "out")(**ids).logits, want)
