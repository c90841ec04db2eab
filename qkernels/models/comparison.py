"""How far a quantized model is from its dense one: KL divergence, top-1 agreement, embeddings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.errors import QuantizationError
from qkernels.models.evaluation import batches_of, check_request, evenly_spaced, windows_of
from qkernels.models.layer_noise import LayerNoise, NoiseMeter

_LOGIT_ROWS = 64
"""Tokens whose logits of both models are held in fp32 at a time."""


@dataclass(frozen=True)
class ModelComparison:
    """A quantized language model beside its dense one, on the same text.

    Attributes:
        perplexity, dense_perplexity: as `evaluation.perplexity` has them.
        kl_divergence: mean over the tokens of KL(dense || quantized), in nats.
        top1_agreement: the part of the tokens after which both models predict the same one.
        tokens: tokens of text in the windows that were run.
        layers: the signal to noise of each quantized layer, where it was asked for.
        not_compared: layers that were not measured -> the reason.
    """

    perplexity: float
    dense_perplexity: float
    kl_divergence: float
    top1_agreement: float
    tokens: int
    windows: int
    total_tokens: int
    seconds: float
    layers: list[LayerNoise] = field(default_factory=list)
    not_compared: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EmbeddingComparison:
    """A quantized encoder beside its dense one, on the same passages.

    Attributes:
        cosine, least_cosine: between the two embeddings of a passage, the means of its tokens' last
            hidden states; the mean over the passages, and the least.
        layers, not_compared: as in `ModelComparison`.
    """

    cosine: float
    least_cosine: float
    passages: int
    tokens: int
    seconds: float
    layers: list[LayerNoise] = field(default_factory=list)
    not_compared: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def compare_models(
    dense: nn.Module,
    quantized: nn.Module,
    token_ids: Tensor,
    *,
    window: int = 512,
    batch: int = 1,
    max_windows: int | None = None,
    layers: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ModelComparison:
    """Runs two transformers causal language models over `token_ids`, window by window.

    Sums are in float64, over log-softmax in float32. Beside the models, the logits of one batch of
    each are held. Arguments as in `evaluation.perplexity`.

    Args:
        dense: what `quantized` was made from; on any device.
        layers: measure the signal to noise of each quantized layer too: half the time again.

    Raises:
        QuantizationError: as `evaluation.perplexity`, and for models with other vocabularies.
    """
    for model in (dense, quantized):
        check_request(model, token_ids, window, batch)
    _check_vocabularies(_configured_vocabulary(dense), _configured_vocabulary(quantized))
    chosen = windows_of(token_ids, window, max_windows)
    device, home = next(quantized.parameters()).device, next(dense.parameters()).device
    meter = NoiseMeter(dense, quantized) if layers else None
    sums = _Sums()
    start, done = time.perf_counter(), 0
    with meter or nullcontext():
        for rows in batches_of(chosen, batch):
            if progress is not None:
                progress(done, len(chosen))
            expected = dense(input_ids=rows.to(home), use_cache=False).logits
            got = quantized(input_ids=rows.to(device), use_cache=False).logits
            _check_vocabularies(expected.shape[-1], got.shape[-1])
            for row, ids in enumerate(rows.to(device)):
                sums.add(expected[row].to(device), got[row], ids)
            done += len(rows)
    if progress is not None:
        progress(done, len(chosen))
    predicted = sums.tokens - len(chosen)
    return ModelComparison(
        perplexity=_exponential(sums.loss / predicted),
        dense_perplexity=_exponential(sums.dense_loss / predicted),
        kl_divergence=sums.divergence / sums.tokens,
        top1_agreement=sums.agreed / sums.tokens,
        tokens=sums.tokens,
        windows=len(chosen),
        total_tokens=len(token_ids),
        seconds=time.perf_counter() - start,
        layers=meter.results() if meter else [],
        not_compared=meter.not_compared if meter else {},
    )


@torch.no_grad()
def compare_encoders(
    dense: nn.Module,
    quantized: nn.Module,
    passages: Sequence[Tensor],
    *,
    layers: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> EmbeddingComparison:
    """Embeds passages by two transformers models that give hidden states, one after the other.

    Args:
        passages: token ids, int64 [T] each: see `passages_of`.
        layers, progress: as in `compare_models`.

    Raises:
        QuantizationError: without a passage, for an id outside the vocabulary, or models of other
            sizes.
    """
    if not passages:
        raise QuantizationError("there is no passage to embed")
    for model in (dense, quantized):
        check_request(model, torch.cat(list(passages)), max(2, *map(len, passages)), 1)
    _check_vocabularies(_configured_vocabulary(dense), _configured_vocabulary(quantized))
    meter = NoiseMeter(dense, quantized) if layers else None
    start, cosines = time.perf_counter(), []
    with meter or nullcontext():
        for number, ids in enumerate(passages):
            if progress is not None:
                progress(number, len(passages))
            expected, got = embedding(dense, ids), embedding(quantized, ids)
            if expected.shape != got.shape:
                raise QuantizationError(
                    f"the models embed in {len(expected)} and {len(got)} numbers: they are not the "
                    "same model"
                )
            cosines.append(float(torch.cosine_similarity(expected, got, dim=0)))
    if progress is not None:
        progress(len(passages), len(passages))
    return EmbeddingComparison(
        cosine=sum(cosines) / len(cosines),
        # min() may pass over NaN.
        least_cosine=float(torch.tensor(cosines, dtype=torch.float64).min()),
        passages=len(passages),
        tokens=sum(map(len, passages)),
        seconds=time.perf_counter() - start,
        layers=meter.results() if meter else [],
        not_compared=meter.not_compared if meter else {},
    )


@torch.no_grad()
def embedding(model: Any, token_ids: Tensor) -> Tensor:
    """The mean of the last hidden states of a passage [T], as sentence-transformers take it: fp64
    [H] on the CPU."""
    body = getattr(model, "base_model", model)
    ids = token_ids[None].to(next(model.parameters()).device)
    return body(input_ids=ids).last_hidden_state[0].double().mean(dim=0).cpu()


def passages_of(
    tokenizer: Any, text: str, *, longest: int | None = None, most: int | None = None
) -> list[Tensor]:
    """The paragraphs of a text as token ids, int64 [T] each, with the tokenizer's special tokens.

    Args:
        longest: tokens of a passage; longer ones are cut.
        most: so many of them, evenly spaced over the text, instead of all.
    """
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    cut = {} if longest is None else {"truncation": True, "max_length": longest}
    return [
        torch.tensor(tokenizer(paragraph, verbose=False, **cut)["input_ids"], dtype=torch.int64)
        for paragraph in evenly_spaced(paragraphs, most)
    ]


@dataclass
class _Sums:
    """Over the tokens so far."""

    tokens: int = 0
    divergence: float = 0.0
    agreed: int = 0
    loss: float = 0.0
    dense_loss: float = 0.0

    def add(self, dense: Tensor, quantized: Tensor, ids: Tensor) -> None:
        """A window: logits [T, V] of both models, and its tokens [T]."""
        for start in range(0, len(ids), _LOGIT_ROWS):
            stop = min(start + _LOGIT_ROWS, len(ids))
            p = dense[start:stop].float().log_softmax(dim=1)
            q = quantized[start:stop].float().log_softmax(dim=1)
            # A token that the dense model rules out adds nothing.
            terms = (p.exp() * (p - q)).masked_fill_(p.isneginf(), 0)
            self.divergence += float(terms.sum(dtype=torch.float64))
            self.agreed += int((p.argmax(dim=1) == q.argmax(dim=1)).sum())
            targets = ids[start + 1 : stop + 1, None]
            self.loss += _summed_loss(q, targets)
            self.dense_loss += _summed_loss(p, targets)
            self.tokens += stop - start


def _summed_loss(scores: Tensor, targets: Tensor) -> float:
    """Of log-probabilities [T, V] and the next tokens [T, 1], of which the last may be missing."""
    return -float(scores[: len(targets)].gather(1, targets).sum(dtype=torch.float64))


def _exponential(mean: float) -> float:
    return math.exp(mean) if not mean > 700 else math.inf


def _configured_vocabulary(model: Any) -> int | None:
    return getattr(getattr(model, "config", None), "vocab_size", None)


def _check_vocabularies(dense: int | None, quantized: int | None) -> None:
    if dense is not None and quantized is not None and dense != quantized:
        raise QuantizationError(
            f"the models have vocabularies of {dense} and {quantized} tokens: compare a quantized "
            "model with the one that it was made from"
        )
