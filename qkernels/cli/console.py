"""What commands print with: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

INTERRUPTED = 130
"""The exit code of a command that SIGINT ended."""

_PIPED_WIDTH = 200
"""Columns where nobody looks: wide enough for every table, so that no cell is folded."""


def output() -> Console:
    """Standard output: colours on a terminal, plain text in a pipe."""
    terminal = sys.stdout.isatty()
    # Names of layers and error texts hold brackets, which must not be read as markup.
    return Console(highlight=False, markup=False, width=None if terminal else _PIPED_WIDTH)


def complain(text: str) -> None:
    """An error on standard error, after the name of the program."""
    print(f"qkernels: {text}", file=sys.stderr)


def note(text: str) -> None:
    """A remark that is no result, on standard error."""
    print(text, file=sys.stderr)


def table(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    """An empty table; the columns in `numbers` are aligned to the right."""
    made = Table()
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return made


def as_json(value: Any) -> str:
    """A record as the text of a JSON file; NaN and infinity, which JSON lacks, become strings."""
    return json.dumps(_finite(value), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def progress_console() -> Console:
    """Standard error, for progress bars."""
    return Console(stderr=True)


def bar_columns() -> tuple[ProgressColumn, ...]:
    """Columns of a bar whose task has the fields `text` and `detail`."""
    return (
        TextColumn("{task.fields[text]}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )


@contextlib.contextmanager
def progress_bar(text: str) -> Iterator[Callable[..., None]]:
    """A bar on standard error, where that is a terminal, for the time of the `with` block.

    Yields update(done=0, total=0, detail=""); without a call it is a moving bar with a clock.
    """
    console = progress_console()
    bar = Progress(*bar_columns(), console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task("", total=None, text=text, detail="")

        def update(done: int = 0, total: int = 0, detail: str = "") -> None:
            bar.update(task, completed=done, total=total or None, detail=detail)

        yield update
