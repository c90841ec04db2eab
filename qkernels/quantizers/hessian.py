"""H = x^T x over the calibration inputs of a layer: the curvature of its output's error."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.calibration.statistics import LayerInputs
from qkernels.errors import LayerError

MOST_DAMPING = 1.0
"""As a part of the diagonal's mean."""

_UNSEEN = 2**-10
"""What an input that is always 0 counts, as a part of the least that is not."""


def gram_of(inputs: LayerInputs) -> Tensor:
    """The mean of x^T x over the calibration inputs of a layer, fp32 [K, K].

    Inputs that are always 0 count a little, or 1 where all are: their weights are still to be
    rounded to something near, at no other weight's expense.
    """
    gram: Tensor = inputs.quantized["gram"].matrix / inputs.rows
    diagonal = gram.diagonal()
    seen = diagonal[diagonal > 0]
    diagonal[diagonal == 0] = _UNSEEN * seen.min() if len(seen) else 1
    return gram


def damped_gram(gram: Tensor, damp_percent: float) -> tuple[Tensor, Tensor]:
    """`gram` with its diagonal raised until it can be factored, and its lower factor, both fp64."""
    mean = float(gram.diagonal().double().mean())
    while damp_percent <= MOST_DAMPING:
        damped = gram.double()
        damped.diagonal().add_(damp_percent * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return damped, lower
        damp_percent *= 2
    raise LayerError(
        "x^T x of its calibration inputs is not positive definite, however much is added to its "
        "diagonal: they overflow"
    )
