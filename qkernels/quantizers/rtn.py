"""Round to nearest: the scales span the range of each group, the codes are the nearest values."""

from __future__ import annotations

from dataclasses import dataclass

from qkernels import rounding
from qkernels.calibration.statistics import Needs
from qkernels.quantizers import grids
from qkernels.quantizers.hessian import gram_of
from qkernels.quantizers.method import LayerTask, Method
from qkernels.scheme import QuantScheme
from qkernels.weight import WeightParameters


@dataclass(frozen=True)
class RtnParameters:
    """Attributes:
    grid: what scales are fitted to; see `grids.Grid`.
    """

    grid: grids.Grid = "minmax"


def _statistics(scheme: QuantScheme, parameters: RtnParameters) -> Needs:
    return Needs(quantized=("gram",)) if grids.asks_for_inputs(parameters.grid) else Needs()


def _quantize(task: LayerTask, parameters: RtnParameters) -> WeightParameters:
    gram = None
    if grids.asks_for_inputs(parameters.grid):
        assert task.inputs is not None
        gram = gram_of(task.inputs)
    fitted = rounding.fit(task.weight, task.scheme, activation_scale=task.activation_scale)
    return grids.search(task.weight, fitted, parameters.grid, gram)


RTN = Method(
    name="rtn",
    title="round to nearest",
    parameters=RtnParameters,
    statistics=_statistics,
    quantize=_quantize,
)
