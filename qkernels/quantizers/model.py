"""`quantize_model`: takes a quantization method through a model, block by block, with a report.

Every layer is checked before the first is replaced, so that an error leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

from torch import nn

from qkernels import rounding
from qkernels.checkpoints import check_planned, mark_quantized
from qkernels.errors import LayerError, SchemeError
from qkernels.modules.awq import _AwqLinear
from qkernels.modules.linear import WQLinear
from qkernels.quantizers.driver import Plan, Progress, drive
from qkernels.quantizers.recipe import Recipe
from qkernels.quantizers.report import QuantizationReport
from qkernels.quantizers.resume import ResumeFolder, fingerprint_batches, fingerprint_model
from qkernels.scheme import QuantScheme
from qkernels.select import check_backend

OUTPUT_HEADS = ("lm_head", "*.lm_head", "embed_out", "output_projection")
"""Names of output heads, which stay in 16 bits unless they are included by name: they are the most
sensitive layer, and their weight often is that of the embedding."""


def quantize_model(
    model: nn.Module,
    method: str | Recipe = "rtn",
    scheme: QuantScheme | str = "w4a16-g128",
    *,
    calibration: Iterable[Any] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    overrides: Mapping[str, QuantScheme | str | None] | None = None,
    backend: str | None = None,
    check_kernels: bool = True,
    resume: str | Path | None = None,
    format: str | None = None,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Replaces the `nn.Linear` layers of `model`, in place, by `WQLinear`.

    Args:
        model: its linear layers hold fp16, bf16 or fp32 weights.
        method: a recipe: a method of `qkernels list methods` with its parameters, or several joined
            by +, such as "a(x=0.5)+b"; the last one quantizes, those before prepare.
        scheme: for all layers that no override names.
        calibration: batches to run through the model (tensors, tuples or dicts of its arguments),
            for the output errors, static activation scales and methods that learn from inputs. All
            are held at once, and the inputs that they give to one block. A layer that they do not
            reach is rounded to nearest, with activations per token where they would be static.
        include: patterns (`fnmatch`) of layer names to quantize; None for all but output heads.
        exclude: patterns of layers to leave alone.
        overrides: pattern -> scheme, or None to leave the layer alone; the first match counts. A
            pattern here includes an output head.
        check_kernels: check a kernel on this device before it runs there first.
        resume: a folder, empty or of an interrupted run with the same arguments. Each block is
            stored there when it is finished, and taken from there by the next run, whose result is
            the same bit for bit. It may be removed afterwards.
        format: the format that the model will be saved in; what that does not hold is refused
            before the first layer is quantized.
        progress: called as progress(done, total, layer name).

    Returns:
        A report of each layer's error and size, and why layers were skipped.

    Raises:
        RecipeError: for a recipe that does not parse.
        LayerError: where nothing is left to quantize, a pattern matches no layer, a layer is
            quantized already, or calibration is missing.
        SchemeError, WeightError, NoKernelError: naming the layer.
        CheckpointError: for a `resume` folder of another run, or layers that `format` does not
            hold.

    The model is unchanged where anything is raised, an interrupt included.
    """
    recipe = Recipe.parse(method)
    check_backend(backend)
    default = QuantScheme.parse(scheme)
    parsed = {
        pattern: None if value is None else QuantScheme.parse(value)
        for pattern, value in (overrides or {}).items()
    }
    report = QuantizationReport(str(recipe))
    schemes = _plan(model, default, include, exclude, parsed, report)
    _check_methods(recipe, schemes, calibrated=calibration is not None)
    if format is not None:
        check_planned(format, _sizes(model, schemes))
    for name in schemes:
        weight = cast(nn.Linear, model.get_submodule(name)).weight
        rounding.check_weight(weight.detach(), f"{name}.weight")
    batches = None if calibration is None else list(calibration)
    if batches is not None and not batches:
        raise LayerError("calibration holds no batch")
    plan = Plan(recipe, schemes, batches, backend, check_kernels)
    folder = None if resume is None else _open_folder(resume, model, plan)
    outcome = drive(model, plan, progress or (lambda done, total, name: None), folder)
    report.layers.extend(outcome.layers[name] for name in schemes)
    report.unreached.update(outcome.unreached)
    mark_quantized(model)
    return replace(report, whole_model=outcome.whole_model)


def _sizes(
    model: nn.Module, schemes: Mapping[str, QuantScheme]
) -> dict[str, tuple[QuantScheme, tuple[int, int]]]:
    layers = {name: cast(nn.Linear, model.get_submodule(name)) for name in schemes}
    return {
        name: (schemes[name], (layer.out_features, layer.in_features))
        for name, layer in layers.items()
    }


def _open_folder(folder: str | Path, model: nn.Module, plan: Plan) -> ResumeFolder:
    batches = plan.batches
    run = {
        "recipe": str(plan.recipe),
        "backend": plan.backend,
        "schemes": {name: str(scheme) for name, scheme in plan.schemes.items()},
        "model": fingerprint_model(model),
        "calibration": None if batches is None else fingerprint_batches(batches),
    }
    return ResumeFolder(folder, run)


def _check_methods(recipe: Recipe, schemes: Mapping[str, QuantScheme], *, calibrated: bool) -> None:
    """Raises where a part of the recipe cannot make a layer's scheme, or lacks calibration."""
    for name, scheme in schemes.items():
        static = scheme.activation.granularity == "static"
        if static and not calibrated:
            raise LayerError(f"{name} has static activations ({scheme}): pass calibration batches")
        for part in recipe.parts:
            reason = part.method.why_not(scheme, part.parameters)
            if reason is not None:
                raise SchemeError(f"{name}: {part} does not make {scheme}: {reason}")
            if part.method.statistics(scheme, part.parameters) and not calibrated:
                raise LayerError(f"{part} learns from inputs: pass calibration batches")


def _plan(
    model: nn.Module,
    default: QuantScheme,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    overrides: Mapping[str, QuantScheme | None],
    report: QuantizationReport,
) -> dict[str, QuantScheme]:
    """Scheme of each layer to quantize; what is left alone goes into `report.skipped`."""
    names = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear)
    ]
    quantized = [
        name for name, module in model.named_modules() if isinstance(module, WQLinear | _AwqLinear)
    ]
    if quantized:
        raise LayerError(f"{quantized[0]} is quantized already: start from the original model")
    for pattern in (*(include or ()), *(exclude or ()), *overrides):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise LayerError(
                f"pattern {pattern!r} matches none of the {len(names)} linear layers, "
                f"for example {names[:3]}"
            )
    if "" in names:
        raise LayerError("the model is a linear layer itself: use WQLinear.from_linear")
    plan: dict[str, QuantScheme] = {}
    for name in names:
        override = next((p for p in overrides if fnmatchcase(name, p)), None)
        included = _matches(name, include or ())
        if _matches(name, exclude or ()):
            report.skipped[name] = "excluded"
        elif override is not None:
            chosen = overrides[override]
            if chosen is None:
                report.skipped[name] = f"left alone by the override {override!r}"
            else:
                plan[name] = chosen
        elif include is not None and not included:
            report.skipped[name] = "not included"
        elif include is None and _matches(name, OUTPUT_HEADS):
            report.skipped[name] = "output heads stay in 16 bits unless they are included by name"
        else:
            plan[name] = default
    if not plan:
        raise LayerError(f"no linear layer is left to quantize out of {len(names)}")
    return plan


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
