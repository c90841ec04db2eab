"""Results as tables: with rich where it is installed, else as plain text."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TextIO

from bench import load
from bench.results import CUT, DECLINED, FAILED, WRONG, Cell, Results
from bench.subjects.ours import KERNEL_PREFIX, LAYER

CLEARLY = 1.1
"""Times as long as another kernel, from which on the chosen one is said to be slower."""

COLUMNS = ("M", "scheme", "subject", "us", "TFLOP/s", "GB/s", "% roofline", "x dense", "error")


def number(value: float | None, digits: int = 3) -> str:
    """`value` to so many significant digits without an exponent; "-" where there is none."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    size = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{max(digits - max(size, 1), 0)}f}" if size else f"{value:.{digits}g}"


def row(cell: Cell) -> tuple[str, ...]:
    """The cells of a table row, in the order of `COLUMNS`."""
    note = {WRONG: " (wrong)", CUT: " (cut)", FAILED: " (failed)"}.get(cell.status, "")
    name = cell.subject if cell.kernel in (None, cell.subject) else _with_kernel(cell)
    error = "-" if cell.error is None else f"{cell.error:.1e}"
    return (
        str(cell.m),
        cell.scheme or "dense",
        name + note,
        number(cell.median_us, 4),
        number(cell.tflop_s),
        number(cell.gb_s),
        number(cell.roofline_percent),
        number(cell.vs_dense),
        "inf" if cell.status == WRONG and cell.error is None else error,
    )


def _with_kernel(cell: Cell) -> str:
    assert cell.kernel is not None
    return cell.subject if cell.subject.endswith(cell.kernel) else f"{cell.subject} [{cell.kernel}]"


def tables(results: Results) -> dict[str, list[Cell]]:
    """The cells to show by layer, fastest first within M and scheme; declined ones are left out."""
    shown: dict[str, list[Cell]] = {}
    for cell in results.cells:
        if cell.status != DECLINED:
            title = f"{cell.model} {cell.layer}: N = {cell.n}, K = {cell.k}, {cell.dtype}"
            shown.setdefault(title, []).append(cell)
    order = _scheme_order(results.cells)
    for cells in shown.values():
        cells.sort(key=lambda c: (c.m, order[c.scheme], c.median_us or float("inf")))
    return shown


def _scheme_order(cells: Iterable[Cell]) -> dict[str | None, int]:
    """Position of each scheme as measured, the dense baselines first."""
    names = dict.fromkeys(cell.scheme for cell in cells if cell.scheme is not None)
    order: dict[str | None, int] = {name: i + 1 for i, name in enumerate(names)}
    return {None: 0, **order}


def reasons(results: Results) -> list[str]:
    """Why subjects are missing or not timed in full: a line for each subject, status and reason.

    A subject that ran one scheme is not blamed for the schemes that it is not made for.
    """
    ran = {cell.subject for cell in results.cells if cell.status != DECLINED}
    grouped: dict[tuple[str, str, str], tuple[set[str], set[int]]] = {}
    for cell in results.cells:
        if cell.reason is None:
            continue
        other_scheme = cell.scheme is not None and f"not {cell.scheme}" in cell.reason
        if cell.status == DECLINED and other_scheme and cell.subject in ran:
            continue
        key = (cell.subject, cell.status, cell.reason)
        schemes, ms = grouped.setdefault(key, (set(), set()))
        schemes.add(cell.scheme or "dense")
        ms.add(cell.m)
    lines = []
    for (subject, status, reason), (schemes, ms) in grouped.items():
        rows = ", ".join(str(m) for m in sorted(ms))
        lines.append(f"{subject} ({', '.join(sorted(schemes))}; M = {rows}) {status}: {reason}")
    return lines


