"""Kernels that failed on this machine, kept for the life of the process; see `proving`."""

from __future__ import annotations

_reasons: dict[tuple[str, str], str] = {}


def record(kernel: str, device: str, reason: str) -> None:
    """Keeps a kernel from being chosen on a type of device; `reason` is a user's."""
    _reasons[kernel, device] = reason


def reason(kernel: str, device: str) -> str | None:
    """Why a kernel is not to be trusted on a type of device, or None."""
    return _reasons.get((kernel, device))


def forget() -> None:
    """Trusts every kernel again."""
    _reasons.clear()
