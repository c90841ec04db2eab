"""What the rules for tiny configs and inputs do not find, by the name of a config or a class.

Hints of configs are fields to set after the rules: see `shrink.tiny_config`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from bench.survey.inputs import Inputs, ids


def _sections(*sizes: int, **more: Any) -> dict[str, Any]:
    """Rotary positions in sections, which sum to half of the rotated part of a head."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sizes), **more}


_SECTIONS = _sections(2, 3, 3)
_SECTIONS_OF_HALF = _sections(1, 1, 2, partial_rotary_factor=0.5)
_BY_KIND = {"full_attention": _SECTIONS, "sliding_attention": _SECTIONS}
_IMAGE_FIRST = _sections(3, 3, 2)
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16}
_SWIN = {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 3]}
_ONE_TILE = {"image_grid_pinpoints": [[32, 32], [32, 64]]}
_CROSS = {"decoder.is_decoder": True, "decoder.add_cross_attention": True}
_NARROW = {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320}
_DETR = {
    # The default backbone is one of timm.
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
}
_VOCABULARY_OF_CODES = {"<image>": 120} | {f"IMGIMG{'ABCDEFGH'[i]}Z": 100 + i for i in range(8)}

CONFIGS: dict[str, dict[str, Any]] = {
    # Sizes that must fit each other in ways of their own.
    "BambaConfig": _MAMBA2 | {"attn_layer_indices": [1]},
    "FalconH1Config": _MAMBA2 | {"mamba_d_ssm": 128},
    "GraniteMoeHybridConfig": _MAMBA2 | {"layer_types": ["linear_attention", "full_attention"]},
    "Mamba2Config": {"num_heads": 8, "n_groups": 2},
    "NemotronHConfig": {"mamba_num_heads": 8, "n_groups": 2},
    "Zamba2Config": {"n_mamba_heads": 8, "mamba_headdim": 16},
    "LongcatFlashConfig": {"head_dim": 8, "zero_expert_num": 2},
    "xLSTMConfig": {"qk_dim_factor": 1.0},
    "LEDConfig": {"attention_window": 4},
    "LongformerConfig": {"attention_window": 4},
    "MobileBertConfig": {"embedding_size": 32, "intra_bottleneck_size": 32},
    "LiltConfig": {"hidden_size": 96},
    "MimiConfig": {"upsample_groups": 64},
    "CsmConfig": {"codec_config.upsample_groups": 64},
    "FunAsrNanoConfig": {"adaptor_config.intermediate_size": 16},
    "Gemma4AudioConfig": {"subsampling_conv_channels": [32, 16]},
    "LayoutLMv3Config": {"coordinate_size": 12, "shape_size": 8},
    "ReformerConfig": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
    },
    # Kinds of layers.
    "RwkvConfig": {"rescale_every": 1},
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "ZambaConfig": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid"],
    },
    "Gemma3nTextConfig": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": 96,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    # What the default config leaves open.
    "AutoformerConfig": _SERIES,
    "InformerConfig": _SERIES,
    "TimeSeriesTransformerConfig": _SERIES,
    "DbrxConfig": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "DeepseekOcr2Config": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "EsmConfig": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 32},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "MoonshineStreamingConfig": {"num_key_value_heads": 4},
    "NemotronConfig": {"num_key_value_heads": 2},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 128,
        "split_ngram_parts": 1,
    },
    "ReformerModelWithLMHead": {"is_decoder": True},
    "Step3p7Config": {"text_config.sliding_window": 4},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
    "Wav2Vec2BertForCTC": {"vocab_size": 32},
    "Wav2Vec2ConformerForCTC": {"vocab_size": 32},
    "XmodConfig": {"default_language": "en_XX"},
    # Rotary positions in sections, for heads of 16.
    "CohereCompassTextConfig": {"rope_parameters": _BY_KIND},
    "CohereCompassConfig": {"text_config.rope_parameters": _BY_KIND},
    "Cosmos3EdgeTextConfig": {"rope_parameters": _SECTIONS},
    "Cosmos3EdgeConfig": {"text_config.rope_parameters": _SECTIONS},
    "Ernie4_5_VLMoeTextConfig": {"rope_parameters": _IMAGE_FIRST},
    "Ernie4_5_VLMoeConfig": {"text_config.rope_parameters": _IMAGE_FIRST},
    "Glm46VConfig": {"text_config.rope_parameters": _SECTIONS},
    "Glm4vTextConfig": {"rope_parameters": _SECTIONS},
    "Glm4vConfig": {"text_config.rope_parameters": _SECTIONS},
    "Glm4vMoeTextConfig": {"rope_parameters": _SECTIONS_OF_HALF},
    "Glm4vMoeConfig": {"text_config.rope_parameters": _SECTIONS_OF_HALF},
    "GlmImageTextConfig": {"rope_parameters": _SECTIONS},
    "GlmImageConfig": {"text_config.rope_parameters": _SECTIONS},
    "GlmOcrTextConfig": {"rope_parameters": _SECTIONS},
    "GlmOcrConfig": {"text_config.rope_parameters": _SECTIONS},
    "PaddleOCRTextConfig": {"rope_parameters": _SECTIONS},
    "PaddleOCRVLConfig": {"text_config.rope_parameters": _SECTIONS},
    "Qwen2VLTextConfig": {"rope_parameters": _SECTIONS},
    "Qwen2VLConfig": {"text_config.rope_parameters": _SECTIONS},
    "Qwen2_5_VLTextConfig": {"rope_parameters": _SECTIONS},
    "Qwen2_5_VLConfig": {"text_config.rope_parameters": _SECTIONS},
    # Images.
    "AlignConfig": {f"vision_config.{name}": value for name, value in _NARROW.items()},
    "AriaConfig": {"projector_patch_to_query_dict": {16: 4}},
    "BitConfig": {"num_groups": 4, "embedding_size": 16, "hidden_sizes": [16, 32, 64, 128]},
    "Blip2Config": {"image_token_index": 127},
    "ChameleonConfig": {"vocabulary_map": _VOCABULARY_OF_CODES},
    "ConditionalDetrConfig": _DETR,
    "CvtConfig": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
    "DabDetrConfig": _DETR,
    "DeformableDetrConfig": _DETR,
    "DetrConfig": _DETR,
    "DonutSwinConfig": _SWIN,
    "EfficientNetConfig": _NARROW,
    "Gemma3Config": {"mm_tokens_per_image": 4},
    "InstructBlipConfig": {"image_token_index": 127},
    "Llama4Config": {"vision_config.intermediate_size": 256},
    "Llama4VisionConfig": {"intermediate_size": 256},
    "LlavaNextConfig": _ONE_TILE,
    "LlavaNextVideoConfig": _ONE_TILE,
    "LlavaOnevisionConfig": _ONE_TILE,
    "MaskFormerSwinConfig": _SWIN,
    "PerceiverConfig": {"num_latents": 8, "num_self_attends_per_block": 1},
    "PerceiverForImageClassificationConvProcessing": {"num_cross_attention_heads": 1},
    "PerceiverForImageClassificationFourier": {"num_cross_attention_heads": 1},
    "SamConfig": {"vision_config.num_pos_feats": 32},
    "SamHQConfig": {"vision_config.num_pos_feats": 32},
    "ShieldGemma2Config": {"mm_tokens_per_image": 4},
    "SwinConfig": _SWIN,
    "Swinv2Config": _SWIN | {"pretrained_window_sizes": [0, 0]},
    "TableTransformerConfig": _DETR,
    "TextNetConfig": {"stem_out_channels": 16},
    "VipLlavaConfig": {"vision_feature_layers": [-2, -1]},
    # Models made of two others.
    "EncoderDecoderConfig": {"encoder": "bert", "decoder": "bert", **_CROSS},
    "SpeechEncoderDecoderConfig": {"encoder": "wav2vec2", "decoder": "bert", **_CROSS},
    "VisionEncoderDecoderConfig": {"encoder": "vit", "decoder": "gpt2", **_CROSS},
    "VisionTextDualEncoderConfig": {"vision_config": "vit", "text_config": "bert"},
    "MusicgenConfig": {"text_encoder": "t5", "audio_encoder": "encodec"},
    "MusicgenMelodyConfig": {"text_encoder": "t5", "audio_encoder": "encodec"},
}


