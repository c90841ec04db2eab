"""What is tried with a class: quantize, run, save, load, run again; then with its output head."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import qkernels as qk
from bench.survey.classes import ModelClass
from bench.survey.compare import all_tensors, equal, largest_error, shared, take_weights
from bench.survey.inputs import Inputs
from bench.survey.models import MODEL_ERRORS, Example, cast, example, run
from bench.survey.row import LEFT_ALONE, Row
from qkernels.errors import LayerError

SCHEME, METHOD, FORMAT = "w8a16", "rtn", "qkernels"

MAX_WEIGHT_ERROR = 0.02
"""Relative Frobenius error of a layer's weight. Rounding to 8 bits makes about 0.005."""

MAX_ERROR = 0.1
"""Of an output, against the dense model. The layers of a tiny model add up to a few percent."""

MAX_KERNEL_ERROR = 1e-3
"""Of an output in fp32, against a dense model with the dequantized weights, which sums in another
order."""

TOLD_SHARE = 0.02
"""A parameter that is not quantized and is so much of all is named in the report."""

NEW_TOKENS = 4


class Wrong(Exception):
    """A model that is not what it should be after a step."""


def try_class(
    model_class: ModelClass,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    note: Callable[[Row], None] = lambda row: None,
) -> Row:
    """Takes a tiny model of a class through everything.

    Args:
        folder: to save in.
        note: called with the row so far before each step.

    Raises:
        DoesNotStart: where there is no dense model that runs.
        Wrong: where a quantized one is not what it should be.
        Whatever else a step raises.
    """
    row = Row(model_class.name, model_class.kind, model_class.model_type)
    note(row)
    made = example(model_class, dtype)
    dense = made.model()
    row.inputs = list(made.inputs)
    row.parameters = sum(parameter.numel() for parameter in dense.parameters())
    row.generates = _why_not_generate(dense, made.inputs)
    trial = _Trial(made, row, folder, note)
    trial.without_head()
    head = dense.get_output_embeddings()
    if row.outcome != LEFT_ALONE and isinstance(head, nn.Linear):
        trial.with_head(next(name for name, module in dense.named_modules() if module is head))
    row.step = None
    return row


