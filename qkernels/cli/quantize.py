"""`qkernels quantize`: a model folder or GGUF file in, a folder with the quantized model out."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qkernels.cli import models
from qkernels.cli.console import note, output, progress_bar, table

if TYPE_CHECKING:
    import torch

    import qkernels as qk
    from qkernels.checkpoints.save import SavePlan

SHIPPED = "shipped"
"""Names the shipped text in place of a file."""

PROCESSOR_FILES = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("audio_tokenizer_config.json", "chat_template.json", "chat_template.jinja"),
)
"""What prepares images and sound for a model, and messages for its tokenizer."""

Patterns = list[str] | None


def quantize(
    model: models.ModelArgument,
    scheme: Annotated[str, typer.Option("--scheme", help="Such as w4a16-g128, nf4-g64, w8a8.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    method: Annotated[
        str,
        typer.Option(
            metavar="RECIPE",
            help="A method, or several such as a(x=1)+b; `qkernels list methods` lists them.",
        ),
    ] = "rtn",
    include: Annotated[
        Patterns, typer.Option(help="Quantize only layers whose name matches; may be repeated.")
    ] = None,
    exclude: Annotated[
        Patterns, typer.Option(help="Leave layers alone whose name matches; may be repeated.")
    ] = None,
    override: Annotated[
        Patterns,
        typer.Option(
            metavar="PATTERN=SCHEME",
            help="Another scheme for some layers, or none to leave them alone; may be repeated.",
        ),
    ] = None,
    overrides_file: Annotated[
        Path | None,
        typer.Option(
            "--overrides",
            metavar="FILE",
            help="Schemes of layers by `qkernels sensitivity`; --override goes before them.",
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(metavar="SCHEME", help="Quantize the output head too, so. Else it stays."),
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option(
            metavar="SCHEME",
            help="Quantize the embedding of tokens too; with the head's scheme, as one weight with "
            "it where the model ties them. Needs --format qkernels.",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A UTF-8 text to calibrate on, and to measure output errors on; `shipped` is the "
            "text that comes with qkernels. [default: shipped, where the method or the scheme "
            "needs one]",
            show_default=False,
        ),
    ] = None,
    observer: Annotated[
        str,
        typer.Option(
            help="What finds the range of static activations, such as percentile(percent=99.9); "
            "`qkernels list observers` lists them."
        ),
    ] = "minmax",
    sequences: Annotated[
        int, typer.Option(min=1, help="Sequences of 512 tokens to calibrate on, evenly spaced.")
    ] = 128,
    format: Annotated[
        str, typer.Option(help="Of the folder to write; `qkernels list formats` lists them.")
    ] = "compressed-tensors",
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep what is done there, block by block, and go on from it after an interrupt.",
        ),
    ] = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Hold one block of the model at a time, for models larger than memory. Finished "
            "blocks are kept in OUTPUT.unfinished, or where --resume says; the same command goes "
            "on from there.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing model.")] = False,
    dtype: models.PrecisionOption = models.Precision.bf16,
    device: models.DeviceOption = "auto",
) -> None:
    """Quantize the linear layers of a model and write it to a folder."""
    # Whatever can be wrong without the model is checked before the model is loaded.
    check_output(out, model, force)
    from qkernels.calibration.observers import ObserverChoice
    from qkernels.models.calibration_text import needs_calibration
    from qkernels.models.evaluation import SHIPPED_CALIBRATION, read_text
    from qkernels.quantizers.mixture import read_overrides
    from qkernels.quantizers.recipe import Recipe
    from qkernels.scheme import QuantScheme

    parsed = QuantScheme.parse(scheme)
    recipe = Recipe.parse(method, parsed)
    choice = ObserverChoice.parse(observer)
    overrides = parse_overrides(override or [])
    if overrides_file is not None:
        overrides |= {n: s for n, s in read_overrides(overrides_file).items() if n not in overrides}
    ends = {
        part: QuantScheme.parse(text)
        for part, text in (("head", head), ("embedding", embedding))
        if text is not None
    }
    schemes = [s for s in (parsed, *overrides.values(), ends.get("head")) if s is not None]
    calibrates = calibration is not None or needs_calibration(recipe, schemes)
    file = SHIPPED_CALIBRATION if calibration in (None, SHIPPED) else calibration
    text = read_text(file) if calibrates else None
    from qkernels.checkpoints import check_scheme
    from qkernels.checkpoints.save import SavePlan
    from qkernels.models.loading import has_tokenizer
    from qkernels.quantizers.streaming import check_apart_from, unfinished

    for wanted in (parsed, *overrides.values()):
        if wanted is not None:
            check_scheme(format, wanted)
    for part, wanted in ends.items():
        check_scheme(format, wanted, instead_of="an embedding" if part == "embedding" else None)
    reads = text is not None or has_tokenizer(model)
    kept = unfinished(out) if stream and resume is None else resume
    if kept is not None:
        check_apart_from(kept, model, out)
    if stream:
        assert kept is not None
        folder, tokenizer = models.open_folder(model, dtype, device, tokenizer=reads)
        network = folder.model
    else:
        network, tokenizer = models.load(model, dtype, device, dense=True, tokenizer=reads)
    if tokenizer is None:
        note(f"note: {model} holds no tokenizer, so {out} will hold none")
    # The first match of an override counts, and these name one layer.
    overrides = {**{end_of(network, part): wanted for part, wanted in ends.items()}, **overrides}
    batches = None
    if text is not None:
        batches = batches_of(network, tokenizer, text, sequences, models.find_device(device))
    with tempfile.TemporaryDirectory() as temporary:
        companions = Path(temporary) / "companions"
        # Before the work, so that it is not lost where these cannot be written.
        write_companions(model, tokenizer, companions)
        options: dict[str, Any] = {
            "method": recipe,
            "include": include,
            "exclude": exclude,
            "overrides": overrides,
            "calibration": batches,
            "observer": choice,
            "format": format,
        }
        if not stream:
            report = models.quantize_with_bar(network, parsed, resume=resume, **options)
            write_folder(SavePlan.of(network, format), companions, out, force)
        else:
            note(f"note: finished blocks are kept in {kept}; the same command goes on from them")
            streamed = models.stream_with_bar(folder, parsed, resume=kept, **options)
            report, size = streamed.report, streamed.shard_size()
            write_folder(streamed.plan, companions, out, force, size)
            if resume is None:
                assert kept is not None
                shutil.rmtree(kept)
    print_report(report, report.numbers * dtype.dtype.itemsize, out)


def write_companions(model: Path, tokenizer: Any, folder: Path) -> None:
    """Makes `folder` of what belongs to the model at `model` beside its weights and its config."""
    from qkernels.checkpoints.foreign import as_checkpoint_error

    folder.mkdir()
    if tokenizer is not None:
        with as_checkpoint_error(model, "has a tokenizer that cannot be saved"):
            tokenizer.save_pretrained(folder)
    for name in PROCESSOR_FILES:
        if (model / name).is_file() and not (folder / name).exists():
            shutil.copyfile(model / name, folder / name)


def write_folder(
    plan: SavePlan,
    companions: Path,
    out: Path,
    force: bool,
    max_shard_size: int | str | None = None,
) -> None:
    """Writes a model and the files of the folder `companions` to `out`, whole or not at all.

    Args:
        max_shard_size: see `save_model`; None for its own.
    """
    from qkernels.checkpoints.atomic import new_folder, on_disk
    from qkernels.checkpoints.save import SHARD_SIZE, as_written, write_model

    with (
        progress_bar(f"writing {out}") as update,
        as_written(out),
        new_folder(out, replace=force) as new,
    ):
        write_model(plan, new, max_shard_size or SHARD_SIZE, update)
        # The contents alone: a file made here has the mode that the umask leaves.
        shutil.copytree(companions, new, copy_function=shutil.copyfile, dirs_exist_ok=True)
        on_disk(new)


def parse_overrides(texts: list[str]) -> dict[str, qk.QuantScheme | None]:
    """PATTERN=SCHEME texts as a mapping; the scheme "none" leaves layers alone."""
    from qkernels.errors import SchemeError
    from qkernels.scheme import QuantScheme

    overrides: dict[str, qk.QuantScheme | None] = {}
    for text in texts:
        pattern, equals, scheme = text.partition("=")
        if not (pattern and equals and scheme):
            raise SchemeError(
                f"--override {text!r} is not PATTERN=SCHEME, such as '*.down_proj=w8a16'"
            )
        overrides[pattern] = None if scheme == "none" else QuantScheme.parse(scheme)
    return overrides


def end_of(model: Any, part: str) -> str:
    """The name of a model's output head or of its embedding of tokens.

    Args:
        part: "head" or "embedding".

    Raises:
        QuantizationError: where it has none.
    """
    from torch import nn

    from qkernels.errors import QuantizationError
    from qkernels.modules.heads import input_embedding, output_heads

    ends = output_heads(model) if part == "head" else [input_embedding(model)]
    kind = nn.Linear if part == "head" else nn.Embedding
    names = (n for n, m in model.named_modules() if isinstance(m, kind) and m in ends)
    name = next(names, None)
    if name is None:
        raise QuantizationError(
            f"a {type(model).__name__} does not say which layer is its {part}: name it by "
            "--override NAME=SCHEME"
        )
    return name


def batches_of(
    model: Any,
    tokenizer: Any,
    text: str,
    sequences: int,
    device: torch.device,
    length: int | None = None,
) -> list[torch.Tensor]:
    """Calibration batches of a text. Args: length: tokens of a sequence; None for the usual."""
    from qkernels.models.calibration_text import LENGTH, calibration_batches

    models.check_takes_text(
        model, "calibrate it in Python, by qkernels.quantize_model(model, calibration=batches)"
    )
    context = getattr(model.config, "max_position_embeddings", None) or LENGTH
    length = min(length or LENGTH, context)
    return calibration_batches(tokenizer, sequences, length, text, device=device)


def check_output(out: Path, model: Path, force: bool) -> None:
    """Raises where `out` must not be written to: it is there, or holds the model that is read."""
    from qkernels.errors import QuantizationError

    parent = out.absolute().parent
    if not os.path.lexists(out):
        if not parent.is_dir():
            raise QuantizationError(f"the folder {parent} does not exist: make it")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise QuantizationError(f"the folder {parent} cannot be written to: choose another")
        return
    if not out.is_dir() or out.is_symlink():
        raise QuantizationError(f"{out} is there and is no folder: choose another output")
    if not any(out.iterdir()):
        return
    if not force:
        raise QuantizationError(f"{out} is there: choose another output, or replace it by --force")
    if not (out / "config.json").is_file():
        raise QuantizationError(f"{out} holds something else than a model: --force does not apply")
    target, source = out.resolve(), model.resolve()
    if target == source or target in source.parents or source in target.parents:
        raise QuantizationError(f"{out} holds the model to quantize: choose another output")


def _left_alone(report: qk.QuantizationReport) -> list[tuple[str, str]]:
    """Names and reasons, those alike in one line: "blocks.*.router (24 of them)"."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, reason in report.skipped.items():
        alike.setdefault((re.sub(r"\d+", "*", name), reason), []).append(name)
    lines = []
    for (pattern, reason), names in alike.items():
        share = sum(report.shares[name] for name in names)
        label = names[0] if len(names) == 1 else f"{pattern} ({len(names)} of them)"
        lines.append((f"{label}, {share:.1%} of the parameters", reason))
    return lines or [("nothing", "every parameter is a linear layer's or small")]


