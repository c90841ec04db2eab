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
_CROSS = {"decoder.is_decoder": True, "decoder.add_cross_attention": True}
_DETR = {
    "backbone": None,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 64, 64],
        "depths": [1, 1, 1, 1],
        "out_features": ["stage2", "stage3", "stage4"],
    },
    "num_queries": 8,
}

CONFIGS: dict[str, dict[str, Any]] = {
    # Sizes that must fit each other in ways of their own.
    "BambaConfig": _MAMBA2 | {"attn_layer_indices": [1]},
    "GraniteMoeHybridConfig": _MAMBA2 | {"layer_types": ["linear_attention", "full_attention"]},
    "FalconH1Config": _MAMBA2 | {"mamba_d_ssm": 128},
    "Mamba2Config": {"num_heads": 8, "n_groups": 2},
    "NemotronHConfig": {"mamba_num_heads": 8, "n_groups": 2},
    "Zamba2Config": {"n_mamba_heads": 8, "mamba_headdim": 16},
    "LongcatFlashConfig": {"head_dim": 8, "zero_expert_num": 2},
    "xLSTMConfig": {"qk_dim_factor": 1.0},
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
    "DbrxConfig": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "NemotronConfig": {"num_key_value_heads": 2},
    "EsmConfig": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 32},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
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
    "EfficientNetConfig": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    "AlignConfig": {
        "vision_config.width_coefficient": 0.25,
        "vision_config.depth_coefficient": 0.25,
        "vision_config.hidden_dim": 320,
    },
    "BitConfig": {"num_groups": 4, "embedding_size": 16, "hidden_sizes": [16, 32, 64, 128]},
    "CvtConfig": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
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
    "InstructBlipConfig": {"image_token_index": 127},
    "VipLlavaConfig": {"vision_feature_layers": [-2, -1]},
    "Granite4VisionConfig": {"text_config": "granite"},
    "Step3p7Config": {"text_config.sliding_window": 4},
    "ClapConfig": {
        "audio_config.window_size": 4,
        "audio_config.depths": [1, 1],
        "audio_config.num_attention_heads": [2, 4],
    },
    "Gemma4AudioConfig": {"subsampling_conv_channels": [32, 16]},
    "SamConfig": {"vision_config.num_pos_feats": 32},
    "SamHQConfig": {"vision_config.num_pos_feats": 32},
    "Sam2HieraDetConfig": {"hidden_size": 16},
    "Sam2VisionConfig": {"backbone_config.hidden_size": 16},
    "Sam2Config": {"vision_config.backbone_config.hidden_size": 16},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
    "Gemma3Config": {"mm_tokens_per_image": 4},
    "ShieldGemma2Config": {"mm_tokens_per_image": 4},
    "LlavaNextConfig": {"image_grid_pinpoints": [[32, 32], [32, 64]]},
    "LlavaNextVideoConfig": {"image_grid_pinpoints": [[32, 32], [32, 64]]},
    "LlavaOnevisionConfig": {"image_grid_pinpoints": [[32, 32], [32, 64]]},
    "LayoutLMv3Config": {"coordinate_size": 12, "shape_size": 8},
    "LiltConfig": {"hidden_size": 96, "num_attention_heads": 4},
    "MimiConfig": {"upsample_groups": 64},
    "CsmConfig": {"codec_config.upsample_groups": 64},
    "MoonshineStreamingConfig": {"num_key_value_heads": 4},
    "CohereCompassConfig": {
        "text_config.rope_parameters": {
            "full_attention": _SECTIONS,
            "sliding_attention": _SECTIONS,
        }
    },
    "DeepseekOcr2Config": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 120} | {f"IMGIMG{c}Z": 100 + i for i, c in enumerate("ABCDEFGH")}},
    "DetrConfig": _DETR,
    "ConditionalDetrConfig": _DETR,
    "DabDetrConfig": _DETR,
    "DeformableDetrConfig": _DETR,
    "TableTransformerConfig": _DETR,
    "PerceiverForImageClassificationFourier": {"num_cross_attention_heads": 1},
    "PerceiverForImageClassificationConvProcessing": {"num_cross_attention_heads": 1},
    "FunAsrNanoConfig": {"adaptor_config.intermediate_size": 16},
    # Models made of two others.
    "EncoderDecoderConfig": {"encoder": "bert", "decoder": "bert", **_CROSS},
    "VisionEncoderDecoderConfig": {"encoder": "vit", "decoder": "gpt2", **_CROSS},
    "SpeechEncoderDecoderConfig": {"encoder": "wav2vec2", "decoder": "bert", **_CROSS},
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


