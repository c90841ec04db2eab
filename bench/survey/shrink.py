"""Tiny configs: the default config of a type with its sizes made small, by the names of its fields.

Only what the constructor takes and does not compute is set, so that what a config derives from its
sizes (head_dim, kinds of layers, inner widths) follows them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

WIDTH, INNER, HEADS, HEAD_DIM, LAYERS = 64, 96, 4, 16, 2
IMAGE, PATCH = 32, 8
VOCABULARY = 128
"""Tokens past it get an id below, from the end."""

_HEADS = r"(.*_)?heads|(n|num)_head"
_KEY_VALUE_HEADS = r".*(key_value|kv)_(attention_)?heads"
_TOKEN_ID = r".*(token|_|im_start|boi|eoi)(id|index|ids)"

SIZES: tuple[tuple[str, int | None], ...] = (
    (r"chunk_size_feed_forward|.*(_labels|kernel.*|stride|_conv|padding|mult|multiple_of)", None),
    (r"num_encoder_blocks|num_conv_layers|.*num_feature_levels", None),
    (r".*vocab.*|.*codebook_size|num_embeddings|num_embeds", VOCABULARY),
    (r"(max|n)_.*(positions?|position_embeddings|ctx|seq_len|length)|n_ctx|seq_length", 256),
    (_HEADS, HEADS),
    (r"(.*_)?(n|num)_(\w+_)?(layers?|blocks)|(.*_)?layers|(.*_)?depth", LAYERS),
    # Every second layer is of the other kind, from the second on.
    (r"attn_layer_period|.*_interval|.*sparse_step|.*_pattern|.*_every_n_layers", 2),
    (r"attn_layer_offset|first_k_dense_replace|num_dense_layers|n_group|topk_group", 1),
    (r"n_routed_experts|(moe_)?num_(local_)?experts", 4),
    (r"num_experts_per_tok|moe_(topk|top_k|k)|top_k", 2),
    (r"num_queries|num_proposals", 8),
    (r"qk_rope_head_dim|.*rotary_dim", HEAD_DIM // 2),
    (r".*head_(dim|size)|d_kv|.*dim_head|.*d_head|key_dim", HEAD_DIM),
    (r".*lora_rank|time_step_rank|.*dt_rank", HEAD_DIM),
    (r".*(image|img|crop)_size|resolution", IMAGE),
    (r"patch_size|encoder_stride|tubelet_size", PATCH),
    (r".*(intermediate_(size|dim)|ffn_(hidden_)?(size|dim)|d_ff|dff|mlp_dim)", INNER),
    (r".*(size|dim|width|channels|d_model|n_embd|d_inner|ffn|units|filters|rank|feats)", WIDTH),
    (r".*(features|bins)", WIDTH),
)
"""(a whole name, what its value is at most, or None for what is no size); the first that fits."""


class TokenIds:
    """New ids for the tokens whose id is past the small vocabulary, the same for the same."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}

    def below(self, value: int) -> int:
        """The new id of a token."""
        if value < VOCABULARY:
            return value
        return self._known.setdefault(value, VOCABULARY - 1 - len(self._known))


def tiny_config(kind: type[PreTrainedConfig], hints: Mapping[str, Any]) -> PreTrainedConfig:
    """The smallest config of this type that its models are likely to run with.

    Args:
        hints: fields to set after the rules, those of nested configs as "text_config.field". Where
            the value is a type of config in itself, such as "bert", a tiny one is put there.
    """
    composed = getattr(kind, "has_no_defaults_at_init", False)
    sizes = {} if composed else _tiny(kind(), TokenIds())
    for path, value in hints.items():
        *parents, name = path.split(".")
        target = sizes
        for parent in parents:
            target = target.setdefault(parent, {})
        if isinstance(value, str) and value in CONFIG_MAPPING:
            value = {"model_type": value, **_tiny(CONFIG_MAPPING[value](), TokenIds())}
        target[name] = value
    return kind(**sizes)


