"""Loss-weighted statistics: an input counts as the loss of the model depends on its output.

    H = sum over tokens t of  g_t x_t x_t^T,    g_t = mean over outputs of (d loss / d y_t)^2

so that the layer's loss is that of the model, to second order (Kim et al. 2025, GuidedQuant, with
one group of outputs). The loss is that of the next token, drawn from what the model itself
predicts, whose expected H is the curvature of its divergence from the dense model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.calibration.forwards import run_batch
from qkernels.quantizers.gradients import drawn_loss, frozen, gives_logits, output_of, pieces
from qkernels.quantizers.method import Method, ModelTask


@dataclass(frozen=True)
class GuidedParameters:
    """Attributes:
    most: how much an input counts at most, as a multiple of the mean: gradients of some tokens are
        hundreds of times those of others.
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


def _prepare(task: ModelTask, parameters: GuidedParameters) -> None:
    layers = {id(layer): name for name, layer in reversed(list(task.layers.items()))}
    found: dict[str, dict[int, list[Tensor]]] = {}
    generator = torch.Generator().manual_seed(parameters.seed)
    with frozen(task.model), contextlib.ExitStack() as stack:
        present = [0]
        for layer in {id(layer): layer for layer in task.layers.values()}.values():
            kept = found.setdefault(layers[id(layer)], {})
            stack.callback(layer.register_forward_hook(_keeper(kept, present)).remove)
        for number, batch in enumerate(task.batches):
            present[0] = number
            for piece in pieces(batch, parameters.sequences):
                _loss(run_batch(task.model, piece), generator).backward()
    for name, layer in task.layers.items():
        kept = found[layers[id(layer)]]
        if kept:
            task.row_weights[name] = _weights(kept, parameters)


def _keeper(kept: dict[int, list[Tensor]], present: list[int]) -> Callable[..., Any]:
    """A forward hook that puts squared gradients into `kept`, in the order of the calls."""

    def hook(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not output.requires_grad:
            # The first layers of a model have nothing in front that could ask for a gradient.
            output = output.detach().requires_grad_()
        rows = kept.setdefault(present[0], [])
        place = len(rows)
        rows.append(torch.zeros(output[..., 0].numel()))

        def keep(gradient: Tensor) -> None:
            rows[place] = gradient.float().square().mean(dim=-1).flatten().cpu()

        output.register_hook(keep)
        return output

    return hook


def _loss(result: Any, generator: torch.Generator) -> Tensor:
    """The sum over tokens, so that batches of all sizes count alike."""
    output = output_of(result)
    if not gives_logits(result):
        # Random directions: the expected squared gradient is that of the output's squared error.
        signs = torch.randint(2, output.shape, generator=generator).mul_(2).sub_(1)
        return (output.float() * signs.to(output.device)).sum()
    return drawn_loss(output, generator)


def _weights(kept: dict[int, list[Tensor]], parameters: GuidedParameters) -> dict[int, Tensor]:
    joined = {batch: torch.cat(rows) for batch, rows in kept.items()}
    every = torch.cat(list(joined.values()))
    mean = every.mean()
    if not mean > 0:
        return {}

    def bounded(rows: Tensor) -> Tensor:
        return (rows / mean).clamp(max=parameters.most) ** parameters.strength

    mean_after = bounded(every).mean()
    return {batch: bounded(rows) / mean_after for batch, rows in joined.items()}


GUIDED = Method(
    name="guided",
    title="inputs counted by the gradient of the model's loss",
    parameters=GuidedParameters,
    prepare_model=_prepare,
    uses_batches=True,
)
