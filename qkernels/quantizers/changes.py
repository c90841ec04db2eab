"""Every change that quantization makes to a model, so that each can be taken back."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.calibration.blocks import Block
from qkernels.checkpoints.ties import say_untied
from qkernels.fields import FIELDS


class _ScaledInputs:
    """A hook that multiplies what a layer is given, before anybody else sees it.

    Attributes:
        layer: whose inputs they are.
        factor: fp32 [K].
        on: whether it does.
    """

    def __init__(self, layer: nn.Module, factor: Tensor) -> None:
        self.layer, self.factor, self.on = layer, factor, True
        handle = layer.register_forward_pre_hook(self._scale, with_kwargs=True)
        self.remove = handle.remove

    def _scale(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        scale = FIELDS["input_factor"].transform_x
        assert scale is not None
        if self.on and args:
            args = (scale(args[0], self.factor), *args[1:])
        elif self.on:
            kwargs = {**kwargs, "input": scale(kwargs["input"], self.factor)}
        return args, kwargs


@dataclass
class _BlockChanges:
    """Of one block: name -> what was there, and what is there.

    Attributes:
        inputs: of layers before quantization.
    """

    layers: dict[str, tuple[nn.Module, nn.Module]] = field(default_factory=dict)
    parameters: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    inputs: dict[str, _ScaledInputs] = field(default_factory=dict)

    def take_hooks_off(self) -> None:
        """Makes layers take their inputs as they come."""
        for own in self.inputs.values():
            own.remove()


class Changes:
    """The layers replaced, parameters rewritten and inputs scaled so far, block by block.

    Args:
        kept: the values that rewritten parameters had are kept; else they are not taken back.
        no_factors: why layers may have no factor of their input, or None.
    """

    def __init__(
        self, model: nn.Module, *, kept: bool = True, no_factors: str | None = None
    ) -> None:
        self._model, self._kept, self._no_factors = model, kept, no_factors
        users: dict[int, int] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                users[id(parameter)] = users.get(id(parameter), 0) + 1
        self._shared = {key for key, count in users.items() if count > 1}
        self._told = False
        self._blocks: dict[str, _BlockChanges] = {}
        self._before: dict[str, Tensor] = {}
        self._inputs_before: dict[str, _ScaledInputs] = {}
        self._ties: list[Callable[[], None]] = []

    def begin(self, block: Block) -> None:
        """What follows belongs to `block`."""
        self._present = self._blocks.setdefault(block.name, _BlockChanges())

    def replace(self, name: str, layer: nn.Module) -> None:
        """Puts `layer` in place of the one of that name."""
        before = self._model.get_submodule(name)
        self._present.layers[name] = before, layer
        self._model.set_submodule(name, layer)

    def replace_quantized(self, name: str, layer: nn.Module) -> nn.Module:
        """Puts `layer` in place of one that took another's place; that other."""
        changes = next(c for c in self._blocks.values() if name in c.layers)
        original, _ = changes.layers[name]
        changes.layers[name] = original, layer
        self._model.set_submodule(name, layer)
        return original

    def rewrite(self, name: str, values: Tensor) -> None:
        """Gives a parameter new values, rounded to its type, in memory of their own."""
        parameter = self._model.get_parameter(name)
        assert values.shape == parameter.shape, name
        values = _copied(values, parameter)
        before = parameter.data if self._kept else values
        original, _ = self._present.parameters.get(name, (before, None))
        self._present.parameters[name] = original, values
        parameter.data = values

    def is_shared(self, name: str) -> bool:
        """Whether several modules have this parameter, so that one cannot be changed alone."""
        return id(self._model.get_parameter(name)) in self._shared

    def may_scale_inputs(self, name: str) -> bool:
        """Whether a layer may have a factor of its input, and another weight; says once why not."""
        if self.is_shared(f"{name}.weight"):
            return False
        if self._no_factors is not None and not self._told:
            self._told = True
            warnings.warn(
                f"{name}: nothing in front of it takes a factor of its input, and "
                f"{self._no_factors}: it is left as it is, and so are others",
                stacklevel=2,
            )
        return self._no_factors is None

    def scale_inputs(self, name: str, factor: Tensor) -> None:
        """Multiplies what reaches a layer that is not quantized yet by `factor`, fp32 [K], on top
        of what it is multiplied by already."""
        before = self._present.inputs.pop(name, None)
        if before is not None:
            before.remove()
            factor = factor * before.factor
        layer = self._model.get_submodule(name)
        device = layer.get_parameter("weight").device
        self._present.inputs[name] = _ScaledInputs(layer, factor.to(device))

    def scaled_inputs(self) -> dict[str, Tensor]:
        """The factors of layers of the present block."""
        return {name: own.factor for name, own in self._present.inputs.items()}

    def input_factor(self, layer: nn.Module) -> Tensor | None:
        """What the inputs of a layer of the present block are multiplied by."""
        scaled = (*self._inputs_before.values(), *self._present.inputs.values())
        factors = [own.factor for own in scaled if own.layer is layer]
        return math.prod(factors[1:], start=factors[0]) if factors else None

    def rewrite_model(self, name: str, values: Tensor) -> None:
        """Like `rewrite`, before the first block begins; only `undo` knows what was there."""
        assert not self._blocks, name
        parameter = self._model.get_parameter(name)
        assert values.shape == parameter.shape, name
        self._before.setdefault(name, parameter.data)
        parameter.data = _copied(values, parameter)

    def scale_model_inputs(self, name: str, factor: Tensor) -> None:
        """Like `scale_inputs`, before the first block begins; only `undo` takes it back."""
        assert not self._blocks and name not in self._inputs_before, name
        layer = self._model.get_submodule(name)
        device = layer.get_parameter("weight").device
        self._inputs_before[name] = _ScaledInputs(layer, factor.to(device))

    def untie(self, name: str) -> None:
        """Makes a parameter that is another module's too one of its own, and says so in configs."""
        owner, _, key = name.rpartition(".")
        module = self._model.get_submodule(owner)
        shared = module._parameters[key]
        assert shared is not None
        module._parameters[key] = nn.Parameter(shared.data, shared.requires_grad)
        tie_again = say_untied(self._model)

        def undo() -> None:
            module._parameters[key] = shared
            tie_again()

        self._ties.append(undo)

    def rewritten(self) -> dict[str, Tensor]:
        """The parameters of the present block that have other values than at the beginning."""
        return {name: values for name, (_, values) in self._present.parameters.items()}

    def settle(self, block: Block) -> None:
        """Makes what was done to `block` last, and keeps nothing of what was there before."""
        if block.name in self._blocks:
            self._blocks.pop(block.name).take_hooks_off()

    def finish(self) -> None:
        """Takes off of layers that were replaced what was put on them."""
        for changes in self._blocks.values():
            changes.take_hooks_off()
        self._take_first_hooks_off()

    def _take_first_hooks_off(self) -> None:
        for own in self._inputs_before.values():
            own.remove()
        self._inputs_before.clear()

    def undo(self) -> None:
        """Makes the model what it was."""
        for changes in self._blocks.values():
            self._show(changes, 0)
            changes.take_hooks_off()
        self._blocks.clear()
        for name, values in self._before.items():
            self._model.get_parameter(name).data = values
        self._before.clear()
        self._take_first_hooks_off()
        while self._ties:
            self._ties.pop()()

    @contextlib.contextmanager
    def dense_layers(self, block: Block) -> Iterator[None]:
        """A context in which the layers of `block` are not quantized; what was rewritten stays."""
        layers = self._blocks[block.name].layers if block.name in self._blocks else {}
        try:
            self._show_layers(layers, 0)
            yield
        finally:
            self._show_layers(layers, 1)

    @contextlib.contextmanager
    def all_dense(self) -> Iterator[None]:
        """`dense_layers` of every block."""
        try:
            for changes in self._blocks.values():
                self._show_layers(changes.layers, 0)
            yield
        finally:
            for changes in self._blocks.values():
                self._show_layers(changes.layers, 1)

    @contextlib.contextmanager
    def originals(self, block: Block) -> Iterator[None]:
        """`dense_layers` of one block, and all others as they were at the beginning."""
        others = [changes for name, changes in self._blocks.items() if name != block.name]
        try:
            for changes in others:
                self._show(changes, 0)
            with self.dense_layers(block):
                yield
        finally:
            for changes in others:
                self._show(changes, 1)

    def _show(self, changes: _BlockChanges, which: int) -> None:
        self._show_layers(changes.layers, which)
        for name, values in changes.parameters.items():
            self._model.get_parameter(name).data = values[which]
        for own in changes.inputs.values():
            own.on = bool(which)

    def _show_layers(self, layers: Mapping[str, tuple[nn.Module, nn.Module]], which: int) -> None:
        for name, both in layers.items():
            self._model.set_submodule(name, both[which])


def _copied(values: Tensor, parameter: Tensor) -> Tensor:
    # What is made in inference mode is of no use to those that want gradients of it later.
    with torch.inference_mode(False), torch.no_grad():
        return values.detach().to(parameter.device, parameter.dtype, copy=True)
