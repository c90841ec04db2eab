"""Static activations of a layer: their scale and zero point, found by calibration.

Weights are the same whatever the zero point of x, so methods make them for x without one, and it
is added to what they made.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from qkernels.calibration.observers import ObserverChoice
from qkernels.calibration.ranges import Numbers, scale_and_zero
from qkernels.calibration.statistics import LayerInputs, Needs
from qkernels.quantizers.method import LayerTask
from qkernels.scheme import Activation, QuantScheme
from qkernels.weight import QuantizedWeight, WeightParameters


def needs_of(scheme: QuantScheme, observer: ObserverChoice) -> Needs:
    """What is collected of a layer for its static activations."""
    return Needs(quantized=(str(observer),)) if scheme.activation.is_static else Needs()


def x_parameters(
    scheme: QuantScheme, observer: ObserverChoice, inputs: LayerInputs | None
) -> dict[str, Any]:
    """`activation_scale` and `activation_zero` of a `LayerTask`."""
    if not scheme.activation.is_static:
        return {"activation_scale": None, "activation_zero": None}
    assert inputs is not None
    numbers = Numbers.of(scheme.activation)
    low, high = inputs.quantized[str(observer)].range(numbers)
    scale, zero = scale_and_zero(low, high, numbers)
    has_zero = scheme.activation.has_zeros
    return {
        "activation_scale": float(scale),
        "activation_zero": int(zero) if has_zero else None,
    }


def without_inputs(scheme: QuantScheme) -> tuple[QuantScheme, str]:
    """The scheme of a layer that calibration never reached, and what to say of it."""
    if not scheme.activation.is_static:
        return scheme, "rounded to nearest"
    # Per token needs no data and keeps the weights' format; a scale that is guessed may saturate.
    dynamic = dataclasses.replace(scheme, activation=Activation(scheme.activation.dtype, "token"))
    return dynamic, f"rounded to nearest, with activations scaled per token ({dynamic})"


def without_zero(task: LayerTask) -> LayerTask:
    """The task as methods see it."""
    if task.activation_zero is None:
        return task
    symmetric = Activation(task.scheme.activation.dtype, "static")
    scheme = dataclasses.replace(task.scheme, activation=symmetric)
    return dataclasses.replace(task, scheme=scheme, activation_zero=None)


def with_zero(made: WeightParameters, task: LayerTask) -> WeightParameters:
    """What a method made of `without_zero(task)`, for the task."""
    if task.activation_zero is None:
        return made
    zero = torch.tensor(task.activation_zero, dtype=torch.int32, device=task.weight.device)
    if isinstance(made, QuantizedWeight):
        return made.replace(scheme=task.scheme, activation_zero=zero)
    fields = {**made.fields, "activation_zero": zero}
    return WeightParameters(scheme=task.scheme, n=made.n, k=made.k, **fields)
