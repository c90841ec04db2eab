"""Calibration by random tokens."""

import pytest
import torch

import qkernels as qk
from qkernels.calibration.synthetic import random_tokens
from qkernels.errors import LayerError
from tests.plain_model import Model
from tests.tiny_model import VOCABULARY, tiny_model


def test_tokens_are_of_the_vocabulary_and_the_same_again():
    model = tiny_model()
    batches = random_tokens(model, sequences=6, length=500)
    # As long as the model takes.
    assert [tuple(ids.shape) for ids in batches] == [(4, 128), (2, 128)]
    ids = torch.cat(batches)
    assert ids.min() >= 0 and ids.max() < VOCABULARY and len(ids.unique()) > 0.9 * VOCABULARY
    assert torch.equal(torch.cat(random_tokens(model, 6, 500)), ids)
    assert not torch.equal(torch.cat(random_tokens(model, 6, 500, seed=1)), ids)


def test_a_model_is_calibrated_without_data():
    one, two = tiny_model(), tiny_model()
    qk.quantize_model(one, "gptq", "w4a16-g32", calibration="random")
    qk.quantize_model(two, "gptq", "w4a16-g32", calibration=random_tokens(two))
    ids = torch.arange(20)[None]
    assert torch.equal(one(ids).logits, two(ids).logits)


def test_other_words_and_models_without_an_embedding_are_refused():
    with pytest.raises(LayerError, match="calibration is 'text': give batches;"):
        qk.quantize_model(tiny_model(), "rtn", "w4a16-g32", calibration="text")
    with pytest.raises(LayerError, match="does not say which layer embeds"):
        qk.quantize_model(Model(), "rtn", "w4a16-g24", calibration="random")
