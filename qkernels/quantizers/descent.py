"""Gradient descent on what a block gives, for methods that learn the weights of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.calibration.calls import replace_forward
from qkernels.quantizers.gradients import counted_rows, output_of
from qkernels.quantizers.method import BlockTask

_HELD_BYTES = 1 << 30
"""Outputs of the dense block that are held; the rest are made again where they are needed."""


class DescentParameters(Protocol):
    """Attributes:
    steps: how many.
    batch: sequences of a step.
    lr: how far the first step moves, falling linearly to 0; 0 is 1 / steps.
    """

    @property
    def steps(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def lr(self) -> float: ...


class LearnedWeight(Protocol):
    """A layer's weight as it is learned.

    Attributes:
        learned: what is, to be kept and put back.
    """

    learned: list[Tensor]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """[N, K], as the quantized layer has it."""

    def step(self, gradient: Tensor, rate: float) -> None:
        """Moves what is learned. Args: gradient: of the loss with respect to `weight`, [N, K]."""

    def rounded_input(self, x: Tensor) -> Tensor:
        """x as the quantized layer multiplies it, with the gradient of x."""


class _Targets:
    """Outputs of the block in the model before quantization, by batch."""

    def __init__(self, task: BlockTask) -> None:
        self._task, self._held = task, dict[int, Tensor]()
        held = 0
        for batch in task.batches(dense=True):
            output = output_of(task.run(batch, dense=True))
            held += output.nbytes
            if held > _HELD_BYTES:
                break
            self._held[batch] = output

    def of(self, batch: int) -> Tensor:
        held = self._held.get(batch)
        return output_of(self._task.run(batch, dense=True)) if held is None else held


class Descent:
    """Gradient descent over the layers of a block, towards its outputs in the dense model.

    The loss of a batch is a sum of squares without those of padding, and is compared with that of
    its weights at first.

    Args:
        learned: of each layer to learn, by its name.
    """

    def __init__(
        self,
        task: BlockTask,
        learned: Mapping[str, LearnedWeight],
        parameters: DescentParameters,
    ) -> None:
        self._task, self._parameters = task, parameters
        self._layers = [task.layers[name] for name in learned]
        self._learning = list(learned.values())
        self._targets = _Targets(task)
        self._sequences: dict[int, int] = {}
        self._first: dict[int, float] = {}
        weights = self._weights()
        for batch in sorted({*task.batches()} & {*task.batches(dense=True)}):
            self._begin(batch, weights)

    def _begin(self, batch: int, weights: Sequence[Tensor]) -> None:
        """Takes a batch in where there is something to learn from it."""
        wanted = self._targets.of(batch)
        with self._in_place(weights):
            got = output_of(self._task.run(batch))
        # Experts may be given other numbers of rows than in the dense model.
        loss = float(self._loss(batch, got, wanted)) if got.shape == wanted.shape else 0.0
        if loss:
            self._first[batch], self._sequences[batch] = loss, len(wanted)

    def run(self) -> None:
        """Leaves the layers as they were at the step of the least loss."""
        if not self._first:
            return
        steps, batches = self._parameters.steps, self._drawn()
        rate = self._parameters.lr or 1 / steps
        least, best = 1.0, self._learned()
        for step in range(steps):
            loss, gradients = self._gradients(next(batches))
            if loss < least:
                least, best = loss, self._learned()
            for own, gradient in zip(self._learning, gradients, strict=True):
                own.step(gradient, rate * (1 - step / steps))
        for own, learned in zip(self._learning, best, strict=True):
            own.learned = learned

    def _learned(self) -> list[list[Tensor]]:
        return [[values.clone() for values in own.learned] for own in self._learning]

    def _weights(self) -> list[Tensor]:
        return [
            own.weight(layer.weight.dtype)
            for own, layer in zip(self._learning, self._layers, strict=True)
        ]

    def _gradients(self, batches: Sequence[int]) -> tuple[float, list[Tensor]]:
        """The loss, as a part of the first, and its gradients with respect to the weights."""
        # Made before the layers have other weights.
        targets = {batch: self._targets.of(batch) for batch in batches}
        weights = [weight.requires_grad_() for weight in self._weights()]
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        total = 0.0
        with self._in_place(weights):
            for batch, wanted in targets.items():
                with torch.enable_grad():
                    loss = self._loss(batch, output_of(self._task.run(batch)), wanted)
                    # So that it is about 1 at each output, which 16-bit types hold.
                    factor = (wanted.numel() / self._first[batch]) ** 0.5
                    found = torch.autograd.grad(loss * factor, weights, allow_unused=True)
                total += float(loss)
                for gradient, own in zip(found, sums, strict=True):
                    if gradient is not None:
                        own += gradient
        return total / sum(self._first[batch] for batch in batches), sums

    def _loss(self, batch: int, got: Tensor, wanted: Tensor) -> Tensor:
        """The sum of squares of the difference, without padding."""
        kept = self._task.tokens[batch].of_rows(got.shape[:-1])
        return counted_rows(got.float() - wanted.float(), kept).square().sum()

    @contextmanager
    def _in_place(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """A context in which the layers have these weights."""
        with ExitStack() as stack:
            for layer, own, weight in zip(self._layers, self._learning, weights, strict=True):
                stack.callback(replace_forward(layer, _product(own, weight, layer.bias)))
            yield

    def _drawn(self) -> Iterator[list[int]]:
        """Batches for each step, each of them as often as any other."""
        generator = torch.Generator().manual_seed(0)
        batches = list(self._first)
        left: list[int] = []

        def enough(chosen: list[int]) -> bool:
            sequences = sum(self._sequences[batch] for batch in chosen)
            return sequences >= self._parameters.batch or len(chosen) == len(batches)

        while True:
            # None twice in a step, whose loss would be met once and counted twice.
            chosen: list[int] = []
            while not enough(chosen):
                if all(b in chosen for b in left):
                    order = torch.randperm(len(batches), generator=generator).tolist()
                    more = [batches[place] for place in order]
                    # Taken from the end.
                    left += [b for b in more if b in chosen] + [b for b in more if b not in chosen]
                chosen.append(left.pop())
            yield chosen


def _product(own: LearnedWeight, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:
        return F.linear(own.rounded_input(input), weight, bias)

    return forward
