"""What the demo shows and writes: a table, JSON, Markdown, and a picture of the layers' errors."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qkernels import machine
from qkernels.progress import Progress

ANSWER_WIDTH = 40
"""Characters of the answer that the table shows; the JSON has all."""

HEADINGS = (
    "scheme",
    "perplexity",
    "weights MiB",
    "bits per weight",
    "weight error",
    "write tok/s",
    "read tok/s",
    "answer",
)


@dataclass
class Row:
    """What was measured of one configuration; None where it failed before.

    Attributes:
        weight_bytes: of the linear layers but the output head, scales included.
        weight_error: mean over the layers of |W - dequantized| / |W|.
        layers: the report of each layer.
        error: why the row is incomplete, or None.
    """

    scheme: str
    perplexity: float | None = None
    tokens: int | None = None
    weight_bytes: int | None = None
    bits_per_weight: float | None = None
    weight_error: float | None = None
    evaluation_tokens_per_second: float | None = None
    tokens_per_second: float | None = None
    answer: str | None = None
    seconds: float = 0.0
    layers: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None


@dataclass
class Demo:
    """The measurements, filled as they are made."""

    model: str
    text: str
    prompt: str
    total_tokens: int = 0
    rows: list[Row] = field(default_factory=list)
    load_seconds: float = 0.0
    head: str | None = None  # scheme of the output head in quantized rows

    @property
    def complete(self) -> bool:
        return bool(self.rows) and all(row.error is None for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """The measurements as JSON values."""
        return {
            "model": self.model,
            "complete": self.complete,
            "text": self.text,
            "text_tokens": self.total_tokens,
            "prompt": self.prompt,
            "load_seconds": self.load_seconds,
            "head": self.head,
            "rows": [asdict(row) for row in self.rows],
        }


def cells(demo: Demo, row: Row) -> list[str]:
    """A row of the table, as text under `HEADINGS`."""
    dense = demo.rows[0].weight_bytes
    size = "-"
    if row.weight_bytes is not None:
        size = f"{row.weight_bytes / 2**20:.1f}"
        if dense and row.weight_bytes != dense:
            size += f" ({row.weight_bytes / dense:.0%})"
    answer = textwrap.shorten(row.answer or "", ANSWER_WIDTH, placeholder=" ...")
    if row.error is not None:
        answer = f"failed: {row.error.splitlines()[0]}"
    return [
        row.scheme,
        _number(row.perplexity, ".2f"),
        size,
        _number(row.bits_per_weight, ".2f"),
        _number(row.weight_error, ".4f"),
        _number(row.tokens_per_second, ".1f"),
        _number(row.evaluation_tokens_per_second, ".0f"),
        answer,
    ]


def title(demo: Demo) -> str:
    measured = max((row.tokens or 0 for row in demo.rows), default=0)
    return f"{demo.model}: perplexity over {measured:,} of {demo.total_tokens:,} tokens"


def show(demo: Demo) -> None:
    """Prints the table."""
    from qkernels.cli.console import output, table

    made = table(*HEADINGS, numbers=HEADINGS[1:-1])
    for row in demo.rows:
        made.add_row(*cells(demo, row))
    console = output()
    console.print(title(demo), style="bold")
    console.print(made)


def markdown(demo: Demo) -> str:
    """The table as Markdown, with what it was measured on."""
    about, versions = machine.describe(), machine.versions()
    device = about["gpu"]["name"] if about["gpu"] else about["cpu"]
    rules = ["---", *["---:"] * (len(HEADINGS) - 2), "---"]
    lines = [HEADINGS, rules, *(cells(demo, row) for row in demo.rows)]
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    seconds = demo.load_seconds + sum(row.seconds for row in demo.rows)
    notes = (
        f"{title(demo)} of {demo.text}. Weights: the linear layers but the output head (which is "
        f"{demo.head or '16-bit'} beside quantized layers), scales included, and their share of "
        "the dense ones. Weight error: the mean over the layers of "
        "the relative Frobenius error. Read: tokens a second in the perplexity run; write: "
        "generated one by one. "
        f'Answer: the continuation of "{demo.prompt}".\n\n'
        f"{device}, {about['torch_threads']} threads, "
        f"torch {versions['torch']}, transformers {versions['transformers']}; "
        f"{seconds:.0f} s in all."
    )
    return "\n".join(rows) + f"\n\n{notes}\n"


def write(demo: Demo, folder: Path) -> list[Path]:
    """Writes demo.json, demo.md and, where layers were quantized, demo.png; returns the paths."""
    from qkernels.cli.console import as_json, note

    head, dirty = machine.commit()
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": head and (f"{head}+" if dirty else head),
        "machine": machine.describe(),
        "versions": machine.versions(),
        **demo.as_dict(),
    }
    written = [folder / "demo.json", folder / "demo.md"]
    _replace(written[0], as_json(record))
    _replace(written[1], markdown(demo))
    if any(row.layers for row in demo.rows):
        try:
            written.append(draw(demo, folder / "demo.png"))
        except ModuleNotFoundError as error:
            note(f"no picture: {error.name} is not installed: pip install 'qkernels[plot]'")
    return written


def draw(demo: Demo, path: Path) -> Path:
    """One panel for each kind of layer: its relative error in every block, a line a scheme."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    series = errors_by_kind(demo)
    columns = min(4, len(series) + 1)
    lines = math.ceil((len(series) + 1) / columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(3.4 * columns, 2.9 * lines),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    panels = list(axes.flat)
    styles = ("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)))
    handles: dict[str, Any] = {}
    for panel, (kind, by_scheme) in zip(panels, series.items(), strict=False):
        for index, (scheme, points) in enumerate(by_scheme.items()):
            blocks, errors = zip(*points, strict=True)
            # Earlier lines are thicker, so that they show behind later ones that cover them.
            width = 1.2 + 0.6 * (len(by_scheme) - 1 - index)
            style = {"linestyle": styles[index % len(styles)], "linewidth": width}
            (handles[scheme],) = panel.plot(blocks, errors, color=f"C{index}", **style)
        panel.set_title(kind, fontsize=10)
        panel.set_yscale("log")
        panel.grid(True, which="both", alpha=0.25)
    for panel in panels[len(series) :]:
        panel.axis("off")
    # Of the panels that share an axis, those at the rim of the grid name it.
    for index, panel in enumerate(panels[: len(series)]):
        if index + columns >= len(series):
            panel.set_xlabel("block")
            panel.tick_params(labelbottom=True)
        if index % columns == 0:
            panel.set_ylabel("relative weight error")
    panels[len(series)].legend(
        list(handles.values()), list(handles), loc="center", title="scheme", fontsize=10
    )
    figure.suptitle(f"Weight error of each layer after rounding to nearest: {demo.model}")
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    os.replace(temporary, path)
    return path


def errors_by_kind(demo: Demo) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Kind of layer -> scheme -> (block, weight error), such as "self_attn.q_proj"."""
    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in demo.rows:
        for layer in row.layers:
            match = re.search(r"(?:^|\.)(\d+)\.(.+)$", layer["name"])
            block, kind = (int(match[1]), match[2]) if match else (0, layer["name"])
            points = series.setdefault(kind, {}).setdefault(row.scheme, [])
            points.append((block, layer["weight_error"]))
    return series


@contextlib.contextmanager
def bars() -> Iterator[Callable[[str], Progress]]:
    """Progress of one configuration after the other: a bar on a terminal, else a line for each."""
    from rich import progress

    from qkernels.cli.console import bar_columns, note, progress_console

    console = progress_console()
    with progress.Progress(
        *bar_columns(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None, text="", detail="")

        def begin(name: str) -> Progress:
            if not console.is_terminal:
                note(f"{name} ...")
            bar.reset(task, total=None, text=name, detail="")

            def update(done: int, total: int, detail: str) -> None:
                bar.update(task, completed=done, total=total or None, detail=detail)

            return update

        yield begin


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
