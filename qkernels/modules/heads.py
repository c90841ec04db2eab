"""The ends of a model: its embedding of tokens, and the layers that make logits."""

from __future__ import annotations

from typing import Any

from torch import nn


def output_heads(module: Any) -> list[nn.Module]:
    """What a Transformers model says makes its logits; nothing for other modules."""
    find = getattr(module, "get_output_embeddings", None)
    if find is None:
        return []
    try:
        found = find()
    except (NotImplementedError, AttributeError):
        # Of models that have none, or only in some of their forms.
        return []
    heads = found if isinstance(found, list | tuple | nn.ModuleList) else [found]
    return [head for head in heads if isinstance(head, nn.Module)]


def input_embedding(module: Any) -> nn.Module | None:
    """What a Transformers model says embeds its tokens; None for other modules."""
    find = getattr(module, "get_input_embeddings", None)
    if find is None:
        return None
    try:
        found = find()
    except (NotImplementedError, AttributeError):
        # Of models that have none, or only in some of their forms.
        return None
    return found if isinstance(found, nn.Module) else None