def _codes(model: PreTrainedModel) -> Inputs:
    """A row for each of four codebooks."""
    return {"input_ids": ids(2 * 4, 6)}


def _boxes(model: PreTrainedModel) -> Inputs:
    return {"input_ids": ids(2, 12), "bbox": torch.rand(2, 12, 4), "decoder_input_ids": ids(2, 5)}


def _pixels(model: PreTrainedModel) -> Inputs:
    size = model.config.image_size
    return {"pixel_values": torch.randn(2, 3, size, size)}


def _series(model: PreTrainedModel) -> Inputs:
    config = model.config
    shape = (2, config.context_length, config.num_input_channels)
    return {"past_values": torch.randn(shape)}


def _padded_series(model: PreTrainedModel) -> Inputs:
    return {
        "past_values": torch.randn(2, 64),
        "past_values_padding": torch.zeros(2, 64, dtype=torch.long),
    }


def _series_and_future(model: PreTrainedModel) -> Inputs:
    config = model.config
    past, future = config.context_length + max(config.lags_sequence), config.prediction_length
    return {
        "past_values": torch.randn(2, past),
        "past_time_features": torch.randn(2, past, config.num_time_features),
        "past_observed_mask": torch.ones(2, past),
        "future_values": torch.randn(2, future),
        "future_time_features": torch.randn(2, future, config.num_time_features),
    }


