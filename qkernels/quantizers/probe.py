"""A few tokens to look at a model with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.calibration.batches import Tokens
from qkernels.errors import LayerError
from qkernels.modules.heads import input_embedding
from qkernels.quantizers.method import ModelTask

_ROWS, _TOKENS = 2, 24


def few_tokens(task: ModelTask, method: str) -> Any:
    """A small batch: of the first calibration batch, or made up.

    Raises:
        LayerError: naming `method`, where there is no calibration and the model embeds no tokens.
    """
    if task.batches:
        batch = task.batches[0]
        if isinstance(batch, Tensor) and batch.dim() == 2 and not batch.is_floating_point():
            return batch[:_ROWS, :_TOKENS]
        if isinstance(batch, Mapping) and _are_all_tokens(batch.values()):
            kept = Tokens.of(batch).kept
            if kept is None:
                return {key: tokens[:_ROWS, :_TOKENS] for key, tokens in batch.items()}
            # Of one sequence, without its padding.
            row = int(kept.sum(dim=1).argmax())
            own = kept[row]
            return {key: v[row : row + 1, own][:, :_TOKENS] for key, v in batch.items()}
        return batch
    embedding = input_embedding(task.model) or next(
        (module for module in task.model.modules() if isinstance(module, nn.Embedding)), None
    )
    if not isinstance(embedding, nn.Embedding):
        raise LayerError(
            f"{method} runs the model, which embeds no tokens: pass calibration batches"
        )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(embedding.num_embeddings, (_ROWS, _TOKENS), generator=generator)
    return tokens.to(embedding.weight.device)


def _are_all_tokens(values: Collection[Any]) -> bool:
    shapes = {v.shape if isinstance(v, Tensor) and v.dim() == 2 else None for v in values}
    return len(shapes) == 1 and None not in shapes
