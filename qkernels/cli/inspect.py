"""`qkernels explain` and `qkernels inspect`: which kernels run a problem, what is in a model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from qkernels.cli import models
from qkernels.cli.console import output, table


def explain(
    scheme: Annotated[str, typer.Argument(metavar="SCHEME", help="Such as w4a16-g128 or w8a8.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Output features.")] = 4096,
    k: Annotated[int, typer.Option("--k", min=1, help="Input features.")] = 4096,
    m: Annotated[int, typer.Option("--m", min=0, help="Rows of x, so tokens at a time.")] = 1,
    device: models.DeviceOption = "auto",
    dtype: Annotated[
        models.Precision, typer.Option("--dtype", help="Of x.")
    ] = models.Precision.bf16,
) -> None:
    """Which kernel would run x [M, K] times a weight [N, K], and why not the others."""
    import qkernels as qk

    where = models.find_device(device)
    parsed = qk.QuantScheme.parse(scheme)
    found = qk.explain(parsed, n=n, k=k, m=m, device=where, x_dtype=dtype.dtype)
    rows = table("kernel", "backend", "chosen", "why not")
    for row in found:
        mark = Text("yes", "green") if row.chosen else Text("no")
        able = "" if row.chosen else "can, but comes later in order"
        rows.add_row(row.kernel, row.backend, mark, row.reason or able)
    console = output()
    console.print(f"{parsed}, x [{m}, {k}] {dtype.value}, weight [{n}, {k}], {where}", style="bold")
    console.print(rows)


@dataclass(frozen=True)
class LayerSize:
    """A linear layer: its name, what it is stored as, its shape and the bytes of its weight."""

    name: str
    stored: str
    n: int
    k: int
    nbytes: int


def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A model folder or a .gguf file on this machine.")
    ],
    every: Annotated[
        bool, typer.Option("--all", help="A row for every layer, not one for all like it.")
    ] = False,
    dtype: models.StoredPrecisionOption = None,
) -> None:
    """List the linear layers of a model and its quantized embeddings: schemes, shapes, sizes."""
    network, _ = models.load(path, dtype, "cpu", tokenizer=False)
    layers = linear_layers(network)
    rows = table(
        "layers",
        "count",
        "stored as",
        "n",
        "k",
        "bits per weight",
        "MiB",
        numbers=("count", "n", "k", "bits per weight", "MiB"),
    )
    for name, alike in ((x.name, [x]) for x in layers) if every else group_alike(layers):
        rows.add_row(name, str(len(alike)), alike[0].stored, *_sizes(alike))
    rows.add_section()
    rows.add_row("all linear layers", str(len(layers)), "", "", "", *_sizes(layers)[2:])
    for table_of in quantized_embeddings(network):
        rows.add_row(table_of.name, "1", table_of.stored, *_sizes([table_of]))
    console = output()
    console.print(f"{path}: {type(network).__name__}", style="bold")
    console.print(rows)
    total = sum(p.nbytes for p in network.parameters()) + sum(b.nbytes for b in network.buffers())
    console.print(f"the whole model with embeddings and norms: {models.mebibytes(total)}")


def linear_layers(network: Any) -> list[LayerSize]:
    """All linear layers of a model, in its order."""
    from qkernels.modules import WQLinear
    from qkernels.modules.kinds import is_plain_linear, linear_parts

    found = []
    for name, layer in network.named_modules():
        if isinstance(layer, WQLinear):
            n, k, stored = layer.out_features, layer.in_features, str(layer.scheme)
            found.append(LayerSize(name, stored, n, k, layer.packed.nbytes))
        elif is_plain_linear(layer):
            weight = linear_parts(layer).weight
            n, k = weight.shape
            stored = str(weight.dtype).removeprefix("torch.")
            found.append(LayerSize(name, stored, n, k, weight.nbytes))
    return found


def quantized_embeddings(network: Any) -> list[LayerSize]:
    """The quantized embeddings of a model; one in the memory of another layer takes no bytes."""
    from qkernels.modules import WQEmbedding

    names = {id(module): name for name, module in network.named_modules()}
    found = []
    for name, module in network.named_modules():
        if isinstance(module, WQEmbedding):
            n, k, stored = module.num_embeddings, module.embedding_dim, str(module.scheme)
            nbytes = module.packed.nbytes
            if id(module.source) in names:
                stored, nbytes = f"{stored}, as {names[id(module.source)]}", 0
            found.append(LayerSize(name, stored, n, k, nbytes))
    return found


def group_alike(layers: list[LayerSize]) -> list[tuple[str, list[LayerSize]]]:
    """Layers that differ by the numbers of their block and expert alone, under one name."""
    groups: dict[tuple[str, str, int, int], list[LayerSize]] = {}
    for layer in layers:
        pattern = re.sub(r"\.\d+\.", ".*.", layer.name)
        pattern = re.sub(r"\.expert_\d+$", ".*", pattern)
        groups.setdefault((pattern, layer.stored, layer.n, layer.k), []).append(layer)
    return [(key[0] if len(alike) > 1 else alike[0].name, alike) for key, alike in groups.items()]


def _sizes(layers: list[LayerSize]) -> tuple[str, str, str, str]:
    nbytes, weights = sum(x.nbytes for x in layers), sum(x.n * x.k for x in layers)
    bits = 8 * nbytes / weights if weights else 0.0
    first = layers[0] if layers else LayerSize("", "", 0, 0, 0)
    return str(first.n), str(first.k), f"{bits:.3f}", f"{nbytes / 2**20:,.2f}"
