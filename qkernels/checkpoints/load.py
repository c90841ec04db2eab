"""`load_model`: a folder of any format as a model, packed layer by layer for a device."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.checkpoints import layer_types
from qkernels.checkpoints.checkpoint import Checkpoint, open_checkpoint
from qkernels.checkpoints.dense import Place, dense_places, replace_tensor
from qkernels.checkpoints.empty import empty_model
from qkernels.checkpoints.foreign import as_checkpoint_error
from qkernels.checkpoints.memory import give_back_free_pages
from qkernels.checkpoints.pretrained import mark_quantized
from qkernels.checkpoints.ties import tie_beside_head
from qkernels.errors import CheckpointError
from qkernels.modules.experts import fused_experts, unfuse
from qkernels.modules.kinds import is_plain_linear, linear_parts
from qkernels.modules.linear import WQLinear
from qkernels.weight import QuantizedWeight

UNUSED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$")
"""Tensors that some versions of Transformers store and others compute: they change nothing."""

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OTHER = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Types that may take each other's place in a file."""


def load_model(
    folder: str | Path,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype | None = None,
    check_kernels: bool = True,
) -> Any:
    """The Transformers model in `folder`, with `WQLinear` layers packed for `device`.

    Tensors are read one by one, so that no more is held than the packed model and one layer. Each
    one of the folder is used and each one of the model filled, or that is an error.

    Args:
        dtype: for what is not quantized and stored in the folder's own type; None keeps that. What
            is stored in another type, such as fp32 norms of a bf16 model, keeps its own.
        check_kernels: check a kernel on the device before it runs there first.

    Raises:
        CheckpointError: for files that are missing or damaged, formats that are not known, and
            tensors that do not fit the model.
    """
    device = torch.device(device)
    checkpoint = open_checkpoint(folder)
    model, own = empty_model(
        checkpoint, dtype, lambda model: _check_shapes(checkpoint, dense_places(model))
    )

    def cast(tensor: Tensor) -> Tensor:
        return tensor if dtype is None or tensor.dtype != own else tensor.to(dtype)

    _unfuse_experts(model, checkpoint)
    linears = _find_linears(model, checkpoint)
    types = layer_types.read(checkpoint.config, checkpoint.layers)
    replaced = set(linears.values())
    places = {n: place for n, place in dense_places(model).items() if place.module not in replaced}
    # Whatever can be wrong without the tensors' data is checked before they are read.
    _check_names(model, checkpoint, places)
    made: dict[int, WQLinear] = {}
    for name, linear in linears.items():
        weight = checkpoint.read(name)
        if checkpoint.format.idle_biases:
            weight = _without_idle_bias(weight, linear)
        _check_layer(checkpoint, name, linear, weight)
        if weight.bias is not None:
            weight = weight.replace(bias=cast(weight.bias))
        parts = linear_parts(linear)
        layer = WQLinear.from_weight(
            weight,
            device=device,
            check_kernels=check_kernels,
            dtype=types.get(name, parts.weight.dtype),
        )
        layer.transposed = parts.transposed
        # One layer under several names stays one.
        first = made.setdefault(id(linear), layer)
        if first is not layer:
            _check_same(checkpoint, name, layer, first)
        model.set_submodule(name, first)
        del weight, layer
        give_back_free_pages()
    for names in _tied(places).values():
        tied = {name: places[name] for name in names}
        _fill(tied, checkpoint, lambda tensor: cast(tensor).to(device))
    tie_beside_head(model, places, set(linears))
    path = checkpoint.folder / "generation_config.json"
    if path.is_file():
        transformers = importlib.import_module("transformers")
        with as_checkpoint_error(path, "cannot be read"):
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    mark_quantized(model)
    return model.to(device).eval()


