"""Calibration without data: tokens drawn at random.

What a layer's inputs are is for the most part the model's own doing, such as the channels that its
norms make large: on tokens that say nothing, the sums of squares by channel already tell which
weights count.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qkernels.errors import LayerError
from qkernels.modules.heads import input_embedding

BATCH = 4
"""Sequences a batch."""


def random_tokens(
    model: nn.Module, sequences: int = 8, length: int = 256, seed: int = 0
) -> list[Tensor]:
    """Batches of token ids, int64 [4, length] and a last one of fewer rows, uniform over the
    vocabulary, on the device of the model's embedding.

    Args:
        model: one of Transformers, or another that tells its embedding by `get_input_embeddings`.
        length: at most what the model takes, by its config.

    Raises:
        LayerError: for a model that `why_no_tokens` says something of.
    """
    reason = why_no_tokens(model)
    if reason is not None:
        raise LayerError(
            f"a {type(model).__name__} {reason}: calibrate it with batches of your own"
        )
    embedding = input_embedding(model)
    assert isinstance(embedding, nn.Embedding)
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    length = min(length, most) if isinstance(most, int) else length
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(embedding.num_embeddings, (sequences, length), generator=generator)
    device = embedding.weight.device
    return list((ids if device.type == "meta" else ids.to(device)).split(BATCH))


def why_no_tokens(model: nn.Module) -> str | None:
    """Why `random_tokens` has none for a model, or None."""
    if not isinstance(input_embedding(model), nn.Embedding):
        return "does not say which layer embeds its tokens"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "takes tokens of two texts"
    return None
