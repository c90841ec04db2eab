"""`qkernels formats`: the checkpoint formats, and what each holds."""

from __future__ import annotations

from rich.text import Text

from qkernels.cli.console import output, table


def formats() -> None:
    """List the checkpoint formats that are read: whose, whether written too, for which weights."""
    from qkernels.checkpoints import FORMATS
    from qkernels.checkpoints.table import weight_types

    rows = table("format", "what", "written", "weight types")
    for row in FORMATS.values():
        written = Text("yes", "green") if row.writes else Text("no")
        rows.add_row(row.name, row.title, written, " ".join(weight_types(row)))
    output().print(rows)
