"""Outputs of the parts of a block that are the same in each run of a batch, made once.

Where the layers of a block are quantized one after the other, the block runs for each of them, and
what is in front of the layer, attention above all, gives the same again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from qkernels.calibration.blocks import Block
from qkernels.calibration.calls import copied, replace_forward


@dataclass(frozen=True)
class Running:
    """One run of a block.

    Attributes:
        dense: in the model before quantization.
    """

    batch: int
    dense: bool = False


@dataclass
class _Part:
    """A child of the block.

    Attributes:
        layers: names of those in it.
        kept: its output by batch and by whether that is the dense model's.
        run: the latest in which it was called.
    """

    layers: frozenset[str]
    kept: dict[tuple[int, bool], Any] = field(default_factory=dict)
    run: Running | None = None
    repeats: bool = False


class Reuse:
    """Makes the children of a block that hold layers give what they gave, where that stays.

    Layers run in the order in which they change, so that what a child is given has stopped to
    change when its layers have. A child that one run calls twice always runs.
    """

    def __init__(self, model: nn.Module, block: Block) -> None:
        self._parts: dict[nn.Module, _Part] = {}
        self._now: frozenset[str] = frozenset()
        self._later: frozenset[str] = frozenset()
        self.running: Running | None = None
        self._undo: list[Callable[[], None]] = []
        module = model.get_submodule(block.name)
        prefix = f"{block.name}." if block.name else ""
        for name, child in module.named_children():
            inside = [each for each in block.layers if each.startswith(f"{prefix}{name}.")]
            if inside and child not in self._parts:
                self._parts[child] = _Part(frozenset(inside))
                forward = partial(self._forward, child, child.forward)
                self._undo.append(replace_forward(child, forward))

    def change(self, now: Collection[str], later: Collection[str]) -> None:
        """Says which layers are looked at and change now, and which later: none when all have
        changed."""
        self._now, self._later = frozenset(now), frozenset(later)

    def end(self) -> None:
        """Leaves the block as it was found."""
        while self._undo:
            self._undo.pop()()
        self._parts.clear()

    def _forward(
        self, child: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        part, run = self._parts[child], self.running
        if run is None:
            return inner(*args, **kwargs)
        if part.run is run:
            part.repeats = True
            part.kept.clear()
        part.run = run
        moving = self._now if run.dense else self._now | self._later
        if part.repeats or part.layers & moving:
            return inner(*args, **kwargs)
        key = run.batch, run.dense
        # One more run follows when all layers have changed. In the dense model it makes its part
        # again: what is kept until then would lie beside the widest statistics of the block.
        last = not self._later and (run.dense or not self._now)
        if key in part.kept:
            return part.kept.pop(key) if last else copied(part.kept[key])
        output = inner(*args, **kwargs)
        if not last:
            part.kept[key] = copied(output)
        return output
