"""What writes to a model's residual stream and what reads it, and which heads attention mixes.

Nothing is known of architectures; parts of the model are run (`parts.py`). With all linear layers
of a block at zero its stream stays what it was: whoever is given just that then is a reader, and a
block that gives anything else has no residual stream. A linear layer some of whose rows are zero,
after which the next reader finds the same columns of the stream changed and no other, writes to it.
Values are layers behind which blocks of rows may be turned, where the next layer turns its columns
back: the largest blocks for which that is so are heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.calibration.blocks import kind_of
from qkernels.calibration.neighbours import Neighbours, find_neighbours, with_parameters
from qkernels.calibration.parts import Outputs, Part, row_error
from qkernels.errors import LayerError

_SAME = 1e-4
"""|difference| / |tensor| that fp32 may leave."""

_UNCHANGED = 1e-5
"""|difference| / the largest number, of what does not change."""


@dataclass(frozen=True)
class StreamNorm:
    """A norm that reads the stream, and that linear layers alone read.

    Attributes:
        consumers: these layers.
        plus_one: it multiplies by 1 + weight.
        subtracts_mean: it takes the mean of each row away.
    """

    name: str
    consumers: tuple[str, ...]
    plus_one: bool
    subtracts_mean: bool


@dataclass(frozen=True)
class Roles:
    """Of modules in a part, by their names in it.

    Attributes:
        readers: linear layers that read the stream with no norm between.
        writers: linear layers and embeddings whose outputs are added to it.
        suspects: what may be why this is not all, in words.
    """

    norms: tuple[StreamNorm, ...]
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    suspects: tuple[str, ...] = ()


@dataclass(frozen=True)
class Heads:
    """Values, the layer that reads what attention makes of them, and how long a head is."""

    values: Neighbours
    length: int


def neighbours_of(part: Part) -> list[Neighbours]:
    """Those in a part that is `alone`."""

    def run() -> Any:
        outputs = part.run()
        return outputs.stream, outputs.others

    return find_neighbours(part.module, run)


def stream_roles(part: Part, neighbours: Sequence[Neighbours]) -> Roles:
    """Who reads and writes the stream in a part that is `alone`.

    Raises:
        LayerError: where the part is no sum of its input and more, or a norm that reads the stream
            is not read by linear layers alone.
    """
    return _Trace(part).roles(neighbours)


def heads_of(
    part: Part, neighbours: Sequence[Neighbours], turn: Callable[[Tensor], Tensor]
) -> list[Heads]:
    """The values in a block that is `alone`.

    Args:
        turn: multiplies [..., d] by an orthogonal matrix of order d.
    """
    found = []
    base = part.run()
    for one in neighbours:
        if part.module.get_submodule(one.producer)._parameters["weight"].dim() != 2:  # type: ignore[union-attr]
            continue
        for length in (d for d in range(one.count, 1, -1) if one.count % d == 0):
            heads = Heads(one, length)
            if not _in_whole_heads(heads):
                continue
            values = {
                name: change(part.module.get_parameter(name).detach())
                for name, change in turned_heads(part.module, heads, turn).items()
            }
            with with_parameters(part.module, values):
                if _are_close(part.run(), base):
                    found.append(heads)
                    break
    return found


def turned_heads(
    module: nn.Module, heads: Heads, turn: Callable[[Tensor], Tensor]
) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is to be done to parameters of the block so that each head's values are turned, and it
    computes the same."""
    first, length = heads.values.first, heads.length

    def rows(x: Tensor) -> Tensor:
        kept, own = x[:first], x[first:]
        return torch.cat((kept.to(own), _turned_rows(own, length, turn).to(own)))

    def columns(x: Tensor) -> Tensor:
        return turn(x.unflatten(1, (-1, length))).flatten(1)

    producer = heads.values.producer
    names = ("weight", "bias")
    own = module.get_submodule(producer)._parameters
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        f"{producer}.{name}": rows for name in names if own.get(name) is not None
    }
    return changes | {f"{name}.weight": columns for name in heads.values.consumers}


def _turned_rows(x: Tensor, length: int, turn: Callable[[Tensor], Tensor]) -> Tensor:
    by_head = x.unflatten(0, (-1, length))
    if x.dim() == 1:
        return turn(by_head).flatten()
    return turn(by_head.transpose(1, 2)).transpose(1, 2).flatten(0, 1)


def _in_whole_heads(heads: Heads) -> bool:
    """Whether columns come in runs that are the rows of one head."""
    channels, length = heads.values.channels, heads.length
    if len(channels) % length:
        return False
    runs = channels.view(-1, length)
    whole = runs[:, :1] + torch.arange(length)
    return bool((runs[:, 0] % length == 0).all() and torch.equal(runs, whole))


@dataclass(frozen=True)
class _Seen:
    """Attributes: inputs: the first of each module, in the order of calls."""

    inputs: Mapping[str, Tensor]
    outputs: Outputs


