"""What is tried with a class: quantize, run, save, load, run again, generate; with its head and without."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import qkernels as qk
from bench.survey.classes import ModelClass
from bench.survey.inputs import Inputs
from bench.survey.models import MODEL_ERRORS, Example, example, run
from bench.survey.row import LEFT_ALONE, Row
from qkernels.errors import LayerError

SCHEME, METHOD = "w8a16", "rtn"
MAX_ERROR = 0.1
"""Relative Frobenius error of a quantized model's outputs. w8a16 rounds weights by 0.5% or so, and the
layers of a tiny random model add up to a few percent; a layer that is wrong shows as far more."""

NEW_TOKENS = 4

class Wrong(Exception):
    """A model that is not what it should be after a step."""


def try_class(
    model_class: ModelClass,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    note: Callable[[Row], None] = lambda row: None,
) -> Row:
    """Takes a tiny model of a class through everything; raises what goes wrong.

    Args:
        folder: an empty one, to save in.
        note: called with the row so far before each step.
    """
    row = Row(model_class.name, model_class.kind, model_class.model_type)

    def step(name: str) -> None:
        row.step = name
        note(row)

    step("start")
    made = example(model_class, dtype)
    model = made.model()
    row.inputs = list(made.inputs)
    row.parameters = sum(parameter.numel() for parameter in model.parameters())
    dense = run(model, made.inputs)
    row.generates = _why_not_generate(model, made.inputs)
    step("quantize")
    try:
        report = qk.quantize_model(model, METHOD, SCHEME)
    except LayerError as error:
        if any(type(module) is nn.Linear for module in model.modules()):
            raise
        row.outcome, row.reason = LEFT_ALONE, str(error)
        return row
    row.skipped = dict(report.skipped)
    row.quantized = _share(made, report)
    row.error = _round_trip(model, made, dense, row, folder, step)
    step("head left alone")
    if isinstance(model.get_output_embeddings(), qk.WQLinear):
        raise Wrong("the output head is quantized though nobody asked for it")
    name = _head_name(made.model())
    if name is not None:
        model = made.model()
        step("quantize with head")
        report = qk.quantize_model(model, METHOD, SCHEME, overrides={name: SCHEME})
        if isinstance(model.get_submodule(name), qk.WQLinear):
            row.head = "quantized"
        elif name in report.skipped:
            row.head = f"left alone: {report.skipped[name]}"
        else:
            raise Wrong(f"the head {name} is not quantized, and the report does not say why")
        error = _round_trip(model, made, dense, row, folder, lambda s: step(f"{s} with head"))
        row.error = max(row.error, error)
    row.step = None
    return row


def _round_trip(
    model: PreTrainedModel,
    made: Example,
    dense: dict[str, Tensor],
    row: Row,
    folder: Path,
    step: Callable[[str], None],
) -> float:
    """Runs, saves, loads and compares a quantized model; returns its error."""
    step("forward")
    got = run(model, made.inputs)
    error = _error(got, dense)
    if not error <= MAX_ERROR:
        raise Wrong(f"relative error {error:.3g} of the outputs, more than {MAX_ERROR}")
    tokens = None
    if row.generates is None:
        step("generate")
        tokens = generate(model, made.inputs)
    step("save")
    target = folder / "saved"
    shutil.rmtree(target, ignore_errors=True)
    qk.save_model(model, target, format="qkernels")
    step("load")
    loaded = qk.load_model(target)
    step("compare tensors")
    _check_same_tensors(model, loaded)
    step("forward of the loaded model")
    again = run(loaded, made.inputs)
    changed = [name for name in got if name not in again or not _equal(got[name], again[name])]
    if changed or len(got) != len(again):
        raise Wrong(f"outputs {changed or sorted(set(again) - set(got))} changed by saving and loading")
    if tokens is not None:
        step("generate of the loaded model")
        if not torch.equal(tokens, generate(loaded, made.inputs)):
            raise Wrong("other tokens after saving and loading")
    return error


def generate(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """Ids that greedy decoding gives."""
    given = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    torch.manual_seed(3)
    with torch.no_grad():
        found = model.generate(  # type: ignore[operator]
            **given, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
        )
    found = getattr(found, "sequences", found)
    if not isinstance(found, Tensor):
        raise TypeError(f"generate gives a {type(found).__name__}")
    return found


def _why_not_generate(model: PreTrainedModel, inputs: Inputs) -> str | None:
    if not model.can_generate():
        return "has no generate"
    try:
        generate(model, inputs)
    except MODEL_ERRORS as error:
        return f"dense: {type(error).__name__}: {error}".splitlines()[0]
    return None


def _error(got: dict[str, Tensor], dense: dict[str, Tensor]) -> float:
    """The largest relative error of an output, where the dense one is finite; infinite for NaN."""
    worst = 0.0
    if got.keys() != dense.keys():
        raise Wrong(f"outputs {sorted(got)} in place of {sorted(dense)}")
    for name, exact in dense.items():
        if got[name].shape != exact.shape:
            raise Wrong(f"{name} is {list(got[name].shape)} in place of {list(exact.shape)}")
        finite = exact.isfinite()
        want, have = exact[finite].double(), got[name][finite].double()
        if not have.isfinite().all():
            return float("inf")
        norm = float(want.norm())
        worst = max(worst, float((have - want).norm()) / norm if norm else 0.0)
    return worst


def _share(made: Example, report: qk.QuantizationReport) -> float:
    model = made.model()
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    total = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    return sum(layer.n * layer.k for layer in report.layers) / total


def _head_name(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return None
    return next(name for name, module in model.named_modules() if module is head)


def _check_same_tensors(model: nn.Module, loaded: nn.Module) -> None:
    """Raises where a parameter or buffer differs, in a bit, its type, or what it shares memory with."""
    if type(model) is not type(loaded):
        raise Wrong(f"a {type(model).__name__} is loaded as {type(loaded).__name__}")
    before, after = _all_tensors(model), _all_tensors(loaded)
    if before.keys() != after.keys():
        raise Wrong(f"other tensors after loading: {sorted(before.keys() ^ after.keys())[:4]}")
    for name, tensor in before.items():
        if tensor.dtype != after[name].dtype:
            raise Wrong(f"{name} is {tensor.dtype}, and {after[name].dtype} after loading")
        if not _equal(tensor, after[name]):
            raise Wrong(f"{name} differs after loading")
    if _shared(before) != _shared(after):
        raise Wrong(f"shared tensors are {_shared(before)}, and {_shared(after)} after loading")


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    named: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    return named


def _shared(tensors: dict[str, Tensor]) -> set[tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            names.setdefault(id(tensor), []).append(name)
    return {tuple(sorted(group)) for group in names.values() if len(group) > 1}


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.detach().contiguous().flatten().view(torch.uint8),
        b.detach().contiguous().flatten().view(torch.uint8),
    )
