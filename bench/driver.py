"""Runs the plan: every layer, every M, all subjects of all schemes in one race."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench import load
from bench import results as record
from bench.accuracy import Reference, error_limit
from bench.results import Cell
from bench.roofline import Roofline
from bench.shapes import Layer
from bench.subjects.base import Prepared, Problem, Subject
from bench.subjects.dense import baseline_name, dtype_name
from bench.timing import (
    MIN_SAMPLES,
    POOL_TURNS,
    SINGLE_CALLS,
    Contestant,
    CpuRunner,
    CudaRunner,
    Runner,
    Samples,
    copies_for,
    race,
)
from bench.weights import generator, random_weight, scheme_bytes
from qkernels.machine import available_bytes
from qkernels.scheme import QuantScheme

MEMORY_SHARE = 0.5
"""Part of the free memory that copies of weights may take."""

SLOW_CALL_SECONDS = 2.0
"""A subject whose call takes this long, and over 5 budgets, is not run at larger M."""

INTERRUPTED = "interrupted"
"""Why a run stopped that SIGINT ended."""


def time_is_up(limit: float) -> str:
    """Why a run stopped that reached its limit of so many seconds."""
    return f"time limit of {limit:g} s reached"


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        m_values: ascending, so that what gets too slow is dropped for the rest.
        cell_seconds: time for the samples of one subject on one problem.
        rotate_bytes: memory that the copies of one weight cover.
        time_limit: seconds for the whole run, or infinity; budgets shrink to keep it.
    """

    device: str
    dtype: torch.dtype
    layers: Sequence[Layer]
    m_values: Sequence[int]
    schemes: Sequence[QuantScheme]
    subjects: Sequence[Subject]
    cell_seconds: float
    rotate_bytes: int
    time_limit: float = math.inf
    seed: int = 0

    @property
    def problems(self) -> int:
        return len(self.layers) * len(self.m_values)

    def problem(self, layer: Layer, m: int, scheme: QuantScheme) -> Problem:
        return Problem(m, layer.n, layer.k, self.dtype, self.device, scheme)


@dataclass
class _Entry:
    """A subject with a prepared weight of one layer."""

    subject: Subject
    scheme: QuantScheme
    weight_bytes: int
    reference: Reference
    prepared: Prepared | None = None
    failure: str | None = None
    states: list[Any] = field(default_factory=list)
    slow: str | None = None

    @property
    def limit(self) -> float:
        subject = self.subject
        return error_limit(None if subject.dense else self.scheme, quantizes_x=subject.quantizes_x)


