"""`quantize_model`: takes a quantization method through a model, block by block, with a report.

Every layer is checked before the first is replaced, so that an error leaves the model as it was.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.distributed import ProcessGroup

from qkernels import rounding
from qkernels.calibration.batches import check_tokens, checked
from qkernels.calibration.distributed import ALONE, Processes
from qkernels.calibration.observers import DEFAULT_OBSERVER, ObserverChoice
from qkernels.calibration.ranges import Numbers
from qkernels.calibration.synthetic import random_tokens, why_no_tokens
from qkernels.checkpoints import mark_quantized
from qkernels.checkpoints.format import WeightKind
from qkernels.checkpoints.table import FORMATS, check_holds
from qkernels.checkpoints.written import check_writes
from qkernels.errors import LayerError, SchemeError
from qkernels.modules.kinds import become, is_plain_linear
from qkernels.progress import Progress, silent
from qkernels.quantizers.driver import drive
from qkernels.quantizers.embeddings import EmbeddingForms, embedding_kinds
from qkernels.quantizers.gradients import pieces
from qkernels.quantizers.job import Outcome, Plan
from qkernels.quantizers.linear_forms import LinearForms
from qkernels.quantizers.making import planned_kind
from qkernels.quantizers.plan import LayerPlan, parsed_overrides, plan_layers
from qkernels.quantizers.recipe import Recipe
from qkernels.quantizers.report import LayerReport, QuantizationReport
from qkernels.quantizers.resume import (
    WHAT_DIFFERS,
    ResumeFolder,
    fingerprint_batches,
    fingerprint_model,
)
from qkernels.scheme import QuantScheme
from qkernels.select import check_backend


def quantize_model(
    model: nn.Module,
    method: str | Recipe = "rtn",
    scheme: QuantScheme | str = "w4a16-g128",
    *,
    calibration: Iterable[Any] | Literal["random"] | None = None,
    observer: str | ObserverChoice = DEFAULT_OBSERVER,
    process_group: ProcessGroup | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    overrides: Mapping[str, QuantScheme | str | None] | None = None,
    backend: str | None = None,
    check_kernels: bool = True,
    resume: str | Path | None = None,
    format: str | None = None,
    progress: Progress = silent,
) -> QuantizationReport:
    """Replaces the linear layers of `model`, in place, by `WQLinear`; embeddings where asked.

    These are its `nn.Linear`s, the Conv1Ds of Transformers, and the experts that Transformers holds
    in one parameter, each a layer of its own: `<parameter>.expert_<number>`. A subclass of
    `nn.Linear` may compute something else, and is left alone. An embedding that is named becomes a
    `WQEmbedding`, rounded to nearest; where an output head has its weight and is quantized too,
    both have that of the head.

    Args:
        model: its linear layers hold fp16, bf16 or fp32 weights. A model that is an `nn.Linear`
            itself becomes a `WQLinear`; to patterns its name is "layer".
        method: a recipe: a method of `qkernels list methods` with its parameters, or several joined
            by +, such as "a(x=0.5)+b"; the last one quantizes, those before prepare.
        scheme: for all layers that no override names.
        calibration: batches to run through the model (tensors, tuples or dicts of its arguments),
            or "random" for tokens that are drawn at random where there is no data; for the output
            errors, static activation scales and methods that learn from inputs. `hqq` draws them
            where none are given. All are held at once, and the inputs that they give to one block.
            A layer that they do not reach is rounded to nearest, with activations per token where
            they would be static.
        observer: what finds the range of static activations: an observer of `qkernels list
            observers` with its parameters, such as "percentile(percent=99.9)".
        process_group: of `torch.distributed`, such as `torch.distributed.group.WORLD`, which is
            None, this process alone, before `init_process_group`: its
            processes all call this with the same model and arguments, each with calibration batches
            of its own, which may be more or fewer than others'. Each gets the codes that one
            process would make of all batches, those of the first process first, but for what the
            order of sums changes; all get the same. What one raises, all raise.
        include: patterns (`fnmatch`) of layer names to quantize; None for all but output heads and
            layers that share their weight with an embedding. The name of a parameter of experts
            stands for all of them. An embedding is quantized by a pattern whose last part, behind
            dots, names it: "*embed_tokens" and not "*" or "model.*".
        exclude: patterns of layers to leave alone.
        overrides: pattern -> scheme, or None to leave the layer alone; the first match counts. A
            pattern here includes an output head, and an embedding that it names as above. Head and
            embedding of one weight must have one scheme where both are named.
        check_kernels: check a kernel on this device before it runs there first.
        resume: a folder, empty or of an interrupted run with the same arguments. Each block is
            stored there when it is finished, and taken from there by the next run, whose result is
            the same bit for bit. It may be removed afterwards.
        format: the format that the model will be saved in; what that does not hold is refused
            before the first layer is quantized.
        progress: called as progress(done, total, layer name).

    Returns:
        A report of each layer's error and size, and of what was left alone and why.

    Raises:
        RecipeError: for a recipe or an observer that does not parse.
        LayerError: where nothing is left to quantize, a pattern matches no layer, a layer is
            quantized already, or calibration is missing.
        SchemeError, WeightError, NoKernelError: naming the layer.
        CheckpointError: for a `resume` folder of another run, or layers that `format` does not
            hold.

    The model is unchanged where anything is raised, an interrupt included.
    """
    if is_plain_linear(model):
        # No module holds it that could be made to hold another layer.
        holder = nn.Sequential(OrderedDict(layer=model))
        report = quantize_model(
            holder,
            method,
            scheme,
            calibration=calibration,
            observer=observer,
            process_group=process_group,
            include=include,
            exclude=exclude,
            overrides=overrides,
            backend=backend,
            check_kernels=check_kernels,
            resume=resume,
            format=format,
            progress=progress,
        )
        become(model, holder[0])
        return report
    processes = Processes(process_group)
    with processes.together():
        default = QuantScheme.parse(scheme)
        recipe, choice = Recipe.parse(method, default), ObserverChoice.parse(observer)
        check_backend(backend)
        parsed = parsed_overrides(overrides)
        layers = plan_layers(model, default, include, exclude, parsed)
        batches = calibration_of(model, recipe, layers, calibration)
        plan = plan_run(layers, recipe, choice, batches, backend, check_kernels, processes)
        check_tokens(model, plan.batches or ())
        _check_inference(model, recipe)
        _check_shared(recipe, processes, resume)
        forms = LinearForms(model, plan.schemes)
        folder = None
        try:
            if format is not None:
                kinds = kinds_of(model, plan, forms)
                check_holds(format, embedding_kinds(model, layers.embeddings))
                check_writes(format, model, kinds)
                plan = for_format(plan, format, kinds)
            for name in plan.schemes:
                weight = cast(nn.Linear, model.get_submodule(name)).weight
                rounding.check_weight(weight.detach(), f"{name}.weight")
            looked_up = EmbeddingForms(model, layers.embeddings)
            if processes.size > 1:
                _check_alike(layers, plan, fingerprint_model(model))
            if resume is not None:
                folder = open_folder(resume, layers, plan, fingerprint_model(model))
            outcome = drive(model, plan, progress, folder) if plan.schemes else Outcome(None)
        except BaseException:
            forms.undo()
            raise
        finally:
            if folder is not None:
                folder.close()
        forms.finish()
        reports = looked_up.put(outcome.layers)
        mark_quantized(model)
        return report_of(layers, recipe, outcome, reports)


def calibration_of(
    model: nn.Module,
    recipe: Recipe,
    layers: LayerPlan,
    calibration: Iterable[Any] | None,
    device: torch.device | None = None,
) -> Iterable[Any] | None:
    """The batches that `calibration`, as of `quantize_model`, stands for: random tokens by that
    word, and where none are given and such are what the recipe takes. Static activations, whose
    scales are learned from batches too, want given ones.

    Args:
        device: of drawn tokens; None is that of the model's embedding.
    """
    asked = isinstance(calibration, str) and calibration == "random"
    static = any(scheme.activation.is_static for scheme in layers.schemes.values())
    drawn = any(part.method.draws_tokens(part.parameters) for part in recipe.parts) and not static
    if asked or (calibration is None and drawn and why_no_tokens(model) is None):
        tokens = random_tokens(model)
        return tokens if device is None else [ids.to(device) for ids in tokens]
    return calibration


def plan_run(
    layers: LayerPlan,
    recipe: Recipe,
    observer: ObserverChoice,
    calibration: Iterable[Any] | None,
    backend: str | None,
    check_kernels: bool,
    processes: Processes = ALONE,
) -> Plan:
    """What the driver is to do; arguments and errors as for `quantize_model`."""
    check_methods(recipe, layers.schemes, calibrated=calibration is not None)
    embeddings = _embeddings(layers)
    for part in recipe.parts if embeddings else ():
        if part.method.rewrites_embeddings(part.parameters):
            raise LayerError(
                f"{part} gives embeddings other values, so they stay in 16 bits: leave out "
                f"{', '.join(embeddings)}"
            )
    _check_observer(observer, layers.schemes)
    batches = None if calibration is None else _cut(checked(calibration), recipe)
    return Plan(recipe, layers.schemes, batches, backend, check_kernels, observer, processes)


def report_of(
    layers: LayerPlan, recipe: Recipe, outcome: Outcome, embeddings: Mapping[str, LayerReport]
) -> QuantizationReport:
    """What became of the layers, with the reports of the embeddings."""
    reports = {**outcome.layers, **embeddings}
    return QuantizationReport(
        str(recipe),
        layers=[reports[name] for name in (*layers.schemes, *_embeddings(layers))],
        skipped=layers.skipped,
        shares=layers.shares,
        unreached=outcome.unreached,
        whole_model=outcome.whole_model,
    )


def _embeddings(layers: LayerPlan) -> dict[str, QuantScheme]:
    """The schemes of embeddings, by name."""
    return {name: e.scheme for e in layers.embeddings for name in e.names}


def kinds_of(model: nn.Module, plan: Plan, forms: LinearForms) -> dict[str, WeightKind]:
    """What is known of the layers before they are quantized."""
    found = {}
    for name, scheme in plan.schemes.items():
        layer = cast(nn.Linear, model.get_submodule(name))
        shape = layer.out_features, layer.in_features
        found[name] = planned_kind(scheme, plan.recipe.quantizing, shape, forms.instead_of(name))
    return found


def for_format(plan: Plan, format: str, kinds: Mapping[str, WeightKind]) -> Plan:
    """The plan of a model that is to be saved in `format`, which may hold no factors of inputs."""
    parts = plan.recipe.parts
    if not any(part.method.scales_inputs(part.parameters) for part in parts):
        return plan
    factor = frozenset({"input_factor"})
    reason = FORMATS[format].why_not_all(
        {name: replace(kind, fields=kind.fields | factor) for name, kind in kinds.items()}
    )
    return plan if reason is None else replace(plan, no_factors=f"{format} {reason}")


def _identity(layers: LayerPlan, plan: Plan, fingerprint: str) -> dict[str, Any]:
    """What makes a run the same as another, but for its batches; with keys of `WHAT_DIFFERS`."""
    schemes = {**plan.schemes, **_embeddings(layers)}
    return {
        "recipe": str(plan.recipe) + ("" if plan.no_factors is None else ", inputs as they are"),
        "observer": str(plan.observer),
        "backend": plan.backend,
        "schemes": {name: str(scheme) for name, scheme in schemes.items()},
        "model": fingerprint,
    }


def _cut(batches: list[Any], recipe: Recipe) -> list[Any]:
    """Calibration batches of no more sequences than the methods of a recipe want."""
    sizes = [part.method.most_sequences(part.parameters) for part in recipe.parts]
    size = min((size for size in sizes if size is not None), default=None)
    return batches if size is None else [part for batch in batches for part in pieces(batch, size)]


def open_folder(
    folder: str | Path, layers: LayerPlan, plan: Plan, fingerprint: str
) -> ResumeFolder:
    """The folder of a run on the model with that fingerprint."""
    batches = plan.batches
    calibration = None if batches is None else fingerprint_batches(batches)
    return ResumeFolder(
        folder, {**_identity(layers, plan, fingerprint), "calibration": calibration}
    )


def _check_shared(recipe: Recipe, processes: Processes, resume: str | Path | None) -> None:
    """Raises where several processes cannot do this together."""
    if processes.size == 1:
        return
    for part in recipe.parts:
        if part.method.uses_batches:
            raise LayerError(
                f"{part} runs the calibration batches itself, which the processes of a "
                "process_group do not share: leave process_group out"
            )
    if resume is not None:
        raise LayerError("a folder to resume from is of one process: leave process_group out")


def _check_alike(layers: LayerPlan, plan: Plan, fingerprint: str) -> None:
    """Raises where processes were called with different arguments."""
    calibration = None if plan.batches is None else "of its own"
    own = {**_identity(layers, plan, fingerprint), "calibration": calibration}
    first, *others = plan.processes.gather("run", own)
    for number, other in enumerate(others, 1):
        different = [WHAT_DIFFERS[key] for key in first if first[key] != other[key]]
        if different:
            raise LayerError(
                f"process {number} of the process_group differs from process 0 in "
                f"{' and '.join(different)}: give all of them the same"
            )


def _check_observer(choice: ObserverChoice, schemes: Mapping[str, QuantScheme]) -> None:
    for name, scheme in schemes.items():
        if scheme.activation.is_static:
            reason = choice.observer.why_not(Numbers.of(scheme.activation))
            if reason is not None:
                raise SchemeError(f"{name}: observer {choice} is not for {scheme}: {reason}")


def _check_inference(model: nn.Module, recipe: Recipe) -> None:
    """Raises LayerError for a method that rewrites or learns from tensors of inference mode."""
    made = next((n for n, p in model.named_parameters() if p.is_inference()), None)
    works = next((part for part in recipe.parts if part.method.quantize is None), None)
    works = works or next((part for part in recipe.parts if part.method.prepares), None)
    if made is not None and works is not None:
        raise LayerError(
            f"{made} was made in inference mode, where tensors cannot be what {works} changes or "
            "learns from: build or load the model outside of torch.inference_mode()"
        )


def check_methods(recipe: Recipe, schemes: Mapping[str, QuantScheme], *, calibrated: bool) -> None:
    """Raises where a part of the recipe cannot make a layer's scheme, has nothing to do, or lacks
    calibration."""
    for part in recipe.parts if schemes else ():
        idle = part.method.why_idle({*schemes.values()}, part.parameters)
        if idle is not None:
            raise SchemeError(f"{part} has nothing to do: {idle}")
    for name, scheme in schemes.items():
        static = scheme.activation.is_static
        if static and not calibrated:
            raise LayerError(f"{name} has static activations ({scheme}): pass calibration batches")
        for part in recipe.parts:
            reason = part.method.why_not(scheme, part.parameters)
            if reason is not None:
                raise SchemeError(f"{name}: {part} does not make {scheme}: {reason}")
            learns = part.method.uses_batches or (
                part.method.statistics(scheme, part.parameters)
                and not part.method.draws_tokens(part.parameters)
            )
            if learns and not calibrated:
                raise LayerError(f"{part} learns from inputs: pass calibration batches")
