"""Calibration by random tokens."""

import copy

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.calibration.synthetic import random_tokens
from qkernels.errors import CheckpointError, LayerError
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
    with pytest.raises(LayerError, match="calibration is a list of batches, got a text"):
        qk.quantize_model(tiny_model(), "rtn", "w4a16-g32", calibration="text")
    with pytest.raises(LayerError, match="does not say which layer embeds"):
        qk.quantize_model(Model(), "rtn", "w4a16-g24", calibration="random")


def test_hqq_draws_tokens_where_no_batches_are_given():
    one, two, alike = tiny_model(), tiny_model(), tiny_model()
    qk.quantize_model(one, "hqq", "w4a16-g32")
    qk.quantize_model(two, "hqq", "w4a16-g32", calibration=random_tokens(two))
    qk.quantize_model(alike, "hqq(grid=mse)", "w4a16-g32")
    ids = torch.arange(20)[None]
    assert torch.equal(one(ids).logits, two(ids).logits)
    assert not torch.equal(one(ids).logits, alike(ids).logits)


def test_hqq_goes_without_inputs_where_a_model_embeds_no_tokens():
    one = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    two = copy.deepcopy(one)
    qk.quantize_model(one, "hqq", "w4a16-g16")
    qk.quantize_model(two, "hqq(grid=mse)", "w4a16-g16")
    x = torch.randn(3, 64)
    assert torch.equal(one(x), two(x))


def test_static_activations_are_not_calibrated_on_drawn_tokens_unasked():
    with pytest.raises(LayerError, match=r"has static activations .*: pass calibration batches"):
        qk.quantize_model(tiny_model(), "hqq(zeros=integer)", "w4afp8-g32-static")


def test_hqq_counts_inputs_by_the_loss():
    plain, weighed = tiny_model(), tiny_model()
    batches = random_tokens(plain)
    qk.quantize_model(plain, "hqq", "w3a16-g32", calibration=batches)
    qk.quantize_model(weighed, "guided+hqq", "w3a16-g32", calibration=batches)
    ids = torch.arange(20)[None]
    assert not torch.equal(plain(ids).logits, weighed(ids).logits)


def test_models_of_two_texts_are_refused():
    model = tiny_model()
    model.config.is_encoder_decoder = True
    with pytest.raises(LayerError, match="takes tokens of two texts"):
        random_tokens(model)


def test_a_format_without_real_zero_points_is_refused_at_once():
    model = tiny_model()
    with pytest.raises(CheckpointError, match=r"integer zero points alone, such as hqq\(zeros="):
        qk.quantize_model(model, "hqq", "w4a16-g32", format="awq")
    assert not any(isinstance(module, qk.WQLinear) for module in model.modules())
