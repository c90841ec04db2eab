"""One model of each kind of architecture: quantize, run, save, load, run again; all of them with
`python -m bench.architectures`."""

import pytest
import torch

from bench.survey.classes import model_classes
from bench.survey.row import WORKS
from bench.survey.trial import try_class

SAMPLE = {
    "LlamaForCausalLM": 0.89,
    "GPT2LMHeadModel": 0.98,
    "OPTForCausalLM": 0.97,
    "Gemma3ForConditionalGeneration": 0.79,
    "MixtralForCausalLM": 0.95,
    "Qwen3MoeForCausalLM": 0.95,
    "DeepseekV3ForCausalLM": 0.94,
    "GptOssForCausalLM": 0.94,
    "Llama4ForCausalLM": 1.00,
    "MambaForCausalLM": 0.92,
    "Mamba2ForCausalLM": 0.87,
    "FalconMambaForCausalLM": 0.92,
    "JambaForCausalLM": 0.92,
    "RwkvForCausalLM": 0.92,
    "T5ForConditionalGeneration": 0.99,
    "BartForConditionalGeneration": 0.98,
    "BertForMaskedLM": 0.97,
    "RobertaForMaskedLM": 0.97,
    "DebertaV2ForMaskedLM": 0.97,
    "DistilBertForMaskedLM": 0.97,
    "AlbertForMaskedLM": 0.97,
    "WhisperForConditionalGeneration": 0.84,
    "Wav2Vec2ForCTC": 0.50,
    "SiglipModel": 0.80,
    "ViTForImageClassification": 0.79,
}
"""Class -> the share of its tiny model's parameters outside of embeddings that is quantized."""

WITHOUT_HEAD = ("Wav2Vec2ForCTC", "ViTForImageClassification", "SiglipModel")
"""Those that do not say that a layer is their output head."""

WITHOUT_GENERATE = tuple(name for name in SAMPLE if name.endswith("MaskedLM")) + WITHOUT_HEAD


@pytest.mark.parametrize("name", SAMPLE)
def test_a_class_works(name, tmp_path):
    row = try_class(model_classes()[name], tmp_path)
    assert row.outcome == WORKS
    assert row.quantized == pytest.approx(SAMPLE[name], abs=0.01)
    assert row.head == (None if name in WITHOUT_HEAD else "quantized")
    assert row.generates == ("has no generate" if name in WITHOUT_GENERATE else None)
    assert row.shares.keys() == row.skipped.keys()
    assert not row.sensitive


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "WhisperForConditionalGeneration"])
def test_a_class_works_in_bf16(name, tmp_path):
    assert try_class(model_classes()[name], tmp_path, torch.bfloat16).outcome == WORKS


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("Llama4ForCausalLM", "model.layers.0.feed_forward.router", "a subclass of nn.Linear"),
        ("WhisperForConditionalGeneration", "proj_out", "embedding model.decoder.embed_tokens"),
        ("BertForMaskedLM", "cls.predictions.decoder", "embedding bert.embeddings.word_embeddings"),
        (
            "SiglipModel",
            "vision_model.head.attention.out_proj",
            "nn.MultiheadAttention multiplies by its weight without calling it",
        ),
        ("Wav2Vec2ForCTC", "wav2vec2.feature_extractor.conv_layers.1.conv", "convolutions are not"),
    ],
)
def test_what_is_left_alone_has_a_reason(name, layer, reason, tmp_path):
    row = try_class(model_classes()[name], tmp_path)
    assert reason in row.skipped[layer]
