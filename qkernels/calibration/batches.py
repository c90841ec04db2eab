"""What a calibration batch says of its tokens: how many there are, and which are padding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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
