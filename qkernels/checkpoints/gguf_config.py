"""What a GGUF file says of its model that Transformers does not take over into the config.

Sizes of experts and heads, and the position embedding: its base, how much of a head it turns, its
scaling, and the factors that llama.cpp stores as tensors of D/2 numbers, D the rotated part of a
head: `rope_freqs.weight` for all lengths (Llama 3.1 and later), or `rope_factors_short.weight` and
`rope_factors_long.weight` for texts up to the length the model was first trained on and beyond
(Phi-3). In the config of a model factors are a rope of the type "longrope":

    inverse frequency i = 1 / (factor_i * theta^(2i / D))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from qkernels.errors import CheckpointError

ALL, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
FACTORS = (ALL, SHORT, LONG)

_SIZES = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attention.key_length": "head_dim",
    "context_length": "n_positions",
}
"""Key of the architecture -> field of the config."""

Said = Callable[[str], Any]
"""What a file has under a key of its architecture, or None."""


def complete_config(config: Any, said: Said, where: object) -> None:
    """Takes over what a file's keys say into the config of Transformers, in place.

    Raises:
        CheckpointError: for a scaling of the position embedding that is not known.
    """
    for key, field in _SIZES.items():
        if said(key) is not None and hasattr(config, field):
            setattr(config, field, int(said(key)))
    rope = getattr(config, "rope_parameters", None)
    if not rope or "rope_theta" not in rope:
        return
    changed = dict(rope)
    if said("rope.freq_base") is not None:
        changed["rope_theta"] = float(said("rope.freq_base"))
    heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if said("rope.dimension_count") is not None and "partial_rotary_factor" in rope:
        changed["partial_rotary_factor"] = int(said("rope.dimension_count")) / heads
    kind, factor = said("rope.scaling.type"), said("rope.scaling.factor")
    # Before it had a type, a scaling was linear.
    kind = "linear" if kind is None and factor is not None else kind
    if kind in ("linear", "yarn") and factor not in (None, 0.0, 1.0):
        changed |= {"rope_type": kind, "factor": float(factor)}
        if kind == "yarn":
            original = said("rope.scaling.original_context_length")
            changed["original_max_position_embeddings"] = int(
                original or config.max_position_embeddings
            )
    elif kind not in (None, "none", "linear", "yarn", "longrope"):
        raise CheckpointError(f"{where} scales its position embedding by {kind!r}: not supported")
    config.rope_parameters = changed


def set_factors(
    config: Any, model: nn.Module, factors: Mapping[str, Any], said: Said, where: object
) -> None:
    """Makes a model's config say that its frequencies are divided by `factors`.

    Args:
        config: of Transformers, changed in place.
        model: made of it as it was.
        factors: fp32 arrays by the names of the tensors.
        where: the file, for errors.

    Raises:
        CheckpointError: for a model whose position embedding takes none, or other numbers of them.
    """
    known = {name: [float(value) for value in array] for name, array in factors.items()}
    short = known.get(SHORT, known.get(ALL))
    long = known.get(LONG, known.get(ALL))
    wanted = {b.numel() for m in model.modules() if (b := m._buffers.get("inv_freq")) is not None}
    parameters = getattr(config, "rope_parameters", None) or {}
    found = " and ".join(f"{len(values)} in {name}" for name, values in known.items())
    plain = parameters.get("rope_type") == "default"
    if short is None or long is None or len(wanted) != 1 or not plain:
        raise CheckpointError(
            f"{where} holds factors of its position embedding ({found}), and a "
            f"{type(model).__name__} of Transformers takes none beside {parameters}"
        )
    size = wanted.pop()
    if any(len(values) != size for values in known.values()):
        raise CheckpointError(
            f"{where} holds factors of its position embedding ({found}), and the config makes it "
            f"{size} frequencies"
        )
    if not all(0 < value < float("inf") for values in known.values() for value in values):
        raise CheckpointError(f"{where}: factors of its position embedding must be above zero")
    original = said("rope.scaling.original_context_length") if SHORT in known else None
    # Factors for all lengths scale no scores. None is for Transformers to work out.
    attention = said("rope.scaling.attn_factor") if SHORT in known else 1.0
    original = int(original or config.max_position_embeddings)
    if hasattr(config, "original_max_position_embeddings"):
        # Phi-3's own field counts before that of the rope.
        config.original_max_position_embeddings = original
    config.rope_parameters = {
        **parameters,
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "attention_factor": None if attention is None else float(attention),
        "original_max_position_embeddings": original,
    }
