"""The picture of a record: bits per weight against perplexity, a panel a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.plot import PlotError
from bench.quality.record import Measured, Record
from bench.quality.rows import ENCODER
from qkernels.scheme import QuantScheme

_MARKERS = {
    "integers": "o",
    "integers, symmetric": "D",
    "codebooks": "s",
    "float8": "^",
}


_MOST = 3
"""Times the dense model's perplexity, where the panels end: what is beyond tells nothing apart."""


def family(scheme: str) -> str:
    """The kind of weights of a scheme, a key of `_MARKERS`."""
    parsed = QuantScheme.parse(scheme)
    if parsed.weight.kind == "linear":
        return "integers, symmetric" if parsed.symmetric else "integers"
    return "codebooks" if parsed.weight.kind == "codebook" else "float8"


def draw(record: Record, path: Path) -> None:
    """Writes a PNG.

    Raises:
        PlotError: without matplotlib, or without a row that was measured.
    """
    rows = [row for row in record.rows if row.error is None and row.bits_per_weight is not None]
    if not rows:
        raise PlotError("nothing was measured")
    try:
        import matplotlib
    except ImportError:
        raise PlotError("matplotlib is not installed (pip install matplotlib)") from None
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    texts = list(dict.fromkeys(text for row in rows for text in row.texts))
    embedded = [row for row in rows if row.model == ENCODER]
    columns = len(texts) + bool(embedded)
    figure = Figure(figsize=(5.0 * columns, 5.5), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    recipes = list(dict.fromkeys(row.recipe for row in rows))
    colors = matplotlib.colormaps["tab20"]
    style = {recipe: colors(index % 20) for index, recipe in enumerate(recipes)}
    for axis, text in zip(axes, texts, strict=False):
        shown = [row for row in rows if text in row.texts]
        dense = shown[0].texts[text]["dense_perplexity"]
        _scatter(axis, shown, style, _perplexity_on(text, _MOST * dense))
        axis.axhline(dense, color="black", linewidth=1, linestyle=":")
        label = f"perplexity (dotted: dense; top: {_MOST}x that and more)"
        axis.set(title=f"SmolLM2-135M, {text}", ylabel=label, yscale="log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    if embedded:
        _scatter(axes[-1], embedded, style, lambda row: 1 - row.embeddings["cosine"])
        axes[-1].set(title="all-MiniLM-L6-v2", ylabel="1 - cosine of embeddings", yscale="log")
    for axis in axes:
        axis.set_xlabel("bits per weight, scales included")
        axis.grid(alpha=0.3, which="both")
    line = matplotlib.lines.Line2D
    handles = [line([], [], marker="o", linestyle="", color=style[name]) for name in recipes]
    kinds = list(dict.fromkeys(family(row.scheme) for row in rows))
    handles += [line([], [], marker=_MARKERS[k], linestyle="", color="gray") for k in kinds]
    figure.legend(handles, recipes + kinds, loc="outside lower center", ncols=4, fontsize="small")
    commits = {row.commit[:12] if row.commit else "unknown commit" for row in rows}
    told = commits.pop() if len(commits) == 1 else f"{len(commits)} commits"
    figure.suptitle(f"{rows[-1].machine}, {told}, {rows[-1].date[:10]}")
    figure.savefig(path, dpi=110, format="png")


def _perplexity_on(text: str, most: float) -> Callable[[Measured], float]:
    return lambda row: min(row.texts[text]["perplexity"], most)


def _scatter(
    axis: Any, rows: list[Measured], style: dict[str, Any], value: Callable[[Measured], float]
) -> None:
    """A point a row; integers with zero points by one recipe are joined."""
    for recipe in dict.fromkeys(row.recipe for row in rows):
        own = [row for row in rows if row.recipe == recipe]
        joined = sorted(
            (row.bits_per_weight or 0, value(row))
            for row in own
            if family(row.scheme) == "integers"
        )
        if joined:
            axis.plot(*zip(*joined, strict=True), color=style[recipe], linewidth=1)
        for row in own:
            axis.plot(
                [row.bits_per_weight],
                [value(row)],
                _MARKERS[family(row.scheme)],
                color=style[recipe],
                markersize=5,
            )
