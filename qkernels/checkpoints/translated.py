"""A folder under the names of a model: layers and tensors made of rows of the stored ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qkernels.checkpoints.checkpoint import Checkpoint
from qkernels.checkpoints.foreign import as_checkpoint_error
from qkernels.checkpoints.format import StoredLayer
from qkernels.checkpoints.rows import join, pick
from qkernels.checkpoints.store import Store
from qkernels.errors import CheckpointError
from qkernels.weight import QuantizedWeight


@dataclass(frozen=True)
class Source:
    """Rows of a stored tensor or layer.

    Attributes:
        rows: which, in what order; None for all.
        of: how many it must have, or None where that is not known.
        turned: the stored tensor is [K, N].
    """

    name: str
    rows: slice | Tensor | None = None
    of: int | None = None
    turned: bool = False

    def check(self, where: object, shape: Sequence[int]) -> None:
        """Raises CheckpointError where what is stored has other rows than the model."""
        if self.of is not None and tuple(shape[:1]) != (self.of,):
            raise CheckpointError(
                f"{where}: {self.name} has {shape[0] if shape else 'no'} rows in the file, and the "
                f"model's config makes them {self.of}"
            )


@dataclass(frozen=True)
class Origin:
    """What a layer or a tensor of the model is made of: rows of sources, one after the other.

    Attributes:
        order: the row of those that is row n of the model's; None where they are in order.
    """

    sources: tuple[Source, ...]
    order: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class TranslatedCheckpoint(Checkpoint):
    """A folder under the names of a model.

    Attributes:
        stored: the same as it is.
        origins: of each layer whose name is not the stored one.
    """

    stored: Checkpoint
    origins: Mapping[str, Origin]

    def read(self, name: str) -> QuantizedWeight:
        parts = self.read_parts(name)
        if len(parts) > 1:
            raise CheckpointError(
                f"{self.folder}: no scheme holds the rows of {name} as one weight"
            )
        return parts[0]

    def read_parts(self, name: str) -> list[QuantizedWeight]:
        if name not in self.origins:
            return self.stored.read_parts(name)
        origin, parts = self.origins[name], []
        for source in origin.sources:
            stored = self.stored.read_parts(source.name)
            source.check(self.folder, (sum(weight.n for weight in stored),))
            if source.rows is None:
                parts += stored
            elif len(stored) == 1:
                parts.append(pick(stored[0], source.rows))
            else:
                raise CheckpointError(
                    f"{self.folder}: {name} of the model has some rows of {source.name}, which "
                    "are not quantized alike: not supported"
                )
        joined = join(parts)
        if origin.order is None:
            return joined
        if len(joined) > 1:
            names = " and ".join(source.name for source in origin.sources)
            raise CheckpointError(
                f"{self.folder}: rows of {names} take turns in {name} of the model, and they are "
                "not quantized alike"
            )
        return [pick(joined[0], origin.order)]


@dataclass
class Conversion:
    """One of Transformers' converters with what it takes to make tensors of the model.

    Attributes:
        target: the first of these.
        collected: pattern -> stored names, in order.
    """

    converter: Any
    target: str
    collected: dict[str, list[str]] = field(default_factory=dict)

    def add(self, pattern: str, name: str) -> None:
        self.collected.setdefault(pattern, []).append(name)

    @property
    def names(self) -> list[str]:
        return [name for names in self.collected.values() for name in names]

    @property
    def targets(self) -> list[str]:
        patterns = self.converter.target_patterns
        return [self.target.replace(patterns[0], pattern, 1) for pattern in patterns]

    @property
    def operations(self) -> str:
        return ", ".join(type(operation).__name__ for operation in self.converter.operations)

    def run(self, model: Any, get: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The model's tensors, by Transformers' own code."""
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.collected.items():
            for name in names:
                converter.add_tensor(self.target, name, pattern, get(name))
        made = converter.convert(self.target, model=model, config=model.config)
        return {n: t[0] if isinstance(t, list) else t for n, t in made.items()}

    def rows(self, model: Any, numbers: Mapping[str, Tensor]) -> list[Tensor]:
        """Of `numbers` in place of the model's tensors, what would be stored, in the order of the
        patterns."""
        reverse = self.converter.reverse_transform()
        key = self.target
        for name, values in numbers.items():
            key, pattern = reverse.rename_source_key(name)
            reverse.add_tensor(key, name, pattern, values)
        found = reverse.convert(key, model=model, config=model.config)
        return [t[0] if isinstance(t, list) else t for t in found.values()]


class TranslatedStore(Store):
    """The tensors of a folder that are not quantized, under the names of a model."""

    def __init__(
        self,
        stored: Store,
        model: Any,
        origins: Mapping[str, Origin],
        conversions: Mapping[str, Conversion],
        names: Sequence[str],
    ) -> None:
        self.folder, self.where = stored.folder, stored.where
        self.config_path, self.metadata = stored.config_path, stored.metadata
        self._stored, self._model = stored, model
        self._origins, self._conversions = origins, conversions
        self._names = dict.fromkeys(names)
        self._shapes: dict[str, Tensor] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._like(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._like(name).dtype

    def nbytes(self, name: str) -> int:
        return self._like(name).nbytes

    def get(self, name: str) -> Tensor:
        return self._make(name, self._stored.get)

    def _like(self, name: str) -> Tensor:
        """A tensor without values, of the shape and type of another."""
        if name not in self._shapes:
            self._shapes[name] = self._make(name, self._empty)
        return self._shapes[name]

    def _empty(self, name: str) -> Tensor:
        shape, dtype = self._stored.shape(name), self._stored.dtype(name)
        return torch.empty(shape, dtype=dtype, device="meta")

    def _make(self, name: str, get: Callable[[str], Tensor]) -> Tensor:
        if name in self._conversions:
            conversion = self._conversions[name]
            with as_checkpoint_error(self.folder, f"has no {name}: {conversion.operations} failed"):
                return conversion.run(self._model, get)[name]
        if name not in self._origins:
            return get(name)
        origin, parts = self._origins[name], []
        for source in origin.sources:
            stored = get(source.name)
            rows = stored.mT if source.turned else stored
            source.check(self.folder, rows.shape)
            parts.append(rows if source.rows is None else rows[source.rows])
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole if origin.order is None else whole[origin.order]


def translated(
    stored: Checkpoint, origins: Mapping[str, Origin], store: Store, dense: Sequence[str]
) -> Checkpoint:
    layers = {}
    renamed = {origin.sources[0].name: name for name, origin in origins.items()}
    for name, origin in origins.items():
        parts = [stored.layers[source.name] for source in origin.sources]
        tensors = tuple(tensor for part in parts for tensor in part.tensors)
        shares = None if parts[0].shares is None else renamed.get(parts[0].shares)
        layers[name] = StoredLayer(parts[0].scheme, tensors, shares=shares)
    return TranslatedCheckpoint(
        config=stored.config,
        store=store,
        format=stored.format,
        layers=layers,
        dense=tuple(dense),
        kv_cache=stored.kv_cache,
        stored=stored,
        origins=origins,
    )