class _Trace:
    def __init__(self, part: Part) -> None:
        self._part, self._module = part, part.module
        weights = {
            name: weight
            for name, module in part.module.named_modules()
            if (weight := module._parameters.get("weight")) is not None
            and weight.is_floating_point()
        }
        self._norms = [name for name, weight in weights.items() if weight.dim() == 1]
        self._matrices = [name for name, weight in weights.items() if weight.dim() == 2]
        self._hidden = part.stream[0].shape[-1]
        self._base = self._look({})

    def roles(self, neighbours: Sequence[Neighbours]) -> Roles:
        readers = self._readers()
        by_name = {one.producer: one for one in neighbours}
        norms = []
        for name in (name for name in readers if name in self._norms):
            if name not in by_name or not self._is_whole(by_name[name]):
                raise LayerError(
                    f"{name} reads the residual stream, and others than linear layers read it"
                )
            one = by_name[name]
            mean = self._subtracts_mean(name)
            norms.append(StreamNorm(name, one.consumers, one.plus_one, mean))
        writers, suspects = self._writers(readers)
        direct = tuple(name for name in readers if name in self._matrices)
        return Roles(tuple(norms), direct, tuple(writers), tuple(suspects))

    def _is_whole(self, one: Neighbours) -> bool:
        return torch.equal(one.channels, torch.arange(self._hidden)) and not one.first

    def _readers(self) -> list[str]:
        """In the order of calls."""
        zero = {}
        for name in self._matrices:
            module = self._module.get_submodule(name)
            if not isinstance(module, nn.Embedding):
                for key, parameter in module._parameters.items():
                    if parameter is not None:
                        zero[f"{name}.{key}"] = torch.zeros_like(parameter)
        seen = self._look(zero)
        if self._part.name and not self._is_stream(seen.outputs.stream[0]):
            raise LayerError("it does not add to what it is given")
        return [name for name, x in seen.inputs.items() if self._is_stream(x)]

    def _is_stream(self, x: Tensor) -> bool:
        """Whether it is what the part takes from the stream, or a multiple."""
        for stream in self._part.stream:
            if x.shape[-1] != self._hidden or x.numel() != stream.numel():
                continue
            flat, own = stream.flatten().double(), x.flatten().double()
            ratio = (flat @ own) / (flat @ flat)
            if ratio != 0 and (own - ratio * flat).norm() <= _SAME * own.norm():
                return True
        return False

    def _subtracts_mean(self, name: str) -> bool:
        norm, x = self._module.get_submodule(name), self._base.inputs[name]
        before = norm(x)
        return bool((norm(x + x.abs().mean()) - before).norm() <= 1e-3 * before.norm())

    def _writers(self, readers: Sequence[str]) -> tuple[list[str], list[str]]:
        found, suspects, idle = [], [], []
        for name in self._matrices:
            module = self._module.get_submodule(name)
            weight: Any = module._parameters["weight"]
            outputs = weight.shape[1 if isinstance(module, nn.Embedding) else 0]
            if outputs != self._hidden:
                continue
            if name not in self._base.inputs:
                idle.append(name)
                continue
            where = self._first_changed(self._look(dict(_every_second(name, module))), readers)
            if where in readers or where == "":
                found.append(name)
            elif where is not None:
                suspects.append(f"{where} lies between {name} and the residual stream")
        kinds = {kind_of(name) for name in found}
        return found + [name for name in idle if kind_of(name) in kinds], suspects

    def _first_changed(self, seen: _Seen, readers: Sequence[str]) -> str | None:
        """The first reader, "" for what the part gives to the stream, that finds every second
        column changed and no other; a norm that does, though it does not read the stream; else
        None."""
        norms = [n for n in self._base.inputs if n in self._norms or n in readers]
        points = [(n, self._base.inputs[n], seen.inputs.get(n)) for n in norms]
        if not self._part.name:
            # There the blocks are called before what reads them.
            points = []
        points += [
            ("", a, b) for a, b in zip(self._base.outputs.stream, seen.outputs.stream, strict=True)
        ]
        for name, before, after in points:
            if after is None or before.shape != after.shape:
                continue
            difference = (after - before).abs()
            if difference.max() <= _UNCHANGED * before.abs().max():
                continue
            if before.shape[-1] != self._hidden:
                continue
            if difference[..., 1::2].max() <= _UNCHANGED * difference.max():
                return name
            if name in readers or not name:
                return None
        return None

    def _look(self, values: Mapping[str, Tensor]) -> _Seen:
        inputs: dict[str, Tensor] = {}

        def note(name: str) -> Callable[..., None]:
            def before(module: nn.Module, args: Any, kwargs: Any) -> None:
                x = args[0] if args else next(iter(kwargs.values()), None)
                if isinstance(x, Tensor):
                    inputs.setdefault(name, x.detach().clone())

            return before

        with contextlib.ExitStack() as stack:
            stack.enter_context(with_parameters(self._module, values))
            for name in (*self._norms, *self._matrices):
                hook = self._module.get_submodule(name).register_forward_pre_hook(
                    note(name), with_kwargs=True
                )
                stack.callback(hook.remove)
            outputs = self._part.run()
        return _Seen(inputs, outputs)


def _every_second(name: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters of a linear layer or embedding, under which every second output is zero."""
    for key in ("weight", "bias"):
        parameter = module._parameters.get(key)
        if parameter is not None:
            values = parameter.detach().clone()
            if isinstance(module, nn.Embedding):
                values[:, ::2] = 0
            else:
                values[::2] = 0
            yield f"{name}.{key}", values


def _are_close(a: Outputs, b: Outputs) -> bool:
    return all(
        row_error(x, y) <= _SAME
        for x, y in zip((*a.stream, *a.others), (*b.stream, *b.others), strict=True)
    )
