"""Small inputs for any model, by the names of its forward's parameters."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

BATCH, TOKENS, TARGET_TOKENS, SAMPLES, FRAMES = 2, 12, 5, 4000, 64
ORDINARY_IDS = (10, 100)
"""Ids of tokens without a special meaning in tiny configs."""

Inputs = dict[str, Any]


def find(config: PreTrainedConfig, *names: str, under: tuple[str, ...] = ()) -> Any:
    """The first of these fields that a config or a nested one has, or None.

    Args:
        under: nested configs whose name holds one of these words are asked first.
    """
    nested = {k: v for k, v in vars(config).items() if isinstance(v, PreTrainedConfig)}
    first = [v for k, v in nested.items() if any(word in k for word in under)]
    for one in first:
        found = find(one, *names)
        if found is not None:
            return found
    for name in names:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    for one in nested.values():
        found = find(one, *names)
        if found is not None:
            return found
    return None


def _ids(model: PreTrainedModel, count: int = TOKENS) -> Tensor:
    return torch.randint(*ORDINARY_IDS, (BATCH, count))


def _image(model: PreTrainedModel) -> list[Tensor]:
    config = model.config
    size = find(config, "image_size", "img_size", "crop_size", "resolution", under=("vision", "image"))
    channels = find(config, "num_channels", "in_channels", "in_chans", under=("vision", "image")) or 3
    height, width = size if isinstance(size, list | tuple) else (size or 32,) * 2
    frames = find(config, "num_frames", "frames_per_clip", "num_image_with_embedding")
    pictures = [torch.randn(BATCH, channels, height, width)]
    if frames is not None:
        pictures.insert(0, torch.randn(BATCH, frames, channels, height, width))
    return [*pictures, torch.randn(BATCH, 1, channels, height, width), torch.randn(BATCH, 3, 64, 64)]


def _patches(model: PreTrainedModel) -> list[Tensor]:
    """What Qwen's vision models take: rows of patches, [T * H * W, channels * size]."""
    config = model.config
    patch = find(config, "patch_size", under=("vision",)) or 8
    frames = find(config, "temporal_patch_size", under=("vision",)) or 1
    channels = find(config, "in_channels", "in_chans", "num_channels", under=("vision",)) or 3
    count = int(GRID.prod())
    return [torch.randn(count, channels * f * patch * patch) for f in dict.fromkeys((frames, 1))] + [
        torch.randn(count, channels, patch, patch)
    ]


GRID = torch.tensor([[1, 4, 4]])
"""Time, height and width of an image in patches; two by two of them become one token."""


def _features(model: PreTrainedModel) -> list[Tensor]:
    config = model.config
    bins = find(
        config, "num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim",
        "feature_projection_input_dim", "input_feat_size", "n_mels", "input_size", under=("audio", "encoder", "speech"),
    ) or 80  # fmt: skip
    length = find(config, "max_source_positions", under=("audio", "encoder"))
    frames = FRAMES if length is None else 2 * length
    shapes = [(BATCH, bins, frames), (BATCH, frames, bins), (BATCH, FRAMES, bins), (BATCH, bins, FRAMES)]
    return [torch.randn(shape) for shape in dict.fromkeys(shapes)]


def _samples(model: PreTrainedModel) -> list[Tensor]:
    config = model.config
    bins = find(config, "num_mel_bins", "max_length") or 80
    length = getattr(config, "max_length", None) or FRAMES
    return [
        torch.randn(BATCH, SAMPLES),
        torch.randn(BATCH, 1, SAMPLES),
        torch.randn(BATCH, length, bins),
        torch.randn(BATCH, 2, SAMPLES),
    ]


def _naflex(model: PreTrainedModel) -> list[Tensor]:
    """Rows of flattened patches, an image a row of the batch: [B, patches, channels * size]."""
    patch = find(model.config, "patch_size", under=("vision",)) or 8
    channels = find(model.config, "num_channels", under=("vision",)) or 3
    return [torch.randn(BATCH, int(GRID.prod()), channels * patch * patch)]


MAKERS: dict[str, Callable[[PreTrainedModel], list[Any]]] = {
    "input_ids": lambda model: [_ids(model)],
    "qformer_input_ids": lambda model: [_ids(model)],
    "decoder_input_ids": lambda model: [_ids(model, TARGET_TOKENS)],
    "attention_mask": lambda model: [torch.ones(BATCH, TOKENS, dtype=torch.long)],
    "pixel_values": _image,
    "pixel_values_videos": _image,
    "input_features": _features,
    "input_values": _samples,
}


