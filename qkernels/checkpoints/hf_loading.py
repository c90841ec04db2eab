"""The quantized layers of a folder, while Transformers loads what is dense into a model.

`from_pretrained` makes a model without memory, fills it, and gives new values to whatever the
folder does not have. So placeholders that it passes over take the places of quantized layers first,
and the layers theirs when the rest is filled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.checkpoints import kv_cache, layer_types
from qkernels.checkpoints.checkpoint import Checkpoint, open_checkpoint
from qkernels.checkpoints.dense import dense_places
from qkernels.checkpoints.names import has_place, in_names_of
from qkernels.checkpoints.place import find_linears, is_unused, place_layers
from qkernels.checkpoints.ties import tie_beside_head, without
from qkernels.errors import CheckpointError
from qkernels.modules.kinds import linear_parts

PLACE = "qkernels_place"


class Placeholder(nn.Module):
    """Stands where a quantized layer will be.

    It has one number, which Transformers moves to the device that the layer goes to. The rest is
    for code of models that draws new weights, and looks at all layers for that.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        parts = linear_parts(linear)
        self.out_features, self.in_features = parts.weight.shape
        # Of a name that no folder has.
        empty = torch.empty(1, dtype=parts.weight.dtype, device="meta")
        self.register_parameter(PLACE, nn.Parameter(empty, requires_grad=False))
        # No parameters, which Transformers would look for in the folder.
        self.weight = torch.zeros(1, 1, device="cpu")
        self.bias = None if parts.bias is None else torch.zeros(self.out_features, device="cpu")
        for held in (self, self.weight, self.bias):
            # Nothing is drawn for what says this.
            if held is not None:
                held._is_hf_initialized = True  # type: ignore[union-attr]


class PendingLayers:
    """The quantized layers of a folder that belong into a model.

    Attributes:
        format: the name of the folder's format.
    """

    def __init__(self, model: Any, files: Iterable[str] | None) -> None:
        """Puts placeholders into `model`, which `from_pretrained` is to fill from `files`.

        Raises:
            CheckpointError: for files that are missing or damaged, formats that are not known, and
                layers that the model has no place for.
        """
        self._model = model
        self._stored = open_checkpoint(_folder_of(files))
        checkpoint = in_names_of(model, self._stored)
        self.format = self._stored.format.name
        # What a folder has less than its own class is damage; another class may have more.
        self._strict = type(model).__name__ in (self._stored.config.get("architectures") or ())
        self._checkpoint = checkpoint if self._strict else _with_places(model, checkpoint)
        self._unplaced = {
            tensor
            for name, layer in checkpoint.layers.items()
            if name not in self._checkpoint.layers
            for tensor in layer.tensors
        }
        self._linears = find_linears(model, self._checkpoint)
        if not self._linears:
            raise CheckpointError(
                f"{self._stored.folder}: none of its quantized layers, such as "
                f"{next(iter(self._stored.layers))}, is one of a {type(model).__name__}"
            )
        made: dict[int, Placeholder] = {}
        for name, linear in self._linears.items():
            model.set_submodule(name, made.setdefault(id(linear), Placeholder(linear)))
        self._shapes = {
            name: tensor.shape
            for name, tensor in model.state_dict().items()
            if isinstance(tensor, Tensor)
        }
        # Those have none of their own that Transformers could make one with another.
        model.all_tied_weights_keys = without(self._linears, model.all_tied_weights_keys)

    def nbytes(self, parameter: str) -> int | None:
        """The size of the layer whose placeholder has a parameter of that name; None for others."""
        name = parameter.removesuffix(f".{PLACE}")
        if name == parameter:
            return None
        tensors = self._checkpoint.layers[name].tensors
        return sum(self._stored.store.nbytes(tensor) for tensor in tensors)

    def fill(self, info: Any, *, check_kernels: bool = True) -> None:
        """Puts the layers in their places, when what is dense is in its own.

        Args:
            info: the report of Transformers, which is made to speak of what is dense alone.

        Raises:
            CheckpointError: for tensors that are damaged, or missing, or of another shape.
        """
        model, checkpoint, folder = self._model, self._checkpoint, self._stored.folder
        holders = {name: model.get_submodule(name) for name in self._linears}
        devices = {name: holder.get_parameter(PLACE).device for name, holder in holders.items()}
        places = {f"{name}.{PLACE}" for name in self._linears}
        info.missing_keys -= places
        info.unexpected_keys.clear()
        info.unexpected_keys |= self._unplaced | {
            name
            for name in checkpoint.dense
            if name not in self._shapes and not is_unused(model, name)
        }
        # Of experts that are stored one by one, and not all quantized.
        for name in info.missing_keys.intersection(checkpoint.dense):
            tensor = model.get_parameter_or_buffer(name)
            tensor.data = checkpoint.store.get(name).to(tensor.device, tensor.dtype)
            info.missing_keys.discard(name)
        if self._strict and info.missing_keys:
            raise CheckpointError(
                f"{folder} lacks {sorted(info.missing_keys)[:3]}, which a "
                f"{type(model).__name__} has: download or save it again"
            )
        held = model.state_dict()
        for name in self._shapes.keys() - places:
            # Transformers leaves this to the quantizer.
            if held[name].shape != self._shapes[name]:
                raise CheckpointError(
                    f"{folder}: {name} is {list(held[name].shape)} in the file and "
                    f"{list(self._shapes[name])} in the model's config"
                )
        _unmap(model)
        cache = kv_cache.read(self._stored.config, self._stored.store, self._stored.kv_cache)
        place_layers(
            model,
            checkpoint,
            self._linears,
            devices.__getitem__,
            cast=self._cast,
            check_kernels=check_kernels,
        )
        tie_beside_head(model, dense_places(model), set(self._linears))
        kv_cache.keep(model, cache)

    def _cast(self, tensor: Tensor) -> Tensor:
        """A bias of the folder's own type is of the model's; another keeps its type."""
        config = self._stored.config
        own = config.get("dtype", config.get("torch_dtype", tensor.dtype))
        named = str(tensor.dtype).removeprefix("torch.")
        return tensor.to(self._model.dtype) if own in (named, tensor.dtype) else tensor


def _unmap(model: nn.Module) -> None:
    """Copies what lies in the mapping of a file: the file may be replaced while the model is in
    use, and torch computes by other code where memory is not aligned, to other last bits."""
    for tensor in (*model.parameters(), *model.buffers()):
        # What torch has allocated it can resize.
        if tensor.device.type == "cpu" and not tensor.untyped_storage().resizable():
            tensor.data = tensor.data.clone()


def _folder_of(files: Iterable[str] | None) -> Path:
    first = next(iter(files or ()), None)
    if first is None:
        raise CheckpointError("quantized layers are loaded from a folder: give one")
    return Path(first).parent


def _with_places(model: Any, checkpoint: Checkpoint) -> Checkpoint:
    """The folder without layers that the model lacks, as one without an output head does."""
    state = model.state_dict()
    layers = {name: layer for name, layer in checkpoint.layers.items() if has_place(state, name)}
    types = layer_types.stated(checkpoint.config)
    kept = {text: [name for name in names if name in layers] for text, names in types.items()}
    config = {**checkpoint.config, layer_types.KEY: kept}
    return dataclasses.replace(checkpoint, layers=layers, config=config)
