"""What feeds what in a block: whose outputs may be scaled where whose weights take the inverse.

Nothing is known of architectures. A norm's weight, or the rows of a linear layer, are multiplied by
powers of two, and the block is run: a layer behind it that meets the same powers of two, column by
column and exactly, reads it directly. Its weight is divided by them, and so on with those behind it
that are only now scaled cleanly, as experts are when their router is as before. In the end nothing
else in the block may have changed. So norms that go into a residual stream as well, and whatever is
not linear in between, rule themselves out; the rows of values that attention hands to several heads
are found by their numbers, written in powers of two.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from qkernels.calibration.blocks import kind_of

_POWERS = (-4, -3, -2, -1, 1, 2, 3, 4)
"""Numbers of channels are written in base 8, a digit d as 2^_POWERS[d]. No power is 1, which is
what shows where nothing is scaled."""

_BASE = len(_POWERS)

_ROWS = 64
"""Rows of each layer's input that are compared."""

_CLEAN = 2**-6
"""|difference| / |input| between a layer's input and what it was multiplied by: rounding alone."""

_ALIKE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""|difference| / |block output| that rounding may leave."""


@dataclass(frozen=True)
class Neighbours:
    """Attributes:
    producer: the module whose outputs are scaled, by its name in the block.
    consumers: the linear layers that read them, and nothing else does.
    channels: int64 [K]: column k of the consumers' input is this one of the producer's outputs,
        counted from `first` on; an output may be several columns.
    count: how many outputs there are from `first` on.
    first: the producer's outputs before it are something else, as queries and keys before values.
    plus_one: the producer is a norm that multiplies by 1 + weight.
    """

    producer: str
    consumers: tuple[str, ...]
    channels: Tensor
    count: int
    first: int = 0
    plus_one: bool = False

    def rewritten(self, block: nn.Module, factor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The parameters of the block, by name, under which the block computes the same.

        Args:
            factor: fp32 [count], > 0: what the consumers' weights are multiplied by.
        """
        producer = block.get_submodule(self.producer)
        factor = factor.cpu()
        for name, values in scaled(producer, 1 / factor, self.first, self.plus_one):
            yield f"{self.producer}.{name}", values
        for consumer in self.consumers:
            weight = block.get_submodule(consumer).weight
            assert isinstance(weight, Tensor)
            yield f"{consumer}.weight", weight.float() * factor[self.channels].to(weight.device)


