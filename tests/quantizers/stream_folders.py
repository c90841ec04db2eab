"""Folders of tiny models of several families, and what is compared of folders."""

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

VOCABULARY = 64
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "Llama": SIZES,
    "Qwen3": {**SIZES, "head_dim": 16, "tie_word_embeddings": True},
    "GPT2": {"n_embd": 64, "n_head": 4, "n_layer": 3, "vocab_size": VOCABULARY, "n_positions": 64},
    "Mixtral": {**SIZES, "num_hidden_layers": 2, "num_local_experts": 3},
    "T5": {
        "d_model": 64,
        "d_ff": 96,
        "d_kv": 16,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": VOCABULARY,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0,
    },
}
"""Name -> what differs from the defaults of its config."""

_CLASSES = {"GPT2": "GPT2LMHeadModel", "T5": "T5ForConditionalGeneration"}


def batches(family="Llama"):
    torch.manual_seed(5)
    tokens = [torch.randint(0, VOCABULARY, (1, length)) for length in (24, 24, 16)]
    if family == "T5":
        return [{"input_ids": t, "decoder_input_ids": t[:, :8]} for t in tokens]
    return tokens


def write_model(folder: Path, family="Llama", dtype=torch.float32, shard="60KB", **more) -> Path:
    """A random model with outliers and biases that are not zero, in several files."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family], **more})
    kind = getattr(transformers, _CLASSES.get(family, f"{family}ForCausalLM"))
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, each of which is in one file."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        assert found.keys().isdisjoint(tensors)
        found |= tensors
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}
