"""How long work tells its caller how far it has come."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""progress(done, total, name of the next layer), and at the end progress(total, total, "")."""


def silent(done: int, total: int, name: str) -> None:
    """Tells nobody."""
