"""`qkernels sensitivity`: a scheme for each layer, by what it loses, under a budget of bits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qkernels.cli import models
from qkernels.cli.console import note, output, progress_bar, table

if TYPE_CHECKING:
    from qkernels.quantizers.mixture import Mixture
    from qkernels.quantizers.sensitivity import Sensitivity

SEQUENCES, LENGTH = 64, 128
"""How many sequences, each of which is one sample of what errors do, and tokens of each."""

DEFAULT_SCHEMES = "w3a16-g64,w4a16-g64,w8a16-g64"


def sensitivity(
    model: models.ModelArgument,
    budget: Annotated[
        float,
        typer.Option(help="Bits a weight in the mean, scales and zero points among them."),
    ],
    out: Annotated[Path, typer.Option("-o", "--output", help="The JSON file to write.")],
    schemes: Annotated[
        str, typer.Option(help="What a layer may get, separated by commas; or it stays as it is.")
    ] = DEFAULT_SCHEMES,
    together: Annotated[
        bool,
        typer.Option("--together", help="One scheme for layers that read one tensor, as q, k, v."),
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="A UTF-8 text to measure on. Else one that is shipped.")
    ] = None,
    method: Annotated[
        str, typer.Option(metavar="RECIPE", help="Whose errors count: one that needs no data.")
    ] = "rtn",
    include: Annotated[
        list[str] | None, typer.Option(help="Only layers whose name matches; may be repeated.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Not layers whose name matches; may be repeated.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="A PNG of the bits of every layer; needs matplotlib.")
    ] = None,
    dtype: models.PrecisionOption = models.Precision.fp32,
    device: models.DeviceOption = "auto",
) -> None:
    """Choose a scheme for each layer under a budget of bits, for `quantize --overrides`."""
    from qkernels.cli.quantize import batches_of
    from qkernels.models.evaluation import SHIPPED_CALIBRATION, read_text
    from qkernels.quantizers.mixture import mix
    from qkernels.quantizers.recipe import Recipe
    from qkernels.quantizers.sensitivity import check_judges, measure_sensitivity
    from qkernels.scheme import QuantScheme

    parsed = [QuantScheme.parse(scheme.strip()) for scheme in split_schemes(schemes)]
    recipe = Recipe.parse(method)
    for scheme in parsed:
        check_judges(recipe, scheme)
    for path in (out, picture):
        if path is not None:
            models.check_file(path)
    text = read_text(calibration or SHIPPED_CALIBRATION)
    network, tokenizer = models.load(model, dtype, device, dense=True)
    place = next(network.parameters()).device
    batches = batches_of(network, tokenizer, text, SEQUENCES, place, LENGTH)
    with progress_bar("measuring layers") as update:
        found = measure_sensitivity(
            network,
            parsed,
            batches,
            include=include,
            exclude=exclude,
            method=method,
            budget=budget,
            progress=update,
        )
    mixture = mix(found, budget, together=together)
    mixture.save(out, found)
    if picture is not None:
        try:
            draw(mixture, found, picture)
        except ModuleNotFoundError as error:
            note(f"no picture: {error.name} is not installed: pip install 'qkernels[plot]'")
    print_mixture(mixture, found, out)


def split_schemes(text: str) -> list[str]:
    """Schemes separated by commas, which the values of a table have too."""
    return [part for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def print_mixture(mixture: Mixture, found: Sensitivity, out: Path) -> None:
    """How many layers and weights each scheme got, and what they lose by it."""
    rows = table("scheme", "layers", "of the weights", "loss", numbers=("layers",))
    for scheme in dict.fromkeys(c.scheme for layer in found.layers.values() for c in layer.choices):
        names = [name for name, given in mixture.schemes.items() if given == scheme]
        own = [found.layers[name] for name in names if found.layers[name].same_as is None]
        share = sum(layer.n * layer.k for layer in own) / found.numbers
        loss = sum(c.loss for layer in own for c in layer.choices if c.scheme == scheme)
        rows.add_row(scheme or "as it is", str(len(names)), f"{share:.1%}", f"{loss:.5f}")
    output().print(rows)
    output().print(
        f"{mixture.bits_per_weight:.4f} bits a weight of {mixture.budget:g}, with a loss of "
        f"{mixture.loss:.5f} nats a token if layers add up; written to {out}",
        soft_wrap=True,
    )


def draw(mixture: Mixture, found: Sensitivity, path: Path) -> Path:
    """Bits a weight of every layer: a row for each kind of layer, a column for each block."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds, blocks = bits_by_kind(mixture, found)
    figure, axes = plt.subplots(
        figsize=(2.5 + 0.32 * len(blocks), 1.4 + 0.4 * len(kinds)), layout="constrained"
    )
    cells = [[row.get(block, float("nan")) for block in blocks] for row in kinds.values()]
    image = axes.imshow(cells, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(kinds)), list(kinds))
    axes.set_xticks(range(0, len(blocks), 5), [str(block) for block in blocks[::5]])
    axes.set_xlabel("block")
    figure.colorbar(image, label="bits a weight")
    axes.set_title(f"{mixture.bits_per_weight:.3f} bits a weight in the mean", fontsize=10)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)
    return path


def bits_by_kind(
    mixture: Mixture, found: Sensitivity
) -> tuple[dict[str, dict[int, float]], list[int]]:
    """Kind of layer, such as "self_attn.q_proj" -> block -> bits a weight; and all blocks."""
    kinds: dict[str, dict[int, float]] = {}
    for name, layer in found.layers.items():
        first = found.layers[layer.same_as] if layer.same_as else layer
        choice = next(c for c in first.choices if c.scheme == mixture.schemes[name])
        match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
        block, kind = (int(match[1]), match[2]) if match else (0, name)
        kinds.setdefault(kind, {})[block] = choice.bits / (layer.n * layer.k)
    return kinds, sorted({block for row in kinds.values() for block in row})
