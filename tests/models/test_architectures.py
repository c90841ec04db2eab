"""A sample of the survey of architectures: a tiny model of each class, taken through everything."""

import pytest

pytest.importorskip("transformers", reason="models come from transformers")

from bench.survey.classes import model_classes
from bench.survey.row import WORKS
from bench.survey.trial import try_class

SAMPLE = (
    *("LlamaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM", "BloomForCausalLM"),
    *("FalconForCausalLM", "PhiForCausalLM", "Gemma3ForCausalLM", "GPTNeoXForCausalLM"),
    # Fused experts, the second and third with their two sizes the other way round.
    *("MixtralForCausalLM", "GptOssForCausalLM", "Llama4ForCausalLM", "DeepseekV3ForCausalLM"),
    *("MambaForCausalLM", "JambaForCausalLM", "RwkvForCausalLM"),
    *("BertForMaskedLM", "RobertaForMaskedLM", "DebertaV2ForMaskedLM", "AlbertForMaskedLM"),
    *("T5ForConditionalGeneration", "BartForConditionalGeneration"),
    *("WhisperForConditionalGeneration", "Wav2Vec2ForCTC"),
    *("ViTForImageClassification", "SiglipModel"),
)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_class_of_models_works(name, tmp_path):
    row = try_class(model_classes()[name], tmp_path)
    assert row.outcome == WORKS
    assert row.quantized > 0.3
    assert row.shares.keys() == row.skipped.keys()


def test_the_sample_is_of_25_classes_that_there_are():
    assert len(set(SAMPLE)) == 25 and set(SAMPLE) <= set(model_classes())
