"""Modules that quantize their outputs where they make them: norms, and gates times what they gate.

What such a module gives is a tensor as ever, with the bits that it always had, but where it is
asked for what only rounds otherwise: `LayerNorm`, and gates in one pass. Beside it lie its int8
rows, made in the same pass, and layers that are given that very tensor take them instead of
quantizing it again. Whoever else reads it sees nothing of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qkernels.activations import QuantizedActivation
from qkernels.backends.cpu import Rounded, best_isa, layer_norm_rows, norm_rows, product_rows
from qkernels.modules.linear import WQLinear
from qkernels.modules.packed import PackedModule

_MOST_WASTED = 4
"""How often in a row int8 rows may be read by nobody, as where layers are given copies, before a
module does what it did."""


LEAST_GATED = 1 << 19
"""Numbers that the product of a gate has at least, to be quantized where it is made: Python needs
some 8 us for that, and before it less is saved. One thread of an AMD EPYC with AVX-512, 2026-11-27:
1 of 5.6 us at 5632 numbers, 34 of 278 us at 720896.
"""


class Reader(Protocol):
    """What reads the output of a producer: a layer, or several as one product."""

    def read_from(self, producer: Producer | None) -> None:
        """What quantizes x where it is made, or None."""


@dataclass
class _Held:
    y: Tensor
    version: int
    rows: QuantizedActivation
    unread: int


class Producer:
    """Replaces a module's `forward` by one that also quantizes what it gives.

    Attributes:
        name: of the module, for listings.
        module: whose forward it is.
    """

    def __init__(self, name: str, module: nn.Module, readers: Sequence[Reader]) -> None:
        self.name, self.module = name, module
        self._readers = list(readers)
        self._held: _Held | None = None
        self._wasted = 0
        self._isa: str | None = None
        for reader in readers:
            reader.read_from(self)
        vars(module)["forward"] = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        raise NotImplementedError

    def quantized(self, x: Tensor | QuantizedActivation) -> Tensor | QuantizedActivation:
        """The int8 rows of x where x is what the module gave last, and x itself else."""
        if torch.compiler.is_compiling():
            return x
        held = self._held
        if held is None or held.y is not x or held.version != version_of(x) or x.requires_grad:
            return x
        self._wasted = 0
        held.unread -= 1
        if held.unread <= 0:
            self._held = None
        return held.rows

    def dissolve(self) -> None:
        """Makes the module and the layers what they were."""
        readers, self._readers, self._held = self._readers, [], None
        for reader in readers:
            reader.read_from(None)
        # Where somebody has put another forward around this one, it stays, and does what it did.
        if vars(self.module).get("forward") == self.forward:
            del vars(self.module)["forward"]

    def _is_wanted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call is the one that this is for, and rows of the last ones were read."""
        return (
            len(args) == 1
            and not kwargs
            and not torch.compiler.is_compiling()
            and bool(self._readers)
            and self._wasted <= _MOST_WASTED
        )

    def _original(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def _instructions(self) -> str:
        if self._isa is None:
            self._isa = best_isa()
        return self._isa

    def _keep(self, made: Rounded) -> Tensor:
        y, values, scale = made
        held, count = self._held, len(self._readers)
        if held is not None and held.unread == count:
            self._wasted += 1
        rows = QuantizedActivation(values, scale, y.dtype)
        self._held = _Held(y, version_of(y), rows, count)
        return y

    def __getstate__(self) -> dict[str, Any]:
        # Of a copy: nobody waits for rows there, and it may be for another machine.
        return {**vars(self), "_held": None, "_isa": None}


@dataclass(frozen=True)
class NormForm:
    """How a norm computes: see `reference.rounded_norm`.

    Attributes:
        epsilon: the attribute of the module that holds it.
        dtype: of x and of the weight.
    """

    epsilon: str
    rounds_first: bool
    adds_one: bool
    dtype: torch.dtype


class AnyNorm(Producer):
    """A norm of one tensor, which `_rows` makes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        made = self._rows(args[0]) if self._is_wanted(args, kwargs) else None
        return self._original(args, kwargs) if made is None else self._keep(made)

    def _rows(self, x: Tensor) -> Rounded | None:
        raise NotImplementedError


class Norm(AnyNorm):
    """x over its root mean square, times a weight."""

    def __init__(
        self, name: str, module: nn.Module, readers: Sequence[Reader], form: NormForm
    ) -> None:
        self._form = form
        super().__init__(name, module, readers)

    def _rows(self, x: Tensor) -> Rounded | None:
        form, module = self._form, self.module
        weight = module._parameters.get("weight")
        if type(x) is not Tensor or x.dtype is not form.dtype or weight is None:
            return None
        epsilon = getattr(module, form.epsilon)
        return norm_rows(x, weight, epsilon, form.rounds_first, form.adds_one, self._instructions())


class LayerNorm(AnyNorm):
    """x without its mean, over its standard deviation, times a weight, and a bias or none; summed
    in another order than torch's.

    Attributes:
        epsilon: the attribute of the module that holds it.
    """

    def __init__(
        self, name: str, module: nn.Module, readers: Sequence[Reader], epsilon: str
    ) -> None:
        self.epsilon = epsilon
        super().__init__(name, module, readers)

    def _rows(self, x: Tensor) -> Rounded | None:
        parameters = self.module._parameters
        weight = parameters.get("weight")
        if type(x) is not Tensor or weight is None or x.dtype is not weight.dtype:
            return None
        epsilon = getattr(self.module, self.epsilon)
        return layer_norm_rows(x, weight, parameters.get("bias"), epsilon, self._instructions())


@dataclass(frozen=True)
class GateForm:
    """The children of a module that computes down(act(gate(x)) * up(x)), by their names.

    Attributes:
        gate: or that of gate and up in one.
        up: None where `gate` gives both, the halves of its output.
        width: of what `down` reads.
        gate_first: whether the first half is the gate.
    """

    gate: str
    up: str | None
    act: str
    down: str
    width: int
    gate_first: bool = True


class Gate(Producer):
    """A gated MLP: what `down` reads is quantized where it is multiplied.

    Attributes:
        kind: the gate of `backends.rows.KINDS` that is made in the pass of the product, or
            "product" where the module's own activation opens it.
    """

    kind = "product"

    def __init__(
        self, name: str, module: nn.Module, readers: Sequence[Reader], form: GateForm
    ) -> None:
        self._form = form
        super().__init__(name, module, readers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        # What leaves few rows alone comes first, but for the compiler, which sees no sizes.
        compiles = torch.compiler.is_compiling()
        if compiles or self.module.training or len(args) != 1 or not self._is_large(args[0]):
            return self._original(args, kwargs)
        y = self.gated(args[0]) if self._is_wanted(args, kwargs) else None
        return self._original(args, kwargs) if y is None else y

    def gated(self, x: Tensor) -> Any:
        """What the module gives for x; None where it has other children than it had."""
        form, children = self._form, self.module._modules
        gate, act, down = children.get(form.gate), children.get(form.act), children.get(form.down)
        up = None if form.up is None else children.get(form.up)
        if gate is None or act is None or down is None or (up is None) != (form.up is None):
            return None
        if up is None:
            first, second = gate(x).chunk(2, dim=-1)
            gated, upper = (first, second) if form.gate_first else (second, first)
            del first, second
        else:
            gated, upper = gate(x), up(x)
        made = None
        if self.kind != "product" and type(gated) is Tensor and type(upper) is Tensor:
            made = product_rows(gated, upper, self._instructions(), self.kind)
        if made is not None:
            del gated, upper
            return down(self._keep(made))
        opened = act(gated)
        del gated
        if type(opened) is Tensor and type(upper) is Tensor:
            made = product_rows(opened, upper, self._instructions())
        y = opened * upper if made is None else self._keep(made)
        # As where the module computes it in one expression: memory that is in the cache is used
        # again.
        del opened, upper, made
        return down(y)

    def _is_large(self, x: Any) -> bool:
        if not isinstance(x, Tensor) or x.dim() == 0:
            return False
        return x.numel() * self._form.width >= LEAST_GATED * x.shape[-1] > 0


class ReadingLinear(WQLinear):
    """A `WQLinear` whose x is quantized where it is made."""

    _producer: Producer

    def forward(self, input: Tensor | QuantizedActivation) -> Tensor:
        """As `WQLinear.forward`."""
        return WQLinear.forward(self, self._producer.quantized(input))

    def quantized_for(
        self, input: Tensor | QuantizedActivation, reader: WQLinear, *, relu: bool = False
    ) -> QuantizedActivation:
        """As `WQLinear.quantized_for`."""
        return WQLinear.quantized_for(self, self._producer.quantized(input), reader, relu=relu)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedModule:
        self._producer.dissolve()
        return WQLinear._apply(self, fn, recurse)


class OneReader:
    """A `WQLinear` as a `Reader`."""

    def __init__(self, layer: WQLinear) -> None:
        self.layer = layer

    def read_from(self, producer: Producer | None) -> None:
        """Makes it a `ReadingLinear`, or what it was."""
        if producer is None:
            self.layer.__class__ = WQLinear
            vars(self.layer).pop("_producer")
        else:
            self.layer.__class__ = ReadingLinear
            vars(self.layer)["_producer"] = producer


def version_of(x: Tensor | QuantizedActivation) -> int:
    """How often x was written to; nobody writes to inputs of inference mode, which do not count."""
    values = x.values if isinstance(x, QuantizedActivation) else x
    return 0 if values.is_inference() else values._version
