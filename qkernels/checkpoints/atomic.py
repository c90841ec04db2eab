"""A folder that is there as a whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from qkernels.errors import CheckpointError

_SAVING, _KEPT = "saving", "kept"
"""What hidden folders are for: one is being written, another is replaced."""

_POSIX = os.name == "posix"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Of Linux' <fcntl.h> and <linux/fs.h>."""


@contextlib.contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder beside `target` that takes its place when the block ends, and goes if it fails.

    A process that is killed leaves it behind, hidden; the next one that writes to `target` removes
    it.

    Args:
        replace: also takes the place of a folder with files in it, which is there as it was until
            the block ends. Where the system can exchange two folders (Linux), there always is one;
            elsewhere, and for a short time, there may be none, and the next call brings the old one
            back if the process was killed just then. Of a folder that no other can be renamed to,
            the files are exchanged one by one.

    Raises:
        CheckpointError: where `target` is there and must not be replaced, now or when the block
            ends.
    """
    target = target.resolve()
    for left in _hidden(target, _KEPT):
        if target.exists():
            _remove_if_left(left)
        else:
            left.rename(target)
    for left in _hidden(target, _SAVING):
        _remove_if_left(left)
    check_free(target, replace=replace)
    fixed = _is_fixed(target)
    parent = target if fixed else target.parent
    parent.mkdir(parents=True, exist_ok=True)
    aside = parent / _name(target, _SAVING)
    aside.mkdir()
    lock = _lock(aside)
    try:
        yield aside
        if fixed:
            _fill(target, aside, replace=replace)
        else:
            _take_place(aside, target, replace=replace)
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(aside, ignore_errors=True)


def on_disk(folder: Path) -> None:
    """Returns when the files of `folder` are on the disk, so that what made them may go."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_free(target: Path, *, replace: bool = False) -> None:
    """Raises CheckpointError where `new_folder` would, as far as it can be known beforehand."""
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} exists and is no folder")
    if not replace and target.exists() and any(target.iterdir()):
        raise CheckpointError(f"{target} exists and is not an empty folder")


def _take_place(aside: Path, target: Path, *, replace: bool) -> None:
    try:
        if replace and target.exists() and any(target.iterdir()):
            if not _exchange(aside, target):
                kept = target.with_name(_name(target, _KEPT))
                target.rename(kept)
                aside.rename(target)
                shutil.rmtree(kept, ignore_errors=True)
        else:
            aside.rename(target)
    except OSError as error:
        # Such as a folder that another process filled in the meantime.
        raise CheckpointError(f"{target} cannot be written: {error.strerror}") from None


def _exchange(a: Path, b: Path) -> bool:
    """Exchanges two folders in one step; False where the system or its files cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if _POSIX else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(b))


def _fill(target: Path, aside: Path, *, replace: bool) -> None:
    """Moves what is in `aside`, a folder in `target`, to `target`, and removes what else is there.

    Without a config.json it is no model, so the old one goes first and the new one comes last.
    """
    files = sorted(aside.iterdir(), key=lambda file: file.name == "config.json")
    others = set(_hidden(target, _SAVING))
    left = {path.name: path for path in target.iterdir() if path not in others}
    if left and not replace:
        raise CheckpointError(f"{target} cannot be written: it was filled in the meantime")
    for name in sorted(left, key=lambda name: name != "config.json"):
        if left[name].is_dir() and not left[name].is_symlink():
            shutil.rmtree(left[name])
        else:
            left[name].unlink()
    for file in files:
        file.rename(target / file.name)


def _is_fixed(target: Path) -> bool:
    """Whether `target` is a folder that no other can be renamed to: something is mounted there, or
    its parent is closed to us."""
    return target.is_dir() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK))


def _name(target: Path, purpose: str) -> str:
    return f".{target.name}.{purpose}-{secrets.token_hex(4)}"


def _hidden(target: Path, purpose: str) -> list[Path]:
    folders = [folder for folder in (target, target.parent) if folder.is_dir()]
    found = (path for folder in folders for path in folder.iterdir())
    return [path for path in found if path.name.startswith(f".{target.name}.{purpose}-")]


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
