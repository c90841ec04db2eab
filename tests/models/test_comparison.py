"""Comparison with the dense model: KL divergence and top-1 by hand, embeddings, wrong pairs."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertModel

import qkernels as qk
from qkernels.errors import QuantizationError
from qkernels.models import comparison, evaluation
from qkernels.models.comparison import compare_encoders, compare_models, passages_of
from tests.bounds import FROBENIUS_BOUND
from tests.tiny_model import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer

BOUND = FROBENIUS_BOUND[torch.float32]


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (333,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def quantized():
    model = tiny_model()
    qk.quantize_model(model, "rtn", "w2a16-g32")
    return model


class Table(nn.Module):
    """A language model whose logits are a row of a table for each token."""

    def __init__(self, logits):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(logits))

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.table[input_ids])


def test_a_model_is_at_no_distance_from_itself(tokens):
    model = tiny_model()
    result = compare_models(model, model, tokens, window=64, batch=2)
    assert result.kl_divergence == 0
    assert result.top1_agreement == 1
    assert result.perplexity == result.dense_perplexity
    assert (result.tokens, result.windows, result.total_tokens) == (333, 6, 333)
    assert result.layers == [] and result.not_compared == {}


@pytest.mark.parametrize("batch", [1, 3])
def test_divergence_and_agreement_are_those_of_the_definition(tokens, quantized, batch):
    dense = tiny_model()
    result = compare_models(dense, quantized, tokens, window=100, batch=batch)
    divergence, agreed = 0.0, 0
    with torch.no_grad():
        for ids in tokens.split(100):
            p = dense(ids[None]).logits[0].double().log_softmax(-1)
            q = quantized(ids[None]).logits[0].double().log_softmax(-1)
            divergence += float(F.kl_div(q, p, log_target=True, reduction="sum"))
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
    # The divergence is a small difference of the logarithms that are taken in fp32.
    assert result.kl_divergence == pytest.approx(divergence / 333, abs=BOUND, rel=BOUND)
    assert result.kl_divergence > 100 * BOUND
    assert result.top1_agreement == agreed / 333
    for value, model in ((result.perplexity, quantized), (result.dense_perplexity, dense)):
        expected = evaluation.perplexity(model, tokens, window=100)
        assert value == pytest.approx(expected.perplexity, rel=BOUND)


def test_divergence_by_hand():
    # After token 0: (3/4, 1/4) against (1/4, 3/4). After token 1: (1/2, 1/2) twice.
    three = math.log(3)
    dense, other = Table([[three, 0.0], [0.0, 0.0]]), Table([[0.0, three], [0.0, 0.0]])
    result = compare_models(dense, other, torch.tensor([0, 1]))
    assert result.kl_divergence == pytest.approx(0.5 * math.log(3) / 2)
    assert result.top1_agreement == 0.5
    assert result.dense_perplexity == pytest.approx(4)
    assert result.perplexity == pytest.approx(4 / 3)


def test_the_divergence_is_from_the_dense_model():
    # KL(dense || quantized) of (1/2, 1/2) and (9/10, 1/10), which is not that of the exchange.
    dense, other = Table([[0.0, 0.0]]), Table([[math.log(9), 0.0]])
    ids = torch.tensor([0, 0])
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert compare_models(dense, other, ids).kl_divergence == pytest.approx(expected)
    exchanged = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert compare_models(other, dense, ids).kl_divergence == pytest.approx(exchanged)


def test_tokens_that_are_ruled_out():
    ids = torch.tensor([0, 0])
    dense = Table([[0.0, 0.0, -math.inf]])
    assert compare_models(dense, dense, ids).kl_divergence == 0
    assert compare_models(dense, Table([[0.0, 0.0, 0.0]]), ids).kl_divergence == pytest.approx(
        math.log(1.5)
    )
    assert compare_models(dense, Table([[0.0, -math.inf, 0.0]]), ids).kl_divergence == math.inf


def test_long_windows_are_summed_in_slices_without_losing_any():
    assert comparison._LOGIT_ROWS * 2 + 1 == 129
    generator = torch.Generator().manual_seed(1)
    dense, other = (Table(torch.randn(50, 50, generator=generator).tolist()) for _ in range(2))
    ids = torch.randint(50, (129,), generator=generator)
    result = compare_models(dense, other, ids)
    p, q = (model.table.detach()[ids].double().log_softmax(-1) for model in (dense, other))
    expected = F.kl_div(q, p, log_target=True, reduction="sum") / 129
    assert result.kl_divergence == pytest.approx(float(expected), rel=BOUND)
    loss = F.nll_loss(q[:-1], ids[1:])
    assert result.perplexity == pytest.approx(math.exp(loss), rel=BOUND)


def test_nan_stays_visible(tokens):
    broken = tiny_model()
    broken.lm_head.weight.data[5, 5] = math.nan
    result = compare_models(tiny_model(), broken, tokens, window=64)
    assert math.isnan(result.kl_divergence)
    assert math.isnan(result.perplexity)
    assert math.isfinite(result.dense_perplexity)


def test_windows_are_those_of_the_perplexity(tokens, quantized):
    seen: list[tuple[int, int]] = []
    result = compare_models(
        tiny_model(),
        quantized,
        tokens,
        window=50,
        max_windows=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    expected = evaluation.perplexity(quantized, tokens, window=50, max_windows=2)
    assert result.perplexity == pytest.approx(expected.perplexity, rel=BOUND)
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_other_vocabularies(tokens):
    config = tiny_config()
    config.vocab_size = 256
    other = type(tiny_model())(config).eval()
    with pytest.raises(QuantizationError, match="vocabularies of 128 and 256 tokens"):
        compare_models(tiny_model(), other, tokens, window=64)
    with pytest.raises(QuantizationError, match="vocabularies of 2 and 3 tokens"):
        compare_models(Table([[0.0] * 2]), Table([[0.0] * 3]), torch.tensor([0, 0]))


def test_wrong_requests(tokens, quantized):
    with pytest.raises(QuantizationError, match="windows of 129 tokens exceed"):
        compare_models(tiny_model(), quantized, tokens, window=129)


def tiny_encoder(**changes) -> BertModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    return BertModel(BertConfig(**(sizes | changes))).eval()


def test_encoders_are_compared_by_the_cosine_of_mean_hidden_states():
    dense, other = tiny_encoder(), tiny_encoder()
    qk.quantize_model(other, "rtn", "w3a16-g32")
    passages = [torch.arange(5, 20), torch.arange(40, 100), torch.tensor([7])]
    result = compare_encoders(dense, other, passages, layers=True)
    with torch.no_grad():
        cosines = [
            float(
                F.cosine_similarity(
                    dense(ids[None]).last_hidden_state.mean(1),
                    other(ids[None]).last_hidden_state.mean(1),
                )
            )
            for ids in passages
        ]
    assert result.cosine == pytest.approx(sum(cosines) / 3, rel=BOUND)
    assert result.least_cosine == pytest.approx(min(cosines), rel=BOUND)
    assert result.least_cosine < result.cosine < 1 - 1e-5
    assert (result.passages, result.tokens) == (3, 76)
    # The pooler does not run for hidden states, though the model runs it.
    assert len(result.layers) == 13
    same = compare_encoders(dense, dense, passages)
    assert same.cosine == pytest.approx(1, abs=BOUND)


def test_a_head_of_an_encoder_does_not_matter():
    model = tiny_model()
    ids = torch.arange(9)
    with torch.no_grad():
        expected = model.model(ids[None]).last_hidden_state[0].double().mean(0)
    assert torch.equal(comparison.embedding(model, ids), expected)


def test_wrong_encoders():
    dense = tiny_encoder()
    with pytest.raises(QuantizationError, match="no passage"):
        compare_encoders(dense, dense, [])
    with pytest.raises(QuantizationError, match="65 tokens exceed the model's context, 64"):
        compare_encoders(dense, dense, [torch.arange(65)])
    with pytest.raises(QuantizationError, match="embed in 64 and 32 numbers"):
        compare_encoders(dense, tiny_encoder(hidden_size=32), [torch.arange(9)])


def test_passages_are_paragraphs():
    text = "one\n\n two\nlines \n\n\n\nthree, which is long\n\nfour"
    passages = passages_of(tiny_tokenizer(), text, longest=9)
    assert ["".join(map(chr, ids)) for ids in passages] == [
        *("one", "two\nlines", "three, wh", "four")
    ]
    chosen = passages_of(tiny_tokenizer(), text, most=2)
    assert ["".join(map(chr, ids)) for ids in chosen] == ["two\nlines", "four"]
