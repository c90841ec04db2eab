"""What ties tensors: the model's code, its config, or only whoever made the model."""

import copy
import io

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.errors import CheckpointError
from tests.tiny_model import tiny_config

transformers = pytest.importorskip("transformers", reason="models come from transformers")

TOKENS = torch.arange(24).view(1, 24)
pytestmark = pytest.mark.filterwarnings("ignore:saved in the qkernels format")


def llama(tied=True):
    torch.manual_seed(0)
    config = tiny_config()
    config.tie_word_embeddings = tied
    return transformers.LlamaForCausalLM(config).eval(), "lm_head"


def bert():
    """Its head has a bias, which is tied too."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model = transformers.BertForMaskedLM(config).eval()
    nn.init.normal_(model.cls.predictions.bias)
    return model, "cls.predictions.decoder"


def bart():
    """It has its embedding under three names."""
    torch.manual_seed(0)
    sides = ("encoder", "decoder")
    config = transformers.BartConfig(
        vocab_size=128,
        d_model=64,
        max_position_embeddings=64,
        **{f"{side}_layers": 1 for side in sides},
        **{f"{side}_ffn_dim": 96 for side in sides},
        **{f"{side}_attention_heads": 4 for side in sides},
    )
    return transformers.BartForConditionalGeneration(config).eval(), "lm_head"


MODELS = {"llama": llama, "bert": bert, "bart": bart}


def with_head(name, scheme="w8a16"):
    """A model whose head is quantized beside the embedding that it was tied to."""
    model, head = MODELS[name]()
    qk.quantize_model(model, scheme="w8a16", overrides={head: scheme})
    return model, head


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def reloaded(model, folder):
    qk.save_model(model, folder)
    return qk.load_model(folder)


@pytest.mark.parametrize("way", ["itself", "copied", "pickled", "reloaded"])
@pytest.mark.parametrize("name", MODELS)
def test_tying_leaves_a_quantized_head_alone(name, way, tmp_path):
    model, head = with_head(name)
    ways = {"copied": copy.deepcopy, "pickled": pickled}
    ways["reloaded"] = lambda model: reloaded(model, tmp_path / "out")
    model = ways.get(way, lambda model: model)(model)
    layer, want = model.get_submodule(head), logits(model)
    model.tie_weights()
    model.init_weights()
    assert model.get_submodule(head) is layer and torch.equal(logits(model), want)
    embedding = model.get_input_embeddings().weight
    assert all(
        getattr(module, "weight", None) is embedding
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.weight.shape == embedding.shape
    )


@pytest.mark.parametrize("format", ["qkernels", "compressed-tensors"])
@pytest.mark.parametrize("name", MODELS)
def test_embeddings_are_resized_beside_a_quantized_head(name, format, tmp_path):
    model, head = with_head(name)
    want = logits(model)
    model.resize_token_embeddings(140)
    resized = logits(model)
    assert isinstance(model.get_submodule(head), nn.Linear) and resized.shape[-1] == 140
    # The head is dense again, and tied again.
    assert model.get_submodule(head).weight is model.get_input_embeddings().weight
    assert (resized[..., :128] - want).norm() / want.norm() < 0.02
    qk.save_model(model, tmp_path / "out", format=format)
    assert torch.equal(logits(qk.load_model(tmp_path / "out")), resized)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_resized_beside_quantized_layers(tied, tmp_path):
    model, _ = llama(tied)
    qk.quantize_model(model, scheme="w4a16-g32")
    want = logits(model)
    model.resize_token_embeddings(140)
    assert torch.equal(logits(model)[..., :128], want)
    assert torch.equal(logits(reloaded(model, tmp_path / "out")), logits(model))


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_is_saved_again(name, tmp_path):
    model, _ = with_head(name)
    want = logits(model)
    for number in range(3):
        model = reloaded(model, tmp_path / str(number))
        assert torch.equal(logits(model), want)


@pytest.mark.parametrize("save", ["save_model", "save_pretrained"])
def test_what_only_this_model_ties_is_stored_under_each_name(save, tmp_path):
    model, _ = llama(tied=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    qk.quantize_model(model, scheme="w8a16")
    want = logits(model)
    if save == "save_model":
        qk.save_model(model, tmp_path / "out")
    else:
        model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(qk.load_model(tmp_path / "out")), want)


def test_what_the_config_calls_one_tensor_and_is_not_is_refused(tmp_path):
    model, _ = llama()
    model.lm_head.weight = nn.Parameter(torch.randn(128, 64))
    qk.quantize_model(model, scheme="w8a16")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight are one tensor .*tie_weights"):
        qk.save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.config.tie_word_embeddings = False
    assert torch.equal(logits(reloaded(model, tmp_path / "out")), logits(model))
