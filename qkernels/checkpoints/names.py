"""Names that a folder has for what a model calls otherwise, and what each is made of.

Transformers 5 keeps tables of renamings, and of conversions such as that of a module an expert to
one parameter of all experts; `from_pretrained` applies them to the tensors of a folder. Here they
are applied to its quantized layers as well, under the name that a layer's weight would have.

What a conversion does to the rows of a weight is found by running it, the other way, on numbers of
rows in place of the model's weights: so any operation is followed that moves whole rows and nothing
else, and others are refused by name.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from qkernels.checkpoints.checkpoint import Checkpoint
from qkernels.checkpoints.foreign import as_checkpoint_error
from qkernels.checkpoints.rows import as_slice
from qkernels.checkpoints.translated import Conversion, Origin, Source, TranslatedStore, translated
from qkernels.errors import CheckpointError
from qkernels.modules.experts import expert_name, fused_experts
from qkernels.modules.kinds import is_linear_kind, linear_parts
from qkernels.modules.rows import part_name

_OURS = re.compile(rf"(.+)(\.{expert_name(0)[:-1]}\d+)")
_PART = re.compile(rf"(.+)\.{part_name(0)[:-1]}(\d+)")


def in_names_of(model: Any, checkpoint: Checkpoint) -> Checkpoint:
    """The folder with the layers and tensors that `model` has, under its names.

    A layer may be made of several stored ones, row by row. What the model has no place for keeps
    its stored name. A folder with the model's own names is given back as it is.

    Args:
        model: of Transformers, with none of its layers replaced yet; parameters may be on the meta
            device.

    Raises:
        CheckpointError: for experts that are missing or too many, two tensors for one place, and
            conversions that quantized layers cannot take.
    """
    checkpoint = _with_parts_joined(checkpoint)
    transforms = transforms_of(model)
    state = model.state_dict() if transforms else {}
    if not transforms or _fits(state, checkpoint):
        return checkpoint
    return _Translator(model, checkpoint, state, transforms).translated()


def transforms_of(model: Any, *, add_legacy: bool = True) -> list[Any]:
    """The renamings and conversions of Transformers for a model; none where it has no tables."""
    try:
        mapping = importlib.import_module("transformers.conversion_mapping")
    except ImportError:
        return []
    if not hasattr(model, "base_model_prefix"):
        return []
    return list(mapping.get_model_conversion_mapping(model, add_legacy=add_legacy))


def _loading() -> Any:
    return importlib.import_module("transformers.core_model_loading")


def has_place(state: Mapping[str, Tensor], layer: str) -> bool:
    """Whether a model with this state dict has a layer, or an expert, of that name."""
    ours = _OURS.fullmatch(layer)
    return f"{layer}.weight" in state or (ours is not None and ours[1] in state)


def _fits(state: Mapping[str, Tensor], checkpoint: Checkpoint) -> bool:
    """Whether all names of the folder are names of the model."""
    store = checkpoint.store
    return all(has_place(state, layer) for layer in checkpoint.layers) and all(
        tuple(state[name].shape) == store.shape(name)
        if name in state
        # Of an expert; others, such as the beta of a norm, have a place under another name.
        else name.endswith(".weight") and has_place(state, name.removesuffix(".weight"))
        for name in checkpoint.dense
    )


class _Translator:
    """Finds the place of each layer and tensor of a folder in a model."""

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        state: Mapping[str, Tensor],
        transforms: Sequence[Any],
    ) -> None:
        self.model, self.checkpoint, self.state = model, checkpoint, state
        self.fused = fused_experts(model)
        self.layers: dict[str, Origin] = {}
        self.tensors: dict[str, Origin] = {}
        self.conversions: dict[str, Conversion] = {}
        loading = _loading()
        kinds = loading.WeightRenaming, loading.WeightConverter
        self._renamings, self._converters = (
            [t for t in transforms if isinstance(t, k)] for k in kinds
        )
        self._natural, self._rename_key = loading.dot_natural_key, loading.rename_source_key

    def translated(self) -> Checkpoint:
        checkpoint = self.checkpoint
        groups: dict[str, Conversion] = {}
        by_pattern = {p: c for c in self._converters for p in c.source_patterns}
        layers = {f"{name}.weight": name for name in checkpoint.layers}
        keys = {**{name: name for name in checkpoint.dense}, **layers}
        for key in sorted(keys, key=self._natural):
            name = keys[key]
            ours = _OURS.fullmatch(key.removesuffix(".weight"))
            if ours is not None:
                # It lies as the model has it, whatever its tables do to stacks of that name.
                expert = f"{self._without_prefix(ours[1])}{ours[2]}"
                if key in layers:
                    self._put(self.layers, expert, (Source(name),))
                else:
                    self._put(self.tensors, f"{expert}.weight", (Source(name),))
                continue
            target, pattern = self._rename(key)
            if target not in self.state:
                self._put(self.layers if key in layers else self.tensors, name, (Source(name),))
            elif pattern is not None:
                new = Conversion(by_pattern[pattern], target)
                groups.setdefault(target, new).add(pattern, name)
            elif key not in layers:
                self._put(self.tensors, target, (Source(name),))
            else:
                kept = target.removesuffix(".weight")
                self._put(self.layers, name if kept == target else kept, (Source(name),))
        for conversion in groups.values():
            if any(name in checkpoint.layers for name in conversion.names):
                self._convert_rows(conversion)
            else:
                self._convert(conversion)
        return self._checkpoint()

    def _rename(self, key: str) -> tuple[str, str | None]:
        """The model's name of a tensor, and the pattern of the converter that it goes to."""
        prefix = self.model.base_model_prefix
        renamed, pattern = self._rename_key(
            key, self._renamings, self._converters, prefix, self.state
        )
        if renamed not in self.state:
            # Its name may be the model's, perhaps without a prefix.
            kept = self._without_prefix(key)
            if kept in self.state:
                return kept, None
        return renamed, pattern

    def _without_prefix(self, key: str) -> str:
        """A name with the prefix of the base model or without it, as the model has it."""
        kept, _ = self._rename_key(key, [], [], self.model.base_model_prefix, self.state)
        return str(kept)

    def _put(
        self,
        places: dict[str, Origin],
        name: str,
        sources: tuple[Source, ...],
        order: Tensor | None = None,
    ) -> None:
        if name in places or name in self.conversions:
            first = places[name].sources[0].name if name in places else "others"
            raise CheckpointError(
                f"{self.checkpoint.folder}: {first} and {sources[0].name} are both {name} of the "
                "model"
            )
        places[name] = Origin(sources, order)

    def _convert(self, conversion: Conversion) -> None:
        """Tensors that are not quantized are converted as Transformers does it."""
        for pattern, names in conversion.collected.items():
            self._check_count(conversion, pattern, names, len(names))
        for target in conversion.targets:
            if target in self.tensors:
                self._put(self.tensors, target, (Source(conversion.names[0]),))
            self.conversions[target] = conversion

    def _convert_rows(self, conversion: Conversion) -> None:
        """Layers some of which are quantized go where their rows go."""
        numbers, slots = self._numbers(conversion)
        folder = self.checkpoint.folder
        with as_checkpoint_error(folder, f"has no {conversion.target}: {conversion.operations}"):
            arrays = conversion.rows(self.model, numbers)
        patterns = conversion.converter.source_patterns
        each, rest = divmod(len(arrays), len(patterns))
        assert not rest, (patterns, len(arrays))
        total = slots[-1][2]
        source_of = torch.full((total,), -1)
        row_of = torch.zeros(total, dtype=torch.int64)
        sources: list[Source] = []
        for at, pattern in enumerate(patterns):
            names = conversion.collected.get(pattern, [])
            self._check_count(conversion, pattern, names, each)
            for name, array in zip(names, arrays[at * each : (at + 1) * each], strict=True):
                rows, turned = row_numbers(array)
                if rows is None or (turned and name in self.checkpoint.layers):
                    self._refuse(conversion, name)
                source_of[rows], row_of[rows] = len(sources), torch.arange(len(rows))
                sources.append(Source(name, None, len(rows), turned))
        if (source_of < 0).any():
            self._refuse(conversion, conversion.names[0])
        for slot, start, stop in slots:
            self._put_rows(slot, sources, source_of[start:stop], row_of[start:stop])

    def _numbers(
        self, conversion: Conversion
    ) -> tuple[dict[str, Tensor], list[tuple[str, int, int]]]:
        """In place of each tensor of the model two columns of numbers, 2n and 2n + 1 in row n of
        all; and each linear layer with its rows of them."""
        store, layers = self.checkpoint.store, self.checkpoint.layers
        most = sum(
            store.nbytes(tensor)
            for name in conversion.names
            for tensor in (layers[name].tensors if name in layers else (name,))
        )
        numbers, slots, first = {}, [], 0
        for target in conversion.targets:
            fused = self.fused.get(target)
            layer = target.removesuffix(".weight")
            if fused is not None:
                reason = fused.why_not()
                if reason is not None:
                    raise CheckpointError(
                        f"{self.checkpoint.folder}: {target} is not supported: {reason}"
                    )
                stack, *sizes = fused.parameter.shape
                n, turned = sizes[1 if fused.transposed else 0], bool(fused.transposed)
                names = [f"{target}.{expert_name(number)}" for number in range(min(stack, most))]
            else:
                module: Any = _module(self.model, layer)
                if target == layer or module is None or not is_linear_kind(module):
                    self._refuse(conversion, conversion.names[0])
                parts = linear_parts(module)
                stack, n, turned, names = 1, len(parts.weight), parts.transposed, [layer]
            # Each row takes a byte at least.
            if stack * n > most:
                raise CheckpointError(
                    f"{self.checkpoint.folder}: {target} has {stack * n} rows in the model's "
                    f"config, more than there are bytes of {conversion.names[0]} and others"
                )
            values = 2 * torch.arange(first, first + stack * n)[:, None] + torch.arange(2)
            values = values.view(stack, n, 2) if fused is not None else values
            numbers[target] = values.mT.contiguous() if turned else values
            slots += [(name, first + at * n, first + (at + 1) * n) for at, name in enumerate(names)]
            first += stack * n
        return numbers, slots

    def _put_rows(
        self, slot: str, sources: Sequence[Source], source_of: Tensor, row_of: Tensor
    ) -> None:
        numbers = source_of.unique_consecutive().tolist()
        order = None
        if len(set(numbers)) < len(numbers):
            numbers = list(dict.fromkeys(numbers))
            order = torch.cat([(source_of == n).nonzero().flatten() for n in numbers]).argsort()
        made = []
        for number in numbers:
            source, rows = sources[number], row_of[source_of == number]
            made.append(Source(source.name, as_slice(rows, source.of), source.of, source.turned))
        quantized = {source.name in self.checkpoint.layers for source in made}
        if len(quantized) > 1:
            dense = next(s.name for s in made if s.name not in self.checkpoint.layers)
            raise CheckpointError(
                f"{self.checkpoint.folder}: {dense} is not quantized, and other rows of {slot} of "
                "the model are: not supported"
            )
        if quantized == {True}:
            self._put(self.layers, slot, tuple(made), order)
        else:
            self._put(self.tensors, f"{slot}.weight", tuple(made), order)

    def _check_count(
        self, conversion: Conversion, pattern: str, names: Sequence[str], wanted: int
    ) -> None:
        numbers = [_numbered(name) for name in names]
        # Experts have a number each. Others share that of their block, or have none.
        numbered = 1 < len(names) == len(set(numbers))
        if len(names) == wanted and not (numbered and numbers != list(range(wanted))):
            return
        where = f"{self.checkpoint.folder}: {conversion.target} of the model takes {wanted} of"
        missing = sorted(set(range(wanted)).difference(numbers))
        which = f", and number {missing[0]} is missing" if missing and names else ""
        if len(names) == wanted and not missing:
            which = ", in another order"
        raise CheckpointError(f"{where} {pattern}, and the file has {len(names)}{which}")

    def _refuse(self, conversion: Conversion, name: str) -> NoReturn:
        raise CheckpointError(
            f"{self.checkpoint.folder}: {name} is quantized, and becomes {conversion.target} of "
            f"the model by {conversion.operations} of Transformers, which moves more than whole "
            "rows: not supported"
        )

    def _checkpoint(self) -> Checkpoint:
        stored = self.checkpoint
        names = (*self.tensors, *self.conversions)
        store = TranslatedStore(stored.store, self.model, self.tensors, self.conversions, names)
        return translated(stored, self.layers, store, names)


