"""The file that rows are collected in, written anew behind each row; see docs/benchmarks.md."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = "qkernels-quality/1"


class RecordError(ValueError):
    """A file that is no record of this schema."""


@dataclass
class Measured:
    """A row that was measured, or failed.

    Attributes:
        name, model, scheme, recipe: of the row.
        commit: of the repository, with a + where files differed from it.
        settings: what the figures depend on beside the row and the commit.
        calibrated: whether calibration batches were given.
        texts: of a language model: text -> perplexity, dense_perplexity, kl_divergence,
            top1_agreement, tokens.
        embeddings: of an encoder: cosine, least_cosine, passages, tokens.
        seconds: that quantizing took, loading and measuring left out.
        peak_bytes: the largest resident memory of the process meanwhile.
        loaded_bytes: that before quantizing, with the dense model and the batches.
        dense_bytes: of all weights of the dense model.
        others_percent: share of the machine's CPU time that others took meanwhile.
        error: why there are no figures, or None.
    """

    name: str
    model: str
    scheme: str
    recipe: str
    commit: str | None
    date: str
    settings: dict[str, Any]
    machine: str
    versions: dict[str, str | None] = field(default_factory=dict)
    calibrated: bool = False
    texts: dict[str, dict[str, float]] = field(default_factory=dict)
    embeddings: dict[str, float] = field(default_factory=dict)
    bits_per_weight: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    loaded_bytes: int | None = None
    dense_bytes: int | None = None
    others_percent: float | None = None
    error: str | None = None


@dataclass
class Record:
    """All rows of a file.

    Attributes:
        texts: the texts of the last run, by their names: source, sha256, characters.
    """

    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[Measured] = field(default_factory=list)

    def find(self, name: str) -> Measured | None:
        return next((row for row in self.rows if row.name == name), None)

    def has(self, name: str, commit: str | None, settings: dict[str, Any]) -> bool:
        """Whether a row is there without an error, of this commit with these settings."""
        row = self.find(name)
        same = row is not None and (row.commit, row.settings) == (commit, settings)
        return same and row is not None and row.error is None

    def put(self, row: Measured) -> None:
        """Takes the place of the row of its name, or comes last."""
        names = [other.name for other in self.rows]
        if row.name in names:
            self.rows[names.index(row.name)] = row
        else:
            self.rows.append(row)

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        data = {"schema": SCHEMA, **asdict(self)}
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text(json.dumps(_encoded(data), indent=1, allow_nan=False) + "\n")
        os.replace(temporary, path)


def read(path: Path) -> Record:
    """The record of a file, an empty one where there is none.

    Raises:
        RecordError: for a file of something else.
    """
    if not path.exists():
        return Record()
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
        raise RecordError(f"{path} is not of schema {SCHEMA}")
    try:
        rows = [Measured(**_decoded(row)) for row in data.pop("rows")]
        return Record(**data, rows=rows)
    except (TypeError, KeyError) as error:
        raise RecordError(f"{path} has other fields than {SCHEMA}: {error}") from None


def to_json(row: Measured) -> str:
    return json.dumps(_encoded(asdict(row)), allow_nan=False)


def from_json(text: str) -> Measured:
    return Measured(**_decoded(json.loads(text)))


_UNENDING = {str(value): value for value in (math.inf, -math.inf, math.nan)}


def _encoded(value: Any) -> Any:
    """NaN and infinity as strings, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: _encoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_encoded(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return _UNENDING.get(value, value) if isinstance(value, str) else value
