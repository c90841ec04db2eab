"""Tiny configs: the default config of a type with its sizes made small, by the names of its fields.

Only fields that the constructor takes and does not compute are set, so that what a config derives
from its sizes (head_dim, layer types, inner widths) follows them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from bench.survey.hints import NESTED

WIDTH, INNER, HEADS, HEAD_DIM, LAYERS = 64, 96, 4, 16, 2
VOCABULARY = 128
"""Token ids from here on are moved below, one new id for each old one."""


def _at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


def _exactly(size: int) -> Callable[[int], int]:
    return lambda value: size if value > 0 else value


RULES: tuple[tuple[str, Callable[[int], int]], ...] = (
    # No sizes, although they are named like some.
    (r".*(chunk_size_feed_forward|_labels|kernel.*|stride|_conv|padding|mult|multiple_of)", int),
    (r"vocab_size", lambda value: VOCABULARY),
    (r".*vocab(_size)?.*|.*codebook_size|num_embeddings|num_embeds", _at_most(VOCABULARY)),
    (r"(max|n)_.*(positions?|position_embeddings|ctx|seq_len|length)|n_ctx|seq_length", _at_most(256)),
    (r"(.*_)?n(um)?_(\w+_)?heads|(.*_)?heads|n_head|.*attention_heads|.*attn_heads", _at_most(HEADS)),
    (r"num_encoder_blocks|num_conv_layers|.*num_feature_levels", int),
    (r"(.*_)?(n|num)_(\w+_)?(layers?|blocks)|(.*_)?layers|(.*_)?depth", _at_most(LAYERS)),
    (r"attn_layer_period|.*_interval|.*sparse_step|sliding_window_pattern|.*_every_n_layers", _at_most(2)),
    (r"attn_layer_offset|first_k_dense_replace|num_dense_layers", _at_most(1)),
    (r"num_experts|n_routed_experts|(moe_)?num_(local_)?experts|num_local_experts", _at_most(4)),
    (r"num_experts_per_tok|moe_(topk|top_k|k)|moe_top_k|top_k", _at_most(2)),
    (r"n_group|topk_group", _at_most(1)),
    (r"num_queries|num_proposals", _at_most(8)),
    (r"qk_rope_head_dim|.*rotary_dim", _at_most(8)),
    (r".*head_(dim|size)|d_kv|.*dim_head|.*d_head|key_dim", _at_most(HEAD_DIM)),
    (r".*lora_rank|time_step_rank|.*dt_rank", _at_most(16)),
    (r".*image_size|resolution|.*img_size|.*crop_size", _exactly(32)),
    (r"patch_size|encoder_stride|tubelet_size", _at_most(8)),
    (r".*(intermediate_(size|dim)|ffn_(hidden_)?(size|dim)|d_ff|dff|mlp_dim)", _at_most(INNER)),
    (r".*(size|dim|width|channels|d_model|n_embd|d_ff|d_inner|ffn|units|filters|dff|rank|features|feats|bins)", _at_most(WIDTH)),
)
"""(pattern of a whole name, the small size for a default one); the first that fits counts."""


@dataclasses.dataclass
class TokenIds:
    """New ids for tokens whose id is past the small vocabulary."""

    known: dict[int, int] = dataclasses.field(default_factory=dict)

    def below(self, value: int) -> int:
        if value < VOCABULARY:
            return value
        return self.known.setdefault(value, VOCABULARY - 1 - len(self.known))


def tiny_config(kind: type[PreTrainedConfig], hints: dict[str, Any]) -> PreTrainedConfig:
    """The smallest config of this type that its models are likely to run with.

    Args:
        hints: fields to set after the rules, those of nested configs as "text_config.field".
    """
    sizes = _tiny(kind(), TokenIds()) if not getattr(kind, "has_no_defaults_at_init", False) else {}
    for path, value in hints.items():
        if isinstance(value, str) and path in NESTED:
            value = {"model_type": value, **_tiny(CONFIG_MAPPING[value](), TokenIds())}
        target = sizes
        *parents, name = path.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[name] = value
    return kind(**sizes)


def _tiny(config: PreTrainedConfig, ids: TokenIds) -> dict[str, Any]:
    """The arguments of the constructor for a small one of these."""
    default = type(config)()
    for one in (config, default):
        one.allow_global_per_layer_attribute_access = True
    layers = _chosen_layers(config)
    sizes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name = field.name
        value = getattr(config, name, None)
        if isinstance(value, PreTrainedConfig):
            sizes[name] = {"model_type": value.model_type, **_tiny(value, ids)}
            continue
        if re.fullmatch(r".*(key_value|kv)_(attention_)?heads", name) and isinstance(value, int):
            heads = re.sub("(key_value|kv)_(attention_)?heads", "attention_heads", name)
            grouped = value < (getattr(config, heads, None) or HEADS)
            sizes[name] = (min(value, 2) if grouped else HEADS) if value else value
            continue
        if name == "head_dim" and value is None:
            sizes[name] = HEAD_DIM
        set_by_parent = value != getattr(default, name, None)
        computed = field.default is None or field.default is dataclasses.MISSING
        small = _small(name, value, layers, ids)
        if isinstance(value, str) or name in ("id2label", "label2id"):
            continue
        if set_by_parent or (small != value and not (computed and not isinstance(value, list))):
            sizes[name] = small
    return sizes


def _chosen_layers(config: PreTrainedConfig) -> list[int] | None:
    """Layers of the default config, at least `LAYERS`, among which each kind of layer occurs."""
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        return None
    chosen = set()
    for value in vars(config).values():
        if isinstance(value, list | tuple) and len(value) == count and isinstance(value[0], str):
            chosen |= {value.index(kind) for kind in value}
    chosen = sorted(chosen | set(range(min(LAYERS - 1, count))))
    extra = (i for i in range(count) if i not in chosen)
    while len(chosen) < min(LAYERS, count):
        chosen.append(next(extra))
    return sorted(chosen)


def _small(name: str, value: Any, layers: list[int] | None, ids: TokenIds) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        if re.fullmatch(r".*(token|_|im_start|boi|eoi)(id|index|ids)", name):
            return ids.below(value)
        if name == "num_hidden_layers" and layers:
            return len(layers)
        rule = next((rule for pattern, rule in RULES if re.fullmatch(pattern, name)), None)
        return rule(value) if rule is not None else value
    if isinstance(value, list | tuple) and value:
        return type(value)(_small_list(name, value, layers, ids))
    return value


def _small_list(name: str, value: Any, layers: list[int] | None, ids: TokenIds) -> Any:
    if re.fullmatch(r".*token_ids?", name):
        return [ids.below(v) for v in value]
    if layers is not None and len(value) > len(layers) and len(value) > max(layers):
        if isinstance(value[0], str) or len(value) >= 8:
            return [_small(name, value[i], None, ids) for i in layers]
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return value
    if re.fullmatch(r".*(indexes|indices|idxs|cross_attention_layers|moe_layers|attention_blocks)", name):
        return [1]
    if re.fullmatch(r"depths?|.*num_blocks|num_block_repeats|blocks_per_stage|block_sizes", name):
        return [min(v, 1) for v in value]
    if re.fullmatch(r".*heads(_per_stage)?", name):
        return [max(1, v // min(value)) for v in value]
    if re.fullmatch(r".*(hidden_sizes|embed_dims?|embed_dim_per_stage)", name):
        return [max(1, v * 2 // min(value)) * 8 for v in value]
    if re.fullmatch(r"conv_dim|tdnn_dim", name):
        return [32 for _ in value]
    if re.fullmatch(r"image_size", name):
        return [32 for _ in value]
    return value
