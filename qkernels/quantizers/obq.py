"""OBQ: each row's weights are rounded one after the other, always the one that costs least.

With F the weights that are not rounded yet and H = x^T x over calibration inputs,

    p = argmin (w_p - round(w_p))^2 / [H_F^-1]_pp
    w_F -= [H_F^-1]_{:, p} (w_p - round(w_p)) / [H_F^-1]_pp

(Frantar & Alistarh 2022, Optimal Brain Compression, algorithm 3). Each row takes an order of its
own and an inverse of its own: N K^3 operations, for small layers, and for checking GPTQ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qkernels import rounding
from qkernels.calibration.statistics import Needs
from qkernels.errors import LayerError
from qkernels.quantizers import grids
from qkernels.quantizers.hessian import MOST_DAMPING, damped_gram, gram_of
from qkernels.quantizers.method import LayerTask, Method
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight, WeightParameters

MOST_OPERATIONS = 1 << 40
"""Of N K^3: about half an hour of two cores."""

_ELEMENTS = 1 << 24
"""Numbers in the inverses that are held at a time."""


@dataclass(frozen=True)
class ObqParameters:
    """Attributes:
    grid: what scales are fitted to, beforehand; see `grids.Grid`.
    damp_percent: what is added to the diagonal of H, as a part of its mean; doubled until it can be
        factored.
    """

    grid: grids.Grid = "hessian"
    damp_percent: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.damp_percent <= MOST_DAMPING:
            raise ValueError(f"damp_percent must be in (0, 1], got {self.damp_percent:g}")


def _statistics(scheme: QuantScheme, parameters: ObqParameters) -> Needs:
    return Needs(quantized=("gram",))


def _quantize(task: LayerTask, parameters: ObqParameters) -> WeightParameters:
    n, k = task.weight.shape
    if n * k**3 > MOST_OPERATIONS:
        raise LayerError(
            f"obq would take about {n * k**3:.1e} operations for [{n}, {k}]: use gptq, which does "
            "the same in one order for all rows"
        )
    assert task.inputs is not None
    gram = gram_of(task.inputs)
    weight = task.weight.float()
    fitted = rounding.fit(weight, task.scheme, activation_scale=task.activation_scale)
    fitted = grids.search(weight, fitted, parameters.grid, gram)
    _, lower = damped_gram(gram, parameters.damp_percent)
    inverse = torch.cholesky_inverse(lower)
    codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    rows = max(1, _ELEMENTS // k**2)
    for start in range(0, n, rows):
        part = slice(start, min(n, start + rows))
        codes[part] = _round_rows(weight[part], fitted, start, inverse)
    return QuantizedWeight(scheme=task.scheme, codes=codes, **fitted.fields)


def _round_rows(weight: Tensor, fitted: WeightParameters, start: int, inverse: Tensor) -> Tensor:
    """Codes of rows [R, K]. Args: inverse: H^-1, fp64 [K, K]."""
    count, k = weight.shape
    # In fp64: what is taken off the inverse K times is in the end nearly all of it.
    left, every = weight.double(), torch.arange(count, device=weight.device)
    inverses = inverse.repeat(count, 1, 1)
    codes = torch.zeros(count, k, dtype=torch.uint8, device=weight.device)
    open_ = torch.ones(count, k, dtype=torch.bool, device=weight.device)
    for _ in range(k):
        nearest = rounding.encode_rows(left, fitted, start)
        errors = left - fitted.dequantize_rows(nearest, start)
        diagonal = inverses.diagonal(dim1=1, dim2=2)
        cost = torch.where(open_, errors.square() / diagonal, torch.inf)
        chosen = cost.argmin(dim=1)
        codes[every, chosen] = nearest[every, chosen]
        open_[every, chosen] = False
        column = inverses[every, chosen]
        pivot = column[every, chosen]
        step = errors[every, chosen] / pivot
        left -= column * step[:, None]
        inverses.baddbmm_(column[:, :, None], (column / pivot[:, None])[:, None, :], alpha=-1)
        # What is rounded has left the inverse: its row and column are zero but for rounding.
        inverses[every, chosen, :] = 0
        inverses[every, :, chosen] = 0
        inverses[every, chosen, chosen] = 1
    return codes


OBQ = Method(
    name="obq",
    title="GPTQ's exact form, for small layers",
    parameters=ObqParameters,
    statistics=_statistics,
    quantize=_quantize,
)