def _pixels(model: PreTrainedModel) -> dict[str, Any]:
    size = model.config.image_size if "Learned" not in type(model).__name__ else 224
    return {"pixel_values": torch.randn(1, 3, size, size)}


def _idefics(model: PreTrainedModel) -> dict[str, Any]:
    size = model.config.vision_config.image_size
    return {
        "input_ids": _ids(2, 12),
        "attention_mask": torch.ones(2, 12, dtype=torch.long),
        "pixel_values": torch.randn(2, 1, 3, size, size),
        "image_attention_mask": torch.ones(2, 12, 1, dtype=torch.long),
    }


def _kosmos(model: PreTrainedModel) -> dict[str, Any]:
    size = model.config.vision_config.image_size
    mask = torch.zeros(2, 80, dtype=torch.long)
    mask[:, 2 : 2 + model.config.latent_query_num] = 1
    return {
        "pixel_values": torch.randn(2, 3, size, size),
        "input_ids": _ids(2, 80),
        "image_embeds_position_mask": mask,
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
    "PerceiverModel": lambda model: {"inputs": torch.randn(2, 12, model.config.d_model)},
    "PerceiverForImageClassificationLearned": _pixels,
    "PerceiverForImageClassificationFourier": _pixels,
    "PerceiverForImageClassificationConvProcessing": _pixels,
    "SpeechEncoderDecoderModel": lambda model: {
        "input_values": torch.randn(2, 4000),
        "decoder_input_ids": _ids(2, 5),
    },
    "MusicgenModel": lambda model: {"input_ids": _ids(2 * 4, 6)},
    "MusicgenMelodyModel": lambda model: {"input_ids": _ids(2 * 4, 6)},
    "TimesFmModel": lambda model: {
        "past_values": torch.randn(2, 64),
        "past_values_padding": torch.zeros(2, 64, dtype=torch.long),
        "freq": torch.zeros(2, 1, dtype=torch.long),
    },
    "TimesFm2_5Model": lambda model: {
        "past_values": torch.randn(2, 64),
        "past_values_padding": torch.zeros(2, 64, dtype=torch.long),
    },
    "Blip2QFormerModel": lambda model: {
        "query_embeds": torch.randn(2, 8, model.config.hidden_size),
        "encoder_hidden_states": torch.randn(2, 5, model.config.encoder_hidden_size),
    },
    "IdeficsForVisionText2Text": _idefics,
    "IdeficsModel": _idefics,
    "Kosmos2ForConditionalGeneration": _kosmos,
    "Kosmos2Model": _kosmos,
    "BrosModel": lambda model: {"input_ids": _ids(2, 12), "bbox": torch.rand(2, 12, 4)},
    "UdopForConditionalGeneration": lambda model: {
        "input_ids": _ids(2, 12),
        "bbox": torch.rand(2, 12, 4),
        "decoder_input_ids": _ids(2, 5),
    },
    "UdopModel": lambda model: {
        "input_ids": _ids(2, 12),
        "bbox": torch.rand(2, 12, 4),
        "decoder_input_ids": _ids(2, 5),
    },
    "ClapModel": lambda model: {"input_ids": _ids(2, 12), "input_features": torch.randn(2, 1, 64, 64)},
    "DecisionTransformerModel": lambda model: {
        "states": torch.randn(2, 4, model.config.state_dim),
        "actions": torch.randn(2, 4, model.config.act_dim),
        "rewards": torch.randn(2, 4, 1),
        "returns_to_go": torch.randn(2, 4, 1),
        "timesteps": torch.arange(4)[None].repeat(2, 1),
        "attention_mask": torch.ones(2, 4),
    },
    "PatchTSTModel": lambda model: {
        "past_values": torch.randn(2, model.config.context_length, model.config.num_input_channels)
    },
    "PatchTSMixerModel": lambda model: {
        "past_values": torch.randn(2, model.config.context_length, model.config.num_input_channels)
    },
    "SpeechT5Model": lambda model: {
        "input_values": torch.randn(2, 12, 64),
        "decoder_input_values": torch.randn(2, 5, 64),
    },
    "InformerModel": _time_series,
    "TimeSeriesTransformerModel": _time_series,
    "Pix2StructForConditionalGeneration": lambda model: {
        "flattened_patches": torch.rand(2, 6, model.config.vision_config.patch_embed_hidden_size + 2),
        "decoder_input_ids": _ids(2, 5),
    },
}
