"""Quantization from folder to folder, of models that are larger than memory.

Blocks are taken by the same driver as in memory, with the weights of one block read at a time
(`residence.py`). What a block becomes is stored (`resume.py`); when all are, the folder is written
from there, tensor by tensor, by the same code that saves a model.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qkernels import rounding
from qkernels.calibration.batches import check_tokens
from qkernels.calibration.blocks import Block, find_blocks
from qkernels.calibration.forwards import CannotFollow
from qkernels.calibration.observers import DEFAULT_OBSERVER, ObserverChoice
from qkernels.calibration.walks import check_apart
from qkernels.checkpoints.atomic import check_free, new_folder, on_disk
from qkernels.checkpoints.dense import Place
from qkernels.checkpoints.dense_folder import DenseFolder
from qkernels.checkpoints.format import WeightKind
from qkernels.checkpoints.pretrained import mark_quantized
from qkernels.checkpoints.save import SHARD_SIZE, HeldValues, SavePlan, as_written, write_model
from qkernels.checkpoints.store import shard_bytes
from qkernels.checkpoints.table import check_holds
from qkernels.checkpoints.written import check_writes
from qkernels.errors import CheckpointError, LayerError, RecipeError
from qkernels.modules.packed import PackedModule
from qkernels.progress import Progress, silent
from qkernels.quantizers.driver import drive
from qkernels.quantizers.embeddings import EmbeddingForms, embedding_kinds
from qkernels.quantizers.job import Outcome
from qkernels.quantizers.model import (
    calibration_of,
    for_format,
    kinds_of,
    open_folder,
    plan_run,
    report_of,
)
from qkernels.quantizers.plan import parsed_overrides, plan_layers
from qkernels.quantizers.recipe import Recipe
from qkernels.quantizers.report import QuantizationReport
from qkernels.quantizers.residence import StreamedBlocks
from qkernels.quantizers.resume import OpenedBlock, fingerprint
from qkernels.scheme import QuantScheme
from qkernels.select import check_backend
from qkernels.weight import QuantizedWeight

UNFINISHED = ".unfinished"
"""Ends the name of the folder of finished blocks, beside the one that is to be written."""

_INSTEAD = "load the model and use quantize_model, or leave out --stream"


def quantize_folder(
    source: str | Path,
    out: str | Path,
    method: str | Recipe = "rtn",
    scheme: QuantScheme | str = "w4a16-g128",
    *,
    calibration: Iterable[Any] | None = None,
    observer: str | ObserverChoice = DEFAULT_OBSERVER,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    overrides: Mapping[str, QuantScheme | str | None] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    backend: str | None = None,
    check_kernels: bool = True,
    resume: str | Path | None = None,
    format: str = "compressed-tensors",
    max_shard_size: int | str = SHARD_SIZE,
    progress: Progress = silent,
) -> QuantizationReport:
    """Quantizes the model of one folder to another, with a block at a time in memory.

    What is written is what `from_pretrained`, `quantize_model` and `save_model` write, bit for bit.
    In memory are the weights of one block, what it becomes, and one shard, which is no larger; with
    calibration also what is in no block that is quantized, such as embeddings and the head, and the
    inputs of one block for all batches.

    Args:
        source: a folder with safetensors files and config.json, of a model of Transformers that is
            not quantized.
        out: created where it is missing; must be empty. It appears when all of it is written.
        calibration: batches, on `device`.
        dtype: of the model; None for the folder's own.
        device: where blocks are run and quantized.
        resume: where finished blocks are kept until all are written; None for a folder beside
            `out`, with .unfinished behind its name, which is removed in the end. The same call goes
            on from it after an interrupt or a kill, with the same result.
        max_shard_size: of a file, as for `save_model`; no more than the largest block has.
        method, scheme, observer, include, exclude, overrides, backend, check_kernels, format,
            progress: as for `quantize_model`.

    Raises:
        CheckpointError: as `load_model`, `save_model` and `quantize_model` do; for models of
            another kind than said above; for an `out` that has files in it.
        LayerError, SchemeError, WeightError, RecipeError: as `quantize_model` does, and for a model
            or a method that cannot be taken block by block.
    """
    source, out = Path(source), Path(out)
    check_free(out)
    shard_bytes(max_shard_size)
    kept = unfinished(out) if resume is None else Path(resume)
    check_apart_from(kept, source, out)
    streamed = stream(
        DenseFolder(source, dtype, device),
        method,
        scheme,
        calibration=calibration,
        observer=observer,
        include=include,
        exclude=exclude,
        overrides=overrides,
        backend=backend,
        check_kernels=check_kernels,
        resume=kept,
        format=format,
        progress=progress,
    )
    with as_written(out), new_folder(out) as aside:
        write_model(streamed.plan, aside, streamed.shard_size(max_shard_size))
        on_disk(aside)
    if resume is None:
        shutil.rmtree(kept)
    return streamed.report


@dataclass(frozen=True)
class Streamed:
    """A model that is quantized, in a folder of finished blocks.

    Attributes:
        plan: how it is saved; reads the weights when they are written.
        most: bytes of the largest block before.
    """

    report: QuantizationReport
    plan: SavePlan
    most: int

    def shard_size(self, wanted: int | str = SHARD_SIZE) -> int:
        """Bytes of a file of weights, all of which are held while it is written."""
        return min(shard_bytes(wanted), self.most)


def stream(
    folder: DenseFolder,
    method: str | Recipe,
    scheme: QuantScheme | str,
    *,
    resume: Path,
    format: str,
    calibration: Iterable[Any] | None = None,
    observer: str | ObserverChoice = DEFAULT_OBSERVER,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    overrides: Mapping[str, QuantScheme | str | None] | None = None,
    backend: str | None = None,
    check_kernels: bool = True,
    progress: Progress = silent,
) -> Streamed:
    """Quantizes the model of `folder` into the folder `resume`.

    Arguments and errors as for `quantize_folder`. The model of `folder` is used up.
    """
    default, model = QuantScheme.parse(scheme), folder.model
    recipe, choice = Recipe.parse(method, default), ObserverChoice.parse(observer)
    check_backend(backend)
    parsed = parsed_overrides(overrides)
    layers = plan_layers(model, default, include, exclude, parsed)
    batches = calibration_of(model, recipe, layers, calibration, folder.device)
    plan = plan_run(layers, recipe, choice, batches, backend, check_kernels)
    check_tokens(model, plan.batches or ())
    _check_streams(model, recipe)
    residence = StreamedBlocks(folder, plan.schemes)
    check_holds(format, embedding_kinds(model, layers.embeddings))
    kinds = kinds_of(model, plan, residence.forms)
    check_writes(format, model, kinds)
    plan = for_format(plan, format, kinds)
    blocks = find_blocks(model, plan.schemes) if plan.schemes else []
    with _refusing():
        check_apart(model, blocks)
    run = open_folder(resume, layers, plan, fingerprint(_checked(folder, residence, blocks)))
    with contextlib.closing(run):
        alone = [n for e in layers.embeddings if e.head is None for n in e.names]
        residence.hold(f"{name}.weight" for name in alone)
        looked_up = EmbeddingForms(model, layers.embeddings)
        if plan.batches is not None:
            residence.hold_for_forward(blocks)
        with _refusing():
            outcome = drive(model, plan, progress, run, residence) if blocks else Outcome(None)
    residence.forms.finish()
    reports = looked_up.put(outcome.layers)
    mark_quantized(model)
    stored = [run.opened(number) for number in range(len(blocks))]
    return Streamed(
        report=report_of(layers, recipe, outcome, reports),
        plan=SavePlan.of(model, format, _StoredValues(folder, residence, stored)),
        most=max((residence.nbytes(block) for block in blocks), default=1),
    )


class _StoredValues(HeldValues):
    """Where the numbers of a streamed model are: in the folder of finished blocks, and in the one
    that the model came from."""

    def __init__(
        self, folder: DenseFolder, residence: StreamedBlocks, blocks: Sequence[OpenedBlock]
    ) -> None:
        self._folder, self._residence = folder, residence
        # By what they are, since a layer may have several names, and is stored under one.
        self._layers = {
            id(folder.model.get_submodule(name)): (block, name)
            for block in blocks
            for name in block.layers
        }
        self._rewritten = {name: block for block in blocks for name in block.rewritten}

    def check(self, model: nn.Module) -> None:
        """Nothing: each tensor is in one of the folders."""

    def kind(self, name: str, layer: PackedModule) -> WeightKind:
        source = getattr(layer, "source", None) or layer
        if id(source) in self._layers:
            _, first = self._layers[id(source)]
            return self._residence.kinds[first]
        return super().kind(name, layer)

    def weight(self, name: str, layer: PackedModule) -> QuantizedWeight:
        if id(layer) in self._layers:
            block, first = self._layers[id(layer)]
            return block.weight(first)
        return super().weight(name, layer)

    def tensor(self, name: str, place: Place) -> Tensor:
        if name in self._rewritten:
            return self._rewritten[name].parameter(name)
        if not place.tensor.is_meta:
            return place.tensor
        key, part = self._residence.part(place) or (name, None)
        tensor = self._folder.get(key)
        return tensor if part is None else part(tensor)


def _checked(
    folder: DenseFolder, residence: StreamedBlocks, blocks: Iterable[Block]
) -> Iterator[object]:
    """What makes the model what it is, for `fingerprint`, read once from end to end.

    Raises:
        CheckpointError: for a tensor that cannot be read.
        WeightError: for a weight that is not finite, or of another type than methods take.
    """
    model = folder.model
    yield repr(model)
    for block in blocks:
        residence.bring(block)
        for name in block.layers:
            weight = cast(nn.Linear, model.get_submodule(name)).weight
            rounding.check_weight(weight.detach(), f"{name}.weight")
        for key, tensor in model.get_submodule(block.name).state_dict().items():
            yield f"{block.name} {key}"
            yield tensor
        residence.let_go()
    for name in residence.outside(blocks):
        yield name
        yield folder.get(name)


def _check_streams(model: nn.Module, recipe: Recipe) -> None:
    """Raises for a model whose code changes its blocks from outside, and a recipe that needs all of
    the model at once."""
    for part in recipe.parts:
        if part.method.prepare_model is not None or part.method.finish is not None:
            raise RecipeError(
                f"{part.method.name} works on the whole model, whose blocks are read one at a "
                f"time: leave it out of the recipe, or {_INSTEAD}"
            )
    for name, module in model.named_modules():
        if hasattr(module, "layers_are_rescaled"):
            raise LayerError(
                f"{name or 'the model'} is a {type(module).__name__}, which changes weights of its "
                f"blocks before it runs them, so these cannot be read one at a time: {_INSTEAD}"
            )


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Within, a model that cannot be followed block by block is a LayerError."""
    try:
        yield
    except CannotFollow as reason:
        raise LayerError(
            f"the model cannot be taken one block at a time ({reason}): {_INSTEAD}"
        ) from None


def unfinished(out: Path) -> Path:
    """Where finished blocks of a run are kept that is to write `out`, if nobody says it."""
    out = out.resolve()
    return out.with_name(out.name + UNFINISHED)


def check_apart_from(kept: Path, source: Path, out: Path) -> None:
    """Raises CheckpointError where finished blocks would be kept in a folder that is something
    else."""
    for other, what in ((source, "the model to quantize"), (out, "the folder to write")):
        if kept.resolve() == other.resolve() or other.resolve() in kept.resolve().parents:
            raise CheckpointError(f"{kept} is in {other}, {what}: keep finished blocks elsewhere")
