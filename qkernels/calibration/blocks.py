"""The blocks of a model: the parts that a method is taken through, one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Block:
    """A module, and the layers in it that are to be quantized, by their names in the model.

    A layer outside of all repeated blocks is a block of its own.
    """

    name: str
    layers: tuple[str, ...]


def find_blocks(model: nn.Module, layers: Iterable[str]) -> list[Block]:
    """Every layer in exactly one block, in the order of the model's modules.

    Blocks are the entries of the outermost `nn.ModuleList`s, and of `nn.Sequential`s that repeat a
    class, such as the layers of a decoder. A model that has none is one block.
    """
    grouped: dict[str, list[str]] = {}
    repeated = False
    for layer in layers:
        block = next(_enclosing(model, layer), None)
        repeated |= block is not None
        grouped.setdefault(layer if block is None else block, []).append(layer)
    if not repeated:
        return [Block("", tuple(layer for names in grouped.values() for layer in names))]
    return [Block(name, tuple(names)) for name, names in grouped.items()]


def _enclosing(model: nn.Module, layer: str) -> Iterator[str]:
    """Names of repeated modules around `layer`, the outermost first."""
    parts = layer.split(".")
    parent = model
    for i, part in enumerate(parts[:-1]):
        entry = parent.get_submodule(part)
        if _repeats(parent, entry):
            yield ".".join(parts[: i + 1])
        parent = entry


def _repeats(parent: nn.Module, entry: nn.Module) -> bool:
    if isinstance(entry, nn.ModuleList | nn.ModuleDict):
        # It only holds modules, and is never called itself.
        return False
    if isinstance(parent, nn.Sequential):
        return sum(type(other) is type(entry) for other in parent) > 1
    return isinstance(parent, nn.ModuleList)


def kind_of(name: str) -> str:
    """The same for modules that numbers alone tell apart, such as experts."""
    return re.sub(r"\d+", "*", name)
