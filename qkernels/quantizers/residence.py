"""The weights of a model that are in memory: those of the block at work, and those of no block.

The others are in a folder, and their parameters on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from qkernels.calibration.blocks import Block
from qkernels.checkpoints.dense import Place, dense_places
from qkernels.checkpoints.dense_folder import DenseFolder
from qkernels.checkpoints.format import WeightKind
from qkernels.checkpoints.memory import give_back_free_pages
from qkernels.modules.experts import WQExperts
from qkernels.modules.kinds import is_conv1d
from qkernels.modules.packed import PackedModule
from qkernels.quantizers.linear_forms import LinearForms


@dataclass(frozen=True)
class _Slot:
    """A parameter of a module that has a tensor of the folder, or a part of it.

    Attributes:
        empty: what is there while the tensor is not in memory.
    """

    module: nn.Module
    name: str
    part: Callable[[Tensor], Tensor]
    empty: nn.Parameter

    def fill(self, tensor: Tensor) -> None:
        values = nn.Parameter(self.part(tensor), requires_grad=self.empty.requires_grad)
        self.module._parameters[self.name] = values

    def clear(self) -> None:
        self.module._parameters[self.name] = self.empty


class StreamedBlocks:
    """Reads the weights of each block when it is reached, and lets go of them behind it.

    Of quantized layers there is the form alone then, on the meta device, and what `kinds` says.

    Args:
        folder: its model has none of its layers replaced yet.
        names: the layers that are to be quantized.

    Attributes:
        forms: the layers of `names`, as `nn.Linear`.
        kinds: of the layers that were quantized, by name.
    """

    def __init__(self, folder: DenseFolder, names: Collection[str]) -> None:
        self._folder, self._model = folder, folder.model
        places = dense_places(self._model)
        self.forms = LinearForms(self._model, names)
        self._slots = {
            own: [slot for name in own for slot in self._slots_of(name, places[name])]
            for own in folder.names
        }
        self._parts = {
            (id(slot.module), slot.name): (own[0], slot.part)
            for own, slots in self._slots.items()
            for slot in slots
        }
        self._held: set[tuple[str, ...]] = set()
        self._brought: list[tuple[str, ...]] = []
        self.kinds: dict[str, WeightKind] = {}

    def _slots_of(self, name: str, place: Place) -> Iterator[_Slot]:
        """Where a tensor of the folder is in the model, whose layers have other forms by now."""
        prefix, _, own = name.rpartition(".")
        module = self._model.get_submodule(prefix)
        stack = module._modules.get(own)
        if isinstance(stack, WQExperts):
            for number, layer in enumerate(stack.layers):
                yield _slot(layer, "weight", _entry(number, stack.transposed))
        elif is_conv1d(place.module) and module is not place.module:
            yield _slot(module, own, Tensor.t if own == "weight" else _whole)
        else:
            yield _slot(place.module, own, _whole)

    def bring(self, block: Block) -> None:
        """See `Residence`."""
        assert not self._brought
        for own in self._of(block):
            if own not in self._held:
                self._brought.append(own)
                self._fill(own)

    def leave(self, block: Block) -> None:
        """See `Residence`."""
        for name in block.layers:
            layer = self._model.get_submodule(name)
            if isinstance(layer, PackedModule):
                if layer.packed.device.type != "meta":
                    self.kinds[name] = WeightKind.of(layer.packed.parameters())
                    layer.to("meta")
                else:
                    self.kinds[name] = self._kind_of_same(block, layer)
        self.let_go()

    def let_go(self) -> None:
        """Empties the parameters that the last `bring` filled."""
        while self._brought:
            for slot in self._slots[self._brought.pop()]:
                slot.clear()
        give_back_free_pages()

    def hold(self, names: Iterable[str]) -> None:
        """Reads parameters, by any of their names, to stay."""
        wanted = set(names)
        for own in self._folder.names:
            if own not in self._held and not wanted.isdisjoint(own):
                self._fill(own)
                self._held.add(own)

    def outside(self, blocks: Iterable[Block]) -> list[str]:
        """A name of each parameter that is not of one block alone."""
        prefixes = [_prefix(block) for block in blocks]
        found = []
        for own in self._folder.names:
            owners = {next((p for p in prefixes if n.startswith(p)), None) for n in own}
            if None in owners or len(owners) > 1:
                found.append(own[0])
        return found

    def nbytes(self, block: Block) -> int:
        """Bytes of the weights of a block, as they are in the folder's model."""
        return sum(self._folder.nbytes(own) for own in self._of(block))

    def part(self, place: Place) -> tuple[str, Callable[[Tensor], Tensor]] | None:
        """The tensor of the folder that a place of the model has, and which part of it."""
        return self._parts.get((id(place.module), place.name))

    def _of(self, block: Block) -> list[tuple[str, ...]]:
        prefix = _prefix(block)
        return [own for own in self._folder.names if any(n.startswith(prefix) for n in own)]

    def _fill(self, own: tuple[str, ...]) -> None:
        tensor = self._folder.get(own[0])
        for slot in self._slots[own]:
            slot.fill(tensor)

    def _kind_of_same(self, block: Block, layer: nn.Module) -> WeightKind:
        """Of a layer that has several names in its block."""
        return next(self.kinds[n] for n in block.layers if self._model.get_submodule(n) is layer)


def _prefix(block: Block) -> str:
    return f"{block.name}." if block.name else ""


def _slot(module: nn.Module, name: str, part: Callable[[Tensor], Tensor]) -> _Slot:
    empty = module._parameters[name]
    assert empty is not None
    return _Slot(module, name, part, empty)


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _entry(number: int, transposed: bool) -> Callable[[Tensor], Tensor]:
    def part(stack: Tensor) -> Tensor:
        return stack[number].t() if transposed else stack[number]

    return part