def scaled(
    module: nn.Module, factor: Tensor, first: int, plus_one: bool
) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a norm or a linear layer with its outputs from `first` on multiplied by
    `factor`, fp32."""
    factor = torch.cat((factor.new_ones(first), factor))
    for name in ("weight", "bias"):
        parameter = module._parameters.get(name)
        if parameter is None:
            continue
        values = parameter.detach().float()
        own = factor.to(values.device)
        if name == "weight" and plus_one:
            yield name, (values + 1) * own - 1
        else:
            yield name, values * (own[:, None] if values.dim() == 2 else own)


def find_neighbours(block: nn.Module, run: Callable[[], Any]) -> list[Neighbours]:
    """All that are in a block, those with norms first.

    Args:
        run: runs the block on some input, always the same.
    """
    return _Trace(block, run).all()


def still_neighbours(found: Sequence[Neighbours], block: nn.Module, run: Callable[[], Any]) -> bool:
    """Whether all that was found in one block holds in another whose parameters have the same names
    and shapes."""
    trace = _Trace(block, run)
    return all(trace.is_undone(neighbours) for neighbours in found)


@dataclass(frozen=True)
class _Seen:
    """A run: what each layer got, in the order of calls, and what came out."""

    inputs: Mapping[str, Tensor]
    outputs: tuple[Tensor, ...]


class _Trace:
    def __init__(self, block: nn.Module, run: Callable[[], Any]) -> None:
        self._block, self._run = block, run
        # Each with the number of its columns.
        self._readers = {
            name: weight.shape[1]
            for name, module in block.named_modules()
            if (weight := _weight_of(module, 2)) is not None
        }
        self._base = self._look({})

    def all(self) -> list[Neighbours]:
        found = []
        for dimensions in (1, 2):
            for name, module in self._block.named_modules():
                weight = _weight_of(module, dimensions)
                if weight is None or (dimensions == 2 and type(module) is not nn.Linear):
                    continue
                found += next(([way] for way in self._ways(name, weight) if way is not None), [])
        return found

    def _ways(self, name: str, weight: Tensor) -> Iterator[Neighbours | None]:
        yield self._from(name, 0, len(weight), False)
        if weight.dim() == 1:
            yield self._from(name, 0, len(weight), True)
            return
        # Fused projections end in what is linear: values, or what is multiplied by a gate.
        columns = set(self._readers.values())
        last = {k // copies for k in columns for copies in range(1, 17) if k % copies == 0}
        for count in sorted((c for c in last if 1 < c < len(weight)), reverse=True):
            yield self._from(name, len(weight) - count, count, False)

    def _from(self, name: str, first: int, count: int, plus_one: bool) -> Neighbours | None:
        consumers: tuple[str, ...] = ()
        channels = torch.zeros(0, dtype=torch.int64)
        places = 1
        while _BASE**places < count:
            places += 1
        for place in range(places):
            digits = self._readers_of(name, first, count, plus_one, place)
            if place == 0:
                consumers = tuple(digits)
                channels = torch.zeros_like(next(iter(digits.values()), channels))
            if not consumers or set(digits) != set(consumers):
                return None
            one = digits[consumers[0]]
            if any(len(d) != len(one) or (d != one).any() for d in digits.values()):
                return None
            channels = channels + one * _BASE**place
        if (channels >= count).any():
            return None
        others = self._not_run(consumers, len(channels))
        if others is None:
            return None
        made = Neighbours(name, (*consumers, *others), channels, count, first, plus_one)
        return made if self.is_undone(made) else None

    def _readers_of(
        self, name: str, first: int, count: int, plus_one: bool, place: int
    ) -> dict[str, Tensor]:
        """The layers that read outputs of `name` directly, with a digit of each column's number."""
        module = self._block.get_submodule(name)
        powers = _powers(torch.arange(count), place)
        changed = {f"{name}.{n}": v for n, v in scaled(module, powers, first, plus_one)}
        found: dict[str, Tensor] = {}
        while True:
            seen = self._look(changed)
            new = {}
            for reader, x in seen.inputs.items():
                before = self._base.inputs.get(reader)
                if before is None or reader in found or reader == name:
                    continue
                if x.shape == before.shape and torch.equal(x, before):
                    continue
                digits = _digits(before, x, count, place)
                if digits is not None:
                    new[reader] = digits
            if not new:
                return found
            found |= new
            for reader, digits in new.items():
                weight = self._block.get_parameter(f"{reader}.weight").detach().float()
                changed[f"{reader}.weight"] = weight / _powers(digits, 0).to(weight.device)

    def _not_run(self, consumers: Sequence[str], columns: int) -> list[str] | None:
        """Layers that this input did not reach, and that are consumers as those like them are, such
        as other experts; None where there may be others."""
        kinds = {kind_of(name) for name in consumers}
        idle = [name for name in self._readers if name not in self._base.inputs]
        like = [name for name in idle if kind_of(name) in kinds]
        unlike = set(idle) - set(like)
        return None if any(self._readers[name] == columns for name in unlike) else like

    def is_undone(self, found: Neighbours) -> bool:
        """Whether the block computes the same where the consumers take back what was done."""
        factor = _powers(torch.arange(found.count) * 5 + 3, 0)
        seen = self._look(dict(found.rewritten(self._block, factor)))
        if len(seen.outputs) != len(self._base.outputs):
            return False
        return all(
            a.shape == b.shape and are_alike(a, b)
            for a, b in zip(seen.outputs, self._base.outputs, strict=True)
        )

    def _look(self, parameters: Mapping[str, Tensor]) -> _Seen:
        inputs: dict[str, Tensor] = {}

        def note(name: str) -> Callable[..., None]:
            def before(module: nn.Module, args: Any, kwargs: Any) -> None:
                x = args[0] if args else next(iter(kwargs.values()), None)
                if isinstance(x, Tensor):
                    inputs.setdefault(name, x.detach().reshape(-1, x.shape[-1])[:_ROWS].clone())

            return before

        with contextlib.ExitStack() as stack:
            stack.enter_context(with_parameters(self._block, parameters))
            for name in self._readers:
                hook = self._block.get_submodule(name).register_forward_pre_hook(
                    note(name), with_kwargs=True
                )
                stack.callback(hook.remove)
            outputs = tree_flatten(self._run())[0]
        kept = (o.detach().clone() for o in outputs if isinstance(o, Tensor))
        return _Seen(inputs, tuple(o for o in kept if o.is_floating_point()))


def _weight_of(module: nn.Module, dimensions: int) -> Tensor | None:
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != dimensions or not weight.is_floating_point():
        return None
    return None if isinstance(module, nn.Embedding) else weight


def _powers(numbers: Tensor, place: int) -> Tensor:
    """A digit of each number, as a power of two."""
    digits = numbers // _BASE**place % _BASE
    return torch.exp2(torch.tensor(_POWERS, dtype=torch.float32)[digits])


def _digits(before: Tensor, after: Tensor, count: int, place: int) -> Tensor | None:
    """The digit that each column was multiplied by, int64 [K], or None where it was something else.

    A column that is zero throughout takes the digit of its own number, where it has one.
    """
    if before.shape != after.shape:
        return None
    before, after = before.double(), after.double()
    columns = before.shape[1]
    largest, rows = before.abs().max(dim=0)
    every = torch.arange(columns, device=before.device)
    ratio = after[rows, every] / torch.where(largest > 0, before[rows, every], 1.0)
    powers = ratio.clamp(min=1e-30).log2().round()
    scaled = before * torch.exp2(powers)
    if (after - scaled).norm() > _CLEAN * scaled.norm():
        return None
    digits = torch.full(powers.shape, -1, device=before.device)
    for digit, power in enumerate(_POWERS):
        digits[powers == power] = digit
    idle = largest == 0
    if idle.any():
        if columns != count:
            return None
        digits = torch.where(idle, every // _BASE**place % _BASE, digits)
    return digits.cpu() if (digits >= 0).all() else None


def are_alike(a: Tensor, b: Tensor) -> bool:
    """Whether the output `a` is `b`, but for rounding in b's type."""
    difference = (a.double() - b.double()).norm()
    return bool(difference <= _ALIKE.get(b.dtype, 1e-3) * b.double().norm())


@contextlib.contextmanager
def with_parameters(block: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, parameters of the block have other values."""
    before = {name: block.get_parameter(name).data for name in parameters}
    try:
        for name, values in parameters.items():
            parameter = block.get_parameter(name)
            parameter.data = values.to(parameter.device, parameter.dtype)
        yield
    finally:
        for name, data in before.items():
            block.get_parameter(name).data = data
