"""The command line: `python -m bench.quality`.

Every row runs in a process of its own, and is in the file as soon as it is done. Rows that are
there, of this commit with these options, are not run again. At the end the table and the picture
are made of all rows of the file.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from bench.children import end_with_parent, run_alone
from bench.cli import INTERRUPTED_STATUS
from bench.plot import PlotError
from bench.quality import inputs, picture, record, table
from bench.quality.measure import Settings, blank, measure
from bench.quality.record import Measured, Record
from bench.quality.rows import MODELS, ROWS, Row
from qkernels.errors import QuantizationError

CHILD = "--child"
"""Says that this process measures one row, which is the value as JSON."""


class Interrupted(Exception):
    """The user stopped a row."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality",
        description="Measures what quantization costs a real model. See docs/benchmarks.md.",
    )
    add = parser.add_argument
    default = Settings()
    add("--rows", nargs="+", metavar="PATTERN", default=["*"], help="such as 'smollm2 w4* gptq'")
    add("--also", nargs="+", metavar="ROW", default=[], help="rows beside those of the table")
    add("--windows", type=int, default=default.windows, help="of each text (%(default)s)")
    add("--window", type=int, default=default.window, help="tokens a window (%(default)s)")
    add("--passages", type=int, default=default.passages, help="of each text, for encoders")
    add("--sequences", type=int, default=default.sequences, help="of calibration (%(default)s)")
    add("--length", type=int, default=default.length, help="tokens of a sequence (%(default)s)")
    add("--threads", type=int, help="CPU threads (torch's own choice unless given)")
    for model in MODELS:
        add(f"--{model}", type=Path, metavar="PATH", help="instead of the package's")
    add("--output", type=Path, default=Path("build/quality"), metavar="DIR")
    add("--force", action="store_true", help="measure rows again that are there")
    add("--list", action="store_true", help="list the rows, and what is missing for them")
    add("--report", action="store_true", help="only make table and picture of what is there")
    add(CHILD, help=argparse.SUPPRESS)
    return parser


def run(argv: Sequence[str]) -> int:
    """Measures; returns the exit code: 0, 1 where a row failed, 2 a bad option, 130 interrupted."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.child is not None:
        return _child(options)
    settings = Settings(**{f.name: getattr(options, f.name) for f in fields(Settings)})
    for name, value in asdict(settings).items():
        if value is not None and value < (2 if name in ("window", "length") else 1):
            parser.error(f"--{name} {value} is too small")
    try:
        chosen = choose(options.rows, options.also)
        paths = {
            model: getattr(options, model) or inputs.find_model(model)
            for model in dict.fromkeys(row.model for row in chosen)
            if not (options.list or options.report)
        }
        options.output.mkdir(parents=True, exist_ok=True)
        held = record.read(options.output / "quality.json")
    except (ValueError, QuantizationError, OSError) as error:
        parser.error(str(error))
    if options.list:
        for row in chosen:
            print(row.name if row.why_not() is None else f"{row.name}: {row.why_not()}")
        return 0
    status = 0
    if not options.report:
        status = measure_all(chosen, settings, paths, held, options.output, force=options.force)
    report(held, options.output)
    return status


def choose(patterns: Sequence[str], also: Sequence[str]) -> list[Row]:
    """The rows of the table that a pattern matches, and those of `also`.

    Raises:
        ValueError: for a pattern that matches none, or no row.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(row.name, pattern) for row in ROWS):
            raise ValueError(f"--rows {pattern!r} matches no row; --list names them")
    chosen = [r for r in ROWS if any(fnmatch.fnmatchcase(r.name, p) for p in patterns)]
    return list(dict.fromkeys([*chosen, *map(Row.parse, also)]))


def measure_all(
    rows: Sequence[Row],
    settings: Settings,
    paths: dict[str, Path],
    held: Record,
    folder: Path,
    *,
    force: bool,
) -> int:
    """Measures the rows that are not held, and writes each as it is done; returns the exit code."""
    status, full = 0, settings.as_dict()
    texts = [*inputs.evaluation_texts(), inputs.calibration_text()]
    held.texts = {text.name: text.as_dict() for text in texts}
    for number, row in enumerate(rows):
        place = f"[{number + 1}/{len(rows)}] {row.name}"
        empty = blank(row, full)
        if not force and held.has(row.name, empty.commit, full):
            print(f"{place}: there", file=sys.stderr)
            continue
        reason = row.why_not()
        if reason is not None:
            print(f"{place}: left out: {reason}", file=sys.stderr)
            continue
        print(f"{place} ...", file=sys.stderr, flush=True)
        try:
            measured = in_child(row, settings, paths[row.model], empty)
        except Interrupted:
            print("interrupted; the rows until then are written", file=sys.stderr)
            return INTERRUPTED_STATUS
        status = status if measured.error is None else 1
        print(f"{place}: {_summary(measured)}", file=sys.stderr, flush=True)
        held.put(measured)
        held.write(folder / "quality.json")
    return status


def in_child(row: Row, settings: Settings, path: Path, empty: Measured) -> Measured:
    """Measures a row in a process of its own; `empty`, with the reason, where that fails.

    Raises:
        Interrupted: by Ctrl-C.
    """
    request = json.dumps([row.name, asdict(settings), str(path.absolute())])
    with tempfile.TemporaryDirectory(prefix="qkernels-quality-") as name:
        command = [sys.executable, "-m", "bench.quality", CHILD, request, "--output", name]
        outcome, reason = run_alone(command, Path(name, "log"))
        if outcome.interrupted:
            raise Interrupted
        done = Path(name, "row.json")
        if done.exists():
            return record.from_json(done.read_text())
    empty.error = outcome.failure or reason
    return empty


def _child(options: argparse.Namespace) -> int:
    end_with_parent()
    name, settings, path = json.loads(options.child)
    measured = measure(Row.parse(name), Settings(**settings), Path(path))
    part = options.output / "row.part"
    part.write_text(record.to_json(measured))
    part.rename(options.output / "row.json")
    return 0


def _summary(row: Measured) -> str:
    if row.error is not None:
        return f"failed: {row.error}"
    figures = [f"{text} {values['perplexity']:.3f}" for text, values in row.texts.items()]
    figures += [f"cosine {row.embeddings['cosine']:.5f}"] if row.embeddings else []
    return f"{', '.join(figures)}; {row.seconds:.0f} s"


def report(held: Record, folder: Path) -> None:
    """Writes and prints the table, and draws the picture."""
    text = table.markdown(held)
    (folder / "quality.md").write_text(text)
    print(text)
    written = ["quality.json", "quality.md"]
    try:
        picture.draw(held, folder / "quality.png")
        written.append("quality.png")
    except PlotError as error:
        print(f"no picture: {error}", file=sys.stderr)
    print(f"in {folder}: {', '.join(written)}", file=sys.stderr)