class Driver:
    """Measures a plan; `cells` holds what is done so far, whatever stops it."""

    def __init__(
        self,
        plan: Plan,
        roofline: Roofline,
        *,
        started: float | None = None,
        progress: Callable[[int, int, str], None] | None = None,
        make_runner: Callable[[Prepared, list[Any], Any], Runner] | None = None,
    ) -> None:
        self.plan, self.roofline = plan, roofline
        self.cells: list[Cell] = []
        self.stopped: str | None = None
        self._started = time.perf_counter() if started is None else started
        self._progress = progress or (lambda done, total, text: None)
        self._make_runner = make_runner or self._default_runner
        self._done = 0

    def run(self) -> None:
        """Measures until the plan is done, the time is up or the user interrupts.

        A KeyboardInterrupt ends the run early; `stopped` then says so, and the samples of the race
        that it cut short are kept.
        """
        try:
            with torch.inference_mode():
                for layer in self.plan.layers:
                    self._layer(layer)
                    if self.stopped is not None:
                        return
        except KeyboardInterrupt:
            self.stopped = INTERRUPTED

    def _out_of_time(self) -> bool:
        if time.perf_counter() - self._started < self.plan.time_limit:
            return False
        self.stopped = time_is_up(self.plan.time_limit)
        return True

    def _layer(self, layer: Layer) -> None:
        self._progress(self._done, self.plan.problems, f"{layer}: preparing weights")
        if self._out_of_time():
            return
        entries = list(self._entries(layer))
        self._copy(entries)
        for m in self.plan.m_values:
            if self._out_of_time():
                return
            self._progress(self._done, self.plan.problems, f"{layer}, M = {m}")
            self._race(layer, m, entries)
            self._done += 1
            self._progress(self._done, self.plan.problems, f"{layer}, M = {m}")

    def _entries(self, layer: Layer) -> Iterator[_Entry]:
        plan = self.plan
        for index, scheme in enumerate(plan.schemes):
            weight = random_weight(scheme, layer.n, layer.k, plan.device, plan.seed + index)
            reference = Reference(weight.dequantize())
            for subject in plan.subjects:
                # The dense rows do not depend on the scheme, and so run once.
                if subject.dense and index > 0:
                    continue
                entry = _Entry(subject, scheme, scheme_bytes(weight), reference)
                problems = [plan.problem(layer, m, scheme) for m in plan.m_values]
                able = [p for p in problems if subject.why_not(p) is None]
                if able:
                    try:
                        entry.prepared = subject.prepare(able[0], weight)
                    except Exception as error:  # A peer's failure must not end the others' run.
                        entry.failure = _describe(error)
                if subject.dense and entry.prepared is not None:
                    entry.weight_bytes = entry.prepared.stored_bytes
                yield entry

    def _copy(self, entries: list[_Entry]) -> None:
        ready = [entry for entry in entries if entry.prepared is not None]
        memory = int(MEMORY_SHARE * available_bytes(self.plan.device))
        for entry in ready:
            assert entry.prepared is not None
            size = entry.prepared.stored_bytes
            count = copies_for(size, self.plan.rotate_bytes, memory, len(ready))
            try:
                more = [entry.prepared.copy(entry.prepared.state) for _ in range(count - 1)]
                entry.states = [entry.prepared.state, *more]
            except Exception as error:  # As above.
                entry.failure, entry.prepared = _describe(error), None

    def _race(self, layer: Layer, m: int, entries: list[_Entry]) -> None:
        source = generator(self.plan.seed + 1000, self.plan.device)
        x = torch.randn(m, layer.k, generator=source, device=self.plan.device)
        x = x.to(self.plan.dtype)
        contestants: list[tuple[Contestant, _Entry, Cell]] = []
        expected: dict[int, Any] = {}
        for entry in entries:
            cell = self._cell(layer, m, entry)
            contestant = self._admit(entry, cell, x, expected)
            if contestant is None:
                self.cells.append(cell)
            else:
                contestants.append((contestant, entry, cell))
        before = load.snapshot()
        try:
            if contestants:
                self._time(contestants)
        finally:
            # Also after an interrupt: what was sampled until then counts.
            others = load.others_percent(before, load.snapshot())
            for _, _, cell in contestants:
                cell.others_percent = others
            self._record(contestants)

    def _time(self, contestants: list[tuple[Contestant, _Entry, Cell]]) -> None:
        plan = self.plan
        budget, deadline = plan.cell_seconds, math.inf
        if plan.time_limit < math.inf:
            deadline = self._started + plan.time_limit
            left = max(deadline - time.perf_counter(), 0.0)
            # Half of what is left goes to preparing and checking.
            share = 0.5 * left / max(plan.problems - self._done, 1) / len(contestants)
            budget = min(budget, share)
        runners = [contestant for contestant, _, _ in contestants]
        pools = plan.device == "cpu" and any(
            entry.subject.own_process for _, entry, _ in contestants
        )
        turns = POOL_TURNS if pools else SINGLE_CALLS
        race(runners, budget, deadline=deadline, device=plan.device, turns=turns)

    def _admit(
        self, entry: _Entry, cell: Cell, x: Tensor, expected: dict[int, Any]
    ) -> Contestant | None:
        """The contestant for a subject that can run, is right and is not too slow.

        Otherwise the cell gets its status and reason.
        """
        subject = entry.subject
        reason = subject.why_not(self._problem_of(cell, entry.scheme))
        if reason is not None:
            cell.status, cell.reason = record.DECLINED, reason
        elif entry.failure is not None:
            cell.status, cell.reason = record.FAILED, entry.failure
        elif entry.slow is not None:
            cell.status, cell.reason = record.CUT, entry.slow
        if cell.status:
            return None
        assert entry.prepared is not None
        prepared = entry.prepared
        if id(entry.reference) not in expected:
            expected[id(entry.reference)] = entry.reference.expected(x)
        try:
            x_in = prepared.to_input(x)
            error, seconds = self._checked_call(prepared, x_in, expected[id(entry.reference)])
            cell.error = error if math.isfinite(error) else None
            if not error <= entry.limit:
                cell.status = record.WRONG
                cell.reason = f"relative error {error:.2g}, accepted are {entry.limit:.2g}"
                return None
            if seconds > max(SLOW_CALL_SECONDS, 5 * self.plan.cell_seconds):
                entry.slow = f"not run: at M = {cell.m} a call took {seconds:.1f} s"
            states = self._warm(entry, x_in) if cell.own_process else entry.states
            runner = self._make_runner(prepared, states, x_in)
            if prepared.kernel is not None:
                cell.kernel = prepared.kernel(cell.m)
        except Exception as error:  # As in `_entries`.
            cell.status, cell.reason = record.FAILED, _describe(error)
            return None
        cell.mode, cell.copies = runner.mode, len(states)
        return Contestant(subject.name, runner)

    def _checked_call(self, prepared: Prepared, x_in: Any, expected: Any) -> tuple[float, float]:
        """Relative error of one call and its seconds; also the warm-up of what is timed."""
        _poison_free_memory(expected.shape, self.plan.dtype, self.plan.device)
        started = time.perf_counter()
        output = prepared.run(prepared.state, x_in)
        if self.plan.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        return expected.error(prepared.to_output(output, x_in)), seconds

    def _warm(self, entry: _Entry, x_in: Any) -> list[Any]:
        """The copies that the race will get to, each called once.

        Runtimes choose and compile kernels at the first call of each copy with a new M: for
        OpenVINO 2026.4 that is 2 ms (Xeon with AMX), many times the product itself.
        """
        assert entry.prepared is not None
        run, budget = entry.prepared.run, self.plan.cell_seconds
        times = []
        for _ in range(3):
            started = time.perf_counter()
            run(entry.states[0], x_in)
            times.append(time.perf_counter() - started)
        seconds = max(min(times), 1e-9)
        calls = MIN_SAMPLES + math.ceil(
            budget * (1 + POOL_TURNS.settle / POOL_TURNS.length) / seconds
        )
        states = entry.states[:calls]
        for state in states[1:]:
            run(state, x_in)
        return states

    def _default_runner(self, prepared: Prepared, states: list[Any], x_in: Any) -> Runner:
        if self.plan.device == "cuda":
            return CudaRunner(prepared.run, states, x_in)
        return CpuRunner(prepared.run, states, x_in)

    def _problem_of(self, cell: Cell, scheme: QuantScheme) -> Problem:
        return Problem(cell.m, cell.n, cell.k, self.plan.dtype, self.plan.device, scheme)

    def _cell(self, layer: Layer, m: int, entry: _Entry) -> Cell:
        width = torch.empty((), dtype=self.plan.dtype).element_size()
        cell = blank_cell(self.plan, entry.subject, entry.scheme, layer, m)
        cell.bytes = entry.weight_bytes + (m * layer.k + m * layer.n) * width
        cell.operations = 2 * m * layer.n * layer.k
        return cell

    def _record(self, contestants: list[tuple[Contestant, _Entry, Cell]]) -> None:
        baseline = baseline_name(self.plan.dtype)
        dense = next(
            (
                Samples(c.seconds).median
                for c, _, _ in contestants
                if c.name == baseline and c.seconds
            ),
            None,
        )
        for contestant, entry, cell in contestants:
            if not contestant.seconds:
                cell.status, cell.reason = record.CUT, "no sample before the run was stopped"
            else:
                math_name = entry.subject.math_for(entry.scheme)
                fill(cell, Samples(contestant.seconds), self.roofline, math_name, dense)
            self.cells.append(cell)