class _Trial:
    """The trials of one class, whose outcomes go into its row."""

    def __init__(self, made: Example, row: Row, folder: Path, note: Callable[[Row], None]) -> None:
        self._made, self._row, self._folder, self._note = made, row, folder, note
        self._suffix = ""

    def _step(self, name: str) -> None:
        self._row.step = name + self._suffix
        self._note(self._row)

    def without_head(self) -> None:
        """What `quantize_model` does by itself."""
        self._step("quantize")
        model, row = self._made.model(), self._row
        try:
            report = qk.quantize_model(model, METHOD, SCHEME)
        except LayerError as error:
            if any(type(module) is nn.Linear for module in model.modules()):
                raise
            row.outcome, row.reason = LEFT_ALONE, str(error)
            return
        row.skipped, row.shares = dict(report.skipped), dict(report.shares)
        row.quantized = _share(self._made, model)
        if isinstance(model.get_output_embeddings(), qk.WQLinear):
            raise Wrong("the output head is quantized though nobody asked for it")
        self._step("report")
        _check_told(model, report, row.parameters)
        self._round_trip(model)

    def with_head(self, name: str) -> None:
        """The same with the output head asked for by its name."""
        self._suffix = " with head"
        self._step("quantize")
        model = self._made.model()
        report = qk.quantize_model(model, METHOD, SCHEME, overrides={name: SCHEME})
        if isinstance(model.get_submodule(name), qk.WQLinear):
            self._row.head = "quantized"
        elif name in report.skipped:
            self._row.head = f"left alone: {report.skipped[name]}"
        else:
            raise Wrong(f"the head {name} is not quantized, and the report does not say why")
        self._round_trip(model)

    def _round_trip(self, model: PreTrainedModel) -> None:
        """Runs, saves, loads and compares a quantized model."""
        inputs = self._made.inputs
        self._step("forward")
        # Made before the model runs: some change their weights then.
        twins = self._twins(model)
        got = run(model, inputs)
        self._check_close(got, model, twins)
        tokens = None
        if self._row.generates is None:
            self._step("generate")
            tokens = generate(model, inputs)
        self._step("save")
        target = self._folder / "saved"
        shutil.rmtree(target, ignore_errors=True)
        qk.save_model(model, target, format=FORMAT)
        self._step("load")
        loaded = qk.load_model(target)
        self._step("forward of the loaded model")
        again = run(loaded, inputs)
        changed = [name for name in got if name not in again or not equal(got[name], again[name])]
        if changed or len(got) != len(again):
            raise Wrong(f"outputs changed by saving and loading: {changed or sorted(again)}")
        if tokens is not None:
            self._step("generate of the loaded model")
            if not torch.equal(tokens, generate(loaded, inputs)):
                raise Wrong("other tokens after saving and loading")
        self._step("compare tensors")
        _check_same(model, loaded)

    def _twins(self, model: PreTrainedModel) -> dict[torch.dtype, PreTrainedModel]:
        """Dense models with the weights of `model`: in its type, and in fp32."""
        twins = {self._made.dtype: self._made.model()}
        errors = take_weights(twins[self._made.dtype], model)
        for name, error in errors.items():
            if not error <= MAX_WEIGHT_ERROR:
                raise Wrong(f"relative error {error:.3g} of the weight of {name}")
        if torch.float32 not in twins:
            twins[torch.float32] = self._made.model().float()
            take_weights(twins[torch.float32], model)
        return twins

    def _check_close(
        self,
        got: dict[str, Tensor],
        model: PreTrainedModel,
        twins: Mapping[torch.dtype, PreTrainedModel],
    ) -> None:
        """Raises where the outputs of `model` are further from dense ones than by rounding."""
        made, row = self._made, self._row
        dense = run(made.model(), made.inputs)
        if got.keys() != dense.keys():
            raise Wrong(f"outputs {sorted(got)} in place of {sorted(dense)}")
        error = largest_error(got, dense)
        bound = MAX_KERNEL_ERROR if made.dtype == torch.float32 else MAX_ERROR
        kernel_error = largest_error(got, run(twins[made.dtype], made.inputs))
        if made.dtype != torch.float32 and kernel_error > bound:
            # Rounding of activations may tip a choice as well, where it is coarse.
            inputs, bound = cast(made.inputs, torch.float32), MAX_KERNEL_ERROR
            exact = run(copy.deepcopy(model).float(), inputs)
            kernel_error = largest_error(exact, run(twins[torch.float32], inputs))
        if not kernel_error <= bound:
            raise Wrong(
                f"relative error {kernel_error:.3g} of the outputs against dense layers with the "
                f"same weights, and {error:.3g} against the dense model"
            )
        if error < float("inf"):
            row.error = max(row.error or 0.0, error)
        # The dense model with the same weights gives the same: rounding makes the difference.
        row.sensitive = row.sensitive or error > MAX_ERROR


def generate(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """Ids that greedy decoding gives."""
    # Some models write into their inputs.
    given = copy.deepcopy({n: value for n, value in inputs.items() if not n.startswith("decoder_")})
    config = model.generation_config
    assert config is not None
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


def _check_told(model: nn.Module, report: qk.QuantizationReport, parameters: int) -> None:
    """Raises where a large part of a model is not quantized, and the report does not say why.

    Args:
        parameters: how many numbers are in those of the dense model.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = name.rpartition(".")[0]
        if parameter.numel() >= TOLD_SHARE * parameters and not {name, owner} & set(report.skipped):
            share = parameter.numel() / parameters
            raise Wrong(f"{name}, {share:.0%} of the parameters, is left alone without a reason")


def _check_same(model: nn.Module, loaded: nn.Module) -> None:
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
