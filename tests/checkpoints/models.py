"""A small model for tests of whole folders."""

import json

import pytest
import torch

from tests.checkpoints.folders import edit_config, edit_tensors

transformers = pytest.importorskip("transformers", reason="models come from transformers")

TOKENS = torch.arange(24).view(1, 24)
LAYER = "model.layers.0."
UP = LAYER + "mlp.up_proj"


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


def logits(model, **inputs):
    with torch.no_grad():
        return model(TOKENS, **inputs).logits


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def put(name, tensor):
    return lambda folder: edit_tensors(folder, lambda t: t.update({name: tensor}))


def drop(name):
    return lambda folder: edit_tensors(folder, lambda t: t.pop(name))


def change(**values):
    return lambda folder: edit_config(folder, lambda config: config.update(values))


def change_quantization(**values):
    return lambda folder: edit_config(
        folder, lambda config: config["quantization_config"].update(values)
    )
