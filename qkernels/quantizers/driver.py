"""The driver: takes a recipe through the blocks of a model, one at a time.

For each block: statistics of its inputs, which come out of blocks that are quantized already; the
parts of the recipe that prepare it; its layers quantized, measured and replaced; its new outputs
handed on. What is kept is the inputs and outputs of one block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol, cast

from torch import Tensor, nn

from qkernels.calibration.blocks import Block, find_blocks
from qkernels.calibration.forwards import Around, CannotFollow, autocast_here, without_autocast
from qkernels.calibration.observe import calibrating
from qkernels.calibration.statistics import LayerInputs
from qkernels.calibration.walks import BlockByBlock, Walk, WholeModel
from qkernels.checkpoints.memory import give_back_free_pages
from qkernels.errors import LayerError
from qkernels.modules import WQLinear
from qkernels.progress import Progress
from qkernels.quantizers.changes import Changes
from qkernels.quantizers.job import Outcome, Plan
from qkernels.quantizers.making import build_layer, layer_task
from qkernels.quantizers.method import BlockTask, LayerTask, ModelTask
from qkernels.quantizers.methods import LAST, METHODS
from qkernels.quantizers.observing import Observation
from qkernels.quantizers.recipe import Part
from qkernels.quantizers.report import LayerReport, compare
from qkernels.quantizers.resume import FinishedBlock, ResumeFolder, digest_of_layers
from qkernels.quantizers.static_inputs import without_zero
from qkernels.weight import QuantizedWeight, WeightParameters


class Residence(Protocol):
    """Keeps the weights of blocks elsewhere while they are not worked on."""

    def bring(self, block: Block) -> None:
        """Makes the weights of `block` be there, before anything is done with it."""

    def leave(self, block: Block) -> None:
        """Lets go of the weights of `block`, which is quantized and stored."""


def drive(
    model: nn.Module,
    plan: Plan,
    progress: Progress,
    folder: ResumeFolder | None = None,
    residence: Residence | None = None,
) -> Outcome:
    """Quantizes the layers of `plan` in `model`, which is unchanged where anything is raised.

    Blocks that are finished in `folder` are taken from there, the others are added to it.

    Args:
        residence: where the weights are, of a model that can only be taken block by block and is
            not changed back.

    Raises:
        CannotFollow: where that is given, and the model's forward cannot be followed.
    """
    changes = Changes(model, kept=residence is None, no_factors=plan.no_factors)
    whole = None if folder is None else folder.whole_model
    around = autocast_here()
    try:
        # The model runs as it does for whoever calls, methods in the types that they name.
        with calibrating(model), without_autocast():
            try:
                return _Run(
                    model, plan, changes, progress, folder, whole, around, residence
                ).through()
            except CannotFollow as reason:
                if residence is not None:
                    raise
                agreed = plan.processes.agree(reason)
                if not isinstance(agreed, CannotFollow):
                    raise agreed from None
                whole = str(agreed)
            changes.undo()
            if folder is not None:
                folder.take_whole_model(whole)
            return _Run(model, plan, changes, progress, folder, whole, around).through()
    except BaseException:
        changes.undo()
        raise


def _asks_for_dense(plan: Plan) -> bool:
    asked = (plan.needs(part, name) for part in plan.recipe.parts for name in plan.schemes)
    return any(needs.dense or needs.paired for needs in asked)


class _Run:
    """One way through all blocks."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        changes: Changes,
        progress: Progress,
        folder: ResumeFolder | None,
        whole: str | None,
        around: Around,
        residence: Residence | None = None,
    ) -> None:
        self._model, self._plan, self._changes = model, plan, changes
        self._progress, self._folder, self._processes = progress, folder, plan.processes
        self._residence = residence
        self._outcome = Outcome(whole)
        self._row_weights: dict[str, dict[int, Tensor]] = {}
        self._blocks = find_blocks(model, plan.schemes)
        for part in plan.recipe.parts:
            if part.method.prepare_model is not None:
                part.method.prepare_model(self._model_task(), part.parameters)
        self._walk: Walk
        batches = plan.batches or ()
        if batches and whole is None:
            dense = changes.dense_layers if _asks_for_dense(plan) else None
            self._walk = BlockByBlock(
                model, self._blocks, batches, dense, self._processes, self._arrive, around
            )
        else:
            self._walk = WholeModel(
                *(model, self._blocks, batches, changes.originals),
                *(self._processes, self._arrive, around),
            )
        self._observation = Observation(model, plan, self._walk, self._row_weights)

    def through(self) -> Outcome:
        """Takes every block, and leaves the walk behind."""
        try:
            while (block := self._walk.next()) is not None:
                self._take(block)
                self._compare_processes(block)
                self._walk.advance()
                give_back_free_pages()
                if self._residence is not None:
                    self._changes.settle(block)
                    self._residence.leave(block)
        finally:
            self._walk.close()
        self._finish()
        self._changes.finish()
        # What fails in one process until here changes the model in none.
        self._processes.gather("end", None)
        self._tell("")
        return self._outcome

    def _arrive(self, block: Block) -> None:
        if self._residence is not None:
            self._residence.bring(block)

    def _compare_processes(self, block: Block) -> None:
        """Raises, in all processes, where they have made different layers of a block."""
        if self._processes.size == 1:
            return
        made = {name: self._model.get_submodule(name) for name in block.layers}
        digest = digest_of_layers(made, self._changes.rewritten())
        if len(set(self._processes.gather("codes", digest))) > 1:
            raise LayerError(
                f"{block.name}: the processes made different codes of the same statistics: their "
                "processors, numbers of threads or versions of torch compute differently"
            )

    def _model_task(self) -> ModelTask:
        names = self._plan.schemes
        return ModelTask(
            model=self._model,
            layers={name: self._model.get_submodule(name) for name in names},
            schemes=names,
            batches=self._plan.batches or (),
            row_weights=self._row_weights,
            changes=self._changes,
        )

    def _finish(self) -> None:
        for part in self._plan.recipe.parts:
            if part.method.finish is None:
                continue
            self._tell(part.method.name)
            for name, weight in part.method.finish(self._model_task(), part.parameters).items():
                self._refinish(name, weight, part)

    def _refinish(self, name: str, weight: QuantizedWeight, part: Part) -> None:
        """Puts `weight` in place of that of a quantized layer and of all who share it."""
        before = self._model.get_submodule(name)
        assert isinstance(before, WQLinear) and weight.scheme == before.scheme, name
        made = WQLinear.from_weight(
            weight, device=before.weight.device, dtype=before.dtype, **self._plan.options
        )
        for other in [n for n in self._plan.schemes if self._model.get_submodule(n) is before]:
            original = self._changes.replace_quantized(other, made)
            assert isinstance(original, nn.Linear)
            report = self._outcome.layers[other]
            method = f"{report.method}+{part}"
            self._outcome.layers[other] = dataclasses.replace(
                compare(other, original, made, None, method), output_error=report.output_error
            )

    def _tell(self, name: str) -> None:
        self._progress(len(self._outcome.layers), len(self._plan.schemes), name)

    def _take(self, block: Block) -> None:
        """Takes a block from the folder, or quantizes it."""
        number = self._blocks.index(block)
        layers = {name: cast(nn.Linear, self._model.get_submodule(name)) for name in block.layers}
        self._changes.begin(block)
        if self._folder is None:
            self._quantize(block, layers)
            return
        finished = self._folder.load(number, self._model, self._plan.options)
        if finished is None:
            own = {id(layer): name for name, layer in reversed(layers.items())}
            own = {key: name for key, name in own.items() if key not in self._outcome.made}
            self._quantize(block, layers)
            made = {name: self._outcome.made[key] for key, name in own.items()}
            self._folder.save(number, self._finished(block, made))
            return
        for name, values in finished.rewritten.items():
            self._changes.rewrite(name, values)
        for name, factor in finished.scaled.items():
            self._changes.scale_inputs(name, factor)
        for name, packed in finished.layers.items():
            self._outcome.made[id(layers[name])] = packed
        self._outcome.unreached.update(finished.unreached)
        for report in finished.reports:
            self._tell(report.name)
            self._install(layers[report.name], report)

    def _finished(self, block: Block, made: dict[str, WQLinear]) -> FinishedBlock:
        unreached = self._outcome.unreached
        return FinishedBlock(
            layers=made,
            rewritten=self._changes.rewritten(),
            scaled=self._changes.scaled_inputs(),
            reports=[self._outcome.layers[name] for name in block.layers],
            unreached={name: unreached[name] for name in block.layers if name in unreached},
        )

    def _install(self, layer: nn.Linear, report: LayerReport) -> None:
        self._changes.replace(report.name, self._outcome.made[id(layer)])
        self._outcome.layers[report.name] = report

    def _quantize(self, block: Block, layers: Mapping[str, nn.Linear]) -> None:
        recipe = self._plan.recipe
        for part in recipe.parts:
            if part.method.prepare_block is not None:
                self._prepare(part, block, layers)
        found = self._observation.stages(recipe.quantizing, layers)
        for number, stage in enumerate(found):
            if len(found) > 1:
                later = [name for other in found[number + 1 :] for name in other.names]
                self._walk.change(stage.names, later)
            group = {name: layers[name] for name in stage.names}
            beside = self._observation.for_report
            inputs = self._observation.of(recipe.quantizing, group, beside, stage)
            self._quantize_layers(block, group, recipe.quantizing, inputs)
            # Else what the next stage needs for a while comes on top of it.
            give_back_free_pages()

    def _prepare(self, part: Part, block: Block, layers: Mapping[str, nn.Linear]) -> None:
        assert part.method.prepare_block is not None
        inputs = self._observation.of(part, layers)
        part.method.prepare_block(self._block_task(block, layers, inputs), part.parameters)

    def _block_task(
        self,
        block: Block,
        layers: Mapping[str, nn.Linear],
        inputs: Mapping[str, LayerInputs],
    ) -> BlockTask:
        return BlockTask(
            name=block.name,
            module=self._model.get_submodule(block.name),
            layers=layers,
            schemes={name: self._plan.schemes[name] for name in layers},
            inputs=inputs,
            walk=self._walk,
            changes=self._changes,
            processes=self._processes,
            tokens=self._observation.tokens,
        )

    def _quantize_layers(
        self,
        block: Block,
        layers: Mapping[str, nn.Linear],
        part: Part,
        inputs: Mapping[str, LayerInputs],
    ) -> None:
        """Makes the layers, and puts them into the model."""
        factor_of = self._changes.input_factor
        tasks = {
            name: layer_task(name, layer, self._plan, self._outcome, inputs, factor_of(layer))
            for name, layer in layers.items()
        }
        together: Mapping[str, WeightParameters] = {}
        if part.method.quantize_block is not None:
            # A layer with several names is made once.
            reached = {
                id(layers[name]): name
                for name in reversed(tasks)
                if name not in self._outcome.unreached
            }
            own = {
                name: without_zero(task)
                for name, task in tasks.items()
                if reached.get(id(layers[name])) == name
            }
            own = {
                name: task
                for name, task in own.items()
                if id(layers[name]) not in self._outcome.made
            }
            together = part.method.quantize_block(
                self._block_task(block, layers, inputs), own, part.parameters
            )
        for name, layer in layers.items():
            self._tell(name)
            self._quantize_layer(layer, tasks[name], part, together.get(name))

    def _quantize_layer(
        self, layer: nn.Linear, task: LayerTask, part: Part, weight: WeightParameters | None
    ) -> None:
        """Args: weight: what the layer becomes, where that is known already."""
        made = self._outcome.made
        if task.name in self._outcome.unreached:
            part = Part(METHODS[LAST], METHODS[LAST].parameters())
        if id(layer) not in made:
            made[id(layer)] = build_layer(task, part, self._plan.options, weight)
        rows = None if task.inputs is None else task.inputs.quantized["rows"].rows
        report = compare(
            *(task.name, layer, made[id(layer)], rows, str(part)),
            input_factor=task.input_factor,
            places=None if task.inputs is None else task.inputs.row_positions,
        )
        self._install(layer, report)
