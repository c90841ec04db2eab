"""The survey as text: counts, what fails, and a row for each class."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from bench.survey.classes import KINDS
from bench.survey.row import FAILS, LEFT_ALONE, OUTCOMES, STARTS_NOT, Row


def counts(rows: Sequence[Row]) -> list[list[str]]:
    """A table of outcomes by kind, its heading and sum included."""
    found = Counter((row.kind, row.outcome) for row in rows)
    kinds = [kind for kind in KINDS if any(row.kind == kind for row in rows)]
    table = [["kind", "classes", "start", *OUTCOMES]]
    for name, of in (*((kind, [kind]) for kind in kinds), ("all", kinds)):
        by_outcome = [sum(found[kind, outcome] for kind in of) for outcome in OUTCOMES]
        total = sum(by_outcome)
        start = total - by_outcome[OUTCOMES.index(STARTS_NOT)]
        table.append([name, *(str(number) for number in (total, start, *by_outcome))])
    return table


def markdown(rows: Sequence[Row], heading: Sequence[str]) -> str:
    """The whole survey.

    Args:
        heading: what the figures are of: versions, settings.
    """
    parts = ["# Architectures", *heading, _table(counts(rows))]
    failed = [row for row in rows if row.outcome == FAILS]
    if failed:
        lines = [[row.name, row.step or "", row.reason or ""] for row in failed]
        parts += ["## Fails", _table([["class", "step", "reason"], *lines])]
    started = [row for row in rows if row.outcome not in (FAILS, STARTS_NOT)]
    lines = [_cells(row) for row in started]
    parts += ["## Works, or is left alone", _COLUMNS, _table([_HEADING, *lines])]
    others = [[row.name, row.kind, row.reason or ""] for row in rows if row.outcome == STARTS_NOT]
    if others:
        parts += ["## Starts not", _table([["class", "kind", "reason"], *others])]
    return "\n\n".join(parts) + "\n"


_HEADING = ["class", "kind", "quantized", "error", "head", "generate", "left alone"]
_COLUMNS = (
    "quantized: share of the parameters outside of embeddings; error: largest relative error of an "
    "output; head: its output head, where that is asked for."
)


def _cells(row: Row) -> list[str]:
    if row.outcome == LEFT_ALONE:
        return [row.name, row.kind, "0%", "", "", "", row.reason or ""]
    assert row.quantized is not None
    generates = "yes" if row.generates is None else "no: " + row.generates
    alone = "; ".join(f"{names}: {reason}" for reason, names in _grouped(row.skipped).items())
    share = f"{row.quantized:.0%}"
    error = "other shape" if row.error is None else f"{row.error:.1e}"
    error += " (sensitive)" if row.sensitive else ""
    return [row.name, row.kind, share, error, row.head or "none", generates, alone]


def _grouped(skipped: dict[str, str]) -> dict[str, str]:
    """Reason -> the names it holds for; layers that differ in a number alone are one name."""
    grouped: dict[str, dict[str, None]] = {}
    for name, reason in skipped.items():
        grouped.setdefault(reason, {})[re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)] = None
    return {reason: ", ".join(names) for reason, names in grouped.items()}


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
