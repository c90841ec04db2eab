"""Peers with threads of their own, each in a process of its own: `python -m bench` as a child.

The threads of a pool spin for some milliseconds after its work: on the CPU they would take the
cores from whoever is timed next. A child times one such peer beside the dense baseline alone, with
the ceilings that its parent measured, and hands its cells back in a results file.
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench import results as record
from bench.driver import INTERRUPTED, Plan, blank_cell, time_is_up
from bench.results import Cell, ResultsError
from bench.roofline import Roofline
from bench.subjects.base import Problem, Subject
from qkernels.machine import REPOSITORY

PROGRAM = (sys.executable, "-m", "bench")

OPTION = "--child"
"""Says to `python -m bench` that it is a child; its value are the ceilings as JSON."""

START_SECONDS = 2.0
"""About what Python and torch take to start, which a child's own time limit does not count."""

GRACE_SECONDS = 20.0
"""A child that is so late is ended: it looks at its time limit between two problems only."""

INTERRUPT_SECONDS = 10.0
"""For a child to write what it measured after Ctrl-C."""


def apart(plan: Plan) -> list[Subject]:
    """The subjects of `plan` that need a child: those that run none of it are declined without."""
    if plan.device != "cpu":
        return []
    return [s for s in plan.subjects if s.own_process and _able_schemes(plan, s)]


def contestants(plan: Plan, subject: Subject) -> int:
    """How many rows of results `subject` fills; the time limit is shared out by that."""
    return min(1, _able_schemes(plan, subject)) if subject.dense else _able_schemes(plan, subject)


def _able_schemes(plan: Plan, subject: Subject) -> int:
    def able(problem: Problem) -> bool:
        return subject.why_not(problem) is None

    return sum(
        any(able(plan.problem(layer, m, scheme)) for layer in plan.layers for m in plan.m_values)
        for scheme in plan.schemes
    )


def _weight(plan: Plan, subject: Subject) -> int:
    # With its dense row, and twice that: a child starts Python and waits for other pools to sleep.
    return 2 * (contestants(plan, subject) + 1)


def parents_share(plan: Plan, subjects: Sequence[Subject]) -> float:
    """The part of the time limit that is for what runs in this process."""
    own = sum(contestants(plan, s) for s in plan.subjects if s not in subjects)
    theirs = sum(_weight(plan, subject) for subject in subjects)
    return own / (own + theirs) if theirs else 1.0


@dataclass
class Outcome:
    """What a child left: its cells, or why there are none."""

    cells: list[Cell] = field(default_factory=list)
    failure: str | None = None
    late: bool = False
    interrupted: bool = False


class Children:
    """Runs a child for each subject, one after another; `cells` holds what is done so far.

    Args:
        plan: what to measure.
        subjects: those of `apart`.
        arguments: of this command; a child gets the same ones, and its own after them.
        started: when the time limit of the plan began, by `time.perf_counter`.
    """

    def __init__(
        self,
        plan: Plan,
        subjects: Sequence[Subject],
        ceilings: Roofline,
        arguments: Sequence[str],
        *,
        started: float,
        progress: Callable[[int, str], None] | None = None,
        program: Sequence[str] | None = None,
    ) -> None:
        self.plan, self.subjects = plan, subjects
        self.cells: list[Cell] = []
        self.stopped: str | None = None
        self._ceilings, self._arguments, self._started = ceilings, arguments, started
        self._progress = progress or (lambda done, text: None)
        self._program = PROGRAM if program is None else program

    def run(self) -> None:
        """Runs all children, or until the time is up or the user interrupts."""
        try:
            for index, subject in enumerate(self.subjects):
                left = self._started + self.plan.time_limit - time.perf_counter()
                if left <= 0:
                    self.stopped = time_is_up(self.plan.time_limit)
                    return
                self._progress(index, f"{subject.name}, in its own process")
                weights = [_weight(self.plan, later) for later in self.subjects[index:]]
                outcome = self._child(subject, left * weights[0] / sum(weights))
                self._keep(subject, outcome)
                if outcome.interrupted:
                    self.stopped = INTERRUPTED
                    return
                if outcome.late:
                    self.stopped = time_is_up(self.plan.time_limit)
        except KeyboardInterrupt:
            self.stopped = INTERRUPTED

    def _child(self, subject: Subject, limit: float) -> Outcome:
        # The last of two equal options counts.
        own = ["--subjects", glob.escape(subject.name), OPTION, json.dumps(asdict(self._ceilings))]
        if limit < math.inf:
            own += ["--time-limit", f"{max(limit - START_SECONDS, 1.0):.3f}"]
        return run_child([*self._program, *self._arguments, *own], limit)

    def _keep(self, subject: Subject, outcome: Outcome) -> None:
        # The dense cells of a child are left behind: `dense_us` of its other cells has their time.
        self.cells += [cell for cell in outcome.cells if cell.subject == subject.name]
        if outcome.failure is not None:
            self.cells += failed_cells(self.plan, subject, outcome.failure)


