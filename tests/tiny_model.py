"""A random Llama small enough for any test, and a tokenizer of one token a character."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 128
HIDDEN, BLOCKS, LINEAR_LAYERS = 64, 2, 14


def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )


def tiny_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config()).to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """ASCII characters as themselves; everything else is token 0."""
    tokenizer = Tokenizer(WordLevel({chr(i): i for i in range(VOCABULARY)}, unk_token=chr(0)))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=chr(0), chat_template=template
    )


def write_folder(folder: Path) -> Path:
    """A Hugging Face folder with the model and its tokenizer."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_gguf(
    path: Path,
    kind=None,
    dense: Sequence[str] = (),
    more: Mapping[str, np.ndarray] | None = None,
    tied: bool = False,
) -> Path:
    """The model as a GGUF file, and a byte-level tokenizer with two merges.

    Args:
        kind: the `gguf.GGMLQuantizationType` of its matrices; None is Q8_0.
        dense: parts of names of matrices that are fp32.
        more: tensors to add.
        tied: without a head of its own.
    """
    import gguf

    kind = gguf.GGMLQuantizationType.Q8_0 if kind is None else kind

    config, state = tiny_config(), tiny_model().state_dict()
    if tied:
        del state["lm_head.weight"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    tokens = [f"<{i}>" if i < 33 else chr(i) for i in range(VOCABULARY)]
    tokens[3:5] = ["ab", "cd"]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 3 else 1 for i in range(VOCABULARY)])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, BLOCKS)
    for name, tensor in state.items():
        known = names.get_name(name, try_suffixes=(".weight",))
        values = tensor.float().numpy()
        if values.ndim == 2 and not any(part in known for part in dense):
            packed = gguf.quants.quantize(values, kind)
            writer.add_tensor(known, packed, raw_dtype=kind)
        else:
            writer.add_tensor(known, values.astype(np.float32))
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