def _tiny(config: PreTrainedConfig, ids: TokenIds) -> dict[str, Any]:
    """The arguments that make a small one of `config`, which is a default one."""
    default = type(config)()
    for one in (config, default):
        one.allow_global_per_layer_attribute_access = True
    layers = _chosen_layers(config)
    sizes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name, None)
        if isinstance(value, PreTrainedConfig):
            sizes[name] = {"model_type": value.model_type, **_tiny(value, ids)}
        elif name == "head_dim" and value is None:
            sizes[name] = HEAD_DIM
        elif re.fullmatch(_KEY_VALUE_HEADS, name) and isinstance(value, int):
            sizes[name] = _key_value_heads(config, name, value)
        elif not isinstance(value, str | dict):
            small = _small(name, value, layers, ids)
            # What a parent config has set stands in no default of the type.
            given = value != getattr(default, name, None)
            computed = field.default in (None, dataclasses.MISSING) and not isinstance(value, list)
            if given or (small != value and not computed):
                sizes[name] = small
        elif value != getattr(default, name, None):
            sizes[name] = value
    return sizes


def _key_value_heads(config: PreTrainedConfig, name: str, value: int) -> int:
    heads = re.sub("(key_value|kv)_(attention_)?heads", "attention_heads", name)
    grouped = value < (getattr(config, heads, None) or HEADS)
    return min(value, HEADS // 2 if grouped else HEADS)


@dataclasses.dataclass(frozen=True)
class _Layers:
    """Those layers of a default config that a tiny one keeps.

    Attributes:
        count: how many the default config has.
        kept: their numbers there, in order.
    """

    count: int
    kept: Sequence[int]


def _chosen_layers(config: PreTrainedConfig) -> _Layers | None:
    """`LAYERS` layers, or as many as it takes for each kind of them to occur."""
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        return None
    kept = set(range(min(LAYERS - 1, count)))
    for value in vars(config).values():
        if isinstance(value, list | tuple) and len(value) == count and isinstance(value[0], str):
            kept |= {value.index(kind) for kind in value}
    others = [number for number in range(count) if number not in kept]
    return _Layers(count, sorted(kept | set(others[: max(0, LAYERS - len(kept))])))


def _small(name: str, value: Any, layers: _Layers | None, ids: TokenIds) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        if re.fullmatch(_TOKEN_ID, name):
            return ids.below(value)
        if name == "num_hidden_layers" and layers is not None:
            return len(layers.kept)
        if name == "vocab_size":
            return VOCABULARY
        limit = next((limit for pattern, limit in SIZES if re.fullmatch(pattern, name)), None)
        return value if limit is None else min(value, limit)
    if isinstance(value, list | tuple) and value:
        return type(value)(_small_list(name, value, layers, ids))
    return value


def _small_list(name: str, value: Sequence[Any], layers: _Layers | None, ids: TokenIds) -> Any:
    if re.fullmatch(_TOKEN_ID, name):
        return [ids.below(token) for token in value]
    if layers is not None and len(value) == layers.count:
        return [_small(name, value[number], None, ids) for number in layers.kept]
    if not all(type(entry) is int for entry in value):
        return value
    if re.fullmatch(r".*(indexes|indices|idxs|attention_layers|moe_layers|attention_blocks)", name):
        # Numbers of layers.
        return [LAYERS - 1]
    if re.fullmatch(r"depths?|.*num_blocks|num_block_repeats|blocks_per_stage|block_sizes", name):
        return [min(entry, 1) for entry in value]
    # Of stages, each wider than the one before.
    if re.fullmatch(rf"({_HEADS})(_per_stage)?", name):
        return [max(1, entry // min(value)) for entry in value]
    if re.fullmatch(r".*(hidden_sizes|embed_dims?|embed_dim_per_stage)", name):
        return [max(1, entry * 2 // min(value)) * 8 for entry in value]
    if re.fullmatch(r"conv_dim|tdnn_dim", name):
        return [WIDTH // 2] * len(value)
    if name == "image_size":
        return [IMAGE] * len(value)
    return value