def _unfuse_experts(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Takes apart the experts that are stored one by one."""
    stored = {name.rpartition(".")[0] for name in checkpoint.layers}
    for name, fused in fused_experts(model).items():
        if name in stored and fused.name in fused.owner._parameters:
            reason = fused.why_not()
            if reason is not None:
                raise CheckpointError(f"{checkpoint.folder}: {name} is not supported: {reason}")
            unfuse(fused)


def _find_linears(model: nn.Module, checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """The layers of the model that quantized ones are to take the place of."""
    found = {}
    for name, stored in checkpoint.layers.items():
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            if all(_is_unused(model, tensor) for tensor in stored.tensors):
                continue
            raise CheckpointError(
                f"{checkpoint.folder}: the model has no layer {name}, which is in the file"
            ) from None
        if not is_plain_linear(layer):
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is quantized in the file, and in the model a "
                f"{type(layer).__name__}, which is not supported"
            )
        found[name] = layer
    return found


def _check_names(model: Any, checkpoint: Checkpoint, places: Mapping[str, Place]) -> None:
    """Each tensor of the folder has a place, each place a tensor, and of the same shape."""
    dense = set(checkpoint.dense)
    # The code of the model says that it computes these itself.
    computed = tuple(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    unexpected = [
        name for name in checkpoint.dense if name not in places and not _is_unused(model, name)
    ]
    missing = [
        names[0]
        for names in _tied(places).values()
        if dense.isdisjoint(names)
        and (places[names[0]].tensor.is_meta or not _matches(names[0], computed))
    ]
    if missing or unexpected:
        raise CheckpointError(
            f"{checkpoint.folder} does not fit the model: missing {missing[:3]}, "
            f"unexpected {unexpected[:3]}"
        )
    _check_shapes(checkpoint, places)


def _check_shapes(checkpoint: Checkpoint, places: Mapping[str, Place]) -> None:
    for name in (name for name in checkpoint.dense if name in places):
        wanted, stored = places[name].tensor, checkpoint.store.shape(name)
        if tuple(wanted.shape) != stored:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is {list(stored)} in the file and "
                f"{list(wanted.shape)} in the model's config"
            )
        dtype = checkpoint.store.dtype(name)
        if dtype not in (_FLOATING if wanted.is_floating_point() else _OTHER):
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is {dtype} in the file, and in the "
                f"model {wanted.dtype}"
            )


def _is_unused(model: Any, name: str) -> bool:
    """Whether a tensor that the model has no place for changes nothing, by our list or its own."""
    own = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return _matches(name, (*UNUSED, *own))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _tied(places: Mapping[str, Place]) -> dict[int, list[str]]:
    """The names of each tensor."""
    tied: dict[int, list[str]] = {}
    for name, place in places.items():
        tied.setdefault(id(place.tensor), []).append(name)
    return tied


def _without_idle_bias(weight: QuantizedWeight, linear: nn.Module) -> QuantizedWeight:
    idle = linear_parts(linear).bias is None and weight.bias is not None and not weight.bias.any()
    return weight.replace(bias=None) if idle else weight


def _check_layer(
    checkpoint: Checkpoint, name: str, linear: nn.Module, weight: QuantizedWeight
) -> None:
    where, parts = f"{checkpoint.folder}: {name}", linear_parts(linear)
    if tuple(parts.weight.shape) != weight.shape:
        raise CheckpointError(
            f"{where} is {list(weight.shape)} in the file and {list(parts.weight.shape)} in the "
            "model's config"
        )
    if (parts.bias is None) != (weight.bias is None):
        there, not_there = ("model", "file") if weight.bias is None else ("file", "model")
        raise CheckpointError(f"{where} has a bias in the {there}, and none in the {not_there}")


def _check_same(checkpoint: Checkpoint, name: str, layer: WQLinear, first: WQLinear) -> None:
    held, wanted = layer.state_dict(), first.state_dict()
    if held.keys() != wanted.keys() or not all(torch.equal(held[n], wanted[n]) for n in held):
        raise CheckpointError(
            f"{checkpoint.folder}: {name} is one layer with another by the model's code, and "
            "differs from it in the file"
        )


def _fill(
    places: Mapping[str, Place], checkpoint: Checkpoint, move: Callable[[Tensor], Tensor]
) -> None:
    """Fills a tensor of the model that is at all of `places`, from the names that are stored."""
    stored = [name for name in places if name in checkpoint.store]
    if not stored:
        return
    replace_tensor(list(places.values()), move(checkpoint.store.get(stored[0])))
    for other in stored[1:]:
        if not torch.equal(move(checkpoint.store.get(other)), places[other].tensor.detach()):
            raise CheckpointError(
                f"{checkpoint.folder}: {stored[0]} and {other} are one tensor by the model's "
                "config, and differ in the file"
            )
