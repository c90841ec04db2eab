"""Round to nearest: the scales span the range of each group, the codes are the nearest values."""

from __future__ import annotations

from qkernels import rounding
from qkernels.quantizers.method import LayerTask, Method, NoParameters
from qkernels.weight import WeightParameters


def _quantize(task: LayerTask, parameters: NoParameters) -> WeightParameters:
    return rounding.fit(task.weight, task.scheme, activation_scale=task.activation_scale)


RTN = Method(name="rtn", title="round to nearest", quantize=_quantize)