def _idefics(model: PreTrainedModel) -> Inputs:
    size = model.config.vision_config.image_size
    return {
        "input_ids": ids(2, 12),
        "attention_mask": torch.ones(2, 12, dtype=torch.long),
        "pixel_values": torch.randn(2, 1, 3, size, size),
        "image_attention_mask": torch.ones(2, 12, 1, dtype=torch.long),
    }


def _kosmos(model: PreTrainedModel) -> Inputs:
    size, queries = model.config.vision_config.image_size, model.config.latent_query_num
    mask = torch.zeros(2, queries + 12, dtype=torch.long)
    mask[:, 2 : queries + 2] = 1
    return {
        "pixel_values": torch.randn(2, 3, size, size),
        "input_ids": ids(2, queries + 12),
        "image_embeds_position_mask": mask,
    }


def _decisions(model: PreTrainedModel) -> Inputs:
    return {
        "states": torch.randn(2, 4, model.config.state_dim),
        "actions": torch.randn(2, 4, model.config.act_dim),
        "rewards": torch.randn(2, 4, 1),
        "returns_to_go": torch.randn(2, 4, 1),
        "timesteps": torch.arange(4).expand(2, 4),
        "attention_mask": torch.ones(2, 4),
    }


def _image_regions(model: PreTrainedModel) -> Inputs:
    return {
        "input_ids": ids(2, 12),
        "visual_feats": torch.randn(2, 5, model.config.visual_feat_dim),
        "visual_pos": torch.randn(2, 5, model.config.visual_pos_dim),
    }


def _flat_patches(model: PreTrainedModel) -> Inputs:
    # The first two numbers of a patch are its row and column.
    width = model.config.vision_config.patch_embed_hidden_size + 2
    return {"flattened_patches": torch.rand(2, 6, width), "decoder_input_ids": ids(2, 5)}


def _queries(model: PreTrainedModel) -> Inputs:
    return {
        "query_embeds": torch.randn(2, 8, model.config.hidden_size),
        "encoder_hidden_states": torch.randn(2, 5, model.config.encoder_hidden_size),
    }


INPUTS: dict[str, Callable[[PreTrainedModel], Inputs]] = {
    "AutoformerModel": _series_and_future,
    "Blip2QFormerModel": _queries,
    "BrosModel": lambda model: {"input_ids": ids(2, 12), "bbox": torch.rand(2, 12, 4)},
    "DecisionTransformerModel": _decisions,
    "IdeficsForVisionText2Text": _idefics,
    "IdeficsModel": _idefics,
    "InformerModel": _series_and_future,
    "Kosmos2ForConditionalGeneration": _kosmos,
    "Kosmos2Model": _kosmos,
    "LxmertModel": _image_regions,
    "MusicgenForCausalLM": _codes,
    "MusicgenMelodyForCausalLM": _codes,
    "MusicgenMelodyModel": _codes,
    "MusicgenModel": _codes,
    "PatchTSMixerModel": _series,
    "PatchTSTModel": _series,
    "PerceiverForImageClassificationConvProcessing": _pixels,
    "PerceiverForImageClassificationFourier": _pixels,
    "PerceiverModel": lambda model: {"inputs": torch.randn(2, 12, model.config.d_model)},
    "Pix2StructForConditionalGeneration": _flat_patches,
    "SpeechEncoderDecoderModel": lambda model: {
        "input_values": torch.randn(2, 4000),
        "decoder_input_ids": ids(2, 5),
    },
    "SpeechT5Model": lambda model: {
        "input_values": torch.randn(2, 12, model.config.hidden_size),
        "decoder_input_values": torch.randn(2, 5, model.config.hidden_size),
    },
    "TimeSeriesTransformerModel": _series_and_future,
    "TimesFm2_5Model": _padded_series,
    "TimesFmModel": lambda model: (
        _padded_series(model) | {"freq": torch.zeros(2, 1, dtype=torch.long)}
    ),
    "UdopForConditionalGeneration": _boxes,
    "UdopModel": _boxes,
}
