"""Static activations of a layer: their scale and zero point, found by calibration.

Weights are the same whatever the zero point of x, so methods make them for x without one, and it
is added to what they made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.calibration.observers import ObserverChoice
from qkernels.calibration.ranges import Numbers, rounded, scale_and_zero
from qkernels.calibration.statistics import LayerInputs, Needs, by_position
from qkernels.positions import at
from qkernels.quantizers.method import LayerTask
from qkernels.scheme import Activation, QuantScheme
from qkernels.weight import WeightParameters


def needs_of(scheme: QuantScheme, observer: ObserverChoice, *, is_head: bool = False) -> Needs:
    """What is collected of a layer for its static activations.

    Args:
        is_head: whether it makes logits. Generation gives it the last token alone, whose position
            it cannot tell, so that all its positions have one scale.
    """
    if not scheme.activation.is_static:
        return Needs()
    apart = scheme.activation.by_position and not is_head
    return Needs(quantized=(by_position(observer) if apart else str(observer),))


def x_parameters(
    scheme: QuantScheme, observer: ObserverChoice, inputs: LayerInputs | None, weight: Tensor
) -> dict[str, Any]:
    """`activation_scale` and `activation_zero` of a `LayerTask` with this weight [N, K]."""
    if not scheme.activation.is_static:
        return {"activation_scale": None, "activation_zero": None}
    assert inputs is not None
    numbers = Numbers.of(scheme.activation)
    apart = inputs.quantized.get(by_position(observer))
    seen = inputs.quantized[str(observer)] if apart is None else apart.observer
    low, high = seen.range(numbers)
    tried = list(observer.observer.tried(seen))
    if tried:
        rows = inputs.quantized["rows"].rows
        places = inputs.row_positions
        if places is None:
            places = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        low, high = _least_output_error(tried, (low, high), numbers, rows, places, weight)
    scale, zero = scale_and_zero(low, high, numbers)
    has_zero = scheme.activation.has_zeros
    if scheme.activation.by_position:
        return {"activation_scale": scale, "activation_zero": zero if has_zero else None}
    return {
        "activation_scale": float(scale),
        "activation_zero": int(zero) if has_zero else None,
    }


_CLOSER = tuple(1 + step / 50 for step in range(-8, 9))
"""Parts of the best range that are tried in the end."""


def _least_output_error(
    tried: Sequence[tuple[Tensor, Tensor]],
    whole: tuple[Tensor, Tensor],
    numbers: Numbers,
    rows: Tensor,
    places: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor]:
    """The ranges, [1] or [P] of positions, with the least |(x_q - x) W^T|^2 on a sample of rows
    [R, K] at `places` [R]: of those that are tried, and then of ranges close to the best of them,
    `whole` at most."""
    rows, weight = rows.float(), weight.float()

    def error(ends: tuple[Tensor, Tensor]) -> float:
        scale, zero = (at(own, places)[:, None] for own in scale_and_zero(*ends, numbers))
        wrong = rounded(rows, scale, zero, numbers) - rows
        return float(F.linear(wrong, weight).square().sum())

    best = min(tried, key=error)
    low, high = best
    closer = (
        (torch.maximum(low * step, whole[0]), torch.minimum(high * step, whole[1]))
        for step in _CLOSER
    )
    return min((best, *closer), key=error)


def without_inputs(scheme: QuantScheme) -> tuple[QuantScheme, str]:
    """The scheme of a layer that calibration never reached, and what to say of it."""
    if not scheme.activation.is_static:
        return scheme, "rounded to nearest"
    # Per token needs no data and keeps the weights' format; a scale that is guessed may saturate.
    dynamic = scheme.dynamic
    return dynamic, f"rounded to nearest, with activations scaled per token ({dynamic})"


def without_zero(task: LayerTask) -> LayerTask:
    """The task as methods see it."""
    if task.activation_zero is None:
        return task
    granularity = task.scheme.activation.granularity.removesuffix("asym")
    symmetric = Activation(task.scheme.activation.dtype, granularity)
    scheme = dataclasses.replace(task.scheme, activation=symmetric)
    zero = task.activation_zero
    return dataclasses.replace(task, scheme=scheme, activation_zero=None, input_zero=zero)


def with_zero(made: WeightParameters, task: LayerTask) -> WeightParameters:
    """What a method made of `without_zero(task)`, for the task."""
    if task.activation_zero is None:
        return made
    zero = torch.as_tensor(task.activation_zero, dtype=torch.int32, device=task.weight.device)
    return made.replace(scheme=task.scheme, activation_zero=zero)
