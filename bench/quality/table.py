"""The table of a record: Markdown, a table for each model."""

from __future__ import annotations

from collections.abc import Sequence

from bench.load import RELIABLE_PERCENT
from bench.quality.record import Measured, Record
from bench.quality.rows import BASELINE, ENCODER, LANGUAGE

_TITLES = {
    LANGUAGE: "SmolLM2-135M-Instruct, bf16, all linear layers but the output head",
    ENCODER: "all-MiniLM-L6-v2, fp32, all linear layers",
}


def won_back(record: Record, row: Measured, text: str) -> float | None:
    """The part of round to nearest's loss of perplexity that a row wins back on a text.

    1 is the dense model, 0 round to nearest in the same scheme; None without that row, or where it
    lost nothing.
    """
    baseline = record.find(f"{row.model} {row.scheme} {BASELINE}")
    if baseline is None or text not in baseline.texts or text not in row.texts:
        return None
    worst, dense = (baseline.texts[text][key] for key in ("perplexity", "dense_perplexity"))
    lost = worst - dense
    return (worst - row.texts[text]["perplexity"]) / lost if lost > 0 else None


def markdown(record: Record) -> str:
    """All rows, in the order of the file, and what they were measured on."""
    parts = []
    for model in (LANGUAGE, ENCODER):
        rows = [row for row in record.rows if row.model == model]
        if rows:
            lines = _language(record, rows) if model == LANGUAGE else _encoder(rows)
            parts += [f"{_TITLES[model]}:", "\n".join(lines)]
    return "\n\n".join([*parts, *_notes(record)]) + "\n"


def _language(record: Record, rows: Sequence[Measured]) -> list[str]:
    texts = list(dict.fromkeys(text for row in rows for text in row.texts))
    both = " / ".join(texts)
    heads = ["scheme", "recipe", "bits", *texts, f"KL, {both}", f"top-1, {both}"]
    lines = _heading([*heads, "seconds", "peak MiB"])
    dense = next((row for row in rows if row.texts), None)
    if dense is not None:
        values = [f"{dense.texts[text]['dense_perplexity']:.2f}" for text in texts]
        size = _mebibytes(dense.dense_bytes)
        lines.append(_line(["dense", "", "16", *values, "0", "100%", "", size]))
    for row in rows:
        if row.error is not None:
            lines.append(_failed(row, len(heads) + 2))
            continue
        cells = []
        for text in texts:
            share = won_back(record, row, text)
            shown = "" if share is None or row.recipe == BASELINE else f" ({share:.0%})"
            cells.append(f"{row.texts[text]['perplexity']:.2f}{shown}")
        cells.append(" / ".join(f"{row.texts[text]['kl_divergence']:.4f}" for text in texts))
        cells.append(" / ".join(f"{row.texts[text]['top1_agreement']:.1%}" for text in texts))
        lines.append(_line([*_start(row), *cells, *_end(row)]))
    return lines


def _encoder(rows: Sequence[Measured]) -> list[str]:
    heads = ["scheme", "recipe", "bits", "cosine, mean", "least", "seconds", "peak MiB"]
    lines = _heading(heads)
    for row in rows:
        if row.error is not None:
            lines.append(_failed(row, len(heads)))
            continue
        cosines = [f"{row.embeddings[key]:.5f}" for key in ("cosine", "least_cosine")]
        lines.append(_line([*_start(row), *cosines, *_end(row)]))
    return lines


def _heading(heads: Sequence[str]) -> list[str]:
    return [_line(heads), "|---|---|" + "---:|" * (len(heads) - 2)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _start(row: Measured) -> list[str]:
    assert row.bits_per_weight is not None
    return [f"`{row.scheme}`", f"`{row.recipe}`", f"{row.bits_per_weight:.2f}"]


def _end(row: Measured) -> list[str]:
    busy = (row.others_percent or 0.0) > RELIABLE_PERCENT
    seconds = "-" if row.seconds is None else f"{row.seconds:.0f}{' (busy)' if busy else ''}"
    return [seconds, _mebibytes(row.peak_bytes)]


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.0f}"


def _failed(row: Measured, columns: int) -> str:
    assert row.error is not None
    reason = row.error.splitlines()[0]
    return _line([f"`{row.scheme}`", f"`{row.recipe}`", f"failed: {reason}", *[""] * (columns - 3)])


def _notes(record: Record) -> list[str]:
    done = [row for row in record.rows if row.error is None]
    texts = "; ".join(f"{name}: {text['source']}" for name, text in record.texts.items())
    notes = [
        "Perplexity on each text, and in brackets the part of round to nearest's loss that is won "
        "back. KL: of the next token's distribution from the dense model's, nats a token. Top-1: "
        "tokens after which both say the same. Seconds: of quantizing; busy: other processes used "
        f"more than {RELIABLE_PERCENT:.0f}% of the machine. Peak: the largest resident memory "
        "while quantizing, with the dense model, Python and torch; of the dense row, its weights.",
        f"{texts}." if texts else "",
    ]
    groups: dict[str, list[str]] = {}
    for row in done:
        listed = ", ".join(
            f"{key} {value}" for key, value in row.settings.items() if key not in record.texts
        )
        commit = "unknown" if row.commit is None else row.commit[:12] + "+" * ("+" in row.commit)
        torch = row.versions.get("torch")
        about = f"{row.machine}, torch {torch}, commit {commit}; {listed}"
        groups.setdefault(about, []).append(row.name)
    if len(groups) == 1:
        notes.append(f"{next(iter(groups))}.")
    else:
        notes += [f"{about}: {', '.join(names)}." for about, names in groups.items()]
    return [note for note in notes if note]
