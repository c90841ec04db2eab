"""Small inputs for any model, by the names of its forward's parameters."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

BATCH, TOKENS, TARGET_TOKENS, SAMPLES, FRAMES = 2, 12, 5, 4000, 64

ORDINARY_IDS = (10, 100)
"""Ids of tokens without a special meaning in tiny configs: from, up to."""

GRID = torch.tensor([[1, 4, 4]])
"""Time, height and width of an image in patches."""

Inputs = dict[str, Any]


def find(config: PreTrainedConfig, *names: str, under: Sequence[str] = ()) -> Any:
    """The first of these fields that a config or a nested one has, or None.

    Args:
        under: nested configs whose name holds one of these words are asked first.
    """
    nested = {k: v for k, v in vars(config).items() if isinstance(v, PreTrainedConfig)}
    preferred = [v for k, v in nested.items() if any(word in k for word in under)]
    own = [getattr(config, name, None) for name in names]
    of_nested = (find(one, *names) for one in nested.values())
    found = itertools.chain((find(one, *names) for one in preferred), own, of_nested)
    return next((value for value in found if value is not None), None)


def ids(*shape: int) -> Tensor:
    """Ordinary tokens."""
    return torch.randint(*ORDINARY_IDS, shape)


def _images(model: PreTrainedModel) -> list[Tensor]:
    """Pictures, videos, and several pictures for each text, in sizes that the config names."""

    def size_of(*names: str) -> Any:
        return find(model.config, *names, under=("vision", "image"))

    size = size_of("image_size", "img_size", "crop_size", "resolution") or 32
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = size_of("num_channels", "in_channels", "in_chans") or 3
    frames = size_of("num_frames", "frames_per_clip", "num_image_with_embedding")
    shapes = [(channels, height, width), (2, channels, height, width), (channels, 64, 64)]
    if frames is not None:
        shapes.insert(0, (frames, channels, height, width))
    return [torch.randn(BATCH, *shape) for shape in shapes]


def _patches(model: PreTrainedModel) -> list[Tensor]:
    """What vision models of the kind of Qwen's take: the patches of all images, as rows."""

    def size_of(*names: str) -> int | None:
        found: int | None = find(model.config, *names, under=("vision",))
        return found

    patch, frames = size_of("patch_size") or 8, size_of("temporal_patch_size") or 1
    channels = size_of("in_channels", "in_chans", "num_channels") or 3
    flat = [channels * depth * patch * patch for depth in dict.fromkeys((frames, 1))]
    shapes = [*((size,) for size in flat), (channels, patch, patch)]
    return [torch.randn(int(GRID.prod()), *shape) for shape in shapes]


_BINS = (
    *("num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim"),
    *("feature_projection_input_dim", "input_feat_size", "n_mels", "input_size"),
)


def _features(model: PreTrainedModel) -> list[Tensor]:
    """Spectrograms, with time last and with time first."""
    bins = find(model.config, *_BINS, under=("audio", "encoder", "speech")) or 80
    length = find(model.config, "max_source_positions", under=("audio", "encoder"))
    lengths = (FRAMES if length is None else 2 * length, FRAMES)
    shapes = [shape for frames in lengths for shape in ((bins, frames), (frames, bins))]
    return [torch.randn(BATCH, *shape) for shape in dict.fromkeys(shapes)]


def _samples(model: PreTrainedModel) -> list[Tensor]:
    """Sound, with and without channels, and spectrograms."""
    bins = find(model.config, "num_mel_bins", "max_length") or 80
    frames = getattr(model.config, "max_length", None) or FRAMES
    shapes = ((SAMPLES,), (1, SAMPLES), (frames, bins), (2, SAMPLES))
    return [torch.randn(BATCH, *shape) for shape in shapes]


MAKERS: dict[str, Callable[[PreTrainedModel], list[Tensor]]] = {
    "input_ids": lambda model: [ids(BATCH, TOKENS)],
    "qformer_input_ids": lambda model: [ids(BATCH, TOKENS)],
    "decoder_input_ids": lambda model: [ids(BATCH, TARGET_TOKENS)],
    "attention_mask": lambda model: [torch.ones(BATCH, TOKENS, dtype=torch.long)],
    "pixel_values": _images,
    "pixel_values_videos": _images,
    "input_features": _features,
    "input_values": _samples,
}
"""Name of a parameter -> values of it to try."""


