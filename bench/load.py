"""How busy other processes kept the machine while something was timed.

A CPU time taken beside other work says nothing about a kernel: threads wait for each other at
barriers, so that one that lost its core for a scheduler tick delays all. Medians do not mend that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.results import Results

RELIABLE_PERCENT = 10.0
"""Share of the machine that others may take before its CPU times are called unreliable."""

_IDLE_FIELDS = (3, 4)
# Fields 9 and 10, guest time, are counted in the first two as well.
_FIELDS = 8


@dataclass(frozen=True)
class Snapshot:
    """Seconds since some start: of CPU time of everybody, of this process with its children that
    have ended, and of all cores."""

    busy: float
    own: float
    total: float


def parse_stat(text: str, ticks_per_second: int) -> tuple[float, float]:
    """Busy and total seconds of all cores from the text of /proc/stat."""
    ticks = [int(word) for word in text.splitlines()[0].split()[1 : 1 + _FIELDS]]
    idle = sum(ticks[i] for i in _IDLE_FIELDS)
    return (sum(ticks) - idle) / ticks_per_second, sum(ticks) / ticks_per_second


def snapshot() -> Snapshot | None:
    """The load counters now, or None on a system without /proc/stat."""
    try:
        text = Path("/proc/stat").read_text()
    except OSError:
        return None
    busy, total = parse_stat(text, os.sysconf("SC_CLK_TCK"))
    children = os.times()
    own = time.process_time() + children.children_user + children.children_system
    return Snapshot(busy, own, total)


def others_percent(before: Snapshot | None, after: Snapshot | None) -> float | None:
    """Percent of the machine's CPU time that went to others; None where too little time passed."""
    if before is None or after is None or after.total - before.total <= 0:
        return None
    others = (after.busy - before.busy) - (after.own - before.own)
    return max(0.0, min(100.0, 100 * others / (after.total - before.total)))


def of_run(results: Results) -> str | None:
    """The warning that goes with a run's figures. None for a GPU, whose times are its own."""
    if results.machine.get("gpu") is not None:
        return None
    # All cells of a race share one load: count it once.
    races = {
        (c.n, c.k, c.m, c.subject if c.own_process else None): c.others_percent
        for c in results.cells
        if c.timed
    }
    return warning([results.roofline.get("others_percent"), *races.values()])


def warning(percents: Iterable[float | None]) -> str | None:
    """What a reader of CPU times must know, from the load during each race, or None."""
    known = sorted(percent for percent in percents if percent is not None)
    noisy = [percent for percent in known if percent > RELIABLE_PERCENT]
    if not noisy:
        return None
    return (
        f"UNRELIABLE: other processes used up to {known[-1]:.0f}% of this machine's CPU during "
        f"{len(noisy)} of {len(known)} timings; do not quote these figures, run again when idle"
    )
