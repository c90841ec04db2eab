"""H = x^T x over the calibration inputs of a layer: the curvature of its output's error."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from qkernels.calibration.statistics import LayerInputs
from qkernels.errors import LayerError

MOST_DAMPING = 1.0
"""As a part of the diagonal's mean."""

ENOUGH_INPUTS = 4
"""Times the columns of a layer: from so many inputs on, H is not warned of. With 2.7 times as many,
gptq was worse than rtn on a text of another kind (docs/methods.md)."""


def warn_of_few(name: str, inputs: LayerInputs, k: int, part: str) -> bool:
    """Warns of a layer whose H is of few inputs; whether it did.

    Args:
        k: how many columns the layer has.
        part: what learns from H, as a recipe spells it.
    """
    few = "gram" in inputs.quantized and 0 < inputs.rows < ENOUGH_INPUTS * k
    if few:
        warnings.warn(
            f"{name} met {inputs.rows} calibration tokens, and each has {k} numbers: {part} learns "
            f"from so few what holds for them alone. Give {ENOUGH_INPUTS * k} tokens or more; "
            "other layers may have met as few",
            stacklevel=2,
        )
    return few


_UNSEEN = 2**-10
"""What an input that is always 0 counts, as a part of the least that is not."""


def gram_of(inputs: LayerInputs) -> Tensor:
    """The mean of x^T x over the calibration inputs of a layer, fp32 [K, K].

    Inputs that are always 0 count a little, or 1 where all are: their weights are still to be
    rounded to something near, at no other weight's expense.
    """
    gram: Tensor = inputs.quantized["gram"].matrix / inputs.rows
    _count_unseen(gram.diagonal())
    return gram


def squares_of(inputs: LayerInputs) -> Tensor:
    """The diagonal of `gram_of`, fp32 [K]."""
    squares: Tensor = (inputs.quantized["squares"].sums / inputs.rows).float()
    _count_unseen(squares)
    return squares


def _count_unseen(diagonal: Tensor) -> None:
    seen = diagonal[diagonal > 0]
    diagonal[diagonal == 0] = _UNSEEN * seen.min() if len(seen) else 1


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