def parameters(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    """What the forward of a model takes."""
    return inspect.signature(model.forward).parameters


def candidates(model: PreTrainedModel) -> Iterator[Inputs]:
    """Inputs to try, the richest first."""
    taken = parameters(model)
    required = [
        name
        for name, p in taken.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if "grid_thw" in taken or "image_grid_thw" in taken:
        yield from _with_grid(model)
    if "spatial_shapes" in taken:
        yield from _with_spatial_shapes(model)
    if "pixel_values" in taken and "input_ids" in taken:
        yield from _with_image(model, required)
    main: Any = model.main_input_name
    main = [main] if isinstance(main, str) else main
    names = [name for name in dict.fromkeys([*main, *required]) if name in taken]
    if "decoder_input_ids" in taken:
        yield from _combinations(model, [*names, "decoder_input_ids"])
    yield from _combinations(model, names)
    if names != ["input_ids"] and "input_ids" in taken:
        yield from _combinations(model, [*names, "input_ids"])
        yield from _combinations(model, ["input_ids"])
    if "use_cache" in taken:
        for inputs in _combinations(model, names):
            yield inputs | {"use_cache": False}


def _combinations(model: PreTrainedModel, names: Sequence[str]) -> Iterator[Inputs]:
    if not all(name in MAKERS for name in names):
        return
    for values in itertools.product(*(MAKERS[name](model) for name in names)):
        inputs = dict(zip(names, values, strict=True))
        if "input_features" in inputs and "input_features_mask" in parameters(model):
            # Time is one of the last two dimensions.
            for frames in inputs["input_features"].shape[:0:-1]:
                yield inputs | {"input_features_mask": torch.ones(BATCH, frames, dtype=torch.long)}
        yield inputs


def _with_grid(model: PreTrainedModel) -> Iterator[Inputs]:
    taken = parameters(model)
    for patches in _patches(model):
        if "grid_thw" in taken:
            name = "pixel_values" if "pixel_values" in taken else "hidden_states"
            yield {name: patches, "grid_thw": GRID}
        else:
            yield from with_tokens(model, {"pixel_values": patches, "image_grid_thw": GRID})


def _with_spatial_shapes(model: PreTrainedModel) -> Iterator[Inputs]:
    """Patches as rows of each image, with a mask."""
    patches = _patches(model)[-1].flatten(1).expand(BATCH, -1, -1)
    image = {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long),
        "spatial_shapes": GRID[:, 1:].expand(BATCH, 2),
    }
    if "input_ids" not in parameters(model):
        yield image
        return
    yield from with_tokens(model, {name: value[:1] for name, value in image.items()})
    yield image | {"input_ids": ids(BATCH, TOKENS)}


def _with_image(model: PreTrainedModel, required: Sequence[str]) -> Iterator[Inputs]:
    taken = parameters(model)
    others = [name for name in required if name not in ("pixel_values", "input_ids")]
    if not all(name in MAKERS for name in others):
        return
    more = {name: MAKERS[name](model)[0] for name in others}
    if "decoder_input_ids" in taken:
        more["decoder_input_ids"] = ids(BATCH, TARGET_TOKENS)
    one = {name: value[:1] for name, value in more.items()}
    for picture in _images(model):
        image = {"pixel_values": picture[:1]}
        if "image_sizes" in taken:
            sizes = torch.tensor([picture.shape[-2:]])
            for inputs in with_tokens(model, image | {"image_sizes": sizes}):
                yield inputs | one
        for inputs in with_tokens(model, image):
            yield inputs | one
        yield {"pixel_values": picture, "input_ids": ids(BATCH, TOKENS)} | more


def with_tokens(model: PreTrainedModel, image: Inputs) -> Iterator[Inputs]:
    """An image and a text that holds as many image tokens as the model makes features of it."""
    token = find(model.config, "image_token_id", "image_token_index")
    if token is None:
        return
    for count in _token_counts(model, image):
        text = ids(1, count + TOKENS)
        text[:, 2 : count + 2] = token
        inputs = image | {"input_ids": text, "attention_mask": torch.ones_like(text)}
        if "mm_token_type_ids" in parameters(model):
            inputs["mm_token_type_ids"] = (text == token).int()
        yield inputs


def _token_counts(model: PreTrainedModel, image: Inputs) -> Iterator[int]:
    """How many tokens an image may be: what the model says, else one for each patch or four."""
    try:
        with torch.no_grad():
            found = model.get_image_features(**image, return_dict=True)  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        yield from (int(GRID.prod()), int(GRID.prod()) // 4)
        return
    features = getattr(found, "pooler_output", found)
    features = features if isinstance(features, list | tuple) else [features]
    yield sum(part.numel() // part.shape[-1] for part in features)
