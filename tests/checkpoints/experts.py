"""Small mixtures of experts, and folders of them as other packages write these: a module an expert.

The names are those that Transformers itself saves a dense model under. The words are packed here,
by the layouts that AutoAWQ and AutoGPTQ document, and not by the package under test.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", reason="models come from transformers")

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
EXPERTS = 3
TOKENS = torch.arange(24).view(1, 24)

TWO_OF = {"num_experts": EXPERTS, "num_experts_per_tok": 2}

CLASSES = {
    "Mixtral": {"num_local_experts": EXPERTS},
    "Qwen2Moe": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 32,
    },
    "Qwen3Moe": {"num_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 8},
    "Olmoe": {"num_experts": EXPERTS, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "DeepseekV3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "Phimoe": {"num_local_experts": EXPERTS},
    "Jamba": {
        "num_experts": EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "MiniMaxM2": {
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "rotary_dim": 8,
    },
}


def mixture(name, seed=0, **changes):
    """A random model of a class of `CLASSES`."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **CLASSES[name], **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def save_dense(model, folder):
    """The folder that Transformers writes, and its tensors."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def is_expert(name):
    return ".experts." in name and name.endswith(".weight")


def rewrite(folder, quantize, section, chosen=is_expert, dtype=torch.float32):
    """Quantizes the `chosen` tensors of a saved folder in place.

    Args:
        quantize: (layer's name, weight [N, K]) -> (tensors by their names below the layer's, the
            dequantized weight).

    Returns the dense tensors that the folder stands for.
    """
    stored, dense = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not chosen(name):
            stored[name] = dense[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        tensors, dense[name] = quantize(layer, tensor.float())
        stored |= {f"{layer}.{part}": value.contiguous() for part, value in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = section
    (folder / "config.json").write_text(json.dumps(config))
    return dense


def dense_model(folder, dense, tmp_path):
    """The model that Transformers makes of dense tensors under the same names."""
    tmp_path.mkdir()
    save_file(dense, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    kind = getattr(transformers, config["architectures"][0])
    model, info = kind.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def in_groups(weight, group):
    """Rounds a weight to 4 bits: integers [N, K], scales and zero points [N, G], all numbers."""
    n, k = weight.shape
    grouped = weight.view(n, k // group, group)
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    scales = ((high - low) / 15).half().float().clamp(min=1e-4)
    zeros = (-low / scales).round().clamp(1, 15)
    integers = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    back = (integers - zeros[..., None]) * scales[..., None]
    return integers.view(n, k).int(), scales, zeros.int(), back.view(n, k)


def shifted(values, order):
    """Eight numbers of 4 bits along the last dimension into one word."""
    words = torch.zeros((*values.shape[:-1], values.shape[-1] // 8), dtype=torch.int64)
    for place, number in enumerate(order):
        words |= values[..., number::8].long() << (4 * place)
    return (words - ((words >> 31) << 32)).int()


AWQ_SECTION = {
    "quant_method": "awq",
    "version": "gemm",
    "bits": 4,
    "group_size": 16,
    "zero_point": True,
}


def awq(layer, weight):
    integers, scales, zeros, back = in_groups(weight, 16)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        "qweight": shifted(integers.t(), order),
        "qzeros": shifted(zeros.t(), order),
        "scales": scales.t().half(),
    }
    return tensors, back


GPTQ_SECTION = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": True}


def gptq(layer, weight, order_of=lambda layer: 0):
    """In groups by activations: `order_of` says of what seed the order of a layer's columns is."""
    k = weight.shape[1]
    perm = torch.randperm(k, generator=torch.Generator().manual_seed(order_of(layer)))
    integers, scales, zeros, back = in_groups(weight[:, perm], 16)
    restored, index = torch.empty_like(integers), torch.empty(k, dtype=torch.int32)
    restored[:, perm], index[perm] = integers, (torch.arange(k) // 16).int()
    dense = torch.empty_like(back)
    dense[:, perm] = back
    tensors = {
        "qweight": shifted(restored, range(8)).t(),
        "qzeros": shifted((zeros - 1).t(), range(8)),
        "scales": scales.t().half(),
        "g_idx": index,
    }
    return tensors, dense


EIGHT_BITS_SECTION = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def eight_bits(layer, weight):
    largest = weight.abs().amax(1)
    integers = (weight / largest[:, None] * 127).round()
    back = integers * (largest / 127)[:, None]
    return {"weight": integers.to(torch.int8), "SCB": largest}, back


FLOAT8_SECTION = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True},
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "strategy": "tensor",
                "symmetric": True,
                "dynamic": False,
            },
        }
    },
    "ignore": ["lm_head"],
}


def float8(layer, weight, input_scale=lambda layer: 0.5):
    scale = (weight.abs().max() / 448).reshape(1)
    numbers = (weight / scale).to(torch.float8_e4m3fn)
    tensors = {
        "weight": numbers,
        "weight_scale": scale,
        "input_scale": torch.tensor([input_scale(layer)]),
    }
    return tensors, numbers.float() * scale


def outputs(model):
    with torch.no_grad():
        return model(TOKENS)[0]


def renamed_models():
    """Models whose names Transformers 5 has changed, or whose layers it has taken apart."""
    text = {k: v for k, v in SIZES.items() if k != "moe_intermediate_size"}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
        "projection_dim": 32,
    }
    llava = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=60,
    )
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    qwen = transformers.Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
        },
    )
    return {
        "llava": lambda: transformers.LlavaForConditionalGeneration(llava),
        "qwen2_vl": lambda: transformers.Qwen2VLForConditionalGeneration(qwen),
        # One stored layer for two or four of the model.
        "hrm": lambda: transformers.HrmTextForCausalLM(transformers.HrmTextConfig(**text)),
        "nomic": lambda: transformers.NomicBertModel(transformers.NomicBertConfig(**text)),
    }
