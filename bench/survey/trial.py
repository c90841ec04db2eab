"""What is tried with a class: quantize, run, save, load, run again, generate; then with its head."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import qkernels as qk
from bench.survey.classes import ModelClass
from bench.survey.compare import all_tensors, equal, relative_error, same_weights, shared
from bench.survey.inputs import Inputs
from bench.survey.models import MODEL_ERRORS, Example, cast, example, run
from bench.survey.row import LEFT_ALONE, Row
from qkernels.errors import LayerError

SCHEME, METHOD = "w8a16", "rtn"

MAX_WEIGHT_ERROR = 0.02
"""Relative Frobenius error of a layer's weight. Rounding to 8 bits makes about 0.005."""

MAX_ERROR = 0.1
"""Of an output, against the dense model. The layers of a tiny random model add up to a few percent."""

MAX_KERNEL_ERROR = 1e-3
"""Of an output in fp32, against the dense model with the dequantized weights, which sums in another
order."""

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
        folder: to save in.
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
    row.generates = _why_not_generate(made.model(), made.inputs)
    step("quantize")
    try:
        report = qk.quantize_model(model, METHOD, SCHEME)
    except LayerError as error:
        if any(type(module) is nn.Linear for module in model.modules()):
            raise
        row.outcome, row.reason = LEFT_ALONE, str(error)
        return row
    row.skipped, row.shares = dict(report.skipped), dict(report.shares)
    row.quantized = _share(made, model)
    _round_trip(model, report, made, row, folder, step)
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
        _round_trip(model, report, made, row, folder, lambda name: step(f"{name} with head"))
    row.step = None
    return row


def _round_trip(
    model: PreTrainedModel,
    report: qk.QuantizationReport,
    made: Example,
    row: Row,
    folder: Path,
    step: Callable[[str], None],
) -> None:
    """Runs, saves, loads and compares a quantized model."""
    step("forward")
    # Before the model runs: some change their weights then.
    twins = {made.dtype: same_weights(made.model(), model, report)}
    if made.dtype != torch.float32:
        twins[torch.float32] = same_weights(made.model().float(), model, report)
    got = run(model, made.inputs)
    _check_close(got, model, twins, report, made, row)
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
    step("forward of the loaded model")
    again = run(loaded, made.inputs)
    changed = [name for name in got if name not in again or not equal(got[name], again[name])]
    if changed or len(got) != len(again):
        raise Wrong(f"outputs changed by saving and loading: {changed or sorted(again)}")
    if tokens is not None:
        step("generate of the loaded model")
        if not torch.equal(tokens, generate(loaded, made.inputs)):
            raise Wrong("other tokens after saving and loading")
    step("compare tensors")
    _check_same_tensors(model, loaded)


def _check_close(
    got: dict[str, Tensor],
    model: PreTrainedModel,
    twins: dict[torch.dtype, PreTrainedModel],
    report: qk.QuantizationReport,
    made: Example,
    row: Row,
) -> None:
    """Raises where a weight or an output is further from the dense one than rounding explains.

    Args:
        got: outputs of `model`, which is quantized.
        twins: dense models of a type with the dequantized weights of `model`.
    """
    for layer in report.layers:
        if not layer.weight_error <= MAX_WEIGHT_ERROR:
            raise Wrong(f"relative error {layer.weight_error:.3g} of the weight of {layer.name}")
    dense = run(made.model(), made.inputs)
    if got.keys() != dense.keys():
        raise Wrong(f"outputs {sorted(got)} in place of {sorted(dense)}")
    error = relative_error(got, dense)
    kernel_error = relative_error(got, run(twins[made.dtype], made.inputs))
    if made.dtype != torch.float32 and kernel_error > MAX_ERROR:
        # Rounding of activations may tip a choice as well, where it is coarse.
        inputs = cast(made.inputs, torch.float32)
        exact = run(copy.deepcopy(model).float(), inputs)
        kernel_error = relative_error(exact, run(twins[torch.float32], inputs))
        bound = MAX_KERNEL_ERROR
    else:
        bound = MAX_KERNEL_ERROR if made.dtype == torch.float32 else MAX_ERROR
    if not kernel_error <= bound:
        raise Wrong(
            f"relative error {kernel_error:.3g} of the outputs against dense layers with the same "
            f"weights, and {error:.3g} against the dense model"
        )
    # Infinite where the output has another shape, as speech of another length.
    row.error = None if error == float("inf") else max(row.error or 0.0, error)
    # With the same weights the dense model gives the same: rounding alone makes the difference.
    row.sensitive = row.sensitive or error > MAX_ERROR


def generate(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """Ids that greedy decoding gives."""
    # Some models write into their inputs.
    given = copy.deepcopy({n: value for n, value in inputs.items() if not n.startswith("decoder_")})
    config = model.generation_config
    if config.decoder_start_token_id is None and config.bos_token_id is None:
        given["decoder_start_token_id"] = 0
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


def _share(made: Example, model: PreTrainedModel) -> float:
    dense = made.model()
    embeddings = {
        id(module.weight) for module in dense.modules() if isinstance(module, nn.Embedding)
    }
    total = sum(p.numel() for p in dense.parameters() if id(p) not in embeddings)
    layers = [module for module in model.modules() if isinstance(module, qk.WQLinear)]
    return sum(layer.in_features * layer.out_features for layer in layers) / total


def _head_name(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return None
    return next(name for name, module in model.named_modules() if module is head)


def _check_same_tensors(model: nn.Module, loaded: nn.Module) -> None:
    """Raises where a parameter or buffer differs in a bit, its type, or what shares it."""
    if type(model) is not type(loaded):
        raise Wrong(f"a {type(model).__name__} is loaded as {type(loaded).__name__}")
    before, after = all_tensors(model), all_tensors(loaded)
    if before.keys() != after.keys():
        raise Wrong(f"other tensors after loading: {sorted(before.keys() ^ after.keys())[:4]}")
    for name, tensor in before.items():
        if tensor.dtype != after[name].dtype:
            raise Wrong(f"{name} is {tensor.dtype}, and {after[name].dtype} after loading")
        if not equal(tensor, after[name]):
            raise Wrong(f"{name} differs after loading")
    apart = sorted(shared(model) ^ shared(loaded))
    if apart:
        raise Wrong(f"these are one tensor or layer before or after loading, not both: {apart[0]}")
