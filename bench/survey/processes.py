"""A child process for each class, so that a crash, a hang or a model out of hand costs one row."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from bench.survey.classes import ModelClass
from bench.survey.models import DoesNotStart
from bench.survey.row import FAILS, STARTS_NOT, Row

MEMORY = 10 << 30
"""Bytes of address space for a child; torch alone takes about four of them."""

PRELOADED = (
    "bench.survey.trial",
    *("transformers.modeling_utils", "transformers.modeling_layers"),
    *("transformers.masking_utils", "transformers.generation.utils"),
)
"""What all classes need, imported once by the process that the children are forked from."""


def try_all(
    classes: Iterable[ModelClass],
    dtype: torch.dtype,
    *,
    jobs: int,
    time_limit: float,
    done: Callable[[Row], None],
) -> None:
    """Tries the classes, `jobs` at a time; `done` gets each row when it is there.

    Args:
        time_limit: seconds for a class.
    """
    # Whatever asks for a file of the hub would wait for the network, five times.
    os.environ["HF_HUB_OFFLINE"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with tempfile.TemporaryDirectory(prefix="qkernels-architectures-") as folder:
        waiting = iter(classes)
        running: dict[Connection, _Child] = {}
        try:
            while True:
                while len(running) < jobs:
                    model_class = next(waiting, None)
                    if model_class is None:
                        break
                    child = _Child(context, model_class, dtype, time_limit, Path(folder))
                    running[child.rows] = child
                if not running:
                    return
                for rows in wait(list(running)):
                    assert isinstance(rows, Connection)
                    if running[rows].has_ended():
                        done(running.pop(rows).row())
        finally:
            for child in running.values():
                child.process.kill()
                child.process.join()


class _Child:
    """A process that tries a class, and what it says on the way."""

    def __init__(
        self,
        context: multiprocessing.context.ForkServerContext,
        model_class: ModelClass,
        dtype: torch.dtype,
        time_limit: float,
        folder: Path,
    ) -> None:
        self._model_class, self._time_limit = model_class, time_limit
        self._started = time.perf_counter()
        self._log = folder / f"{model_class.name}.log"
        self._row = Row(model_class.name, model_class.kind, model_class.model_type)
        self.rows, theirs = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_try, args=(model_class, dtype, time_limit, theirs, self._log)
        )
        self.process.start()
        theirs.close()

    def has_ended(self) -> bool:
        """Takes what it says; whether that was the last."""
        try:
            self._row = self.rows.recv()
        except EOFError:
            return True
        return False

    def row(self) -> Row:
        """What came of the class, after its process has ended."""
        self.rows.close()
        self.process.join()
        row = self._row
        row.seconds = round(time.perf_counter() - self._started, 2)
        status = self.process.exitcode
        assert status is not None
        if status == 0:
            return row
        row.outcome = STARTS_NOT if row.step == "start" else FAILS
        row.detail = self._log.read_text(errors="replace")
        row.reason = self._reason(status, row.detail)
        return row

    def _reason(self, status: int, log: str) -> str:
        if status == -signal.SIGALRM:
            return f"not done after {self._time_limit:g} s"
        if status < 0:
            return f"its process was ended by {signal.Signals(-status).name}"
        return error_line(log)


def error_line(log: str) -> str:
    """The first line of the last error of a traceback, without the name of its module."""
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(: |$)", line)]
    if not errors:
        return lines[-1] if lines else "no error was printed"
    name, colon, text = errors[-1].partition(": ")
    kind = name.rsplit(".", 1)[-1]
    text = text if kind not in (DoesNotStart.__name__, "Wrong") else text
    return f"{kind}{colon}{text}"[:300]


def _try(
    model_class: ModelClass, dtype: torch.dtype, time_limit: float, rows: Connection, log: Path
) -> None:
    """What a child does. Its errors go to a file, as they do where it crashes."""
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # Ends the process, whatever it is at; and where nobody is left to do it.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, time_limit)
    torch.set_num_threads(1)
    import transformers

    from bench.survey.trial import try_class

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(dir=log.parent) as folder:
        rows.send(try_class(model_class, Path(folder), dtype, rows.send))
