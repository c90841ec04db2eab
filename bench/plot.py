"""The picture of a run: how many times as fast as the dense product, against M. A row of panels for
each layer, a panel for each scheme; qkernels in bold, the others quiet, the roofline dotted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import load
from bench.results import Cell, Results
from bench.subjects.ours import KERNEL_PREFIX, LAYER

MAX_LAYERS = 4
"""Rows that stay readable; more layers are named in what `draw` returns."""

OURS, ROOFLINE = "qkernels", "roofline"

_COLORS = {OURS: "tab:red", ROOFLINE: "black"}
_QUIET = ("tab:blue", "tab:green", "tab:purple", "tab:brown", "tab:gray", "tab:olive", "tab:cyan")

Curve = dict[int, float]
"""M -> the dense product's time by this one's."""


class PlotError(Exception):
    """No picture can be drawn; the message says why."""


def curves(cells: Sequence[Cell]) -> dict[str, Curve]:
    """The curves of a panel, of the timed cells of a layer and a scheme, by the names they get.

    Ours is the layer that users call; where it was not measured, the fastest of its kernels.
    """
    found: dict[str, Curve] = {OURS: {}, ROOFLINE: {}}
    compared = [cell for cell in cells if cell.vs_dense]
    layer = any(cell.subject == LAYER for cell in compared)
    for cell in sorted(compared, key=lambda cell: cell.m):
        assert cell.vs_dense is not None
        ours = cell.subject.startswith(KERNEL_PREFIX)
        if ours and layer and cell.subject != LAYER:
            continue
        curve = found.setdefault(OURS if ours else cell.subject, {})
        curve[cell.m] = max(curve.get(cell.m, 0.0), cell.vs_dense)
        if ours and cell.floor_us and cell.dense_us:
            found[ROOFLINE][cell.m] = cell.dense_us / cell.floor_us
    return {name: curve for name, curve in found.items() if curve}


def _shape(cell: Cell) -> str:
    return f"{cell.n}x{cell.k}"


def shapes(results: Results) -> list[str]:
    """The "NxK" of every layer that was timed beside a dense product."""
    return list(dict.fromkeys(_shape(cell) for cell in results.cells if cell.vs_dense))


def apart(heights: Mapping[str, float], least: float) -> dict[str, float]:
    """The same heights, moved as little as keeps each `least` from the next."""
    placed: dict[str, float] = {}
    blocks: list[list[str]] = []

    def middle(block: list[str]) -> float:
        return sum(heights[name] for name in block) / len(block)

    for name in sorted(heights, key=lambda name: heights[name]):
        blocks.append([name])
        while len(blocks) > 1:
            below, above = blocks[-2:]
            if middle(above) - middle(below) >= least * (len(below) + len(above)) / 2:
                break
            blocks[-2:] = [below + above]
    for block in blocks:
        for place, name in enumerate(block):
            placed[name] = middle(block) + least * (place - (len(block) - 1) / 2)
    return placed


def draw(results: Results, path: Path, layers: Sequence[str] = ()) -> list[str]:
    """Writes a PNG for `layers` ("NxK"; the first few of the run where none are named).

    Returns the layers that were left out.

    Raises:
        PlotError: without matplotlib, without a timed cell beside a dense product, or for a layer
            that was not measured.
    """
    available = shapes(results)
    if not available:
        raise PlotError("nothing was timed beside a dense product")
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

    timed = [cell for cell in results.cells if cell.vs_dense and cell.scheme is not None]
    schemes = list(dict.fromkeys(str(cell.scheme) for cell in timed)) or [""]
    size = (1 + 4.4 * len(schemes), 1 + 3.4 * len(chosen))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(chosen), len(schemes), squeeze=False, sharex=True, sharey="row")
    panels = {
        (shape, scheme): curves(
            [cell for cell in timed if _shape(cell) == shape and cell.scheme == scheme]
        )
        for shape in chosen
        for scheme in schemes
    }
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    quiet = [name for name in names if name not in _COLORS]
    colors = _COLORS | {name: _QUIET[i % len(_QUIET)] for i, name in enumerate(quiet)}
    ticks = sorted({m for panel in panels.values() for curve in panel.values() for m in curve})
    for row, shape in enumerate(chosen):
        for column, scheme in enumerate(schemes):
            axis = axes[row][column]
            title = f"{scheme}, {shape}" if len(chosen) > 1 else scheme
            axis.set(title=title, xscale="log", yscale="log")
            _fill(axis, panels[shape, scheme], colors)
            axis.set_xticks(ticks, [str(m) for m in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            if row == len(chosen) - 1:
                axis.set_xlabel("rows of x")
        _scale(axes[row][0], [panels[shape, scheme] for scheme in schemes])
        axes[row][0].set_ylabel("times as fast as dense")
        for column, scheme in enumerate(schemes):
            _label(axes[row][column], panels[shape, scheme], colors)
    commit = results.commit[:12] if results.commit else "unknown commit"
    note = "" if results.stopped is None else f" (incomplete: {results.stopped})"
    if load.of_run(results) is not None:
        note += " UNRELIABLE: machine was busy"
    shape = f", N x K = {chosen[0]}" if len(chosen) == 1 else ""
    figure.suptitle(f"{results.device_name}{shape}, {commit}, {results.date[:10]}{note}")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    return [shape for shape in available if shape not in chosen]


def _fill(axis: Any, panel: Mapping[str, Curve], colors: Mapping[str, str]) -> None:
    for name, curve in panel.items():
        style: dict[str, Any] = {"linewidth": 1, "alpha": 0.7, "marker": "."}
        if name == OURS:
            style = {"linewidth": 3, "marker": "o", "markersize": 5, "zorder": 3}
        elif name == ROOFLINE:
            style = {"linewidth": 1.2, "linestyle": ":"}
        axis.plot(list(curve), list(curve.values()), color=colors[name], **style)
    axis.axhline(1, color="black", linewidth=0.8)


def _scale(axis: Any, panels: Sequence[Mapping[str, Curve]]) -> None:
    """Limits and ticks of a row of panels, with some room around the curves."""
    values = [value for panel in panels for curve in panel.values() for value in curve.values()]
    low, high = min([1.0, *values]) / 1.2, max([1.0, *values]) * 1.2
    axis.set_ylim(low, high)
    steps = [10.0**power * step for power in range(-3, 4) for step in (1, 2, 5)]
    ticks = [step for step in steps if low <= step <= high]
    axis.set_yticks(ticks, [f"{step:g}" for step in ticks])


def _label(axis: Any, panel: Mapping[str, Curve], colors: Mapping[str, str]) -> None:
    """Names of curves at their ends, to the right of the panel."""
    ends = {name: curve[max(curve)] for name, curve in panel.items()}
    to_axes = axis.transScale + axis.transLimits
    heights = {name: float(to_axes.transform((1, end))[1]) for name, end in ends.items()}
    for name, height in apart(heights, 0.055).items():
        axis.text(
            1.02,
            height,
            name.removeprefix("torch "),
            transform=axis.transAxes,
            color=colors[name],
            fontsize="small",
            fontweight="bold" if name == OURS else "normal",
            verticalalignment="center",
        )
