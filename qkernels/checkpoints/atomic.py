"""A folder that is there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from qkernels.errors import CheckpointError


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place when the block ends, and goes if it fails.

    A process that is killed leaves it behind, hidden; the next one that writes to `target` removes
    it.

    Raises:
        CheckpointError: where `target` is there and is no empty folder, now or when the block ends.
    """
    target = target.resolve()
    for left in _hidden(target):
        _remove_if_left(left)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not an empty folder")
    parent = target if _is_fixed(target) else target.parent
    parent.mkdir(parents=True, exist_ok=True)
    aside = parent / f"{_prefix(target)}{secrets.token_hex(4)}"
    aside.mkdir()
    lock = _lock(aside)
    try:
        yield aside
        if parent == target:
            # config.json comes last: without it this is no model.
            for file in sorted(aside.iterdir(), key=lambda file: file.name == "config.json"):
                file.rename(target / file.name)
        else:
            _take_place(aside, target)
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(aside, ignore_errors=True)


def _take_place(aside: Path, target: Path) -> None:
    try:
        aside.rename(target)
    except OSError as error:
        # Such as a folder that another process filled in the meantime.
        raise CheckpointError(f"{target} cannot be written: {error.strerror}") from None


def _is_fixed(target: Path) -> bool:
    """Whether `target` is a folder that no other can be renamed to: something is mounted there, or
    its parent is closed to us."""
    return target.is_dir() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK))


def _prefix(target: Path) -> str:
    return f".{target.name}.saving-"


def _hidden(target: Path) -> list[Path]:
    folders = [folder for folder in (target, target.parent) if folder.is_dir()]
    found = (path for folder in folders for path in folder.iterdir())
    return [path for path in found if path.name.startswith(_prefix(target))]


def _remove_if_left(folder: Path) -> None:
    """Removes a folder that no living process holds."""
    lock = _lock(folder)
    if lock is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """Holds `folder` until the result is closed or this process ends.

    None where somebody else holds it, or the system has no such locks.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
