"""H = x^T x over the calibration inputs of a layer: the curvature of its output's error."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.errors import LayerError
from qkernels.quantizers.method import LayerTask

MOST_DAMPING = 1.0
"""As a part of the diagonal's mean."""


def gram_of(task: LayerTask) -> Tensor:
    """The mean of x^T x over calibration inputs, fp32 [K, K]; 1 for inputs that are always 0."""
    assert task.inputs is not None
    gram = task.inputs.quantized["gram"].matrix.to(task.weight.device) / task.inputs.rows
    if not gram.isfinite().all():
        raise LayerError("a calibration batch gives it inputs that are not finite")
    diagonal = gram.diagonal()
    diagonal[diagonal == 0] = 1
    return gram


def damped_gram(gram: Tensor, damp_percent: float) -> Tensor:
    """`gram` with its diagonal raised until it can be factored, fp64."""
    mean = float(gram.diagonal().double().mean())
    while damp_percent <= MOST_DAMPING:
        damped = gram.double()
        damped.diagonal().add_(damp_percent * mean)
        if not torch.linalg.cholesky_ex(damped).info:
            return damped
        damp_percent *= 2
    raise LayerError(
        "x^T x of its calibration inputs is not positive definite, however much is added to its "
        "diagonal: they overflow"
    )
