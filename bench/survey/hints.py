"""What the general rules for tiny configs and inputs do not find, by name of a config or model class.

A config's hints are fields to set after the rules, those of nested configs as "text_config.field".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel


def _mrope(*sections: int, **more: Any) -> dict[str, Any]:
    """Rotary positions in sections, which sum to half of the rotated part of a head."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}


_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_SECTIONS = _mrope(2, 3, 3)
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16}
_SWIN = {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 3]}
_SHARED_KEYS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
_BACKBONE = {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False}

CONFIGS: dict[str, dict[str, Any]] = {
    # Sizes that must fit each other in ways of their own.
    "BambaConfig": _MAMBA2 | {"attn_layer_indices": [1]},
    "GraniteMoeHybridConfig": _MAMBA2 | {"layer_types": ["linear_attention", "full_attention"]},
    "FalconH1Config": _MAMBA2 | {"mamba_d_ssm": 128},
    "Mamba2Config": {"num_heads": 8, "n_groups": 2},
    "NemotronHConfig": {"mamba_num_heads": 8, "n_groups": 2},
    "Zamba2Config": {"n_mamba_heads": 8, "mamba_headdim": 16},
    "LongcatFlashConfig": {"head_dim": 8, "zero_expert_num": 2},
    "xLSTMConfig": {"chunkwise_kernel": "chunkwise--native_autograd"},
    "ReformerConfig": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
    },
    "ReformerModelWithLMHead": {"is_decoder": True},
    "LEDConfig": {"attention_window": 4},
    "LongformerConfig": {"attention_window": 4},
    "MobileBertConfig": {"embedding_size": 32, "intra_bottleneck_size": 32},
    "RwkvConfig": {"rescale_every": 1},
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "ZambaConfig": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid"],
    },
    "Gemma3nTextConfig": _SHARED_KEYS
    | {"intermediate_size": 64, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
    # What the default config leaves open.
    "DbrxConfig": {"attn_config.rope_theta": 1e4},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "NemotronConfig": {"num_key_value_heads": 2},
    "EsmConfig": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 32},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 2,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 128,
        "split_ngram_parts": 1,
    },
    "XmodConfig": {"default_language": "en_XX"},
    "Wav2Vec2BertForCTC": {"vocab_size": 32},
    "Wav2Vec2ConformerForCTC": {"vocab_size": 32},
    "Blip2Config": {"image_token_index": 127},
    "AutoformerConfig": _SERIES,
    "InformerConfig": _SERIES,
    "TimeSeriesTransformerConfig": _SERIES,
    "CohereCompassTextConfig": {
        "rope_parameters": {"full_attention": _SECTIONS, "sliding_attention": _SECTIONS}
    },
    # Rotary positions in sections, for heads of 16.
    "Qwen2VLTextConfig": {"rope_parameters": _SECTIONS},
    "Qwen2_5_VLTextConfig": {"rope_parameters": _SECTIONS},
    "Qwen2VLConfig": {"text_config.rope_parameters": _SECTIONS},
    "Qwen2_5_VLConfig": {"text_config.rope_parameters": _SECTIONS},
    "Glm4vTextConfig": {"rope_parameters": _SECTIONS},
    "Glm4vConfig": {"text_config.rope_parameters": _SECTIONS},
    "Glm46VConfig": {"text_config.rope_parameters": _SECTIONS},
    "GlmOcrTextConfig": {"rope_parameters": _SECTIONS},
    "GlmOcrConfig": {"text_config.rope_parameters": _SECTIONS},
    "GlmImageTextConfig": {"rope_parameters": _SECTIONS},
    "GlmImageConfig": {"text_config.rope_parameters": _SECTIONS},
    "Glm4vMoeTextConfig": {"rope_parameters": _mrope(1, 1, 2, partial_rotary_factor=0.5)},
    "Glm4vMoeConfig": {
        "text_config.rope_parameters": _mrope(1, 1, 2, partial_rotary_factor=0.5)
    },
    "PaddleOCRTextConfig": {"rope_parameters": _SECTIONS},
    "PaddleOCRVLConfig": {"text_config.rope_parameters": _SECTIONS},
    "Cosmos3EdgeTextConfig": {"rope_parameters": _SECTIONS},
    "Cosmos3EdgeConfig": {"text_config.rope_parameters": _SECTIONS},
    "Ernie4_5_VLMoeTextConfig": {"rope_parameters": _mrope(3, 3, 2)},
    "Ernie4_5_VLMoeConfig": {"text_config.rope_parameters": _mrope(3, 3, 2)},
    # Images.
    "SwinConfig": _SWIN,
    "Swinv2Config": _SWIN | {"pretrained_window_sizes": [0, 0]},
    "DonutSwinConfig": _SWIN,
    "MaskFormerSwinConfig": _SWIN,
    "EfficientNetConfig": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 64},
    "BitConfig": {"num_groups": 4, "embedding_size": 16, "hidden_sizes": [16, 32, 64, 128]},
    "CvtConfig": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 1, 1]},
    "TextNetConfig": {"stem_out_channels": 16},
    "PerceiverConfig": {"num_latents": 8, "num_self_attends_per_block": 1},
    "SegGptConfig": {
        "num_hidden_layers": 4,
        "merge_index": 0,
        "intermediate_hidden_state_indices": [1, 2, 3],
        "image_size": [64, 32],
    },
    "LwDetrConfig": {"backbone_config.num_windows": 4},
    "AriaConfig": {"projector_patch_to_query_dict": {16: 4}},
    "Llama4VisionConfig": {
        "projector_input_dim": 64,
        "projector_output_dim": 64,
        "intermediate_size": 256,
        "vision_output_dim": 64,
    },
    "Llama4Config": {"vision_config.intermediate_size": 256},
    # Models made of two others.
    "EncoderDecoderConfig": {"encoder": "bert", "decoder": "bert"},
    "VisionEncoderDecoderConfig": {"encoder": "vit", "decoder": "gpt2"},
    "SpeechEncoderDecoderConfig": {"encoder": "wav2vec2", "decoder": "bert"},
    "VisionTextDualEncoderConfig": {"vision_config": "vit", "text_config": "bert"},
    "MusicgenConfig": {"text_encoder": "t5", "audio_encoder": "encodec"},
    "MusicgenMelodyConfig": {"text_encoder": "t5", "audio_encoder": "encodec"},
}