def blank_cell(plan: Plan, subject: Subject, scheme: QuantScheme, layer: Layer, m: int) -> Cell:
    """The cell of `subject` on a problem, with nothing measured."""
    return Cell(
        subject=subject.name,
        scheme=None if subject.dense else str(scheme),
        model=layer.model,
        layer=layer.name,
        n=layer.n,
        k=layer.k,
        m=m,
        dtype=dtype_name(plan.dtype),
        status="",
        own_process=subject.own_process and plan.device == "cpu",
    )


def fill(
    cell: Cell, samples: Samples, roofline: Roofline, math_name: str, dense: float | None
) -> None:
    """Writes times and what follows from them into `cell`; `dense` is the baseline's seconds."""
    assert cell.bytes is not None
    assert cell.operations is not None
    seconds = samples.median
    cell.samples = len(samples.seconds)
    cell.median_us, cell.min_us = seconds * 1e6, samples.minimum * 1e6
    cell.p90_us = samples.p90 * 1e6
    cell.tflop_s = cell.operations / seconds / 1e12
    cell.gb_s = cell.bytes / seconds / 1e9
    cell.floor_us = roofline.floor(cell.bytes, cell.operations, math_name) * 1e6
    cell.roofline_percent = roofline.percent(cell.bytes, cell.operations, math_name, seconds)
    cell.dense_us = None if dense is None else dense * 1e6
    cell.vs_dense = None if dense is None else dense / seconds
    cell.status = record.MEASURED
    if cell.samples < MIN_SAMPLES:
        cell.status = record.CUT
        cell.reason = f"{cell.samples} of {MIN_SAMPLES} samples: out of time"


def _poison_free_memory(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """Leaves NaN where the allocator puts the next output, so that what is not written shows."""
    torch.full(shape, math.nan, dtype=dtype, device=device)


def _describe(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
