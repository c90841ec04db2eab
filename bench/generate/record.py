"""What was measured, as one JSON file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.results import ResultsError, Run

SCHEMA = "qkernels-generate-1"


@dataclass
class Speed:
    """Of one contestant on one model.

    Attributes:
        read, write: tokens a second, one number a round: of the prompt to the first new token, and
            of the tokens after it.
        about: what its process said of itself.
        absent: why it took no part, or ended.
    """

    model: str
    name: str
    read: list[float] = field(default_factory=list)
    write: list[float] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    absent: str | None = None


@dataclass
class Record(Run):
    """A run of `python -m bench.generate`."""

    speeds: list[Speed] = field(default_factory=list)
    others_percent: float | None = None
    schema: str = SCHEMA


def read(path: Path) -> Record:
    """The run that a file holds.

    Raises:
        ResultsError: where it cannot be read, or holds none.
    """
    try:
        data = json.loads(path.read_text())
        if data.get("schema") != SCHEMA:
            raise ResultsError(f"{path} is not of schema {SCHEMA}")
        speeds = [Speed(**speed) for speed in data.pop("speeds")]
        return Record(**data, speeds=speeds)
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ResultsError(f"{path} holds no run of this benchmark: {error}") from None


def ratio(mine: Speed, other: Speed, of: Callable[[Speed], list[float]]) -> float | None:
    """How many times as fast: the median over the rounds that both took part in."""
    pairs = list(zip(of(mine), of(other), strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else None


def table(record: Record) -> list[str]:
    """Lines of Markdown: for each model, speeds and what they are of each peer's."""
    lines = []
    for model in dict.fromkeys(speed.model for speed in record.speeds):
        speeds = [speed for speed in record.speeds if speed.model == model]
        timed = [speed for speed in speeds if speed.write]
        peers = [speed for speed in timed if not speed.name.startswith("qkernels")]
        heads = "".join(f" | of {peer.name}'s" for peer in peers)
        lines += [
            f"| {model} | writes{heads} | reads{heads} |",
            "|---|" + "---:|" * (2 + 2 * len(peers)),
        ]
        for speed in timed:
            cells = [speed.name]
            for of in (lambda s: s.write, lambda s: s.read):
                cells.append(f"{statistics.median(of(speed)):,.0f}")
                for peer in peers:
                    times = None if peer is speed else ratio(speed, peer, of)
                    cells.append("" if times is None else f"{times:.2f}x")
            lines.append("| " + " | ".join(cells) + " |")
        lines += [f"{speed.name}: absent: {speed.absent}" for speed in speeds if speed.absent]
        lines.append("")
    return lines
