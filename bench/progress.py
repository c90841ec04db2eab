"""Progress on standard error: a bar where rich is there and a person looks, else lines."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Context manager; `update(done, total, text)` shows how far a run is."""

    def __init__(self) -> None:
        # A rich Progress and its task; rich is optional.
        self._bar: Any = None
        self._task: Any = None
        self._last = -_SECONDS_BETWEEN_LINES

    def __enter__(self) -> Progress:
        if not sys.stderr.isatty():
            return self
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar
        except ImportError:
            return self
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        text = TextColumn("{task.description}", markup=False)
        self._bar = Bar(*columns, text, console=Console(stderr=True), transient=True)
        self._bar.start()
        self._task = self._bar.add_task("", total=None)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, description=text)
            return
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            print(f"[{done}/{total}] {text}", file=sys.stderr, flush=True)
