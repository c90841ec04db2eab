"""The driver: takes a recipe through the blocks of a model, one at a time.

For each block: statistics of its inputs, which come out of blocks that are quantized already; the
parts of the recipe that prepare it; its layers quantized, measured and replaced; its new outputs
handed on. What is kept is the inputs and outputs of one block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from qkernels import rounding
from qkernels.calibration.blocks import Block, find_blocks
from qkernels.calibration.forwards import CannotFollow
from qkernels.calibration.observe import calibrating, observe
from qkernels.calibration.statistics import LayerInputs, Needs
from qkernels.calibration.walks import BlockByBlock, Walk, WholeModel
from qkernels.errors import LayerError, QuantizationError
from qkernels.layouts import allocate, write_rows
from qkernels.modules import WQLinear
from qkernels.quantizers.changes import Changes
from qkernels.quantizers.method import BlockTask, LayerTask
from qkernels.quantizers.methods import LAST, METHODS
from qkernels.quantizers.recipe import Part, Recipe
from qkernels.quantizers.report import LayerReport, compare
from qkernels.scheme import Activation, QuantScheme
from qkernels.select import layout_for
from qkernels.weight import QuantizedWeight, WeightParameters, row_slices

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Plan:
    """What to do to a model.

    Attributes:
        schemes: of each layer to quantize, by name, in the model's order.
        batches: calibration batches, or None.
    """

    recipe: Recipe
    schemes: Mapping[str, QuantScheme]
    batches: Sequence[Any] | None
    backend: str | None

    def needs(self, part: Part, name: str) -> Needs:
        """What `part` of the recipe asks to know of a layer."""
        return part.method.statistics(self.schemes[name], part.parameters)


@dataclass
class Outcome:
    """What the driver did; see `QuantizationReport`.

    Attributes:
        made: by the id of the layer that each took the place of, since layers may be shared.
    """

    whole_model: str | None
    layers: dict[str, LayerReport] = field(default_factory=dict)
    unreached: dict[str, str] = field(default_factory=dict)
    made: dict[int, WQLinear] = field(default_factory=dict)


def drive(model: nn.Module, plan: Plan, progress: Progress) -> Outcome:
    """Quantizes the layers of `plan` in `model`, which is unchanged where anything is raised."""
    changes = Changes(model)
    blocks = find_blocks(model, plan.schemes)
    try:
        with calibrating(model):
            try:
                return _run(model, plan, blocks, changes, progress, whole=None)
            except CannotFollow as reason:
                changes.undo()
                return _run(model, plan, blocks, changes, progress, whole=str(reason))
    except BaseException:
        changes.undo()
        raise


def _run(
    model: nn.Module,
    plan: Plan,
    blocks: Sequence[Block],
    changes: Changes,
    progress: Progress,
    whole: str | None,
) -> Outcome:
    outcome = Outcome(whole)
    walk: Walk
    batches = plan.batches or ()
    if batches and whole is None:
        walk = BlockByBlock(model, blocks, batches, dense=_asks_for_dense(plan))
    else:
        walk = WholeModel(model, blocks, batches, changes.originals)
    try:
        while (block := walk.next()) is not None:
            changes.begin(block)
            _Block(model, plan, block, walk, changes, progress, outcome).quantize()
            walk.advance()
    finally:
        walk.close()
    progress(len(outcome.layers), len(plan.schemes), "")
    return outcome


def _asks_for_dense(plan: Plan) -> bool:
    asked = (plan.needs(part, name) for part in plan.recipe.parts for name in plan.schemes)
    return any(needs.dense or needs.paired for needs in asked)


class _Block:
    """One block on its way through the recipe."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        block: Block,
        walk: Walk,
        changes: Changes,
        progress: Progress,
        outcome: Outcome,
    ) -> None:
        self._plan, self._block, self._walk, self._changes = plan, block, walk, changes
        self._progress, self._outcome = progress, outcome
        self._module = model.get_submodule(block.name)
        self._layers = {name: cast(nn.Linear, model.get_submodule(name)) for name in block.layers}

    def quantize(self) -> None:
        *preparing, last = self._plan.recipe.parts
        for part in preparing:
            self._prepare(part, self._observe(part))
        inputs = self._observe(last, self._for_report)
        if last.method.prepare_block is not None and self._prepare(last, inputs):
            inputs = self._observe(last, self._for_report)
        for name, layer in self._layers.items():
            self._progress(len(self._outcome.layers), len(self._plan.schemes), name)
            self._quantize_layer(name, layer, last, inputs.get(name))

    def _for_report(self, name: str) -> Needs:
        """What is collected of every layer, whatever the method."""
        static = self._plan.schemes[name].activation.granularity == "static"
        return Needs(quantized=("rows", *(("largest",) if static else ())))

    def _observe(
        self, part: Part, beside: Callable[[str], Needs] = lambda name: Needs()
    ) -> dict[str, LayerInputs]:
        if self._plan.batches is None:
            return {}
        needs = {name: self._plan.needs(part, name) | beside(name) for name in self._layers}
        return observe(self._walk, self._layers, needs) if any(needs.values()) else {}

    def _prepare(self, part: Part, inputs: Mapping[str, LayerInputs]) -> bool:
        """Whether the block was rewritten."""
        before = self._changes.rewritten()
        assert part.method.prepare_block is not None
        task = BlockTask(
            name=self._block.name,
            module=self._module,
            layers=self._layers,
            schemes={name: self._plan.schemes[name] for name in self._layers},
            inputs=inputs,
            walk=self._walk,
            changes=self._changes,
        )
        part.method.prepare_block(task, part.parameters)
        after = self._changes.rewritten()
        return any(after[name] is not before.get(name) for name in after)

    def _quantize_layer(
        self, name: str, layer: nn.Linear, part: Part, inputs: LayerInputs | None
    ) -> None:
        scheme = self._plan.schemes[name]
        reached = inputs is None or inputs.rows > 0
        if not reached:
            inputs, part = None, Part(METHODS[LAST], METHODS[LAST].parameters())
            scheme, self._outcome.unreached[name] = _without_inputs(scheme)
        made = self._outcome.made
        if id(layer) not in made:
            task = LayerTask(
                name=name,
                weight=layer.weight.detach(),
                bias=None if layer.bias is None else layer.bias.detach(),
                scheme=scheme,
                inputs=inputs,
                activation_scale=_activation_scale(name, scheme, inputs),
            )
            made[id(layer)] = _build(task, part, self._plan.backend)
        packed = made[id(layer)]
        rows = None if inputs is None else inputs.quantized["rows"].rows
        report = compare(name, layer, packed, rows, str(part))
        self._outcome.layers[name] = report
        self._changes.replace(name, packed)