def candidates(model: PreTrainedModel) -> Iterator[Inputs]:
    """Inputs to try, the richest first."""
    taken = inspect.signature(model.forward).parameters
    required = [
        name
        for name, p in taken.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if "grid_thw" in taken or "image_grid_thw" in taken:
        yield from _with_grid(model, taken)
    if "spatial_shapes" in taken:
        yield from _with_spatial_shapes(model, taken)
    if "pixel_values" in taken and "input_ids" in taken:
        yield from _with_image(model, taken, required)
    main = model.main_input_name
    main = [main] if isinstance(main, str) else list(main)
    names = [name for name in dict.fromkeys([*main, *required]) if name in taken]
    if "decoder_input_ids" in taken:
        yield from _combinations(model, [*names, "decoder_input_ids"])
    yield from _combinations(model, names)
    if names != ["input_ids"] and "input_ids" in taken:
        yield from _combinations(model, [*names, "input_ids"])
        yield from _combinations(model, ["input_ids"])
    if "use_cache" in taken:
        for inputs in _combinations(model, names):
            yield {**inputs, "use_cache": False}


def _combinations(model: PreTrainedModel, names: list[str]) -> Iterator[Inputs]:
    if not all(name in MAKERS for name in names):
        return
    for values in itertools.product(*(MAKERS[name](model) for name in names)):
        inputs = dict(zip(names, values, strict=True))
        features = inputs.get("input_features")
        if features is not None and "input_features_mask" in inspect.signature(model.forward).parameters:
            for frames in features.shape[:0:-1]:
                yield {**inputs, "input_features_mask": torch.ones(BATCH, frames, dtype=torch.long)}
        yield inputs


def _image_tokens(model: PreTrainedModel, count: int) -> Inputs:
    token = find(model.config, "image_token_id", "image_token_index")
    ids = torch.randint(*ORDINARY_IDS, (1, count + TOKENS))
    ids[:, 2 : count + 2] = token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _with_grid(model: PreTrainedModel, taken: Any) -> Iterator[Inputs]:
    for patches in _patches(model):
        if "grid_thw" in taken:
            name = "pixel_values" if "pixel_values" in taken else "hidden_states"
            yield {name: patches, "grid_thw": GRID}
            continue
        merge = find(model.config, "spatial_merge_size", "merge_size", under=("vision",)) or 1
        image = {"pixel_values": patches, "image_grid_thw": GRID}
        text = _image_tokens(model, int(GRID.prod()) // merge**2)
        if "mm_token_type_ids" in taken:
            token = find(model.config, "image_token_id", "image_token_index")
            text["mm_token_type_ids"] = (text["input_ids"] == token).int()
        yield image | text


def _with_spatial_shapes(model: PreTrainedModel, taken: Any) -> Iterator[Inputs]:
    for patches in _naflex(model):
        mask = torch.ones(patches.shape[:2], dtype=torch.long)
        shapes = GRID[:, 1:].expand(len(patches), 2)
        image = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
        if "input_ids" not in taken:
            yield image
        elif find(model.config, "image_token_id", "image_token_index") is None:
            yield image | {"input_ids": _ids(model)}
        else:
            one = {name: value[:1] for name, value in image.items()}
            yield from _with_tokens(model, one)


def _with_image(model: PreTrainedModel, taken: Any, required: list[str]) -> Iterator[Inputs]:
    others = [name for name in required if name not in ("pixel_values", "input_ids")]
    if not all(name in MAKERS for name in others):
        return
    more = {name: MAKERS[name](model)[0] for name in others}
    if "decoder_input_ids" in taken:
        more["decoder_input_ids"] = _ids(model, TARGET_TOKENS)
    for picture in _image(model):
        image = {"pixel_values": picture[:1]}
        if find(model.config, "image_token_id", "image_token_index") is not None:
            if "image_sizes" in taken:
                sizes = torch.tensor([picture.shape[-2:]])
                yield from _with_tokens(model, image | {"image_sizes": sizes}, more)
            yield from _with_tokens(model, image, more)
        yield {"pixel_values": picture, "input_ids": _ids(model)} | more


def _with_tokens(model: PreTrainedModel, image: Inputs, more: Inputs | None = None) -> Iterator[Inputs]:
    """An image with as many image tokens as the model makes features of it."""
    get = getattr(model, "get_image_features", None)
    if get is None:
        return
    try:
        with torch.no_grad():
            features = get(**image, return_dict=True)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        return
    pooled = getattr(features, "pooler_output", features)
    parts = pooled if isinstance(pooled, list | tuple) else [pooled]
    count = sum(part.numel() // part.shape[-1] for part in parts)
    more = {name: value[:1] for name, value in (more or {}).items()}
    yield image | _image_tokens(model, count) | more
