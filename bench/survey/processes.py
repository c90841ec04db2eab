"""A child process for each class, so that a crash, a hang or a model out of hand costs one row."""

from __future__ import annotations

import faulthandler
import itertools
import multiprocessing
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import transformers

from bench.survey.classes import ModelClass
from bench.survey.models import DoesNotStart
from bench.survey.row import FAILS, STARTS_NOT, Row
from bench.survey.trial import Wrong, try_class
from qkernels.machine import REPOSITORY

MEMORY = 10 << 30
"""Bytes of address space for a child; torch alone takes about four of them."""

MAX_REASON = 300
"""Characters of an error that a row keeps."""

_OWN_ERRORS = (DoesNotStart.__name__, Wrong.__name__)

PRELOADED = (
    "bench.survey.processes",
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
    os.environ |= {
        # Whatever asks for a file of the hub would wait for the network, five times.
        "HF_HUB_OFFLINE": "1",
        # The process that preloads does not get the path of this one.
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    }
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
        row.detail = self._log.read_text(errors="replace") if self._log.exists() else ""
        row.reason = self._reason(status, row.detail)
        return row

    def _reason(self, status: int, log: str) -> str:
        if status == -signal.SIGALRM:
            return f"not done after {self._time_limit:g} s"
        if status < 0:
            return f"its process was ended by {signal.Signals(-status).name}"
        return error_line(log)


def error_line(log: str) -> str:
    """The error that ends the last traceback of `log`, without the name of its module."""
    _, found, last = log.rpartition("Traceback (most recent call last):\n")
    # Frames are indented, and an error is not.
    lines = list(itertools.dropwhile(lambda line: line.startswith(" "), last.splitlines()))
    if not found or not lines:
        return "no error was printed"
    name, colon, text = " ".join(line.strip() for line in lines).partition(": ")
    kind = name.rpartition(".")[2]
    whole = text if kind in _OWN_ERRORS else f"{kind}{colon}{text}"
    return whole[:MAX_REASON]


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
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(dir=log.parent) as folder:
        rows.send(try_class(model_class, Path(folder), dtype, rows.send))
