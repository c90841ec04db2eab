"""Calibration batches: what may be one, and what it says of its tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.errors import LayerError
from qkernels.modules.heads import input_embedding


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in dicts, lists and tuples, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)


def checked(calibration: Iterable[Any]) -> list[Any]:
    """The batches, in the form that `calibration.forwards.run_batch` takes.

    Raises:
        LayerError: for what is no batches, naming the one that is none.
    """
    if isinstance(calibration, str | Tensor | Mapping):
        what = "a text" if isinstance(calibration, str) else "one batch"
        raise LayerError(
            f"calibration is a list of batches, got {what} ({_brief(calibration)}): give [batch]"
        )
    batches = list(calibration)
    if not batches:
        raise LayerError("calibration holds no batch")
    for number, batch in enumerate(batches):
        found = list(tensors_of(batch))
        if not found:
            raise LayerError(
                f"calibration batch {number} holds no tensor ({_brief(batch)}): give tensors of "
                "token ids, or tuples or dicts of the model's arguments"
            )
        empty = next((tensor for tensor in found if not tensor.numel()), None)
        if empty is not None:
            raise LayerError(f"calibration batch {number} is empty: {_brief(empty)}")
    return batches


def check_tokens(model: nn.Module, batches: Iterable[Any]) -> None:
    """Raises LayerError for batches whose token ids a model of Transformers does not know."""
    embedding = input_embedding(model)
    if not isinstance(embedding, nn.Embedding):
        return
    for number, batch in enumerate(batches):
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        ids = next(tensors_of(ids), None)
        if ids is None:
            continue
        if ids.is_floating_point():
            raise LayerError(
                f"calibration batch {number} holds {_brief(ids)} where the model takes token ids"
            )
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most >= embedding.num_embeddings:
            wrong = least if least < 0 else most
            raise LayerError(
                f"calibration batch {number} holds the token {wrong}, and the model knows 0 to "
                f"{embedding.num_embeddings - 1}: is it of another tokenizer?"
            )


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}".removeprefix("torch.")
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:40] + '...'}"


@dataclass(frozen=True)
class Tokens:
    """Of one batch.

    Attributes:
        count: sequences times the length of its first tensor.
        kept: bool [S, T], False for padding; None where there is none.
    """

    count: int
    kept: Tensor | None = None

    @staticmethod
    def of(batch: Any) -> Tokens:
        """Padding is where an `attention_mask` is 0. A model with a decoder of its own has tokens
        that the mask does not speak of; there none is told apart."""
        first = next(tensors_of(batch), None)
        count = 0 if first is None else math.prod(first.shape[:2])
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if not isinstance(mask, Tensor) or mask.dim() != 2 or first is None:
            return Tokens(count)
        decodes = any(str(key).startswith("decoder_") for key in batch)
        if decodes or mask.shape != first.shape[:2] or mask.bool().all():
            return Tokens(count)
        return Tokens(count, mask.bool())

    def of_rows(self, shape: torch.Size) -> Tensor | None:
        """Which rows of x [*shape, K] are no padding, bool [R]; None for all, and where rows are
        not those of the batch."""
        if self.kept is None or tuple(shape) not in (tuple(self.kept.shape), (self.kept.numel(),)):
            return None
        return self.kept.flatten()
