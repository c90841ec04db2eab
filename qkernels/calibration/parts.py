"""A model taken apart at its residual stream: each block, and all that is outside of blocks.

A part runs alone, in fp32, on what the model gives it. What it takes from the stream, [.., hidden],
may be changed on the way in: a block's hidden states, and for the outside what the blocks give,
since they do nothing there but give what they were seen to give.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from qkernels.calibration.blocks import kind_of
from qkernels.calibration.calls import copied, replace_forward
from qkernels.calibration.forwards import run_batch
from qkernels.errors import LayerError

Turn = Callable[[Tensor], Tensor]


def unturned(x: Tensor) -> Tensor:
    """The stream as it is."""
    return x


@dataclass(frozen=True)
class Outputs:
    """Of a part.

    Attributes:
        stream: what it gives to the stream: a block's output, the input of each block.
        others: what else has floating point, such as logits.
    """

    stream: tuple[Tensor, ...]
    others: tuple[Tensor, ...]


class Part(Protocol):
    """Attributes:
    name: of the module in the model; "" is the model without its blocks.
    """

    name: str
    module: nn.Module

    @property
    def stream(self) -> Sequence[Tensor]:
        """What it takes from the stream, fp32."""

    def run(self, turn: Turn = unturned) -> Outputs:
        """Runs it with the stream changed by `turn`."""

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """A context in which it may run: it is in fp32, and has no other part's modules."""


@dataclass
class BlockPart:
    """A block, with the arguments of its one call and what came of it."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None

    @property
    def stream(self) -> tuple[Tensor]:
        """What the block takes and adds to."""
        return (_first(self.args, self.kwargs).float(),)

    def run(self, turn: Turn = unturned) -> Outputs:
        args, kwargs = copied((self.args, self.kwargs), _as_float32)
        if args:
            args = (turn(args[0]), *args[1:])
        else:
            kwargs["hidden_states"] = turn(kwargs["hidden_states"])
        first, *others = _tensors(self.module(*args, **kwargs))
        return Outputs((first,), tuple(others))

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with in_float32(self.module):
            yield


@dataclass
class Outside:
    """The embeddings, the head and whatever else is in no block."""

    module: nn.Module
    blocks: Sequence[BlockPart]
    batch: Any
    name: str = ""

    @property
    def stream(self) -> tuple[Tensor, ...]:
        """What the blocks give."""
        return tuple(_tensors(block.output)[0].float() for block in self.blocks)

    def run(self, turn: Turn = unturned) -> Outputs:
        given: list[Tensor] = []

        def stand_in(block: BlockPart) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                given.append(_first(args, kwargs).detach().clone())
                output = copied(block.output, _as_float32)
                if isinstance(output, Tensor):
                    return turn(output)
                return type(output)((turn(output[0]), *output[1:]))

            return forward

        with contextlib.ExitStack() as stack:
            for block in self.blocks:
                stack.callback(replace_forward(block.module, stand_in(block)))
            others = _tensors(run_batch(self.module, self.batch))
        return Outputs(tuple(given), tuple(others))

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        inside = [(block.module, _emptied(block.module)) for block in self.blocks]
        try:
            with _own_weights(self.module), in_float32(self.module):
                yield
        finally:
            for module, (modules, parameters) in inside:
                module._modules.update(modules)
                module._parameters.update(parameters)


def take_apart(model: nn.Module, blocks: Sequence[str], batch: Any) -> tuple[list[Part], Outside]:
    """The blocks of those names in the order in which the model runs them, and the outside.

    Raises:
        LayerError: where a block is not called once, or takes or gives no [.., hidden].
    """
    calls: list[BlockPart] = []

    def before(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            if any(call.module is module for call in calls):
                raise LayerError(f"{name} is run more than once")
            args, kwargs = copied((args, kwargs))
            if not isinstance(_first(args, kwargs), Tensor):
                raise LayerError(f"{name} is not given hidden states first")
            calls.append(BlockPart(name, module, args, kwargs))

        return note

    def after(module: nn.Module, _: Any, output: Any) -> None:
        call = next(call for call in calls if call.module is module)
        if not isinstance(output, Tensor) and type(output) not in (tuple, list):
            raise LayerError(f"{call.name} gives a {type(output).__name__}")
        call.output = copied(output)

    with contextlib.ExitStack() as stack:
        for name in blocks:
            module = model.get_submodule(name)
            hook = module.register_forward_pre_hook(before(name), with_kwargs=True)
            stack.callback(hook.remove)
            stack.callback(module.register_forward_hook(after).remove)
        run_batch(model, batch)
    called = {call.name for call in calls}
    missing = next((name for name in blocks if name not in called), None)
    if missing is not None:
        raise LayerError(f"{missing} is not run")
    return list(calls), Outside(model, calls, batch)


@contextlib.contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Within, parameters and buffers of floating point are in fp32."""
    tensors = (*module.parameters(), *module.buffers())
    before = [(t, t.data) for t in tensors if t.is_floating_point()]
    try:
        for tensor, data in before:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def modules_not_run(model: nn.Module, batch: Any) -> list[str]:
    """Names of modules with parameters that a batch does not run, nor others of their kind."""
    own = {name: module for name, module in model.named_modules() if module._parameters}
    ran: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: ran.add(kind_of(name))

    with contextlib.ExitStack() as stack:
        for name, module in own.items():
            stack.callback(module.register_forward_pre_hook(note(name)).remove)
        run_batch(model, batch)
    return [name for name in own if kind_of(name) not in ran]


def row_error(got: Tensor, wanted: Tensor) -> float:
    """The largest |difference| / |row| of two [..., n]."""
    difference = (got.double() - wanted.double()).flatten(0, -2).norm(dim=-1)
    lengths = wanted.double().flatten(0, -2).norm(dim=-1)
    return float((difference / lengths.clamp(min=1e-12)).max())


@contextlib.contextmanager
def _own_weights(model: nn.Module) -> Iterator[None]:
    """Within, modules that share a parameter, as embeddings and heads do, have one each."""
    seen: set[int] = set()
    shared: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                shared.append((module, key, parameter))
            seen.add(id(parameter))
    try:
        for module, key, parameter in shared:
            module._parameters[key] = nn.Parameter(parameter.data, parameter.requires_grad)
        yield
    finally:
        for module, key, parameter in shared:
            module._parameters[key] = parameter


def _first(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


def _tensors(output: Any) -> list[Tensor]:
    leaves = tree_flatten(output)[0]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _as_float32(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def _emptied(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Takes its modules and parameters away."""
    kept = dict(module._modules), dict(module._parameters)
    module._modules.clear()
    module._parameters.clear()
    return kept
