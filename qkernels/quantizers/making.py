"""One layer: what a method is told of it, and what the method makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from qkernels.calibration.statistics import LayerInputs
from qkernels.checkpoints.format import WeightKind
from qkernels.errors import QuantizationError
from qkernels.modules import WQLinear
from qkernels.quantizers.job import Outcome, Plan
from qkernels.quantizers.method import LayerTask
from qkernels.quantizers.recipe import Part
from qkernels.quantizers.static_inputs import with_zero, without_inputs, without_zero, x_parameters
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight, WeightParameters


def layer_task(
    name: str,
    layer: nn.Linear,
    plan: Plan,
    outcome: Outcome,
    inputs: Mapping[str, LayerInputs],
    input_factor: Tensor | None,
) -> LayerTask:
    """What is known of a layer; `outcome` is told where no calibration input reached it."""
    scheme, own = plan.schemes[name], inputs.get(name)
    if own is not None and not own.rows:
        own = None
        scheme, outcome.unreached[name] = without_inputs(scheme)
    return LayerTask(
        name=name,
        weight=layer.weight.detach(),
        bias=None if layer.bias is None else layer.bias.detach(),
        scheme=scheme,
        inputs=own,
        input_factor=input_factor,
        **x_parameters(scheme, plan.observer, own, layer.weight.detach()),
    )


def planned_kind(
    scheme: QuantScheme, part: Part, shape: tuple[int, int], instead_of: str | None
) -> WeightKind:
    """What is known of a layer before it is quantized.

    Args:
        part: what will quantize it.
        instead_of: as `WeightKind` has it.
    """
    kind = WeightKind.of_scheme(scheme)
    return replace(
        kind,
        fields=kind.fields | part.method.adds(part.parameters),
        shape=shape,
        real_zeros=part.method.real_zeros(part.parameters),
        instead_of=instead_of,
    )


def build_layer(
    task: LayerTask,
    part: Part,
    options: Mapping[str, Any],
    made: WeightParameters | None = None,
) -> WQLinear:
    """The layer that a part of a recipe makes. Args: made: its weight, where that is known."""
    try:
        if made is None:
            assert part.method.quantize is not None
            made = part.method.quantize(without_zero(task), part.parameters)
        made = with_zero(made, task)
        if task.input_factor is not None:
            made = made.replace(input_factor=task.input_factor.to(task.weight.device))
        assert (made.n, made.k) == tuple(task.weight.shape), part.method.name
        if isinstance(made, QuantizedWeight):
            weight = made.replace(bias=task.bias)
            like = task.weight
            return WQLinear.from_weight(weight, device=like.device, dtype=like.dtype, **options)
        return WQLinear.from_parameters(made, task.weight, task.bias, **options)
    except QuantizationError as error:
        raise type(error)(f"{task.name}: {error}") from None
