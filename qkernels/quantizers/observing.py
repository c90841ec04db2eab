"""The statistics that the parts of a recipe ask for, of the layers of the block that is present."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from qkernels.calibration.batches import Tokens
from qkernels.calibration.observe import Stage, observe, stages
from qkernels.calibration.statistics import LayerInputs, Needs
from qkernels.calibration.walks import Walk
from qkernels.errors import LayerError
from qkernels.modules.heads import output_heads
from qkernels.quantizers.hessian import warn_of_few
from qkernels.quantizers.job import Plan
from qkernels.quantizers.recipe import Part
from qkernels.quantizers.static_inputs import needs_of


class Observation:
    """What calibration collects, stage by stage.

    Args:
        row_weights: what inputs count; see `ModelTask`.

    Attributes:
        tokens: those of each batch.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        walk: Walk,
        row_weights: Mapping[str, Mapping[int, Tensor]],
    ) -> None:
        self._model, self._plan, self._walk = model, plan, walk
        self._row_weights = row_weights
        self._first_batch = plan.processes.first_batch(len(plan.batches or ()))
        self.tokens = [Tokens.of(batch) for batch in plan.batches or ()]
        self._heads = {id(head) for module in model.modules() for head in output_heads(module)}
        self._warned = False

    def stages(self, part: Part, layers: Mapping[str, nn.Linear]) -> list[Stage]:
        """The layers of a block that are calibrated together, in their order."""
        if self._plan.batches is None or not part.method.in_stages(part.parameters):
            return [Stage(list(layers), [])]
        # Of batches that reach the block, where any do.
        mine = stages(self._walk, layers)
        processes = self._plan.processes
        return processes.first("stages", mine if self._walk.batches() else None) or mine

    def of(
        self,
        part: Part,
        layers: Mapping[str, nn.Linear],
        beside: Callable[[str], Needs] = lambda name: Needs(),
        stage: Stage | None = None,
    ) -> dict[str, LayerInputs]:
        """What `part`, and `beside`, ask to know of layers; nothing without calibration."""
        if self._plan.batches is None:
            return {}
        needs = {name: self._plan.needs(part, name) | beside(name) for name in layers}
        if not any(needs.values()):
            return {}
        stage = stage or Stage(list(layers), [])
        found = observe(
            self._walk,
            layers,
            needs,
            [self._model.get_submodule(name) for name in stage.until],
            stage.once,
            self._row_weights,
            self._plan.processes,
            self._first_batch,
            self.tokens,
        )
        for name, inputs in found.items():
            if not inputs.finite:
                raise LayerError(f"{name}: a calibration batch gives it inputs that are not finite")
            if not self._warned:
                self._warned = warn_of_few(name, inputs, layers[name].in_features, str(part))
        return found

    def for_report(self, name: str) -> Needs:
        """What is collected of every layer, whatever the method."""
        scheme = self._plan.schemes[name]
        is_head = id(self._model.get_submodule(name)) in self._heads
        return Needs(quantized=("rows",)) | needs_of(scheme, self._plan.observer, is_head=is_head)
