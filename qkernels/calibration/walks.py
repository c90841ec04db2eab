"""Ways to take calibration batches through a model's blocks, each quantized in its turn.

`BlockByBlock` holds the inputs of one block at a time. `WholeModel` runs all of the model for every
block: it is right for any model, and slower by the number of blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

from torch import nn

from qkernels.calibration.blocks import Block
from qkernels.calibration.calls import copied, replace_forward
from qkernels.calibration.distributed import ALONE, Processes
from qkernels.calibration.forwards import (
    Around,
    Call,
    CannotFollow,
    SuspendedForward,
    autocast_here,
    current_forward,
    run_batch,
)
from qkernels.calibration.reuse import Reuse, Running
from qkernels.modules.heads import output_heads

QUANTIZED, DENSE = "quantized", "dense"
"""The two chains of a walk: what a block gets from quantized blocks, and from dense ones."""

Dense = Callable[[Block], contextlib.AbstractContextManager[None]]


def _stay(block: Block) -> None:
    """For models all of whose weights are there."""


class Walk(Protocol):
    """Blocks in the order in which the model runs them, with the batches that reach each."""

    def next(self) -> Block | None:
        """The next block, or None after the last. Blocks that no batch reaches come last."""

    def batches(self, chain: str = QUANTIZED) -> list[int]:
        """The numbers of the batches that reach the present block."""

    def run(self, batch: int, chain: str = QUANTIZED) -> Any:
        """Runs the present block, as it now is, on what a batch brings to it."""

    def change(self, now: Collection[str], later: Collection[str]) -> None:
        """Says which layers of the present block are looked at and change now, and which later, in
        the order in which they run: what is in front of them gives the same from here on."""

    def advance(self) -> None:
        """Goes past the present block with the outputs that it now has."""

    def close(self) -> None:
        """Leaves the model's modules as they were found."""


