"""A quantized model folder, opened: its format, its layers and its other tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qkernels.checkpoints.config import Config, read_config
from qkernels.checkpoints.format import Format, StoredLayer
from qkernels.checkpoints.gguf import GgufStore
from qkernels.checkpoints.gguf_file import gguf_file
from qkernels.checkpoints.kv_cache import is_of_cache
from qkernels.checkpoints.store import Store
from qkernels.checkpoints.table import find_format
from qkernels.errors import CheckpointError, QuantizationError
from qkernels.weight import QuantizedWeight


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a folder before its tensors are read.

    Attributes:
        layers: the quantized layers, by name.
        dense: the names of all tensors that belong to none of them, nor to `kv_cache`.
        kv_cache: the names of those that say how a KV cache is quantized.
    """

    config: Config
    store: Store
    format: Format
    layers: Mapping[str, StoredLayer]
    dense: tuple[str, ...]
    kv_cache: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return self.store.folder

    def read(self, name: str) -> QuantizedWeight:
        """One quantized layer.

        Raises:
            CheckpointError: naming the layer and what is wrong with it.
        """
        stored = self.layers[name]
        if stored.shares is not None:
            return self.read(stored.shares).replace(bias=None)
        with _naming(self.store, name):
            return self.format.read_layer(self.store, name, stored)

    def read_parts(self, name: str) -> list[QuantizedWeight]:
        """One layer of a model: mostly one weight, else several whose rows follow each other, where
        no scheme holds them as one.

        Raises:
            CheckpointError: as `read` does.
        """
        return [self.read(name)]


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """The quantized model in `folder`; headers are read, and no weights.

    Raises:
        CheckpointError: for files that are missing or damaged, and formats that are not known.
    """
    file = gguf_file(folder)
    store = Store(folder) if file is None else GgufStore(file)
    return understood(store.config if isinstance(store, GgufStore) else read_config(folder), store)


def understood(config: Config, store: Store) -> Checkpoint:
    """The quantized model of these tensors.

    Raises:
        CheckpointError: for formats that are not known, and tensors that do not fit the config.
    """
    with _naming(store):
        row = find_format(config, store)
        layers = row.read_plan(config, store)
    if not layers:
        raise CheckpointError(f"{store.where} holds no quantized layer")
    taken = {tensor for layer in layers.values() for tensor in layer.tensors}
    others = [name for name in store if name not in taken]
    of_cache = tuple(name for name in others if row.keeps_kv_cache and is_of_cache(name))
    dense = tuple(name for name in others if name not in set(of_cache))
    return Checkpoint(config, store, row, layers, dense, of_cache)


@contextlib.contextmanager
def _naming(store: Store, layer: str = "") -> Iterator[None]:
    """Within, errors name the folder, and the layer if one is given."""
    try:
        yield
    except QuantizationError as error:
        text = str(error)
        if layer not in text:
            text = f"{layer}: {text}"
        if str(store.where) not in text:
            text = f"{store.where}: {text}"
        raise CheckpointError(text) from None


def read_weights(folder: str | Path) -> dict[str, QuantizedWeight]:
    """Every quantized layer of a model folder, by name.

    Raises:
        CheckpointError: for files that are missing or damaged, or formats that are not known.
    """
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.layers}
