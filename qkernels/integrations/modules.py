"""`replace_linears`: the quantized layers of other packages in a loaded model become `WQLinear`."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.checkpoints.held import HeldStore
from qkernels.checkpoints.pretrained import mark_quantized
from qkernels.checkpoints.table import FORMATS
from qkernels.errors import CheckpointError, LayerError, QuantizationError
from qkernels.integrations.kinds import KINDS, ModuleKind
from qkernels.modules.foreign import is_foreign
from qkernels.modules.kinds import is_linear_kind, take_place_of, why_not_plain
from qkernels.modules.linear import WQLinear
from qkernels.weight import QuantizedWeight

_DENSE = "it is not quantized"

_MARKS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method")
"""By which Transformers, accelerate and PEFT know models that they may not move or train."""


@dataclass(frozen=True)
class ReplacedLayer:
    """A layer that is a `WQLinear` now.

    Attributes:
        kind: what it was.
    """

    name: str
    kind: str
    scheme: str
    n: int
    k: int


@dataclass(frozen=True)
class ReplacementReport:
    """What `replace_linears` did.

    Attributes:
        replaced: in the model's order.
        left: other linear and quantized layers -> why they are as they were.
    """

    replaced: list[ReplacedLayer] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {"replaced": [asdict(layer) for layer in self.replaced], "left": dict(self.left)}


@dataclass(frozen=True)
class _Candidate:
    """A module that is to be replaced, with the names that it has in the model."""

    module: nn.Module
    kind: ModuleKind
    names: list[str]


class _Left(Exception):
    """Why a module is left alone."""


def replace_linears(
    model: nn.Module,
    *,
    device: torch.device | str | None = None,
    check_kernels: bool = True,
) -> ReplacementReport:
    """Puts `WQLinear` in the place of each quantized layer that another package made.

    Known are the modules of AutoAWQ, GPTQModel, AutoGPTQ, AutoRound, compressed-tensors,
    bitsandbytes, HQQ and torchao whose words are as files store them (`integrations.kinds.KINDS`).
    Weights stay the same numbers, bit for bit, as the format's reader says; hooks and training mode
    go on to the new layers. A layer that no scheme holds exactly is left alone, and the report says
    why. Until all layers are made, the old ones are there too.

    Transformers saves the model as one of ours afterwards; one with quantized layers of another
    package left in it cannot be saved.

    Args:
        model: changed in place. Call this after loading and before the first forward, at which some
            packages unpack or reorder weights.
        device: where the new layers are; None for where the old ones are.
        check_kernels: check a kernel on a device before it runs there first.

    Raises:
        LayerError: where nothing could be replaced, or a layer is damaged or offloaded. The model
            is unchanged then, as after any other error.
    """
    left: dict[str, str] = {}
    made: list[tuple[_Candidate, WQLinear]] = []
    for candidate in _candidates(model, left):
        try:
            layer = _layer(candidate, device, check_kernels)
        except _Left as reason:
            left.update(dict.fromkeys(candidate.names, str(reason)))
        else:
            made.append((candidate, layer))
    if not made:
        raise LayerError(_nothing_found(model, left))
    for candidate, layer in made:
        _take_over(layer, candidate.module)
    for candidate, layer in made:
        for name in candidate.names:
            model.set_submodule(name, layer)
    mark_quantized(model)
    if set(left.values()) <= {_DENSE}:
        for mark in _MARKS:
            vars(model).pop(mark, None)
    replaced = [
        ReplacedLayer(
            name, candidate.kind.name, str(layer.scheme), layer.out_features, layer.in_features
        )
        for candidate, layer in made
        for name in candidate.names
    ]
    return ReplacementReport(replaced, left)


def _candidates(model: nn.Module, left: dict[str, str]) -> list[_Candidate]:
    """The modules of known kinds; why others are left goes to `left`."""
    found: dict[int, _Candidate] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, WQLinear):
            continue
        kind = next((kind for kind in KINDS if kind.matches(module)), None)
        if kind is None:
            reason = _why_unknown(module)
            if reason is not None:
                left[name] = reason
        elif not name:
            left[name] = "it is the model itself: put it into an nn.Sequential"
        elif id(module) in found:
            found[id(module)].names.append(name)
        else:
            found[id(module)] = _Candidate(module, kind, [name])
    return list(found.values())


def _why_unknown(module: nn.Module) -> str | None:
    """Why a module of no known kind is left, or None where nobody would expect otherwise."""
    if is_foreign(module):
        return (
            f"a {type(module).__name__}, whose tensors are those of no known layer, or may be in "
            "the order of a kernel of its own: load the model with the package's plain backend "
            "(GPTQModel's and Transformers' backend='torch', AutoAWQ without exllama and fused "
            "modules), or its folder with qkernels.load_model"
        )
    if is_linear_kind(module):
        return why_not_plain(module) or _DENSE
    return None


def _layer(
    candidate: _Candidate, device: torch.device | str | None, check_kernels: bool
) -> WQLinear:
    """The new layer.

    Raises:
        _Left: where it cannot be one of ours.
        LayerError: where the module is damaged or offloaded.
    """
    module, kind, name = candidate.module, candidate.kind, candidate.names[0]
    if "forward" in vars(module) and not (kind.wraps_forward or hasattr(module, "_hf_hook")):
        raise _Left("its forward has been replaced")
    reason = kind.why_not(module)
    if reason is not None:
        raise _Left(reason)
    tensors = {f"{name}.{part}": tensor for part, tensor in kind.tensors(module).items()}
    offloaded = next((key for key, tensor in tensors.items() if tensor.is_meta), None)
    if offloaded is not None:
        raise LayerError(f"{offloaded} is offloaded: load the model onto one device")
    weight = _simplest(_read(kind, name, tensors, kind.metadata(module, name), module))
    target = next(iter(tensors.values())).device if device is None else device
    return WQLinear.from_weight(
        weight, device=target, check_kernels=check_kernels, dtype=kind.dtype(module)
    )


def _read(
    kind: ModuleKind,
    name: str,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    module: nn.Module,
) -> QuantizedWeight:
    store = HeldStore(tensors, metadata=metadata)
    config = {"quantization_config": kind.section(module, name)}
    row = FORMATS[kind.format]
    try:
        plan = row.read_plan(config, store)
    except CheckpointError as error:
        raise _Left(str(error)) from None
    if name not in plan:
        raise _Left(f"a {type(module).__name__} without the tensors of {kind.name}")
    try:
        return row.read_layer(store, name, plan[name])
    except QuantizationError as error:
        raise LayerError(
            f"{name}, {kind.name}, is damaged: {error}. Load the model anew, or leave the layer "
            "out of what is quantized"
        ) from None


def _simplest(weight: QuantizedWeight) -> QuantizedWeight:
    """The same numbers without zero points where all of these are half the range."""
    scheme, zeros = weight.scheme, weight.zeros
    if scheme.symmetric or zeros is None or not scheme.weight_only or weight.offsets is not None:
        return weight
    symmetric = replace(scheme, symmetric=True)
    if zeros.is_floating_point() or (zeros != symmetric.implied_zero).any():
        return weight
    return weight.replace(scheme=symmetric, zeros=None)


def _take_over(layer: WQLinear, module: nn.Module) -> None:
    """Gives the new layer what is on the old one, but for the attributes of its package."""
    take_place_of(layer, module, attributes=False)
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        importlib.import_module("accelerate.hooks").add_hook_to_module(layer, hook)


def _nothing_found(model: nn.Module, left: dict[str, str]) -> str:
    known = ", ".join(dict.fromkeys(kind.name for kind in KINDS))
    text = f"{type(model).__name__} has no layer that can be replaced; known are {known}"
    if set(left.values()) <= {_DENSE}:
        return f"{text}. Where its layers are dense, use qkernels.quantize_model"
    reasons = [(name, reason) for name, reason in left.items() if reason != _DENSE]
    listed = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in reasons[:3])
    return f"{text}. {listed}"
