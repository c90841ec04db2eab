"""The results file: dataclasses, to JSON and back. docs/benchmarks.md describes the fields."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from qkernels import machine

SCHEMA = "qkernels-bench/1"

MEASURED, CUT, WRONG, FAILED, DECLINED = "measured", "cut", "wrong", "failed", "declined"
STATUSES = (MEASURED, CUT, WRONG, FAILED, DECLINED)


class ResultsError(ValueError):
    """A file that is not a results file of this schema."""


@dataclass
class Cell:
    """One subject on one problem. Times are in microseconds, absent unless it was timed.

    `scheme` is None for the dense baselines. `error` is the relative error of the output; None
    stands for an infinite one where the status is "wrong". `others_percent` is the share of the
    machine's CPU time that other processes took while it was timed. `dense_us` is the time of the
    dense product that `vs_dense` is a ratio to: with `own_process`, of the one in that process.
    """

    subject: str
    scheme: str | None
    model: str
    layer: str
    n: int
    k: int
    m: int
    dtype: str
    status: str
    reason: str | None = None
    kernel: str | None = None
    mode: str | None = None
    copies: int | None = None
    samples: int = 0
    median_us: float | None = None
    min_us: float | None = None
    p90_us: float | None = None
    bytes: int | None = None
    operations: int | None = None
    tflop_s: float | None = None
    gb_s: float | None = None
    floor_us: float | None = None
    roofline_percent: float | None = None
    vs_dense: float | None = None
    dense_us: float | None = None
    error: float | None = None
    others_percent: float | None = None
    own_process: bool = False

    @property
    def timed(self) -> bool:
        return self.median_us is not None


@dataclass
class Run:
    """What every file of a whole run begins with."""

    date: str
    command: list[str]
    machine: dict[str, Any]
    versions: dict[str, str | None]
    commit: str | None
    dirty: bool | None
    settings: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"


def beginning(
    module: str, argv: Sequence[str], device: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """The fields of a `Run` of `python -m module argv` that begins now, here."""
    head, dirty = machine.commit()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": ["python", "-m", module, *argv],
        "machine": machine.describe(device),
        "versions": machine.versions(),
        "commit": head,
        "dirty": dirty,
        "settings": settings,
    }


@dataclass
class Results(Run):
    """A run of `python -m bench`."""

    roofline: dict[str, Any] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    stopped: str | None = None
    schema: str = SCHEMA

    @property
    def device_name(self) -> str:
        gpu = self.machine.get("gpu")
        return str(gpu["name"] if gpu else self.machine.get("cpu"))

    @staticmethod
    def from_json(text: str) -> Results:
        """The results that `text` holds.

        Raises:
            ResultsError: where it is no JSON, of another schema, or lacks or adds a field.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ResultsError(f"not a JSON file: {error}") from None
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ResultsError(f"not a results file of schema {SCHEMA}")
        try:
            cells = [Cell(**cell) for cell in data.pop("cells")]
            results = Results(**data, cells=cells)
        except (TypeError, KeyError) as error:
            raise ResultsError(f"fields do not match schema {SCHEMA}: {error}") from None
        unknown = {cell.status for cell in cells} - set(STATUSES)
        if unknown:
            raise ResultsError(f"status {sorted(unknown)} is not one of {list(STATUSES)}")
        return results


def read(path: Path) -> Results:
    try:
        text = path.read_text()
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}") from None
    return Results.from_json(text)


def new_path(folder: Path, stem: str) -> Path:
    """`folder/stem.json`, with a number where that is taken: a run never overwrites another."""
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    return path


def field_names() -> dict[str, list[str]]:
    """The names of the schema's fields, for the test that holds the documentation to them."""
    return {cls.__name__: [f.name for f in fields(cls)] for cls in (Results, Cell)}
