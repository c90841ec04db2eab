"""The picture of a run: time and percent of the roofline against M, a column for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import load
from bench.results import Cell, Results

MAX_LAYERS = 4
"""Columns that stay readable; more layers are named in what `draw` returns."""


class PlotError(Exception):
    """No picture can be drawn; the message says why."""


def curves(results: Results, shape: str) -> dict[str, list[Cell]]:
    """Timed cells of the layer with this "NxK", by curve name, in order of M."""
    found: dict[str, list[Cell]] = {}
    for cell in results.cells:
        if cell.timed and f"{cell.n}x{cell.k}" == shape:
            name = cell.subject if cell.scheme is None else f"{cell.subject}, {cell.scheme}"
            found.setdefault(name, []).append(cell)
    for cells in found.values():
        cells.sort(key=lambda cell: cell.m)
    return found


def shapes(results: Results) -> list[str]:
    """The "NxK" of every layer with a timed cell."""
    return list(dict.fromkeys(f"{cell.n}x{cell.k}" for cell in results.cells if cell.timed))


def draw(results: Results, path: Path, layers: Sequence[str] = ()) -> list[str]:
    """Writes a PNG for `layers` ("NxK"; the first few of the run where none are named).

    Returns the layers that were left out.

    Raises:
        PlotError: without matplotlib, without a timed cell, or for a layer that was not measured.
    """
    available = shapes(results)
    if not available:
        raise PlotError("nothing was timed")
    missing = [layer for layer in layers if layer not in available]
    if missing:
        raise PlotError(f"layer {missing[0]} was not measured; there are {', '.join(available)}")
    chosen = list(layers) or available[:MAX_LAYERS]
    try:
        import matplotlib
    except ImportError:
        raise PlotError("matplotlib is not installed (pip install matplotlib)") from None
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(10.0, 1.5 + 4.5 * len(chosen)), 9), layout="constrained")
    axes = figure.subplots(2, len(chosen), squeeze=False, sharex="col")
    names = list(dict.fromkeys(name for shape in chosen for name in curves(results, shape)))
    colors = matplotlib.colormaps["tab20"]
    styles: dict[str, Any] = {
        name: {"color": colors(i % 20), "linestyle": ("-", "--", ":")[i // 20 % 3]}
        for i, name in enumerate(names)
    }
    for column, shape in enumerate(chosen):
        time_axis, roofline_axis = axes[0][column], axes[1][column]
        time_axis.set(title=f"N x K = {shape}", xscale="log", yscale="log", ylabel="time (us)")
        roofline_axis.set(xlabel="M", ylabel="% of roofline")
        for name, cells in curves(results, shape).items():
            ms = [cell.m for cell in cells]
            time_axis.plot(ms, [cell.median_us for cell in cells], "o", ms=3, **styles[name])
            percent = [cell.roofline_percent or 0.0 for cell in cells]
            roofline_axis.plot(ms, percent, "o", ms=3, **styles[name])
        # After the curves: a limit set before them would freeze the other one as well.
        roofline_axis.set_ylim(bottom=0)
        ticks = sorted({cell.m for cells in curves(results, shape).values() for cell in cells})
        time_axis.set_xticks(ticks, [str(m) for m in ticks])
        time_axis.minorticks_off()
        for axis in (time_axis, roofline_axis):
            axis.grid(alpha=0.3)
    handles = [matplotlib.lines.Line2D([], [], marker="o", ms=3, **styles[n]) for n in names]
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize="small")
    commit = results.commit[:12] if results.commit else "unknown commit"
    note = "" if results.stopped is None else f" (incomplete: {results.stopped})"
    if load.of_run(results) is not None:
        note += " UNRELIABLE: machine was busy"
    figure.suptitle(f"{results.device_name}, {commit}, {results.date[:10]}{note}")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    return [shape for shape in available if shape not in chosen]
