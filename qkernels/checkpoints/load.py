"""`load_model`: a folder of any format as a model, packed layer by layer for a device."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkernels.checkpoints import kv_cache
from qkernels.checkpoints.checkpoint import Checkpoint, open_checkpoint
from qkernels.checkpoints.dense import Place, dense_places, replace_tensor
from qkernels.checkpoints.empty import compute_parameters, empty_model
from qkernels.checkpoints.foreign import as_checkpoint_error
from qkernels.checkpoints.names import in_names_of
from qkernels.checkpoints.place import find_linears, is_unused, matches, place_layers
from qkernels.checkpoints.pretrained import mark_quantized
from qkernels.checkpoints.ties import tie_beside_head
from qkernels.errors import CheckpointError
from qkernels.progress import Progress, silent

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OTHER = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Types that may take each other's place in a file."""


def load_model(
    folder: str | Path,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype | None = None,
    check_kernels: bool = True,
    progress: Progress = silent,
) -> Any:
    """The Transformers model in `folder`, with `WQLinear` layers packed for `device`.

    Tensors are read one by one, so that no more is held than the packed model and one layer. Each
    one of the folder is used and each one of the model filled, or that is an error.

    Args:
        dtype: for what is not quantized and stored in the folder's own type; None keeps that. What
            is stored in another type, such as fp32 norms of a bf16 model, keeps its own.
        check_kernels: check a kernel on the device before it runs there first.
        progress: called as progress(done, total, layer name).

    Raises:
        CheckpointError: for files that are missing or damaged, formats that are not known, and
            tensors that do not fit the model.
    """
    device = torch.device(device)
    stored = open_checkpoint(folder)
    model, own = empty_model(
        stored, dtype, lambda model: check_shapes(in_names_of(model, stored), dense_places(model))
    )
    checkpoint = in_names_of(model, stored)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if dtype is None or tensor.dtype != own else tensor.to(dtype)

    linears = find_linears(model, checkpoint)
    replaced = set(linears.values())
    places = {n: place for n, place in dense_places(model).items() if place.module not in replaced}
    absent = {
        name: places[name]
        for names in tied_names(places).values()
        for name in names[:1]
        if set(checkpoint.dense).isdisjoint(names) and is_computed(model, name)
    }
    compute_parameters(model, {n: place for n, place in absent.items() if place.tensor.is_meta})
    # Whatever can be wrong without the tensors' data is checked before they are read.
    _check_names(model, checkpoint, places)
    cache = kv_cache.read(stored.config, stored.store, stored.kv_cache)
    place_layers(
        model,
        checkpoint,
        linears,
        lambda _: device,
        cast=cast,
        check_kernels=check_kernels,
        progress=progress,
    )
    for names in tied_names(places).values():
        tied = {name: places[name] for name in names}
        _fill(tied, checkpoint, lambda tensor: cast(tensor).to(device))
    tie_beside_head(model, places, set(linears))
    take_generation_config(model, checkpoint.folder)
    kv_cache.keep(model, cache)
    mark_quantized(model)
    return model.to(device).eval()


def take_generation_config(model: Any, folder: Path) -> None:
    """Gives a model the settings of `generate` that its folder has."""
    path = folder / "generation_config.json"
    if path.is_file():
        transformers = importlib.import_module("transformers")
        with as_checkpoint_error(path, "cannot be read"):
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)


def _check_names(model: Any, checkpoint: Checkpoint, places: Mapping[str, Place]) -> None:
    """Each tensor of the folder has a place, each place a tensor, and of the same shape."""
    dense = set(checkpoint.dense)
    unexpected = [
        name for name in checkpoint.dense if name not in places and not is_unused(model, name)
    ]
    missing = [
        names[0]
        for names in tied_names(places).values()
        if dense.isdisjoint(names)
        and (places[names[0]].tensor.is_meta or not is_computed(model, names[0]))
    ]
    if missing or unexpected:
        raise CheckpointError(
            f"{checkpoint.folder} does not fit the model: missing {missing[:3]}, "
            f"unexpected {unexpected[:3]}"
        )
    check_shapes(checkpoint, places)


def is_computed(model: Any, name: str) -> bool:
    """Whether the code of the model says that it computes a tensor itself."""
    return matches(name, tuple(getattr(model, "_keys_to_ignore_on_load_missing", None) or ()))


def check_shapes(checkpoint: Checkpoint, places: Mapping[str, Place]) -> None:
    """Raises CheckpointError for a tensor of another shape or kind of type than its place."""
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


def tied_names(places: Mapping[str, Place]) -> dict[int, list[str]]:
    """The names of each tensor."""
    tied: dict[int, list[str]] = {}
    for name, place in places.items():
        tied.setdefault(id(place.tensor), []).append(name)
    return tied


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