def failed_cells(plan: Plan, subject: Subject, reason: str) -> list[Cell]:
    """A cell for each problem: failed with this reason, or declined."""
    cells = []
    for layer in plan.layers:
        for m in plan.m_values:
            for scheme in plan.schemes:
                cell = blank_cell(plan, subject, scheme, layer, m)
                declined = subject.why_not(plan.problem(layer, m, scheme))
                cell.status = record.FAILED if declined is None else record.DECLINED
                cell.reason = declined or reason
                cells.append(cell)
    return cells


def run_child(command: Sequence[str], limit: float = math.inf) -> Outcome:
    """Runs `command` with an `--output` of its own to its end, and takes the cells it leaves.

    Args:
        limit: seconds; a child that is `GRACE_SECONDS` late is ended.
    """
    with tempfile.TemporaryDirectory(prefix="qkernels-bench-") as name:
        folder = Path(name, "results")
        outcome, reason = run_alone([*command, "--output", str(folder)], Path(name, "log"), limit)
        _read(outcome, folder, reason)
        return outcome


def run_alone(command: Sequence[str], log: Path, limit: float = math.inf) -> tuple[Outcome, str]:
    """Runs `command` to its end; nothing of it is left after but its errors in `log`.

    Ctrl-C is passed on once, and the child has `INTERRUPT_SECONDS` to write what it has.

    Returns:
        What became of it, without cells, and what there is to say of it if it left no results.
    """
    with log.open("wb") as stream:
        # A session of its own: Ctrl-C at a terminal reaches this process alone. The pipe ends
        # when this process does, however that happens; see `end_with_parent`.
        child = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=stream,
            start_new_session=True,
        )
        try:
            outcome = _wait(child, limit)
        finally:
            child.kill()  # Does nothing to one that has ended.
            child.wait()
            assert child.stdin is not None
            child.stdin.close()
    errors = log.read_text(errors="replace")
    return outcome, how_it_ended(child.returncode, errors, " and no results")


def _wait(child: subprocess.Popen[bytes], limit: float) -> Outcome:
    try:
        child.wait(None if limit == math.inf else limit + GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        late = f"ended after {limit + GRACE_SECONDS:.0f} s, past its time limit of {limit:.0f} s"
        return Outcome(late=True, failure=late)
    except KeyboardInterrupt:
        child.send_signal(signal.SIGINT)
        # Who interrupts again does not want to wait: the child is killed then.
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            child.wait(INTERRUPT_SECONDS)
        return Outcome(interrupted=True)
    return Outcome()


def _read(outcome: Outcome, folder: Path, reason: str) -> None:
    """Takes the child's results into `outcome`, or the reason why there are none."""
    written = list(folder.glob("*.json"))
    if written:
        try:
            found = record.read(written[0])
        except ResultsError as error:
            # Half a file is what a child leaves that was ended while it wrote.
            reason = f"{reason}; {error}"
        else:
            outcome.cells, outcome.failure = found.cells, None
            outcome.interrupted = outcome.interrupted or found.stopped == INTERRUPTED
            outcome.late = outcome.late or found.stopped not in (None, INTERRUPTED)
            return
    if outcome.failure is None and not outcome.interrupted:
        outcome.failure = reason


def how_it_ended(status: int, errors: str, left: str = "") -> str:
    """What there is to say of a child: its status, what it left, the last of its `errors`."""
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    lines = errors.strip().splitlines()
    last = f": {lines[-1].strip()}" if lines else ""
    return f"its process ended with status {status}{left}{last}"


def ceilings_from(text: str) -> Roofline:
    """The ceilings that the value of `OPTION` holds.

    Raises:
        ValueError: where it holds none.
    """
    try:
        return Roofline(**json.loads(text))
    except TypeError as error:
        raise ValueError(str(error)) from None


def end_with_parent() -> None:
    """Ends this process as soon as its standard input does: its parent is gone then."""

    def watch() -> None:
        while os.read(0, 1 << 12):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
