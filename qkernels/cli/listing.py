"""`qkernels list`: what there is to choose from, each read from its table."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from qkernels.cli.console import output, table


def _weight_types() -> Table:
    from qkernels.scheme import WEIGHT_TYPES

    rows = table("name", "bits", "kind", "written as", "scale from", numbers=("bits",))
    for row in WEIGHT_TYPES.values():
        spelled = f"w{row.bits}a16" if row.kind == "linear" else row.name
        rows.add_row(row.name, str(row.bits), row.kind, spelled, f"{row.scale_from} |w|")
    return rows


def _fields() -> Table:
    from qkernels.fields import FIELDS

    rows = table("field of a weight", "along")
    for row in FIELDS.values():
        rows.add_row(row.name, ", ".join(row.axes) or "one number")
    return rows


def _kernels() -> Table:
    from qkernels.select import KERNELS

    rows = table("kernel", "backend", "layout", "activations", "batch invariant")
    for row in KERNELS:
        activations = ", ".join("16-bit" if a == "none" else a for a in row.activations)
        invariant = "no" if row.varies else "yes"
        rows.add_row(row.name, row.backend, row.layout or "any", activations, invariant)
    return rows


def _row_kernels() -> Table:
    from qkernels.backends.rows import ROW_KERNELS

    rows = table("kernel for rows", "backend", "rows of", "scales", "codes")
    for row in ROW_KERNELS:
        codes = ", ".join(str(code).removeprefix("torch.") for code in row.codes)
        kinds, scales = ", ".join(row.kinds), ", ".join(row.scales)
        rows.add_row(row.name, row.backend, kinds, scales, codes)
    return rows


def _methods() -> Table:
    from qkernels.quantizers.methods import METHODS
    from qkernels.spelling import describe_parameters

    rows = table("method", "what it is", "does", "parameters")
    for row in METHODS.values():
        does = {
            "prepares the model": row.prepare_model is not None,
            "prepares blocks": row.prepare_block is not None,
            "quantizes layers": row.quantize is not None,
            "quantizes blocks": row.quantize_block is not None,
            "finishes": row.finishes,
        }
        done = ", ".join(what for what, there in does.items() if there)
        rows.add_row(row.name, row.title, done, describe_parameters(row.parameters))
    return rows


def _recipes() -> Table:
    from qkernels.quantizers.methods import RECIPES

    rows = table("recipe", "stands for", "where activations are quantized")
    for name, row in RECIPES.items():
        rows.add_row(name, row.weights, row.activations)
    return rows


def _observers() -> Table:
    from qkernels.calibration.observers import OBSERVERS
    from qkernels.spelling import describe_parameters

    rows = table("observer", "what a static activation's range is", "parameters")
    for row in OBSERVERS.values():
        rows.add_row(row.name, row.title, describe_parameters(row.parameters))
    return rows


def _formats() -> Table:
    from qkernels.checkpoints.table import FORMATS, weight_types

    rows = table("format", "what", "written", "weight types")
    for row in FORMATS.values():
        written = Text("yes", "green") if row.writes else Text("no")
        rows.add_row(row.name, row.title, written, " ".join(weight_types(row)))
    return rows


_TABLES: dict[str, Callable[[], Table]] = {
    "weights": _weight_types,
    "fields": _fields,
    "methods": _methods,
    "recipes": _recipes,
    "observers": _observers,
    "formats": _formats,
    "kernels": _kernels,
    "rows": _row_kernels,
}


def formats_in_markdown() -> str:
    """The table of formats, as the README has it."""
    from qkernels.checkpoints.table import FORMATS

    lines = ["| format | what | read | written |", "|---|---|---|---|"]
    for row in FORMATS.values():
        lines.append(f"| `{row.name}` | {row.title} | yes | {'yes' if row.writes else 'no'} |")
    return "\n".join(lines)


Listed = Enum("Listed", {name: name for name in _TABLES}, type=str)  # type: ignore[misc]


def listing(
    what: Annotated[
        Listed | None, typer.Argument(help="One of the tables; all of them unless named.")
    ] = None,
) -> None:
    """List weight types, fields of weights, methods, recipes, observers, formats and kernels."""
    console = output()
    for name, rows in _TABLES.items():
        if what is None or what.value == name:
            console.print(rows())
