"""Embeddings that stay one tensor beside a quantized output head.

A head that is quantized shares its weight with no embedding any more, so config.json says
`tie_word_embeddings: false`. In encoder-decoder models that unties the embeddings of the two sides
from each other as well, which they are not.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch

from qkernels.checkpoints.dense import Place, quantized_layers


def tie_beside_head(model: Any, places: Mapping[str, Place], quantized: set[str]) -> None:
    """Makes tensors one that the model's code can tie, and that are equal, where the head is not.

    Args:
        places: of the tensors outside of quantized layers, which are filled.
        quantized: the names of quantized layers.
    """
    with _said_to_be_tied(model):
        possible = ties(model)
    heads = {f"{name}.weight" for name in quantized}
    if heads.isdisjoint(possible) and heads.isdisjoint(possible.values()):
        return
    groups: dict[str, list[str]] = {}
    for name, source in possible.items():
        groups.setdefault(source, [source]).append(name)
    for names in groups.values():
        held = [places[name] for name in names if name in places]
        for place in held[1:]:
            if torch.equal(place.tensor, held[0].tensor):
                setattr(place.module, place.name, held[0].tensor)


def ties(model: Any) -> dict[str, str]:
    """Tensor -> the one that it is, by the model's code and its config."""
    expand = getattr(model, "get_expanded_tied_weights_keys", None)
    if expand is None:
        return {}
    try:
        found: dict[str, str] = expand(all_submodels=True)
    except ValueError:
        # Of names that quantized layers do not have any more.
        return {}
    return found


@contextlib.contextmanager
def _said_to_be_tied(model: Any) -> Iterator[None]:
    untied = [c for c in _configs(model) if getattr(c, "tie_word_embeddings", True) is False]
    try:
        for config in untied:
            config.tie_word_embeddings = True
        yield
    finally:
        for config in untied:
            config.tie_word_embeddings = False


def say_untied(model: Any) -> Callable[[], None]:
    """Makes a model's configs, and Transformers, take its head for a weight of its own.

    Returns:
        What takes that back.
    """
    tied = [c for c in _configs(model) if getattr(c, "tie_word_embeddings", False) is True]
    keys = vars(model).get("all_tied_weights_keys")
    for config in tied:
        config.tie_word_embeddings = False
    if keys is not None:
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)

    def undo() -> None:
        for config in tied:
            config.tie_word_embeddings = True
        if keys is not None:
            model.all_tied_weights_keys = keys

    return undo


def _configs(model: Any) -> list[Any]:
    """Those of a model and of the modules in it, each once."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return list(configs.values())


def tie_no_quantized_layer(model: Any) -> None:
    """Makes `tie_weights` of a Transformers model leave quantized layers alone.

    Transformers calls it too, when embeddings are resized and when weights are initialized. A layer
    that is dense again by then is tied as ever.
    """
    if hasattr(model, "get_expanded_tied_weights_keys"):
        vars(model)["get_expanded_tied_weights_keys"] = functools.partial(_dense_ties, model)
        model.all_tied_weights_keys = without(quantized_layers(model), model.all_tied_weights_keys)


def _dense_ties(model: Any, all_submodels: bool = False) -> dict[str, str]:
    """In place of the model's own `get_expanded_tied_weights_keys`."""
    declared = model._tied_weights_keys
    if isinstance(declared, dict):
        declared = without(quantized_layers(model), declared)
    with mock.patch.object(model, "_tied_weights_keys", declared):
        found: dict[str, str] = type(model).get_expanded_tied_weights_keys(model, all_submodels)
    return found


def without(layers: Mapping[str, Any], tied: Mapping[str, str]) -> dict[str, str]:
    """Those of `tied`, tensor -> tensor, that concern none of `layers`."""
    return {
        name: source
        for name, source in tied.items()
        if not any(tensor.rpartition(".")[0] in layers for tensor in (name, source))
    }