def slower_choices(results: Results) -> list[str]:
    """Where another kernel of ours was clearly faster than the one that `WQLinear` runs: a line for
    each pair of kernels."""
    problems: dict[tuple[object, ...], dict[str, Cell]] = {}
    for cell in results.cells:
        if cell.timed:
            problem = (cell.scheme, cell.n, cell.k, cell.m, cell.dtype)
            problems.setdefault(problem, {})[cell.subject] = cell
    found: dict[tuple[str, str], list[str]] = {}
    for cells in problems.values():
        layer = cells.get(LAYER)
        chosen = cells.get(f"{KERNEL_PREFIX}{layer.kernel}") if layer is not None else None
        kernels = [cell for name, cell in cells.items() if name.startswith(KERNEL_PREFIX)]
        if chosen is None or layer is None:
            continue
        best = min((cell for cell in kernels if cell is not layer), key=_time)
        if _time(chosen) >= CLEARLY * _time(best):
            ratio = f"{_time(chosen) / _time(best):.2f}"
            place = f"{best.scheme} {best.n}x{best.k} M = {best.m}: {ratio}"
            pair = chosen.kernel or chosen.subject, best.kernel or best.subject
            found.setdefault(pair, []).append(place)
    return [
        f"{chosen} is chosen and takes longer than {best}, times: {', '.join(places)}"
        for (chosen, best), places in found.items()
    ]


def _time(cell: Cell) -> float:
    assert cell.median_us is not None
    return cell.median_us


def heading(results: Results) -> list[str]:
    """What a figure must be read with: machine, versions, commit, ceilings."""
    commit = results.commit[:12] if results.commit else "unknown"
    changed = " with local changes" if results.dirty else ""
    peaks = results.roofline.get("peaks_tflop_s", {})
    bandwidth = results.roofline.get("bandwidth_gb_s")
    threads = results.settings.get("threads")
    lines = [
        f"{results.device_name}, CPU threads: {threads}, torch {results.versions.get('torch')}, "
        f"commit {commit}{changed}, {results.date}",
    ]
    if bandwidth is not None:
        listed = ", ".join(f"{name} {number(value)}" for name, value in peaks.items())
        lines.append(f"measured ceilings: {number(bandwidth)} GB/s; TFLOP/s: {listed}")
    noise = load.of_run(results)
    if noise is not None:
        lines.append(noise)
    if results.stopped is not None:
        lines.append(f"incomplete: {results.stopped}")
    return lines


def print_results(results: Results, stream: TextIO | None = None) -> None:
    """Prints heading, a table for each layer, and why subjects are missing."""
    stream = sys.stdout if stream is None else stream
    try:
        _print_rich(results, stream)
    except ImportError:
        print("rich is not installed: plain tables (pip install rich)", file=stream)
        _print_plain(results, stream)


def _print_rich(results: Results, stream: TextIO) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # A file or a pipe has no width; rows that wrap there would be of no use to grep.
    console = Console(file=stream, width=None if stream.isatty() else 140, highlight=False)
    for line in heading(results):
        console.print(escape(line))
    for title, cells in tables(results).items():
        table = Table(title=escape(title), title_justify="left")
        for index, column in enumerate(COLUMNS):
            table.add_column(column, justify="left" if index in (1, 2) else "right")
        for index, cell in enumerate(cells):
            last = index + 1 == len(cells) or cells[index + 1].m != cell.m
            style = "red" if cell.status in (WRONG, FAILED) else None
            table.add_row(*(escape(text) for text in row(cell)), end_section=last, style=style)
        console.print(table)
    for line in [*slower_choices(results), *reasons(results)]:
        console.print(escape(line), soft_wrap=True)


def _print_plain(results: Results, stream: TextIO) -> None:
    for line in heading(results):
        print(line, file=stream)
    for title, cells in tables(results).items():
        rows = [COLUMNS, *(row(cell) for cell in cells)]
        print(f"\n{title}\n{align(rows)}", file=stream)
    print("", *slower_choices(results), *reasons(results), sep="\n", file=stream)


def align(rows: list[tuple[str, ...]]) -> str:
    """Rows as lines of aligned columns: names to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for cells in rows:
        parts = [
            text.ljust(width) if index in (1, 2) else text.rjust(width)
            for index, (text, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)
