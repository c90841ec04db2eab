"""A folder of a dense model, whose weights are read one by one when they are asked for."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from qkernels.checkpoints.checkpoint import Checkpoint
from qkernels.checkpoints.config import read_config
from qkernels.checkpoints.dense import Place, dense_places, replace_tensor
from qkernels.checkpoints.empty import compute_parameters, empty_model
from qkernels.checkpoints.format import Format, StoredLayer, only_read
from qkernels.checkpoints.gguf_file import gguf_file
from qkernels.checkpoints.load import check_shapes, is_computed, take_generation_config, tied_names
from qkernels.checkpoints.names import in_names_of
from qkernels.checkpoints.place import is_unused
from qkernels.checkpoints.store import Store
from qkernels.checkpoints.table import is_quantized
from qkernels.errors import CheckpointError


class UnusedTensorsWarning(UserWarning):
    """A folder holds tensors that its model does not use."""


class DenseFolder:
    """A Transformers model without memory for its parameters, and these in a folder.

    It is the model that `from_pretrained` makes of the folder, in evaluation mode: each parameter
    has the type that it has there.

    Args:
        dtype: of the model; None for the folder's own.
        device: of the tensors that are read.

    Attributes:
        model: its parameters are on the meta device, but for those that its code computes; its
            buffers are filled.
        names: of each parameter that is to be read, all that it has in the model.

    Raises:
        CheckpointError: for files that are missing or damaged, a GGUF file, a quantized model, a
            model that Transformers does not know, and tensors that are missing or do not fit it.

    Warns:
        UnusedTensorsWarning: for tensors that the model does not use.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.path, self.device = Path(path), torch.device(device)
        if gguf_file(path) is not None:
            raise CheckpointError(
                f"{path} is a GGUF file, which is read as a whole: give a folder with safetensors "
                "files"
            )
        if is_quantized(path):
            raise CheckpointError(f"{path} holds a quantized model: start from the original one")
        store = Store(path)
        stored = Checkpoint(read_config(path), store, _DENSE, {}, tuple(store))

        def check(model: Any) -> None:
            check_shapes(in_names_of(model, stored), dense_places(model))

        self.model, own = empty_model(stored, dtype, check)
        self.model.eval()
        self._checkpoint = in_names_of(self.model, stored)
        places = dense_places(self.model)
        check_shapes(self._checkpoint, places)
        self._types = _types(self.model, dtype or own, places)
        tied = list(tied_names(places).values())
        absent = [names for names in tied if not self._stored(names)]
        compute_parameters(
            self.model,
            {
                names[0]: places[names[0]]
                for names in absent
                if places[names[0]].tensor.is_meta and is_computed(self.model, names[0])
            },
        )
        check_tensors(
            self.model,
            path,
            missing=[n[0] for n in absent if places[n[0]].tensor.is_meta],
            unused=[
                name
                for name in self._checkpoint.dense
                if name not in places and not is_unused(self.model, name)
            ],
        )
        self.names: list[tuple[str, ...]] = []
        self._names_of: dict[str, tuple[str, ...]] = {}
        for names in tied:
            held = [places[name] for name in names]
            if held[0].tensor.is_meta:
                self.names.append(tuple(names))
                self._names_of |= dict.fromkeys(names, tuple(names))
            elif self._stored(names):
                self._names_of |= dict.fromkeys(names, tuple(names))
                replace_tensor(held, self.get(names[0]))
        take_generation_config(self.model, self.path)

    def get(self, name: str) -> Tensor:
        """A tensor of the model, read from the folder.

        Raises:
            CheckpointError: for a file that changed since, or that has two tensors for one.
        """
        names = self._names_of[name]
        first, *others = self._stored(names)
        tensor = self._read(first)
        for other in others:
            if not torch.equal(tensor, self._read(other)):
                raise CheckpointError(
                    f"{self.path}: {first} and {other} are one tensor by the model's config, and "
                    "differ in the file"
                )
        return tensor.to(self.device)

    def nbytes(self, names: Sequence[str]) -> int:
        """Bytes in memory of the parameter with these names."""
        store = self._checkpoint.store
        return math.prod(store.shape(self._stored(names)[0])) * self._types[names[0]].itemsize

    def _stored(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self._checkpoint.store]

    def _read(self, name: str) -> Tensor:
        return self._checkpoint.store.get(name).to(self._types[name])


def check_tensors(
    model: Any, path: str | Path, missing: Sequence[str], unused: Sequence[str]
) -> None:
    """Raises for tensors that a folder lacks, and warns of those that its model does not use.

    Raises:
        CheckpointError: where any are missing.
    """
    kind = type(model).__name__
    if missing:
        raise CheckpointError(
            f"{path} lacks {_some(sorted(missing))} of a {kind}, which would be random numbers: "
            "the files are incomplete, or config.json names another model"
        )
    if unused:
        warnings.warn(
            f"{path} holds {_some(sorted(unused))}, which a {kind} does not use",
            UnusedTensorsWarning,
            stacklevel=3,
        )


def _some(names: Sequence[str]) -> str:
    """The first three of `names`, and how many there are in all."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _types(model: Any, dtype: torch.dtype, places: Mapping[str, Place]) -> dict[str, torch.dtype]:
    """The type that `from_pretrained` gives each tensor: that of the model's code, but for what its
    class keeps in fp32."""
    types = {name: place.tensor.dtype for name, place in places.items()}
    plan = model._get_dtype_plan(dtype)
    if plan:
        loading = importlib.import_module("transformers.core_model_loading")
        pattern, groups, _ = loading.build_glob_alternation(list(plan))
        for name in types:
            match = pattern.search(name)
            if match is not None:
                types[name] = plan[groups[match.lastgroup]]
    return types


def _no_layers(config: Mapping[str, Any], store: Store) -> dict[str, StoredLayer]:
    return {}


def _no_layer(store: Store, name: str, layer: StoredLayer) -> NoReturn:
    raise AssertionError("a dense folder has no quantized layers")


_DENSE = Format(
    name="dense",
    title="not quantized",
    why_not=only_read,
    detect=lambda config, store: False,
    read_plan=_no_layers,
    read_layer=_no_layer,
)
"""In place of a row of the table, for folders that need none."""
