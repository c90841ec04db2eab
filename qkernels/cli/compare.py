"""`qkernels eval --against`: a quantized model beside the one that it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from qkernels.cli import models
from qkernels.cli.console import progress_bar, table

if TYPE_CHECKING:
    from qkernels.models.comparison import EmbeddingComparison, ModelComparison

WORST = 10
"""Layers that `--layers worst` shows."""


class Layers(str, Enum):
    """Which layers are shown."""

    worst = "worst"
    all = "all"


def compare(
    network: Any,
    tokenizer: Any,
    against: Path,
    text: str,
    *,
    device: str,
    causal: bool,
    window: int,
    batch: int,
    most: int | None,
    layers: bool,
) -> ModelComparison | EmbeddingComparison:
    """Loads the model at `against` in the precision of `network`, and runs both over a text.

    Args:
        causal: `network` is a causal language model; else embeddings are compared.
        most: windows or passages to read, or None for all.

    Raises:
        QuantizationError: for models of other tokenizers, and those that take more than a text.
    """
    from qkernels.models import comparison, evaluation

    models.check_takes_text(network, "it cannot be compared on one")
    precision = models.Precision.of(network.dtype)
    dense, theirs = models.load(against, precision, device)
    models.check_takes_text(dense, "it cannot be compared on one")
    if not causal:
        passages = comparison.passages_of(tokenizer, text, longest=window, most=most)
        same = comparison.passages_of(theirs, text, longest=window, most=most)
        _check_same(against, passages, same)
        with progress_bar("comparing") as update:
            return comparison.compare_encoders(
                dense, network, passages, layers=layers, progress=update
            )
    ids = evaluation.encode(tokenizer, text)
    _check_same(against, [ids], [evaluation.encode(theirs, text)])
    with progress_bar("comparing") as update:
        return comparison.compare_models(
            dense,
            network,
            ids,
            window=window,
            batch=batch,
            max_windows=most,
            layers=layers,
            progress=update,
        )


def _check_same(against: Path, ours: list[Any], theirs: list[Any]) -> None:
    from qkernels.errors import QuantizationError

    if not all(a.equal(b) for a, b in zip(ours, theirs, strict=True)):
        raise QuantizationError(
            f"the tokenizer of {against} gives other tokens for this text: compare a quantized "
            "model with the one that it was made from"
        )


def lines(result: Any) -> Iterator[tuple[str, str]]:
    """What was measured, and its value, for a `ModelComparison` or an `EmbeddingComparison`."""
    if hasattr(result, "cosine"):
        yield "cosine of embeddings", f"mean {result.cosine:.6f}, least {result.least_cosine:.6f}"
        yield "measured on", f"{result.passages} paragraphs, {result.tokens:,} tokens"
        return
    yield "perplexity", f"{result.perplexity:.4f}, dense {result.dense_perplexity:.4f}"
    yield "KL divergence to the dense model", f"{result.kl_divergence:.6f} nats a token"
    yield "top-1 agreement with it", f"{result.top1_agreement:.2%}"


def layer_table(result: Any, which: Layers) -> Table:
    """The layers of a comparison: the noisiest first, or all in the model's order."""
    shown = list(result.layers)
    if which is Layers.worst:
        shown = sorted(shown, key=lambda layer: layer.snr_db)[:WORST]
    made = table("layer", "scheme", "signal to noise, dB", numbers=("signal to noise, dB",))
    for layer in shown:
        made.add_row(layer.name, layer.scheme, f"{layer.snr_db:.2f}")
    for name, reason in result.not_compared.items():
        made.add_row(name, f"not compared: {reason}", "-")
    return made
