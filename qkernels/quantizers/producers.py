"""What in a block can take a factor in front of layers, for methods that scale inputs."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qkernels.calibration.neighbours import Neighbours, find_neighbours, still_neighbours
from qkernels.calibration.walks import Walk
from qkernels.quantizers.method import BlockTask
from qkernels.scheme import QuantScheme

_Structure = frozenset[tuple[str, torch.Size]]

_FOUND: WeakKeyDictionary[Walk, dict[_Structure, list[Neighbours]]] = WeakKeyDictionary()
"""What was found in the blocks of a walk so far: most of a model's are built alike."""


def neighbours_of(task: BlockTask) -> list[Neighbours]:
    """All in the block, norms first; none where no batch reaches it, and none of modules that have
    a parameter together with others."""
    structure = frozenset((name, p.shape) for name, p in task.module.named_parameters())
    found = _FOUND.setdefault(task.walk, {})

    def look() -> list[Neighbours]:
        batch = task.batches()[0]

        def run() -> object:
            return task.run(batch)

        if structure in found and still_neighbours(found[structure], task.module, run):
            return found[structure]
        return find_neighbours(task.module, run)

    seen = task.shared("neighbours", look)
    if seen is None:
        return []
    found[structure] = seen
    return [one for one in seen if not _is_shared(task, one)]


def _is_shared(task: BlockTask, found: Neighbours) -> bool:
    names = [f"{task.name}.{name}".lstrip(".") for name in (found.producer, *found.consumers)]
    producer = task.module.get_submodule(found.producer)
    own = [key for key, value in producer._parameters.items() if value is not None]
    parameters = [*(f"{names[0]}.{key}" for key in own), *(f"{name}.weight" for name in names[1:])]
    return any(task.changes.is_shared(name) for name in parameters)


def consumers_of(task: BlockTask, found: Neighbours) -> list[str]:
    """The layers behind a producer that are quantized and that calibration reached, by their names
    in the model."""
    names = [f"{task.name}.{name}".lstrip(".") for name in found.consumers]
    return [n for n in names if n in task.layers and n in task.inputs and task.inputs[n].rows]


def around_one(factor: Tensor) -> Tensor:
    """The factor of columns times one number, so that no 16-bit type overflows; the product with
    inputs that are divided by it does not change."""
    return factor / (factor.max() * factor.min()).sqrt()


def any_scale(scheme: QuantScheme) -> float | None:
    """Of static activations: weights are rounded the same under every one."""
    return 1.0 if scheme.activation.is_static else None
