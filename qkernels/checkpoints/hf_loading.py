"""The quantized layers of a folder, while Transformers loads what is dense into a model.

`from_pretrained` makes a model without memory, fills it, and gives new values to whatever the
folder does not have. So placeholders that it passes over take the places of quantized layers first,
and the layers theirs when the rest is filled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.checkpoints.checkpoint import Checkpoint, open_checkpoint
from qkernels.checkpoints.dense import dense_places
from qkernels.checkpoints.native import NATIVE
from qkernels.checkpoints.place import find_linears, place_layers
from qkernels.checkpoints.ties import tie_beside_head, without
from qkernels.errors import CheckpointError
from qkernels.modules.kinds import linear_parts


class Placeholder(nn.Module):
    """Stands where a quantized layer will be.

    Its weight is one number, which Transformers moves to the device that the layer goes to. The
    rest is for code of models that draws new weights, and looks at all layers for that.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        parts = linear_parts(linear)
        self.out_features, self.in_features = parts.weight.shape
        empty = torch.empty(1, 1, dtype=parts.weight.dtype, device="meta")
        self.weight = nn.Parameter(empty, requires_grad=False)
        # No parameter, which Transformers would look for in the folder.
        self.bias = None if parts.bias is None else torch.zeros(self.out_features, device="cpu")
        # Nothing is drawn for what says this.
        vars(self)["_is_hf_initialized"] = True
        if self.bias is not None:
            vars(self.bias)["_is_hf_initialized"] = True


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
        with _outside_of_meta():
            self._stored = open_checkpoint(_folder_of(files))
        self.format = self._stored.format.name
        # What a folder has less than its own class is damage; another class may have more.
        self._strict = type(model).__name__ in (self._stored.config.get("architectures") or ())
        self._checkpoint = _in_names_of(model, self._stored)
        if not self._strict:
            self._checkpoint = _with_places(model, self._checkpoint)
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
        """The size of the layer that a placeholder's `parameter` stands for; None for others."""
        name = parameter.removesuffix(".weight")
        if name == parameter or name not in self._linears:
            return None
        tensors = self._checkpoint.layers[name].tensors
        return sum(self._stored.store.nbytes(tensor) for tensor in tensors)

    def fill(self, info: Any, *, check_kernels: bool = True) -> None:
        """Puts the layers in their places, when what is dense is in its own.

        Args:
            info: the report of Transformers; what it says of the layers is taken out.

        Raises:
            CheckpointError: for tensors that are damaged, or missing, or of another shape.
        """
        model, folder = self._model, self._stored.folder
        placed = {f"{name}.weight" for name in self._linears}
        info.missing_keys -= placed
        info.unexpected_keys -= self._own_keys()
        if self._strict and info.missing_keys:
            raise CheckpointError(
                f"{folder} lacks {sorted(info.missing_keys)[:3]}, which a "
                f"{type(model).__name__} has: download or save it again"
            )
        self._check_shapes(placed)
        devices = {name: model.get_parameter(f"{name}.weight").device for name in self._linears}
        place_layers(
            model,
            self._checkpoint,
            self._linears,
            devices.__getitem__,
            cast=self._cast,
            check_kernels=check_kernels,
        )
        tie_beside_head(model, dense_places(model), set(self._linears))

    def _cast(self, tensor: Tensor) -> Tensor:
        """A bias of the folder's own type is of the model's; another keeps its type."""
        config = self._stored.config
        own = config.get("dtype", config.get("torch_dtype", tensor.dtype))
        named = str(tensor.dtype).removeprefix("torch.")
        return tensor.to(self._model.dtype) if own in (named, tensor.dtype) else tensor

    def _check_shapes(self, placed: set[str]) -> None:
        # Transformers leaves this to the quantizer.
        held = self._model.state_dict()
        for name, shape in self._shapes.items():
            if name not in placed and held[name].shape != shape:
                raise CheckpointError(
                    f"{self._stored.folder}: {name} is {list(held[name].shape)} in the file and "
                    f"{list(shape)} in the model's config"
                )

    def _own_keys(self) -> set[str]:
        """What Transformers calls the tensors that it has no place for, and we know."""
        stored = self._stored
        placed = {t for name in self._linears for t in self._checkpoint.layers[name].tensors}
        layers = {tensor for layer in stored.layers.values() for tensor in layer.tensors}
        known = set(stored.store) - set(stored.dense) - (layers - placed)
        if self.format == NATIVE.name:
            return known
        loading = importlib.import_module("transformers.core_model_loading")
        mapping = importlib.import_module("transformers.conversion_mapping")
        transforms = mapping.get_model_conversion_mapping(self._model)
        renamings = [t for t in transforms if isinstance(t, loading.WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        keys = set()
        for tensor in known:
            key, pattern = loading.rename_source_key(tensor, renamings, converters)
            targets = by_pattern[pattern].target_patterns if pattern is not None else [""]
            keys |= {key.replace(targets[0], target) for target in targets}
        return keys


@contextlib.contextmanager
def _outside_of_meta() -> Iterator[None]:
    """Within, tensors have values, and are of float32 where no type is said: Transformers changes
    both where it makes a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def _folder_of(files: Iterable[str] | None) -> Path:
    first = next(iter(files or ()), None)
    if first is None:
        raise CheckpointError("quantized layers are loaded from a folder: give one")
    return Path(first).parent


@dataclasses.dataclass(frozen=True)
class _Renamed(Checkpoint):
    """A folder under the names of a model: name -> the one that is stored."""

    stored: Checkpoint
    names: Mapping[str, str]

    def read(self, name: str) -> Any:
        return self.stored.read(self.names[name])


def _in_names_of(model: Any, checkpoint: Checkpoint) -> Checkpoint:
    prefix, state = model.base_model_prefix, model.state_dict()
    names = {}
    for stored in checkpoint.layers:
        for name in (stored, f"{prefix}.{stored}", stored.removeprefix(f"{prefix}.")):
            if f"{name}.weight" in state or name.rpartition(".")[0] in state:
                names[name] = stored
                break
        else:
            names[stored] = stored
    layers = {name: checkpoint.layers[stored] for name, stored in names.items()}
    values = {f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint)}
    return _Renamed(**{**values, "layers": layers}, stored=checkpoint, names=names)


def _with_places(model: Any, checkpoint: Checkpoint) -> Checkpoint:
    """The folder without layers that the model lacks, as one without an output head does."""
    state = model.state_dict()
    layers = {
        name: layer
        for name, layer in checkpoint.layers.items()
        if f"{name}.weight" in state or name.rpartition(".")[0] in state
    }
    return dataclasses.replace(checkpoint, layers=layers)
