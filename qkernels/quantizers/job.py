"""What the driver is given to do, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qkernels.calibration.distributed import ALONE, Processes
from qkernels.calibration.observers import DEFAULT_OBSERVER, ObserverChoice
from qkernels.calibration.statistics import Needs
from qkernels.modules import WQLinear
from qkernels.quantizers.recipe import Part, Recipe
from qkernels.quantizers.report import LayerReport
from qkernels.scheme import QuantScheme


@dataclass(frozen=True)
class Plan:
    """What to do to a model.

    Attributes:
        schemes: of each layer to quantize, by name, in the model's order.
        batches: calibration batches, or None.
        observer: finds the range of static activations.
        processes: that calibrate together, each with batches of its own.
        no_factors: why layers may have no factor of their input, or None.
    """

    recipe: Recipe
    schemes: Mapping[str, QuantScheme]
    batches: Sequence[Any] | None
    backend: str | None
    check_kernels: bool = True
    observer: ObserverChoice = DEFAULT_OBSERVER
    processes: Processes = ALONE
    no_factors: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What every layer is made with."""
        return {"backend": self.backend, "check_kernels": self.check_kernels}

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