class BlockByBlock:
    """Holds a suspended forward for each batch, and for each chain that is asked for.

    Raises, from any method, `CannotFollow` where the model runs a block twice or runs a layer of a
    block outside of it, and whatever the model's own forward raises.

    Args:
        dense: a context in which the layers of a block are as they were before quantization, where
            the dense chain is wanted; else None.
        processes: which take the same blocks in the same order, each with its own batches.
        arrive: is called with each block before it is the present one.
        around: gives a context for each run of the model; None is the autocast that is on when the
            walk is made.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        batches: Sequence[Any],
        dense: Dense | None = None,
        processes: Processes = ALONE,
        arrive: Callable[[Block], None] = _stay,
        around: Around | None = None,
    ) -> None:
        self._model, self._dense, self._processes = model, dense, processes
        self._arrive, self._around = arrive, around or autocast_here()
        self._left = list(blocks)
        self._present: Block | None = None
        self._running: str | None = None
        self._reuse: Reuse | None = None
        self._finished: set[str] = set()
        self._undo: list[Callable[[], object]] = []
        chains = (QUANTIZED,) if dense is None else (QUANTIZED, DENSE)
        self._forwards = {
            chain: {
                number: SuspendedForward(partial(self._forward_of, batch))
                for number, batch in enumerate(batches)
            }
            for chain in chains
        }
        check_apart(model, blocks)
        try:
            for block in blocks:
                self._install_gate(block.name)
                self._guard(block)
            for forwards in self._forwards.values():
                for forward in forwards.values():
                    forward.start()
        except BaseException:
            self.close()
            raise

    def next(self) -> Block | None:
        waiting = {
            forward.call.block
            for forward in self._forwards[QUANTIZED].values()
            if forward.call is not None
        }
        waiting = self._processes.union("waiting blocks", waiting)
        # Batches may reach blocks in different orders; what comes first in the model goes first.
        block = next((b for b in self._left if b.name in waiting), None)
        if block is None:
            block = next(iter(self._left), None)
        self._present = block
        if block is not None:
            self._left.remove(block)
            self._arrive(block)
        return block

    def batches(self, chain: str = QUANTIZED) -> list[int]:
        assert self._present is not None
        return [
            number
            for number, forward in self._forwards[chain].items()
            if forward.call is not None and forward.call.block == self._present.name
        ]

    def run(self, batch: int, chain: str = QUANTIZED) -> Any:
        call = self._forwards[chain][batch].call
        assert call is not None
        # Blocks may write to what they are given: hidden states, caches.
        args, kwargs = copied((call.args, call.kwargs))
        run = Running(batch, dense=chain == DENSE)
        if chain == QUANTIZED:
            return self._call(call.block, args, kwargs, run)
        assert self._dense is not None and self._present is not None
        with self._dense(self._present):
            return self._call(call.block, args, kwargs, run)

    def change(self, now: Collection[str], later: Collection[str]) -> None:
        assert self._present is not None
        if self._reuse is None:
            self._reuse = Reuse(self._model, self._present)
        self._reuse.change(now, later)

    def advance(self) -> None:
        block = self._present
        assert block is not None
        if self._reuse is not None:
            self._reuse.change((), ())
        self._finished.add(block.name)
        if block.name in block.layers:
            self._install_gate(block.name)
        self._guard(block)
        numbers = self.batches()
        if not self._left:
            # Behind the last block one batch is enough to see whether the model calls a block
            # again; the others need not make logits.
            numbers = numbers[:1]
            self._end_at_heads()
        elif self._dense is not None:
            with self._dense(block):
                self._go_on(block, DENSE, self.batches(DENSE))
        self._go_on(block, QUANTIZED, numbers)
        self._end_reuse()
        self._present = None

    def close(self) -> None:
        self._end_reuse()
        for forwards in self._forwards.values():
            for forward in forwards.values():
                forward.cancel()
        while self._undo:
            self._undo.pop()()
        # Of the run that the walk belongs to: it and all that it holds would wait for a collector.
        self._arrive = _stay

    def _go_on(self, block: Block, chain: str, numbers: Collection[int]) -> None:
        """Runs the block a last time, and gives each forward its output in place of its inputs."""
        for number in numbers:
            forward = self._forwards[chain][number]
            call = forward.call
            assert call is not None
            run = Running(number, dense=chain == DENSE)
            output = self._call(block.name, call.args, call.kwargs, run)
            del call
            forward.resume(output)
            del output

    def _forward_of(self, batch: Any) -> Any:
        with self._around():
            return run_batch(self._model, batch)

    def _call(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], run: Running | None = None
    ) -> Any:
        self._running = name
        if self._reuse is not None:
            self._reuse.running = run
        try:
            # Not the module itself: its hooks run in the suspended forward, around the gate.
            with self._around():
                return self._model.get_submodule(name).forward(*args, **kwargs)
        finally:
            self._running = None
            if self._reuse is not None:
                self._reuse.running = None

    def _end_reuse(self) -> None:
        if self._reuse is not None:
            self._reuse.end()
            self._reuse = None

    def _install_gate(self, name: str) -> None:
        """Makes a call of the block, in a suspended forward, stop there."""
        module = self._model.get_submodule(name)
        inner = module.forward

        def gate(*args: Any, **kwargs: Any) -> Any:
            forward = current_forward()
            if forward is None:
                if name != self._running:
                    raise CannotFollow(f"{name} is called by the block {self._running}")
                return inner(*args, **kwargs)
            if name in self._finished:
                raise CannotFollow(
                    f"{name} is called more than once, or in another order by other batches"
                )
            return forward.stop(Call(name, args, kwargs))

        self._undo.append(replace_forward(module, gate))

    def _end_at_heads(self) -> None:
        """Makes forwards end where they would make logits, their largest tensors by far."""

        def end(*_: Any) -> None:
            forward = current_forward()
            if forward is not None:
                forward.end()

        for head in output_heads(self._model):
            self._undo.append(head.register_forward_pre_hook(end).remove)

    def _guard(self, block: Block) -> None:
        """Notices where a layer, or what has taken its place, runs outside of its block."""
        for name in block.layers:
            if name == block.name:
                continue

            def check(*_: Any, name: str = name) -> None:
                if current_forward() is not None:
                    raise CannotFollow(f"{name} is called outside of its block")

            hook = self._model.get_submodule(name).register_forward_pre_hook(check)
            self._undo.append(hook.remove)


class WholeModel:
    """Runs the model from its inputs to its outputs for each block, whatever it does in between.

    Args:
        dense: a context in which the layers of a block, and all of the others, are as they were
            before quantization.
        processes: which take the same blocks in the same order, each with its own batches.
        arrive: is called with each block before it is the present one.
        around: gives a context for each run of the model; None is the autocast that is on when the
            walk is made.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        batches: Sequence[Any],
        dense: Dense,
        processes: Processes = ALONE,
        arrive: Callable[[Block], None] = _stay,
        around: Around | None = None,
    ) -> None:
        self._model, self._batches, self._dense, self._arrive = model, batches, dense, arrive
        self._around = around or autocast_here()
        self._left = _in_order_of_execution(model, blocks, batches) if batches else list(blocks)
        self._left = processes.gather("order of blocks", self._left)[0]
        self._present: Block | None = None

    def next(self) -> Block | None:
        self._present = self._left.pop(0) if self._left else None
        if self._present is not None:
            self._arrive(self._present)
        return self._present

    def batches(self, chain: str = QUANTIZED) -> list[int]:
        return list(range(len(self._batches)))

    def run(self, batch: int, chain: str = QUANTIZED) -> Any:
        assert self._present is not None
        if chain == QUANTIZED:
            with self._around():
                return run_batch(self._model, self._batches[batch])
        with self._dense(self._present), self._around():
            return run_batch(self._model, self._batches[batch])

    def change(self, now: Collection[str], later: Collection[str]) -> None:
        # A block may run several times here, each on what other layers of it gave.
        pass

    def advance(self) -> None:
        pass

    def close(self) -> None:
        self._arrive = _stay


def check_apart(model: nn.Module, blocks: Iterable[Block]) -> None:
    """Raises CannotFollow where two blocks are one module, or share a layer."""
    owner: dict[int, str] = {}
    for block in blocks:
        for name in {block.name, *block.layers}:
            other = owner.setdefault(id(model.get_submodule(name)), block.name)
            if other != block.name:
                raise CannotFollow(f"{block.name} and {other} share {name}")


def _in_order_of_execution(
    model: nn.Module, blocks: Sequence[Block], batches: Sequence[Any]
) -> list[Block]:
    """Blocks by when the first batch first runs one of their layers; those never run come last."""
    order: dict[int, int] = {}
    layers = {block: [model.get_submodule(name) for name in block.layers] for block in blocks}

    def note(layer: nn.Module, _: Any) -> None:
        order.setdefault(id(layer), len(order))

    hooks = [layer.register_forward_pre_hook(note) for own in layers.values() for layer in own]
    try:
        run_batch(model, batches[0])
    finally:
        for hook in hooks:
            hook.remove()
    never = len(order)
    return sorted(blocks, key=lambda b: min(order.get(id(layer), never) for layer in layers[b]))