def _without_inputs(scheme: QuantScheme) -> tuple[QuantScheme, str]:
    """The scheme of a layer that calibration never reached, and what to say of it."""
    if scheme.activation.granularity != "static":
        return scheme, "rounded to nearest"
    # Per token needs no data and keeps the weights' format; a scale that is guessed may saturate.
    dynamic = dataclasses.replace(scheme, activation=Activation(scheme.activation.dtype, "token"))
    return dynamic, f"rounded to nearest, with activations scaled per token ({dynamic})"


def _activation_scale(name: str, scheme: QuantScheme, inputs: LayerInputs | None) -> float | None:
    if scheme.activation.granularity != "static":
        return None
    assert inputs is not None
    largest = float(inputs.quantized["largest"].value)
    if not largest < float("inf"):
        raise LayerError(f"{name}: a calibration batch gives it inputs that are not finite")
    return largest / scheme.activation.largest or 1.0


def _build(task: LayerTask, part: Part, backend: str | None) -> WQLinear:
    assert part.method.quantize is not None
    try:
        made = part.method.quantize(task, part.parameters)
        assert (made.n, made.k) == tuple(task.weight.shape), part.method.name
        if isinstance(made, QuantizedWeight):
            weight = made.replace(bias=task.bias)
            return WQLinear.from_weight(weight, backend=backend, device=task.weight.device)
        return _rounded(task, made, backend)
    except QuantizationError as error:
        raise type(error)(f"{task.name}: {error}") from None


def _rounded(task: LayerTask, parameters: WeightParameters, backend: str | None) -> WQLinear:
    """The layer whose codes are nearest under `parameters`; they are never held whole."""
    weight, device = task.weight, task.weight.device
    n, k, fields = parameters.n, parameters.k, parameters.fields
    layout = layout_for(parameters.scheme, n, k, device, backend, fields)
    packed = allocate(layout, parameters, device)
    for start, stop in row_slices(*weight.shape):
        write_rows(packed, start, rounding.encode_rows(weight[start:stop], parameters, start))
    bias = None if task.bias is None else task.bias.clone()
    return WQLinear(packed, bias, backend=backend)