def _with_parts_joined(checkpoint: Checkpoint) -> Checkpoint:
    """The folder with one layer for those that were saved part by part."""
    found = {name: _PART.fullmatch(name) for name in checkpoint.layers}
    if not any(found.values()):
        return checkpoint
    parts: dict[str, list[tuple[int, str]]] = {}
    for name, match in found.items():
        whole, number = (match[1], int(match[2])) if match else (name, 0)
        parts.setdefault(whole, []).append((number, name))
    origins = {
        whole: Origin(tuple(Source(name) for _, name in sorted(numbered)))
        for whole, numbered in parts.items()
    }
    return translated(checkpoint, origins, checkpoint.store, checkpoint.dense)


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def row_numbers(array: Tensor) -> tuple[Tensor | None, bool]:
    """The rows that an array of numbers consists of, or None; and whether it lies as [2, N]."""
    for turned in (False, True):
        rows = array.mT if turned and array.dim() == 2 else array
        if rows.shape[-1:] == (2,) and rows.dim() <= 2:
            rows = rows.reshape(-1, 2)
            if (rows[:, 0] % 2 == 0).all() and (rows[:, 1] == rows[:, 0] + 1).all():
                return rows[:, 0] // 2, turned
    return None, False


def _numbered(name: str) -> int | None:
    found = re.findall(r"\.(\d+)\.", name)
    return int(found[-1]) if found else None
