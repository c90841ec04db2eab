"""Training with quantization: fake quantization put into a model, and made real or taken out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast

from torch import nn

from qkernels import rounding
from qkernels.checkpoints import mark_quantized
from qkernels.errors import LayerError, QuantizationError, SchemeError
from qkernels.modules import FakeQuantLinear, WQEmbedding, WQLinear
from qkernels.modules.experts import WQExperts
from qkernels.modules.kinds import is_plain_linear, take_place_of
from qkernels.modules.rows import WQRows
from qkernels.quantizers.plan import parsed_overrides, plan_layers
from qkernels.quantizers.report import LayerReport, QuantizationReport, compare
from qkernels.scheme import QuantScheme
from qkernels.select import check_backend

Step = Literal["lsq", "range"]


def prepare_qat(
    model: nn.Module,
    scheme: QuantScheme | str | None = None,
    *,
    step: Step = "lsq",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    overrides: Mapping[str, QuantScheme | str | None] | None = None,
) -> list[str]:
    """Makes the linear layers of `model`, in place, compute as their quantized forms will.

    Train it then as any other model: weights keep their type and names, and gradients pass
    rounding. `convert_qat` ends it, `undo_qat` takes it out again.

    A model that is quantized already, as by `gptq`, goes on from there: each `WQLinear` is trained
    in its own scheme, from its codes, scales and zero points, with weights in fp32. Experts in one
    parameter stay as they are, and so does a head whose weight an embedding looks up.

    Args:
        scheme: for all layers that no override names; None is "w4a16-g64".
        step: "lsq" learns scales and zero points, parameters `scales` and `zeros` of the layers;
            "range" takes them from the range of the weight at each step.
        include, exclude, overrides: as of `quantize_model`. Conv1Ds and experts in one parameter
            stay as they are.

    Returns:
        The names of the layers.

    Raises:
        LayerError: where no layer is left, or a pattern matches none.
        SchemeError, WeightError: naming the layer, for a scheme or a weight that cannot be trained.

    The model is unchanged where anything is raised.
    """
    if step not in ("lsq", "range"):
        raise SchemeError(f"step is 'lsq' or 'range', got {step!r}")
    if any(isinstance(module, WQLinear) for module in model.modules()):
        if step != "lsq" or any(v is not None for v in (scheme, include, exclude, overrides)):
            raise LayerError(
                "the model is quantized: its layers are trained in their own schemes, by "
                "step='lsq'; leave scheme, step, include, exclude and overrides out"
            )
        return _prepare_quantized(model)
    parsed = parsed_overrides(overrides)
    default = QuantScheme.parse("w4a16-g64" if scheme is None else scheme)
    plan = plan_layers(model, default, include, exclude, parsed)
    found = {
        name: own
        for name, own in plan.schemes.items()
        if not _in_a_stack(model, name) and is_plain_linear(model.get_submodule(name))
    }
    if not found:
        raise LayerError("no nn.Linear is left to train with quantization")
    made: dict[int, FakeQuantLinear] = {}
    for name, own in found.items():
        layer = cast(nn.Linear, model.get_submodule(name))
        if id(layer) in made:
            continue
        rounding.check_weight(layer.weight.detach(), f"{name}.weight")
        try:
            made[id(layer)] = FakeQuantLinear(layer, own, learn=step == "lsq")
        except QuantizationError as error:
            raise type(error)(f"{name}: {error}") from None
    for name in found:
        before = model.get_submodule(name)
        _put(model, name, before, made[id(before)])
    return list(found)


def _prepare_quantized(model: nn.Module) -> list[str]:
    modules = list(model.named_modules(remove_duplicate=False))
    # Who reads them reads what a WQLinear has.
    read = {id(module.source) for _, module in modules if isinstance(module, WQEmbedding)}
    for _, module in modules:
        if isinstance(module, WQExperts | WQRows):
            read |= {id(layer) for layer in module.children()}
    layers = {
        name: module
        for name, module in modules
        if isinstance(module, WQLinear) and id(module) not in read
    }
    if not layers:
        raise LayerError("no WQLinear is left to train: experts and embeddings read each")
    made: dict[int, FakeQuantLinear] = {}
    for name, layer in layers.items():
        if id(layer) in made:
            continue
        if layer.transposed:
            raise LayerError(f"{name} stands for a Conv1D, which is not trained")
        if type(layer) is not WQLinear:
            raise LayerError(f"{name} is a {type(layer).__name__}: call qk.unfuse(model) first")
        try:
            made[id(layer)] = FakeQuantLinear.from_quantized(layer)
        except QuantizationError as error:
            raise type(error)(f"{name}: {error}") from None
    for name, layer in layers.items():
        _put(model, name, layer, made[id(layer)])
    return list(layers)


def convert_qat(
    model: nn.Module, *, backend: str | None = None, check_kernels: bool = True
) -> QuantizationReport:
    """Replaces the layers of `prepare_qat`, in place, by `WQLinear` with exactly their weights.

    Raises:
        LayerError: where there is none.
        SchemeError, NoKernelError, WeightError: naming the layer, for a static scale of activations
            that has met no batch, a kernel that is not there, or weights that are not finite.

    The model is unchanged where anything is raised.
    """
    check_backend(backend)
    layers = _layers(model)
    made: dict[int, WQLinear] = {}
    reports: list[LayerReport] = []
    for name, layer in layers.items():
        rounding.check_weight(layer.weight.detach(), f"{name}.weight")
        try:
            if id(layer) not in made:
                made[id(layer)] = WQLinear.from_weight(
                    layer.quantized(),
                    backend=backend,
                    check_kernels=check_kernels,
                    device=layer.weight.device,
                    dtype=layer.dtype,
                )
        except QuantizationError as error:
            raise type(error)(f"{name}: {error}") from None
        reports.append(compare(name, layer, made[id(layer)], None, "qat"))
    for name, layer in layers.items():
        _put(model, name, layer, made[id(layer)])
    mark_quantized(model)
    return QuantizationReport("qat", reports)


def undo_qat(model: nn.Module) -> None:
    """Makes the layers of `prepare_qat` plain ones again, with the weights that they have now.

    Raises:
        LayerError: where there is none.
    """
    layers = _layers(model)
    made = {id(layer): layer.plain() for layer in layers.values()}
    for name, layer in layers.items():
        _put(model, name, layer, made[id(layer)])


def _layers(model: nn.Module) -> dict[str, FakeQuantLinear]:
    found = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, FakeQuantLinear)
    }
    if not found:
        raise LayerError("the model has no layers of prepare_qat")
    return found


def _in_a_stack(model: nn.Module, name: str) -> bool:
    """Whether a name of the plan is an entry of a parameter."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return True
    return False


def _put(model: nn.Module, name: str, before: nn.Module, layer: nn.Module) -> None:
    take_place_of(layer, before, attributes=False)
    model.set_submodule(name, layer)
