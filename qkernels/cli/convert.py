"""`qkernels convert`: a quantized model in, the same numbers in another format out."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from qkernels.cli import models, quantize
from qkernels.cli.console import note, output, table


def convert(
    model: models.ModelArgument,
    out: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    to: Annotated[
        str, typer.Option("--to", help="The format; `qkernels list formats` lists them.")
    ] = "compressed-tensors",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing model.")] = False,
    dtype: models.StoredPrecisionOption = None,
) -> None:
    """Write a quantized model in another format, exactly, or say why that does not hold it."""
    quantize.check_output(out, model, force)
    from qkernels.checkpoints import is_quantized
    from qkernels.checkpoints.save import SavePlan
    from qkernels.checkpoints.table import check_holds
    from qkernels.errors import CheckpointError
    from qkernels.models.loading import has_tokenizer

    check_holds(to, {})
    if model.exists() and not is_quantized(model):
        raise CheckpointError(f"{model} holds no quantized model: quantize it first")
    reads = model.exists() and has_tokenizer(model)
    network, tokenizer = models.load(model, dtype, "cpu", tokenizer=reads)
    if tokenizer is None:
        note(f"note: {model} holds no tokenizer, so {out} will hold none")
    plan = SavePlan.of(network, to)
    if plan.left_out is not None:
        note(f"note: {plan.left_out}")
    with tempfile.TemporaryDirectory() as temporary:
        companions = Path(temporary) / "companions"
        quantize.write_companions(model, tokenizer, companions)
        quantize.write_folder(plan, companions, out, force)
    schemes = Counter(str(layer.scheme) for layer in plan.layers.values())
    rows = table("what", "value")
    rows.add_row("written to", str(out))
    rows.add_row("format", to)
    rows.add_row("layers", ", ".join(f"{count} of {text}" for text, count in schemes.items()))
    output().print(rows)