def print_report(report: qk.QuantizationReport, dense_bytes: int, out: Path) -> None:
    """Prints what was done to the layers, whose weights had `dense_bytes` before."""
    layers = report.layers
    worst = max(layers, key=lambda layer: layer.weight_error)
    schemes = sorted({layer.scheme for layer in layers})
    mean = sum(layer.weight_error for layer in layers) / len(layers)
    rows = table("what", "value")
    rows.add_row("written to", str(out))
    rows.add_row("quantized layers", f"{len(layers)} ({', '.join(schemes)})")
    rows.add_row("method", report.method)
    for name, reason in _left_alone(report):
        rows.add_row("left alone", f"{name}: {reason}")
    size = models.mebibytes(report.weight_bytes)
    rows.add_row("their weights", f"{size}, before {models.mebibytes(dense_bytes)}")
    rows.add_row("bits per weight", f"{report.bits_per_weight:.3f}")
    rows.add_row("relative weight error", f"mean {mean:.5f}, most {worst.weight_error:.5f}")
    rows.add_row("worst layer", worst.name)
    measured = [layer.output_error for layer in layers if layer.output_error is not None]
    if measured:
        summary = f"mean {sum(measured) / len(measured):.5f}, most {max(measured):.5f}"
        rows.add_row("relative output error", summary)
    if report.unreached:
        name, instead = next(iter(report.unreached.items()))
        unreached = f"{len(report.unreached)} layers, such as {name}: {instead}"
        rows.add_row("not reached by calibration", unreached)
    if report.whole_model is not None:
        rows.add_row("calibrated slowly", f"not block by block: {report.whole_model}")
    output().print(rows)
