"""Calibration batches from a text, the shipped one by default."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from qkernels.errors import LayerError, QuantizationError, SchemeError
from qkernels.models.evaluation import SHIPPED_CALIBRATION, encode, read_text, windows_of
from qkernels.quantizers.model import check_methods
from qkernels.quantizers.recipe import Recipe
from qkernels.scheme import QuantScheme

SEQUENCES, LENGTH = 128, 512


def needs_calibration(recipe: Recipe, schemes: Iterable[QuantScheme]) -> bool:
    """Whether a recipe needs batches to make layers of one of these schemes."""
    for scheme in schemes:
        if scheme.activation.is_static:
            return True
        try:
            check_methods(recipe, {"": scheme}, calibrated=False)
        except LayerError:
            return True
        except SchemeError:
            # The recipe does not make it, which is said where the layer is known that has it.
            continue
    return False


def calibration_batches(
    tokenizer: Any,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    text: str | None = None,
    *,
    batch: int = 8,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Token ids to calibrate on: int64 [batch, length] each, the last one smaller where need be.

    The sequences are evenly spaced over the whole text, do not overlap and are the same in every
    run. A text that is too short gives fewer, or one shorter sequence.

    Args:
        tokenizer: a transformers tokenizer.
        sequences: how many to take, 1 or more.
        length: tokens of each, 2 or more, no more than the model's context.
        text: None for the text that is shipped.
        batch: sequences that are run together.

    Raises:
        QuantizationError: for sizes that are too small, and a text of less than 2 tokens.
    """
    if sequences < 1 or length < 2 or batch < 1:
        raise QuantizationError(
            "calibration needs 1 sequence or more of 2 tokens or more and a batch of 1 or more, "
            f"got {sequences}, {length} and {batch}"
        )
    ids = encode(tokenizer, read_text(SHIPPED_CALIBRATION) if text is None else text)
    if len(ids) < 2:
        raise QuantizationError(
            f"the calibration text has {len(ids)} tokens: calibration needs 2 or more, and good "
            "results thousands"
        )
    windows = windows_of(ids, length, sequences)
    whole = [window for window in windows if len(window) == length] or windows
    return [
        torch.stack(whole[start : start + batch]).to(device)
        for start in range(0, len(whole), batch)
    ]
