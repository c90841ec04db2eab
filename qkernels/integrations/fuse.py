"""`fuse`: the quantized layers of a model that read the same as one product, and what they read
quantized where it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.calibration.forwards import run_batch
from qkernels.calibration.observe import calibrating
from qkernels.calibration.synthetic import random_tokens, why_no_tokens
from qkernels.errors import LayerError
from qkernels.integrations.producers import (
    Calls,
    make_gate,
    make_norm,
    may_be_gate,
    may_be_norm,
)
from qkernels.modules import WQLinear
from qkernels.modules.fused import Fused, FusedPart, why_not_fused
from qkernels.modules.producers import OneReader, Producer, Reader, ReadingLinear


@dataclass(frozen=True)
class FuseReport:
    """Attributes:
    fused: the names of the layers of each group.
    left: names of layers that read the same -> why they are not one product.
    norms: the names of norms that quantize what they give.
    gates: the names of gated MLPs that quantize what their last layer reads.
    unchanged: names of other norms and gated MLPs whose output an int8 layer reads -> why not.
    """

    fused: list[tuple[str, ...]]
    left: dict[tuple[str, ...], str]
    norms: list[str] = field(default_factory=list)
    gates: list[str] = field(default_factory=list)
    unchanged: dict[str, str] = field(default_factory=dict)


def fuse(model: nn.Module, example: Any = None, *, exact: bool = True) -> FuseReport:
    """Makes the quantized layers of `model` that read the same x one product, in place, and has x
    quantized where it is made.

    The first are projections to queries, keys and values, or to a gate and what it gates, whatever
    the architecture: the model is run once to see who reads what. Each x is then quantized, and its
    weights are gone through, once instead of three times. Where layers quantize x to int8, a token
    at a time, on the CPU, an RMSNorm before them, and the product of a gate with what it gates, do
    that in the pass that makes x.

    Outputs are the same, bit for bit, if `exact`; modules keep their names, their weights and what
    is saved of them; `unfuse` takes it back, and so does moving the model to another device. Where
    a gradient is asked for, under autocast and torch.compile, norms and gates do what they did.

    Args:
        example: a batch to run (a tensor, or a tuple or dict of the model's arguments); None is a
            few tokens drawn at random.
        exact: where False, layer norms quantize what they give too, and gates of SiLU, or of GELU
            by tanh, are opened in the pass of their product. Both sum or round otherwise than
            torch, by a rounding of what they give at most, so int8 numbers differ here and there.

    Raises:
        LayerError: for a model without quantized layers, or one that embeds no tokens where there
            is no example.
    """
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    layers = [module for module in model.modules() if type(module) is WQLinear]
    if not layers:
        raise LayerError("the model has no WQLinear that is not fused already: quantize it first")
    if example is None:
        reason = why_no_tokens(model)
        if reason is not None:
            raise LayerError(f"a {type(model).__name__} {reason}: give an example batch")
        example = random_tokens(model, sequences=1, length=8)[0]
    norms = [module for module in model.modules() if may_be_norm(module)]
    gates = [module for module in model.modules() if may_be_gate(module)]
    acts = [child for gate in gates for child in gate.children()]
    watched = {id(module): module for module in (*layers, *norms, *gates, *acts)}
    calls = Calls(watched.values())
    try:
        with calibrating(model), torch.no_grad():
            before = run_batch(model, example)
    finally:
        calls.end()
    report = FuseReport([], {})
    groups = _make_groups(calls, names, report)

    def readers(taken: Sequence[WQLinear]) -> list[Reader]:
        made: dict[int, Reader] = {}
        for layer in taken:
            one: Reader = groups[id(layer)] if id(layer) in groups else OneReader(layer)
            made[id(one)] = one
        return list(made.values())

    made: list[Producer] = []
    with calibrating(model), torch.no_grad():
        for modules, make, listed in (
            (norms, make_norm, report.norms),
            (gates, make_gate, report.gates),
        ):
            for module in modules:
                name, called = names[id(module)], calls.of.get(id(module))
                producer = make(name, called[0], readers, calls, exact) if called else None
                if isinstance(producer, Producer):
                    made.append(producer)
                    listed.append(name)
                elif producer is not None:
                    report.unchanged[name] = producer
        alike = _same if exact else _close
        if made and not alike(before, run_batch(model, example)):
            _take_back(made, report)
    return report


def unfuse(model: nn.Module) -> None:
    """Takes back what `fuse` did: each layer has memory of its own again."""
    for module in list(model.modules()):
        if isinstance(module, FusedPart):
            module._fused[0].dissolve()
        elif isinstance(module, ReadingLinear):
            module._producer.dissolve()


def _make_groups(calls: Calls, names: Mapping[int, str], report: FuseReport) -> dict[int, Fused]:
    """Makes layers that read the same one product; the group of each layer by its id."""
    groups: dict[int, Fused] = {}
    for read in calls.readers.values():
        once = {layer: version for layer, version in read if calls.once(layer) is not None}
        group = list(once)
        named = tuple(names[id(layer)] for layer in group)
        reason = why_not_fused(group) if group else None
        if reason is None and len(set(once.values())) > 1:
            reason = "x is written to between them"
        if group and reason is None:
            fused = Fused(group, named)
            groups.update((id(layer), fused) for layer in group)
            report.fused.append(named)
        elif len(group) > 1 and reason is not None:
            report.left[named] = reason
    return groups


_CLOSE = 2**-3
"""|difference| / |output|, at most, of a model's outputs where they need not be the same: far
beyond what other roundings to int8 leave of each other, and below outputs that are wrong."""


def _close(a: Any, b: Any) -> bool:
    """Whether all floating tensors of two outputs are close; of what a model has cached, too."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not a.is_floating_point():
            return True
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return False
        left, right = (each.double().where(finite, 0) for each in (a, b))
        return bool((left - right).norm() <= _CLOSE * left.norm())
    return _all(_close, a, b)


def _take_back(made: Sequence[Producer], report: FuseReport) -> None:
    for producer in made:
        producer.dissolve()
        report.unchanged[producer.name] = "the model's outputs were others"
    report.norms.clear()
    report.gates.clear()


def _same(a: Any, b: Any) -> bool:
    """Whether all tensors of two outputs have the same bits; what holds none counts as the same."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return False
        return bool(((a == b) | ((a != a) & (b != b))).all())
    return _all(_same, a, b)


def _all(alike: Callable[[Any, Any], bool], a: Any, b: Any) -> bool:
    """Whether the parts of two outputs are alike; what holds no tensor counts as the same."""
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and all(alike(a[key], b.get(key)) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(alike, a, b))
    return True