NESTED = {"encoder", "decoder", "vision_config", "text_config", "text_encoder", "audio_encoder"}
"""Fields whose hint is the type of a nested config, which is made tiny by the rules."""


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(10, 100, shape)


def _time_series(model: PreTrainedModel) -> dict[str, Any]:
    past, future = 8 + 3, 4
    return {
        "past_values": torch.randn(2, past),
        "past_time_features": torch.randn(2, past, model.config.num_time_features),
        "past_observed_mask": torch.ones(2, past),
        "future_values": torch.randn(2, future),
        "future_time_features": torch.randn(2, future, model.config.num_time_features),
    }


INPUTS: dict[str, Callable[[PreTrainedModel], dict[str, Any]]] = {
    "MusicgenForCausalLM": lambda model: {"input_ids": _ids(2 * 4, 6)},
    "MusicgenMelodyForCausalLM": lambda model: {"input_ids": _ids(2 * 4, 6)},
    "LxmertModel": lambda model: {
        "input_ids": _ids(2, 12),
        "visual_feats": torch.randn(2, 5, model.config.visual_feat_dim),
        "visual_pos": torch.randn(2, 5, model.config.visual_pos_dim),
    },
    "AutoformerModel": _time_series,
    "InformerModel": _time_series,
    "TimeSeriesTransformerModel": _time_series,
    "Pix2StructForConditionalGeneration": lambda model: {
        "flattened_patches": torch.rand(2, 6, model.config.vision_config.patch_embed_hidden_size + 2),
        "decoder_input_ids": _ids(2, 5),
    },
}
