"""`python -m bench.architectures`: a tiny model of every class of Transformers, taken through all.

A class works where its quantized model runs close to the dense one, and is the same bit for bit
after `save_model` and `load_model`, with its output head and without. docs/models.md has more.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from bench.progress import Progress
from bench.report import align
from bench.subjects.dense import DTYPE_NAMES
from bench.survey import table
from bench.survey.classes import KINDS, ModelClass, model_classes
from bench.survey.processes import try_all
from bench.survey.row import FAILS, Row
from qkernels import machine

DESCRIPTION = "Quantizes, saves and loads a tiny model of every class of Transformers."

INTERRUPTED_STATUS = 130
"""The exit code of a command that SIGINT ended."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.architectures", description=DESCRIPTION)
    add = parser.add_argument
    add("--only", metavar="REGEX", default="", help="classes whose name holds it")
    add("--kinds", nargs="+", choices=tuple(KINDS), default=tuple(KINDS))
    add("--dtype", choices=tuple(DTYPE_NAMES), default="fp32", help="of the models")
    add("--jobs", type=int, default=2, help="classes tried at a time, one thread each")
    add("--time-limit", type=float, metavar="S", default=120.0, help="for a class")
    add("--output", default="build/architectures", metavar="DIR", help="where the files go")
    return parser


def run(argv: Sequence[str]) -> int:
    """Tries the classes; returns the exit code.

    0 where all that start work or are left alone, 1 where one fails, 2 for a bad option, 130
    interrupted: what was tried until then is written.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        pattern = re.compile(options.only)
    except re.error as error:
        parser.error(f"--only {options.only!r} is no regular expression: {error}")
    for name, value in (("--jobs", options.jobs), ("--time-limit", options.time_limit)):
        if not value > 0:
            parser.error(f"{name} {value} must be more than 0")
    classes = [
        one
        for one in model_classes().values()
        if one.kind in options.kinds and pattern.search(one.name)
    ]
    if not classes:
        parser.error(f"--only {options.only!r} matches no class of {', '.join(options.kinds)}")
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    rows, interrupted = _try(classes, options)
    heading = _heading(options.dtype)
    _write(folder, rows, heading, argv)
    print(*heading, align([tuple(line) for line in table.counts(rows)]), sep="\n")
    for row in rows:
        if row.outcome == FAILS:
            print(f"{row.name} fails: {row.step}: {row.reason}")
    print(f"written: {folder / 'architectures.md'} and results.json")
    if interrupted:
        print("interrupted; what was tried until then is written", file=sys.stderr)
        return INTERRUPTED_STATUS
    return 1 if any(row.outcome == FAILS for row in rows) else 0


def _try(classes: Sequence[ModelClass], options: argparse.Namespace) -> tuple[list[Row], bool]:
    """The rows in the order of the classes, and whether the user stopped it."""
    found: dict[str, Row] = {}
    interrupted = False
    with Progress() as progress:

        def done(row: Row) -> None:
            found[row.name] = row
            progress.update(len(found), len(classes), row.name)

        try:
            try_all(
                classes,
                DTYPE_NAMES[options.dtype],
                jobs=options.jobs,
                time_limit=options.time_limit,
                done=done,
            )
        except KeyboardInterrupt:
            interrupted = True
    return [found[one.name] for one in classes if one.name in found], interrupted


def _heading(dtype: str) -> list[str]:
    commit, dirty = machine.commit()
    changed = " with local changes" if dirty else ""
    return [
        f"transformers {transformers.__version__}, torch {torch.__version__}, {dtype}, "
        f"commit {commit[:12] if commit else 'unknown'}{changed}"
    ]


def _write(folder: Path, rows: list[Row], heading: list[str], argv: Sequence[str]) -> None:
    commit, dirty = machine.commit()
    results = {
        "command": ["python", "-m", "bench.architectures", *argv],
        "versions": machine.versions(),
        "commit": commit,
        "dirty": dirty,
        "rows": [asdict(row) for row in rows],
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "architectures.md").write_text(table.markdown(rows, heading))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
