"""Layers that read one x as one product: queries, keys and values, or a gate and what it gates.

Their packed weights are put behind each other in one piece of memory, of which each layer holds its
part as a view. Whoever of them is called first with an x multiplies it with all; the others find
their outputs there. So a model's own code stays as it is, and so does each layer: its weight, its
buffers and what is saved of it. The numbers are the same, bit for bit: outputs of a kernel do not
depend on each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from qkernels.activations import QuantizedActivation
from qkernels.fields import FIELDS
from qkernels.layouts import VNNI, PackedWeight
from qkernels.modules.linear import WQLinear
from qkernels.modules.packed import PackedModule
from qkernels.modules.producers import Producer, version_of

LANES = 16
"""Rows that a panel of the layout has: weights are cut there alone."""

_MOST_WASTED = 4
"""How often in a row outputs may wait for nobody, as where each layer is given a copy of x, before
layers compute their own alone."""


class Fused:
    """The layers of one group.

    Attributes:
        layer: of all their outputs.
        names: of the layers, for listings.
    """

    def __init__(self, parts: Sequence[WQLinear], names: Sequence[str]) -> None:
        assert why_not_fused(parts) is None, names
        self.names = tuple(names)
        first = parts[0]
        packed = [part.packed for part in parts]
        buffers = {
            name: torch.cat([each.buffers[name] for each in packed]) if _by_rows(name) else held
            for name, held in packed[0].buffers.items()
        }
        sizes = [part.out_features for part in parts]
        whole = PackedWeight(first.scheme, packed[0].layout, sum(sizes), first.in_features, buffers)
        bias = None if first.bias is None else torch.cat([_bias(part) for part in parts])
        self.layer = WQLinear(
            whole,
            bias,
            backend=first.backend,
            batch_invariant=first.batch_invariant,
            check_kernels=first.check_kernels,
            dtype=first.dtype,
        )
        self._parts, self._ends = list(parts), list(pairwise(accumulate(sizes, initial=0)))
        self._held: tuple[Tensor | QuantizedActivation, int, dict[int, Tensor]] | None = None
        self._wasted = 0
        self._producer: Producer | None = None
        for number, part in enumerate(parts):
            self._show(number, part)

    def output(self, number: int, x: Tensor | QuantizedActivation) -> Tensor:
        """Of one layer, for x; those of the others wait for them."""
        # Compilers do not make equal products one, and do not say how often x was written to: the
        # run in which layers were found says that it is not.
        compiling = torch.compiler.is_compiling()
        held, version = self._held, 0 if compiling else version_of(x)
        if held is not None and held[0] is x and held[1] == version:
            found = held[2].pop(number, None)
            if not held[2]:
                self._held = None
            if found is not None:
                return found
        if not compiling:
            self._wasted = self._wasted + 1 if held is not None else 0
        producer = None if compiling else self._producer
        given = x if producer is None else producer.quantized(x)
        if self._wasted > _MOST_WASTED:
            return WQLinear.forward(self._parts[number], given)
        y = self.layer(given)
        outputs = {i: y[..., a:b] for i, (a, b) in enumerate(self._ends)}
        own = outputs.pop(number)
        self._held = x, version, outputs
        return own

    def read_from(self, producer: Producer | None) -> None:
        """What quantizes x where it is made, or None."""
        self._producer = producer

    def dissolve(self) -> None:
        """Makes the layers what they were, each with memory of its own."""
        if self._producer is not None:
            self._producer.dissolve()
        for part in self._parts:
            part.__class__ = WQLinear
            vars(part).pop("_fused")
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else buffer.clone()
        self._parts.clear()
        self._held = None

    def __getstate__(self) -> dict[str, Any]:
        # Of a copy: nobody waits for outputs there.
        return {**vars(self), "_held": None}

    def _show(self, number: int, part: WQLinear) -> None:
        """Makes a layer hold its part of the memory."""
        start, stop = self._ends[number]
        for name, held in zip(part._names, part._held, strict=True):
            if _by_rows(name):
                whole = self.layer.packed.buffers[name]
                lanes = LANES if _in_panels(name) else 1
                part._buffers[held] = whole[start // lanes : -(-stop // lanes)]
        if self.layer.bias is not None:
            part._buffers["bias"] = self.layer.bias[start:stop]
        part.__class__ = FusedPart
        vars(part)["_fused"] = self, number


class FusedPart(WQLinear):
    """A `WQLinear` whose product is made together with those of others that read the same."""

    _fused: tuple[Fused, int]

    def forward(self, input: Tensor | QuantizedActivation) -> Tensor:
        """As `WQLinear.forward`."""
        group, number = self._fused
        return group.output(number, input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fused={list(self._fused[0].names)}"

    def _apply(self, fn: Any, recurse: bool = True) -> PackedModule:
        # Who moves to another device, or to other memory, is packed anew.
        self._fused[0].dissolve()
        return WQLinear._apply(self, fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._fused[0].dissolve()
        WQLinear._load_from_state_dict(self, *args)


def why_not_fused(parts: Sequence[WQLinear]) -> str | None:
    """Why layers that read the same x cannot be one product, or None."""
    first = parts[0]
    if len(parts) < 2:
        return "nothing else reads what it does"
    if any(type(part) is not WQLinear for part in parts):
        return "they are no WQLinear, or are fused already"
    if any(part.packed.layout is not VNNI for part in parts):
        return f"only weights in the {VNNI.name} layout, that of the CPU, are fused"
    for what in ("scheme", "in_features", "dtype", "backend", "batch_invariant", "transposed"):
        if any(getattr(part, what) != getattr(first, what) for part in parts):
            return f"they differ in {what}"
    if any((part.bias is None) != (first.bias is None) for part in parts):
        return "some have a bias, and others none"
    if first.scheme.scale_levels == "double":
        return "scales that are quantized twice come in blocks over all rows"
    if any(part.out_features % LANES for part in parts[:-1]):
        return f"their outputs are no multiples of {LANES}"
    held = [part.packed.buffers for part in parts]
    for name in {name for each in held for name in each}:
        if any(name not in each for each in held):
            return f"some have {name}, and others none"
        if name != "words" and FIELDS[name].take_rows is not None:
            return "single numbers in 16 bits are not put together"
        if not _by_rows(name) and any(not torch.equal(each[name], held[0][name]) for each in held):
            return f"they differ in {name}"
    return None


def _bias(part: WQLinear) -> Tensor:
    assert part.bias is not None
    return part.bias


def _by_rows(name: str) -> bool:
    """Whether a buffer has numbers for each row of the weight, as its first dimension."""
    return name == "words" or FIELDS[name].axes[:1] in (("n",), ("rows",), ("row_blocks",))


def _in_panels(name: str) -> bool:
    return name == "words" or FIELDS[name].by_group
