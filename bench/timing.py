"""Timing of several contestants side by side: cold caches, interleaved, medians.

A contestant brings copies of its weight, which take turns, so that no call finds its weight in a
cache. Contestants take turns as well (round robin), so that a busy machine or a changing clock
meets all of them alike; where several thread pools take part, a turn is many calls. On the CPU a
sample is one call under `perf_counter`; on CUDA it is one replay of a graph that calls each copy
once, between two events, divided by the number of calls.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

MIN_SAMPLES = 5
MAX_SAMPLES = 400

MAX_COPIES = 256
MIN_REPLAY_SECONDS = 400e-6
"""A graph shorter than this would be timed to no better than the events' resolution of 0.5 us."""


@dataclass(frozen=True)
class Samples:
    """Seconds per call."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    @property
    def p90(self) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, math.ceil(0.9 * len(ordered)) - 1)]


def copies_for(weight_bytes: int, rotate_bytes: int, memory_bytes: int, subjects: int) -> int:
    """How many copies of a weight to rotate over.

    Enough to cover `rotate_bytes`, at least one, at most `MAX_COPIES`, and so few that the copies
    of all `subjects` stay within `memory_bytes`.
    """
    wanted = -(-rotate_bytes // max(weight_bytes, 1))
    affordable = memory_bytes // max(subjects, 1) // max(weight_bytes, 1)
    return max(1, min(wanted, affordable, MAX_COPIES))


class Runner(Protocol):
    """Takes one sample of a contestant; `mode` says how, for the report."""

    mode: str

    def enqueue(self) -> None: ...

    def collect(self) -> float: ...


class CpuRunner:
    """A sample is one call, on the copy whose turn it is."""

    mode = "call"

    def __init__(self, run: Callable[[Any, Any], Any], states: Sequence[Any], x: Any) -> None:
        self._run, self._states, self._x = run, states, x
        self._turn = 0
        self._seconds = 0.0

    def enqueue(self) -> None:
        state = self._states[self._turn % len(self._states)]
        self._turn += 1
        started = time.perf_counter()
        self._run(state, self._x)
        self._seconds = time.perf_counter() - started

    def collect(self) -> float:
        return self._seconds


class CudaRunner:
    """A sample is one replay of a graph that calls every copy, `repeats` times over.

    What cannot be captured is called one by one instead, and its mode says "eager": its time then
    holds the cost of launching.
    """

    def __init__(self, run: Callable[[Any, Any], Any], states: Sequence[Any], x: Any) -> None:
        self._run, self._states, self._x = run, states, x
        once = self._estimate()
        self._repeats = max(1, math.ceil(MIN_REPLAY_SECONDS / max(once * len(states), 1e-9)))
        self._graph = self._capture()
        self.mode = "eager" if self._graph is None else "graph"
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.enqueue()
        torch.cuda.synchronize()

    def _estimate(self) -> float:
        started = time.perf_counter()
        self._run(self._states[0], self._x)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    def _call_all(self) -> None:
        for _ in range(self._repeats):
            for state in self._states:
                self._run(state, self._x)

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._call_all()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        return graph

    def enqueue(self) -> None:
        start, stop = self._events
        start.record()
        if self._graph is None:
            self._call_all()
        else:
            self._graph.replay()
        stop.record()

    def collect(self) -> float:
        start, stop = self._events
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / (self._repeats * len(self._states))


@dataclass
class Contestant:
    """One participant of a race; `seconds` grows as samples are taken."""

    name: str
    runner: Runner
    seconds: list[float] = field(default_factory=list)
    spent: float = 0.0

    def done(self, budget: float) -> bool:
        if len(self.seconds) >= MAX_SAMPLES:
            return True
        # The slowest would otherwise hold up all others for MIN_SAMPLES of its calls.
        enough = len(self.seconds) >= MIN_SAMPLES or self.spent > 3 * budget
        return enough and self.spent >= budget


@dataclass(frozen=True)
class Turns:
    """How long the turn of a contestant is on the CPU.

    Attributes:
        settle: seconds of calls at its start that are not samples.
        length: seconds of samples after these; one sample at least.
    """

    settle: float = 0.0
    length: float = 0.0


SINGLE_CALLS = Turns()
POOL_TURNS = Turns(settle=0.03, length=0.1)
"""For contestants with thread pools of their own. Those of onnxruntime 1.32 were seen to spin for
20 ms after a call, torch's for 4 ms (2 cores of a Xeon with AMX, figures of CPU time)."""


def rounds(contestants: list[Contestant], budget: float) -> Iterator[list[Contestant]]:
    """The order of a race: every round is those whose budget (seconds each) is not spent yet."""
    while True:
        going = [contestant for contestant in contestants if not contestant.done(budget)]
        if not going:
            return
        yield going


def race(
    contestants: list[Contestant],
    budget: float,
    *,
    deadline: float = math.inf,
    device: str = "cpu",
    turns: Turns = SINGLE_CALLS,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Samples all contestants in turn until each has had `budget` seconds, or to the deadline.

    Samples land in `Contestant.seconds`, so that those of a race that is interrupted are there.
    """
    for going in rounds(contestants, budget):
        if clock() > deadline:
            return
        if device == "cuda":
            _cuda_round(going, clock)
            continue
        for contestant in going:
            _cpu_turn(contestant, budget, turns, clock)


def _cpu_turn(
    contestant: Contestant, budget: float, turns: Turns, clock: Callable[[], float]
) -> None:
    started = clock()
    while clock() - started < turns.settle:
        contestant.runner.enqueue()
    started = before = clock()
    while True:
        contestant.runner.enqueue()
        contestant.seconds.append(contestant.runner.collect())
        now = clock()
        contestant.spent += now - before
        before = now
        if now - started >= turns.length or contestant.done(budget):
            return


def _cuda_round(going: list[Contestant], clock: Callable[[], float]) -> None:
    started = clock()
    # Keeps the device busy while the round is queued; an idle device would count launch latency.
    torch.cuda._sleep(1_000_000)
    for contestant in going:
        contestant.runner.enqueue()
    for contestant in going:
        contestant.seconds.append(contestant.runner.collect())
    share = (clock() - started) / len(going)
    for contestant in going:
        contestant.spent += share
