"""Names under which other packages read a mixture of experts: a module an expert.

They are those that `save_pretrained` of Transformers gives a dense model: its tables the other way
around. What a conversion makes of rows is found as in `names.py`. Each name is translated back by
the tables, and what does not come out as the model's is not written under it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from qkernels.checkpoints.foreign import as_checkpoint_error
from qkernels.checkpoints.format import Format, WeightKind
from qkernels.checkpoints.names import row_numbers, transforms_of
from qkernels.checkpoints.rows import as_slice, pick
from qkernels.checkpoints.table import check_holds
from qkernels.errors import CheckpointError
from qkernels.modules.experts import WQExperts, expert_name
from qkernels.modules.rows import WQRows, part_name
from qkernels.weight import QuantizedWeight

_WITH_WEIGHT = (nn.Linear, nn.Embedding)
"""What may be quantized and then lacks the tensor of that name."""

Rows = slice | Tensor | None


@dataclass(frozen=True)
class Piece:
    """Rows of a layer of the model that are stored as a layer.

    Attributes:
        name: of the stored one.
        n: how many.
    """

    name: str
    rows: Rows
    n: int


def written_names(model: Any, row: Format) -> WrittenNames | None:
    """Where the model has experts and the format's readers want a module each, the names of all;
    else None, and names are the model's.

    Raises:
        CheckpointError: for experts that have no such names.
    """
    if row.takes_stacks or not any(isinstance(module, WQExperts) for module in model.modules()):
        return None
    return WrittenNames(model, row)


def check_writes(
    format: str, model: Any, kinds: Mapping[str, WeightKind]
) -> tuple[Format, WrittenNames | None, Mapping[str, WeightKind]]:
    """The row of `format`, which can be written and holds all layers of a model as they are stored,
    with the names under which that is, and the kinds by these.

    Args:
        kinds: of the layers to be stored, by their names in the model.

    Raises:
        CheckpointError: as `check_holds` does, and for experts that readers have no names for.
    """
    row = check_holds(format, {})
    names = written_names(model, row)
    kinds = kinds if names is None else names.kinds(kinds)
    return check_holds(format, kinds), names, kinds


class WrittenNames:
    """The names of a folder of `model`, some of whose layers are `WQExperts`.

    Attributes:
        pieces: what is stored of each linear layer in `WQExperts`, by its name in the model.
    """

    def __init__(self, model: Any, row: Format) -> None:
        self.model, self.row = model, row
        loading = importlib.import_module("transformers.core_model_loading")
        self._rename_key = loading.rename_source_key
        forward = transforms_of(model)
        renamings, converters = loading.WeightRenaming, loading.WeightConverter
        self._renamings = [t for t in forward if isinstance(t, renamings)]
        self._converters = [t for t in forward if isinstance(t, converters)]
        # As in Transformers: a prefix that may have been there or not is not put on again.
        kept = [
            t
            for t in transforms_of(model, add_legacy=False)
            if not isinstance(t, loading.PrefixChange)
        ]
        back = [t.reverse_transform() for t in reversed(kept)]
        self._back_renamings = [t for t in back if isinstance(t, renamings)]
        self._back_converters = [t for t in back if isinstance(t, converters)]
        modules = dict(model.named_modules(remove_duplicate=False))
        stacks = {name: m for name, m in modules.items() if isinstance(m, WQExperts)}
        layers = {f"{name}.weight": m for name, m in modules.items() if isinstance(m, _WITH_WEIGHT)}
        self._state: dict[str, Any] = {**model.state_dict(), **layers, **stacks}
        self.pieces: dict[str, list[Piece]] = {}
        for name, stack in stacks.items():
            self._take_apart(name, stack)

    def layer(self, name: str) -> list[Piece]:
        """What is stored of a linear layer of the model."""
        if name in self.pieces:
            return self.pieces[name]
        stored = self._renamed(f"{name}.weight")
        rows = self.model.get_submodule(name).out_features
        return [Piece(stored.removesuffix(".weight"), None, rows)]

    def weights(self, name: str, weight: QuantizedWeight) -> Iterator[tuple[str, QuantizedWeight]]:
        """The stored layers of one of the model, by their names."""
        for piece in self.layer(name):
            yield piece.name, weight if piece.rows is None else pick(weight, piece.rows)

    def tensors(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What is stored of a tensor that is not quantized."""
        layer = name.removesuffix(".weight")
        if layer != name and layer in self.pieces:
            return {
                f"{piece.name}.weight": tensor if piece.rows is None else tensor[piece.rows]
                for piece in self.pieces[layer]
            }
        converter = self._converter(name)
        if converter is None:
            return {self._renamed(name): tensor}
        return self._converted(converter, name, tensor)

    def kinds(self, kinds: Mapping[str, WeightKind]) -> dict[str, WeightKind]:
        """What a format must know of the stored layers, of what it must know of the model's."""
        found = {}
        for name, kind in kinds.items():
            pieces = self.layer(name)
            instead_of = None if name in self.pieces else kind.instead_of
            for piece in pieces:
                shape = None if kind.shape is None else (piece.n, kind.shape[1])
                found[piece.name] = replace(kind, shape=shape, instead_of=instead_of)
        return found

    def dense(self, quantized: Mapping[str, Any]) -> list[str]:
        """The linear layers that stay dense, as readers name them: routers, which are parameters
        here, and the experts of parameters that were not taken apart are such layers there."""
        found: dict[str, None] = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            if isinstance(module, nn.Linear) and name not in quantized:
                found |= {piece.name: None for piece in self.layer(name)}
            elif not isinstance(module, nn.Linear | nn.Embedding):
                for own, parameter in module._parameters.items():
                    if parameter is not None and parameter.dim() in (2, 3):
                        key = f"{name}.{own}".lstrip(".")
                        like = torch.empty_like(parameter, device="meta")
                        made = self.tensors(key, like).items()
                        found |= {
                            stored.removesuffix(".weight"): None
                            for stored, tensor in made
                            if stored.endswith(".weight") and tensor.dim() == 2
                        }
        return list(found)

    def _take_apart(self, name: str, stack: WQExperts) -> None:
        n = stack.layers[0].out_features
        numbers = 2 * torch.arange(len(stack) * n)[:, None] + torch.arange(2)
        numbers = numbers.view(len(stack), n, 2)
        converter = self._converter(name)
        if converter is None:
            self._refuse(name, "Transformers has no such names for them")
        stored = self._converted(converter, name, numbers.mT if stack.transposed else numbers)
        bounds = {
            (e, start): (layer, start, stop)
            for e, expert in enumerate(stack.layers)
            for layer, start, stop in _parts(f"{name}.{expert_name(e)}", expert)
        }
        for key, array in stored.items():
            rows, turned = row_numbers(array)
            whole = rows is not None and len((rows // n).unique()) == 1 and not turned
            if rows is None or not whole or not key.endswith(".weight"):
                operations = ", ".join(type(op).__name__ for op in converter.operations)
                self._refuse(name, f"{operations} of Transformers moves more than whole rows")
            expert, rows = int(rows[0]) // n, rows % n
            for (e, _), (layer, start, stop) in bounds.items():
                inside = (rows >= start) & (rows < stop)
                if e != expert or not inside.any():
                    continue
                if not inside.all():
                    self._refuse(name, f"{key} has rows of several layers")
                piece = Piece(
                    key.removesuffix(".weight"), as_slice(rows - start, stop - start), len(rows)
                )
                self.pieces.setdefault(layer, []).append(piece)
            if self._read(key) != name:
                self._refuse(name, f"{key} would be read as {self._read(key)}")

    def _converter(self, name: str) -> Any:
        """What makes several tensors, or another one, of a tensor; None where it is renamed."""
        for transform in self._back_converters:
            _, pattern = transform.rename_source_key(name)
            if pattern is not None:
                # One tensor of several of the model is left as these.
                return transform if len(transform.source_patterns) == 1 else None
        return None

    def _converted(self, converter: Any, name: str, tensor: Tensor) -> dict[str, Tensor]:
        operations = ", ".join(type(operation).__name__ for operation in converter.operations)
        key, pattern = converter.rename_source_key(name)
        converter.add_tensor(key, name, pattern, tensor)
        with as_checkpoint_error(name, f"cannot be stored by {operations} of Transformers"):
            made = converter.convert(key, model=self.model, config=self.model.config)
        converter.collected_tensors.clear()
        return {
            self._back(stored): value[0] if isinstance(value, list) else value
            for stored, value in made.items()
        }

    def _back(self, name: str) -> str:
        for transform in self._back_renamings:
            name, _ = transform.rename_source_key(name)
        return name

    def _renamed(self, name: str) -> str:
        stored = self._back(name)
        return stored if self._read(stored) == name else name

    def _read(self, key: str) -> str:
        """The model's name of a stored tensor."""
        prefix = self.model.base_model_prefix
        found, _ = self._rename_key(key, self._renamings, self._converters, prefix, self._state)
        return str(found)

    def _refuse(self, name: str, reason: str) -> NoReturn:
        raise CheckpointError(
            f"{name} holds experts in one parameter, and {self.row.name} is read with a module an "
            f"expert: {reason}; formats that hold it: qkernels"
        )


def _parts(name: str, layer: nn.Module) -> Iterator[tuple[str, int, int]]:
    """The layers that an expert consists of, with their first row and the one after the last."""
    parts: list[Any] = layer.layers if isinstance(layer, WQRows) else [layer]
    start = 0
    for number, part in enumerate(parts):
        own = f"{name}.{part_name(number)}" if isinstance(layer, WQRows) else name
        yield own, start, start + part.out_features
        start += part.out_features
