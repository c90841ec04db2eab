"""Training of a quantized model's layers, end to end, to give the dense model's outputs.

    min KL(p_dense || p_quantized)

over calibration sequences. Models without logits learn by the relative squared error of their
outputs. Some sequences are kept aside: they say whether the model came nearer to the dense one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from qkernels.calibration.calls import replace_forward
from qkernels.calibration.forwards import run_batch
from qkernels.errors import LayerError
from qkernels.modules import WQLinear
from qkernels.quantizers.gradients import (
    Recomputed,
    counted,
    counted_rows,
    divergence,
    gives_logits,
    output_of,
    pieces,
)
from qkernels.quantizers.method import ModelTask

_FEW, _MOST_ASIDE = 16, 8
"""From so many sequences on some are kept aside, and how many at most."""

_HALF_SCALE = 2.0**12
"""What the loss is multiplied by in fp16, whose least number is 6e-8; Adam does not see it."""


class Trained(Protocol):
    """A layer in training."""

    def begin(self) -> None:
        """Makes the weight of the present parameters, which `forward` multiplies with."""

    def end(self) -> None:
        """Lets go of what `begin` made."""

    def learn(self) -> None:
        """Gives the parameters the gradients that forwards since `begin` have left."""

    def forward(self, input: Tensor) -> Tensor:
        """As the layer's."""


class EndToEnd:
    """Layers in training, by the names of their modules.

    Attributes:
        aside: the sequences that are kept aside, a batch of one each.

    Args:
        layers: that run; `trained` stand in for some of them while the model is in training.
    """

    def __init__(
        self, task: ModelTask, layers: Mapping[str, WQLinear], trained: Mapping[str, Trained]
    ) -> None:
        self._task, self._layers, self._trained = task, layers, trained
        self._half = any(layer.dtype == torch.float16 for layer in layers.values())
        cut = [piece for batch in task.batches for piece in pieces(batch, 1)]
        self.aside, self._cut = _set_aside(cut)

    def divergence(self) -> float:
        """From the dense model: the mean over the sequences that are kept aside."""
        with self._weights():
            return sum(self._loss(batch) for batch in self.aside) / len(self.aside)

    def first_divergence(self, method: str) -> float:
        """`divergence` before training.

        Raises:
            LayerError: where it is not finite.
        """
        before = self.divergence()
        if not math.isfinite(before):
            raise LayerError(
                f"{method}: the model's outputs on calibration sequences are not finite"
            )
        return before

    def train(
        self, optimizer: torch.optim.Optimizer, steps: int, sequences: int, seed: int
    ) -> None:
        """Takes steps of so many sequences each; rates fall to 0 by half a cosine."""
        rates = [group["lr"] for group in optimizer.param_groups]
        for number, batches in enumerate(_steps(self._cut, steps, sequences, seed)):
            progress = (number + 0.5) / steps
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * progress)) / 2
            with self._weights():
                for batch in batches:
                    self._learn(batch, 1 / len(batches))
                for each in self._trained.values():
                    each.learn()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def _weights(self) -> Iterator[None]:
        """A context in which the layers have the weights of their present parameters."""
        with contextlib.ExitStack() as stack:
            for each in self._trained.values():
                each.begin()
                stack.callback(each.end)
            yield

    def _learn(self, batch: Any, share: float) -> None:
        """Adds `share` of the gradients of a batch."""
        wanted = self._dense(batch)
        # Blocks run again in the backward pass, as they did before.
        with self._in_training(), Recomputed(self._task.model, self._trained):
            loss = _loss(run_batch(self._task.model, batch), wanted, batch)
            (loss * share * (_HALF_SCALE if self._half else 1.0)).backward()

    def _loss(self, batch: Any) -> float:
        wanted = self._dense(batch)
        with torch.no_grad(), self._in_training():
            return float(_loss(run_batch(self._task.model, batch), wanted, batch))

    def _dense(self, batch: Any) -> Any:
        with torch.no_grad(), self._task.dense():
            return run_batch(self._task.model, batch)

    @contextlib.contextmanager
    def _in_training(self) -> Iterator[None]:
        """A context in which the model runs the layers in training."""
        with contextlib.ExitStack() as stack:
            for name, each in self._trained.items():
                stack.callback(replace_forward(self._layers[name], each.forward))
            yield


def quantized_layers(task: ModelTask) -> dict[str, WQLinear]:
    """The quantized linear layers of a plan, each under the first of its names."""
    layers: dict[int, tuple[str, WQLinear]] = {}
    for name, layer in task.layers.items():
        if isinstance(layer, WQLinear):
            layers.setdefault(id(layer), (name, layer))
    return dict(layers.values())


def _loss(found: Any, wanted: Any, batch: Any) -> Tensor:
    result, target = output_of(found), output_of(wanted)
    kept = counted(batch, result)
    if gives_logits(found):
        return divergence(result, target, kept)
    result, target = (counted_rows(x.float(), kept) for x in (result, target))
    return (result - target).square().sum() / target.square().sum()


def _set_aside(cut: list[Any]) -> tuple[list[Any], list[Any]]:
    """One of 16 sequences, spread over all, and the rest; all of them twice where they are few."""
    if len(cut) < _FEW:
        return cut, cut
    aside = range(0, len(cut), max(_FEW, len(cut) // _MOST_ASIDE))[:_MOST_ASIDE]
    return [cut[i] for i in aside], [piece for i, piece in enumerate(cut) if i not in aside]


def _steps(cut: Sequence[Any], steps: int, sequences: int, seed: int) -> Iterator[list[Any]]:
    """What each step runs, one after the other: all of `cut` in a drawn order, and again."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        step: list[Any] = []
        while len(step) < sequences:
            if not order:
                order = torch.randperm(len(cut), generator=generator).tolist()
            step.append(cut[order.pop()])
        yield step
