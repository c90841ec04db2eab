"""Errors of readers that are not ours, as one of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from qkernels.checkpoints.config import shortened
from qkernels.errors import CheckpointError, QuantizationError


@contextlib.contextmanager
def as_checkpoint_error(path: str | Path, what: str) -> Iterator[None]:
    """Within, any error becomes a CheckpointError that says that `path` is `what`, and why."""
    try:
        yield
    except (QuantizationError, MemoryError):
        raise
    # A damaged file or a config with odd values fails anywhere in code that is not ours, with any
    # exception.
    except Exception as error:
        reason = shortened(error) or "no reason given"
        raise CheckpointError(f"{path} {what} ({type(error).__name__}: {reason})") from error
