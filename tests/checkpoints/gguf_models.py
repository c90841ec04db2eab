"""Small models as GGUF files, written by the gguf package: names, keys and types are its own."""

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf", reason="GGUF files are written by the gguf package")
transformers = pytest.importorskip("transformers", reason="models come from transformers")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}
MIXTURE = {
    "moe_intermediate_size": 32,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}

KINDS = {
    "llama": ("Llama", "LLAMA", {}),
    "qwen2": ("Qwen2", "QWEN2", {}),
    "qwen3": ("Qwen3", "QWEN3", {"head_dim": 16}),
    "qwen2moe": (
        "Qwen2Moe",
        "QWEN2MOE",
        {**MIXTURE, "norm_topk_prob": False, "shared_expert_intermediate_size": 64},
    ),
    "qwen3moe": ("Qwen3Moe", "QWEN3MOE", {**MIXTURE, "head_dim": 16}),
    "phi3": ("Phi3", "PHI3", {"vocab_size": 32064}),
    "gemma2": ("Gemma2", "GEMMA2", {"head_dim": 16, "tie_word_embeddings": True}),
    "starcoder2": ("Starcoder2", "STARCODER2", {}),
    "stablelm": ("StableLm", "STABLELM", {}),
    "nemotron": ("Nemotron", "NEMOTRON", {}),
    "gpt2": ("GPT2", "GPT2", {}),
    "bloom": ("Bloom", "BLOOM", {}),
    "falcon": ("Falcon", "FALCON", {"num_key_value_heads": 1}),
}


def random_model(kind):
    name, _, more = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **more})
    ending = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = getattr(transformers, name + ending)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def write(path, kind, tensor_type="Q8_0", type_of=None, more=None, keys=None):
    """A random model of `KINDS`.

    Rows are in the order of Transformers: what a file's order makes of them is for its reader, and
    two readers of one file must agree.

    Args:
        type_of: tensor's name in the file -> its type, where it is not `tensor_type`.
        more: tensors to add.
        keys: numbers and texts to add under keys of the architecture.
    """
    _, arch, _ = KINDS[kind]
    model = random_model(kind)
    config = model.config
    arch = gguf.MODEL_ARCH[arch]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    heads = config.num_attention_heads
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 256)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_layer_norm_eps(1e-5)
    if "rope.freq_base" not in (keys or {}):
        writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    if kind in ("qwen3", "qwen3moe", "gemma2"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if kind in ("qwen2moe", "qwen3moe"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        if kind == "qwen2moe":
            writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    for key, value in (keys or {}).items():
        add_key = writer.add_string if isinstance(value, str) else writer.add_float32
        add_key(f"{gguf.MODEL_ARCH_NAMES[arch]}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges([])
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        values = tensor.float().numpy()
        if kind == "gpt2" and values.ndim == 2 and ".h." in name:
            values = values.T
        for known, part in _parts(names, name, values):
            chosen = (type_of or {}).get(known, tensor_type)
            if part.ndim < 2 or "_norm" in known or "ffn_gate_inp" in known:
                chosen = "F32"
            add(writer, known, part, chosen)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer, name, values, kind):
    values = np.ascontiguousarray(values, dtype=np.float32)
    if kind == "F32":
        writer.add_tensor(name, values)
        return
    packed, number = _packed(values, kind)
    writer.add_tensor(name, packed, raw_dtype=number)


def _packed(values, kind):
    number = gguf.GGMLQuantizationType[kind]
    flat = gguf.quants.quantize(values.reshape(-1, values.shape[-1]), number)
    return flat.reshape(*values.shape[:-1], -1), number


def reference(kind, tensor_type="Q8_0", type_of=None):
    """The dense model of the numbers in a file of `write`; of kinds whose rows files do not
    reorder."""
    model = random_model(kind)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[KINDS[kind][1]], 2)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            parts = []
            for known, part in _parts(names, name, tensor.float().numpy()):
                chosen = (type_of or {}).get(known, tensor_type)
                if part.ndim > 1 and "_norm" not in known and "ffn_gate_inp" not in known:
                    part = gguf.dequantize(*_packed(part, chosen)) if chosen != "F32" else part
                parts.append(torch.from_numpy(np.array(part)))
            tensor.copy_(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])
    return model


def _parts(names, name, values):
    known = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if known is None:
        # Bloom's files are made of the model without its head.
        known = names.get_name(name.removeprefix("transformer."), try_suffixes=(".weight", ".bias"))
    if name.endswith("gate_up_proj") and values.ndim == 3:
        block = name.split(".")[2]
        gate, up = np.split(values, 2, axis=1)
        return [
            (f"blk.{block}.ffn_gate_exps.weight", gate),
            (f"blk.{block}.ffn_up_exps.weight", up),
        ]
    if values.ndim == 3 and not name.endswith(".weight"):
        return [(f"{known}.weight", values)]
    assert known is not None, name
    # The gate of a shared expert is a row there.
    return [(known, values[0] if "gate_inp_shexp" in known else values)]
