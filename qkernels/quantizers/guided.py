"""Loss-weighted statistics: an input counts as the loss of the model depends on its output.

    H = sum over tokens t of  g_t x_t x_t^T,    g_t = mean over outputs of (d loss / d y_t)^2

so that the layer's loss is that of the model, to second order (Kim et al. 2025, GuidedQuant, with
one group of outputs). The loss is that of the next token, drawn from what the model itself
predicts, whose expected H is the curvature of its divergence from the dense model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.calibration.batches import Tokens
from qkernels.calibration.forwards import run_batch
from qkernels.errors import LayerError
from qkernels.quantizers.gradients import (
    Recomputed,
    counted,
    counted_rows,
    drawn_loss,
    frozen,
    gives_logits,
    output_of,
    pieces,
)
from qkernels.quantizers.method import Method, ModelTask, check_seed


@dataclass(frozen=True)
class GuidedParameters:
    """Attributes:
    most: how much an input counts at most, as a multiple of the mean of all before any is cut down
        to that: gradients of some tokens are hundreds of times those of others.
    strength: the power that weights are taken to, from 0, where all count alike, to 1.
    sequences: run at a time; memory grows with them.
    seed: of the tokens that are drawn.
    """

    most: float = 10.0
    strength: float = 1.0
    sequences: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.most >= 1:
            raise ValueError(f"most must be 1 or more, got {self.most:g}")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength must be in [0, 1], got {self.strength:g}")
        if self.sequences < 1:
            raise ValueError(f"sequences must be 1 or more, got {self.sequences}")
        check_seed(self.seed)


def _prepare(task: ModelTask, parameters: GuidedParameters) -> None:
    layers = {id(layer): name for name, layer in reversed(list(task.layers.items()))}
    tokens = [Tokens.of(batch) for batch in task.batches]
    generator = torch.Generator().manual_seed(parameters.seed)
    with contextlib.ExitStack() as stack:
        stack.enter_context(frozen(task.model))
        found = {name: _Squares(sum(own.count for own in tokens)) for name in layers.values()}
        blocks = stack.enter_context(Recomputed(task.model, task.layers))
        present = [0]
        for layer in {id(layer): layer for layer in task.layers.values()}.values():
            hook = _keeper(found[layers[id(layer)]], present, blocks)
            stack.callback(layer.register_forward_hook(hook).remove)
        for number, batch in enumerate(task.batches):
            present[0] = number
            for piece in pieces(batch, parameters.sequences):
                _loss(run_batch(task.model, piece), piece, generator).backward()
    for name, layer in task.layers.items():
        squares = found[layers[id(layer)]]
        if not squares.finite:
            raise LayerError(f"guided: gradients that are not finite reach {name}")
        if squares.are_of(tokens):
            task.row_weights[name] = squares.weights(parameters)


class _Squares:
    """Mean squared gradients of a layer's outputs, a number a row, in the order of its calls.

    They are in one piece of memory, made beforehand: many small ones that stay among the large ones
    of each backward pass would keep these from being given back.

    Args:
        rows: how many there will be, about.
    """

    def __init__(self, rows: int) -> None:
        self._values = torch.zeros(max(1, rows))
        self._used = 0
        self._places: dict[int, list[slice]] = {}

    def reserve(self, batch: int, rows: int) -> slice:
        """The place of the rows of a call."""
        place = slice(self._used, self._used + rows)
        self._used = place.stop
        if self._used > len(self._values):
            more = torch.zeros(max(self._used - len(self._values), len(self._values)))
            self._values = torch.cat((self._values, more))
        self._places.setdefault(batch, []).append(place)
        return place

    def put(self, place: slice, values: Tensor) -> None:
        self._values[place] = values

    @property
    def finite(self) -> bool:
        return bool(self._values[: self._used].isfinite().all())

    def are_of(self, tokens: Sequence[Tokens]) -> bool:
        """Whether they are numbers of all tokens of each batch, in their order, and any is not 0.

        Experts are given some of the tokens, other ones behind quantized blocks, in an order of
        their own: which number is whose is not known.
        """
        rows = {n: sum(p.stop - p.start for p in places) for n, places in self._places.items()}
        all_there = all(rows.get(number) == own.count for number, own in enumerate(tokens))
        return all_there and bool(self._values[: self._used].any())

    def weights(self, parameters: GuidedParameters) -> dict[int, Tensor]:
        """What each row counts, around 1, by batch."""
        every = self._values[: self._used]
        every = (every / every.mean()).clamp(max=parameters.most) ** parameters.strength
        every /= every.mean()
        return {
            batch: torch.cat([every[place] for place in places])
            for batch, places in self._places.items()
        }


def _keeper(found: _Squares, present: list[int], blocks: Recomputed) -> Callable[..., Any]:
    """A forward hook that puts squared gradients into `found`, for the batch that is `present`."""

    def hook(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not output.requires_grad:
            # The first layers of a model have nothing in front that could ask for a gradient.
            output = output.detach().requires_grad_()
        if blocks.again:
            # Gradients reach what the first run gave.
            return output
        place = found.reserve(present[0], output[..., 0].numel())

        def keep(gradient: Tensor) -> None:
            found.put(place, gradient.float().square().mean(dim=-1).flatten())

        output.register_hook(keep)
        return output

    return hook


def _loss(result: Any, batch: Any, generator: torch.Generator) -> Tensor:
    """The sum over tokens, so that batches of all sizes count alike."""
    output = output_of(result)
    kept = counted(batch, output)
    if gives_logits(result):
        return drawn_loss(output, generator, kept)
    # Random directions: the expected squared gradient is that of the output's squared error.
    signs = torch.randint(2, output.shape, generator=generator).mul_(2).sub_(1)
    moved = output.float() * signs.to(output.device)
    return counted_rows(moved, kept).sum()


GUIDED = Method(
    name="guided",
    title="inputs counted by the gradient of the model's loss",
    parameters=GuidedParameters,
    prepare_model=_prepare,
    uses_batches=True,
)
