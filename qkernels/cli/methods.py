"""`qkernels methods`: the methods that a recipe can name, with their parameters."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from qkernels.cli.console import output, table

if TYPE_CHECKING:
    from qkernels.quantizers.method import Method


def methods() -> None:
    """List the quantization methods, which `quantize --method` takes alone or joined by +."""
    from qkernels.quantizers.methods import METHODS

    rows = table("method", "what it is", "does", "parameters")
    for method in METHODS.values():
        rows.add_row(method.name, method.title, _does(method), _parameters(method))
    output().print(rows)


def _does(method: Method) -> str:
    prepares = "prepares blocks" if method.prepare_block is not None else ""
    quantizes = "quantizes layers" if method.quantize is not None else ""
    return ", ".join(part for part in (prepares, quantizes) if part)


def _parameters(method: Method) -> str:
    from qkernels.quantizers.recipe import describe, parameter_types, spell

    types, default = parameter_types(method), method.parameters()
    return "; ".join(
        f"{f.name}={spell(getattr(default, f.name))}, {describe(types[f.name])}"
        for f in fields(default)
    )
