"""Round to nearest: the scales span the range of each group, the codes are the nearest values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qkernels import rounding
from qkernels.quantizers import grids
from qkernels.quantizers.method import LayerTask, Method
from qkernels.weight import WeightParameters


@dataclass(frozen=True)
class RtnParameters:
    """Attributes:
    grid: what scales are fitted to: the range of each group, or its least squared error.
    """

    grid: Literal["minmax", "mse"] = "minmax"


def _quantize(task: LayerTask, parameters: RtnParameters) -> WeightParameters:
    fitted = rounding.fit(task.weight, task.scheme, activation_scale=task.activation_scale)
    return grids.search(task.weight, fitted, parameters.grid, None)


RTN = Method(name="rtn", title="round to nearest", parameters=RtnParameters, quantize=_quantize)
