"""What the model loses where one layer alone is quantized: an estimate from backward passes.

An error E of a layer's weight moves its output at a token by E x, and the loss of a sequence by the
sum over its tokens of g . E x, g the gradient of that loss with respect to the output. With labels
that the model itself draws, the KL divergence between the model and the one with the error is to
second order

    KL = 1/2 mean over sequences of (sum over tokens of g . E x)^2

and that divided by a sequence's tokens is what a token loses (the Fisher information in place of
the Hessian). Tokens are summed before the square: errors of values, say, add up over all tokens
that attend to them. A model without logits loses the squared error of its first output: g then is
the gradient of a random projection of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from qkernels import rounding
from qkernels.calibration.batches import check_tokens, checked
from qkernels.calibration.blocks import kind_of
from qkernels.calibration.calls import replace_forward
from qkernels.calibration.forwards import run_batch
from qkernels.calibration.observe import calibrating
from qkernels.errors import LayerError, QuantizationError, SchemeError
from qkernels.progress import Progress, silent
from qkernels.quantizers.allocation import Choice
from qkernels.quantizers.gradients import (
    counted,
    counted_rows,
    drawn_loss,
    frozen,
    gives_logits,
    output_of,
)
from qkernels.quantizers.linear_forms import LinearForms
from qkernels.quantizers.method import LayerTask
from qkernels.quantizers.model import check_methods
from qkernels.quantizers.plan import plan_layers
from qkernels.quantizers.recipe import Recipe
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight, WeightParameters, row_slices


def check_judges(recipe: Recipe, scheme: QuantScheme) -> None:
    """Raises SchemeError where a layer of that scheme, or a method, needs data to be judged."""
    part = recipe.quantizing
    if scheme.activation.is_static:
        raise SchemeError(
            f"{scheme} has static activations, which sensitivity does not calibrate: choose "
            "schemes whose activations are scaled as they come"
        )
    if part.method.statistics(scheme, part.parameters) or part.method.quantize is None:
        raise SchemeError(
            f"{part} learns from inputs, and sensitivity judges methods that look at weights "
            "alone, such as rtn"
        )
    check_methods(recipe, {"layers": scheme}, calibrated=False)


@dataclass(frozen=True)
class LayerSensitivity:
    """What one layer may become, and what that loses.

    Attributes:
        n, k: of its weight.
        reads: the first layer that reads the same tensor: projections to q, k and v have the same.
        choices: with the loss in nats a token of a model with logits; the last leaves it as it is.
            Of a layer that no gradient has reached, such as an expert that no token was given, the
            losses are the mean of those of layers whose names differ in numbers alone; where none
            of these was reached either, it stays as it is.
        same_as: the layer that it is, under another name; None where it is the first of that name.
            The bits and losses of such a layer are 0, since they count with the first.
    """

    n: int
    k: int
    reads: str
    choices: tuple[Choice, ...]
    same_as: str | None = None


@dataclass(frozen=True)
class Sensitivity:
    """Of each layer, by name, in the model's order."""

    layers: Mapping[str, LayerSensitivity]

    @property
    def numbers(self) -> int:
        """How many weights all layers have, each counted once."""
        return sum(layer.n * layer.k for layer in self.layers.values() if layer.same_as is None)


def measure_sensitivity(
    model: nn.Module,
    schemes: Sequence[QuantScheme | str],
    calibration: Iterable[Any],
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    method: str = "rtn",
    seed: int = 0,
    budget: float | None = None,
    progress: Progress = silent,
) -> Sensitivity:
    """What each linear layer of `model` loses under each scheme.

    Beside the model it takes the memory of what a backward pass through one batch holds, of all
    layers' scales, and of some rows in fp32. The model is as before in the end.

    Args:
        schemes: to choose from, with 16-bit activations or those that need no calibration.
        calibration: batches as of `quantize_model`. Each sequence is one sample, so that many short
            ones tell more than few long ones: 64 are right to about a sixth.
        include, exclude: as of `quantize_model`.
        method: a recipe of one method that needs no calibration, whose errors are judged.
        seed: of the labels that the model draws.
        budget: bits a weight that the layers are to have in the mean: what no choice fits is said
            before the model runs.
        progress: called as progress(done, total, layer name), for layers and then for batches.

    Raises:
        LayerError: where no gradient reaches any layer, or one that is not finite, or without
            batches.
        QuantizationError: for a `budget` that is too small.
        SchemeError: for a scheme that does not parse or that the method does not make, and where
            it needs data for that.
    """
    parsed = list(dict.fromkeys(QuantScheme.parse(scheme) for scheme in schemes))
    if not parsed:
        raise LayerError("no scheme to choose from is given")
    recipe, batches = Recipe.parse(method), checked(calibration)
    check_tokens(model, batches)
    if len(recipe.parts) > 1:
        raise LayerError(f"layers are judged under one method, got {recipe}")
    names = list(plan_layers(model, parsed[0], include, exclude, {}).schemes)
    for scheme in parsed:
        check_judges(recipe, scheme)
    forms = LinearForms(model, names)
    try:
        layers = {name: cast(nn.Linear, model.get_submodule(name)) for name in names}
        for name, layer in layers.items():
            rounding.check_weight(layer.weight.detach(), f"{name}.weight")
        total = len(layers) + len(batches)
        errors: dict[int, _Errors] = {}
        for done, (name, layer) in enumerate(layers.items()):
            progress(done, total, name)
            if id(layer) not in errors:
                errors[id(layer)] = _Errors.of(name, layer, parsed, recipe)

        if budget is not None:
            check_budget(
                budget,
                sum(min(map(stored_bits, each.made)) for each in errors.values()),
                sum(layer.weight.numel() for layer in {*layers.values()}),
            )

        def batch_done(count: int) -> None:
            progress(len(layers) + count, total, "")

        tokens = _look(model, layers, errors, batches, seed, batch_done)
        found: dict[str, LayerSensitivity] = {}
        for name, layer in layers.items():
            own = errors[id(layer)]
            found[name] = (
                own.result(layer, tokens) if own.name == name else _again(found[own.name], own.name)
            )
    finally:
        forms.undo()
    return Sensitivity(found)


def check_budget(budget: float, least: int, numbers: int) -> None:
    """Raises QuantizationError where `budget` bits a weight are less than the fewest bits that all
    take together, or no number."""
    if not budget > 0:
        raise QuantizationError(f"a budget is a number of bits a weight, got {budget:g}")
    if least > budget * numbers:
        raise QuantizationError(
            f"a budget of {budget:g} bits a weight is too small: with scales and zero points the "
            f"least of these schemes takes {least / numbers:.4f}"
        )


def _again(first: LayerSensitivity, name: str) -> LayerSensitivity:
    choices = tuple(Choice(choice.scheme, 0, 0.0) for choice in first.choices)
    return LayerSensitivity(first.n, first.k, first.reads, choices, same_as=name)


def stored_bits(made: WeightParameters) -> int:
    """Bits of a weight as checkpoints pack it: zero points that are integers take as many as codes.
    Kernels may fill theirs up."""
    bits = made.scheme.bits * made.n * made.k
    for name, value in made.fields.items():
        packed = name == "zeros" and not value.is_floating_point()
        bits += value.numel() * (made.scheme.bits if packed else 8 * value.element_size())
    return bits


@dataclass
class _Errors:
    """What a layer becomes under each scheme, and what that has lost so far.

    Attributes:
        made: its weight under each scheme.
        moved: fp64 [S, B]: by how much the loss of each sequence of the present batch moves under
            each scheme; empty before any gradient has come.
        losses: fp64 [S], the sum of the squares of that over the batches before.
        reads: the first layer that was given the same tensor.
    """

    name: str
    schemes: Sequence[QuantScheme]
    made: list[WeightParameters]
    moved: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    losses: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    reads: str = ""

    @staticmethod
    def of(name: str, layer: nn.Linear, schemes: Sequence[QuantScheme], recipe: Recipe) -> _Errors:
        (part,) = recipe.parts
        assert part.method.quantize is not None
        weight, made = layer.weight.detach(), []
        for scheme in schemes:
            task = LayerTask(name, weight, None, scheme, None, None)
            try:
                made.append(part.method.quantize(task, part.parameters))
            except QuantizationError as error:
                raise type(error)(f"{name}: {error}") from None
        return _Errors(name, schemes, made)

    def add(self, layer: nn.Linear, x: Tensor, gradients: Tensor, sequences: int) -> None:
        """Takes in a call of the layer: x [..., K] and gradients [..., N] of its output."""
        # Rows that do not say which sequence they are of, as those of experts, count as one.
        count = sequences if x.dim() > 2 and len(x) == sequences else 1
        x, gradients = x.reshape(-1, x.shape[-1]), gradients.reshape(-1, gradients.shape[-1])
        moved = torch.zeros(len(self.made), count, dtype=torch.float64)
        for place, made in enumerate(self.made):
            for start, stop in row_slices(*layer.weight.shape):
                error = _error_of(layer.weight.detach()[start:stop], made, start, stop).to(x.dtype)
                products = (x @ error.t()).float() * gradients[:, start:stop]
                moved[place] += products.view(count, -1).sum(dim=1, dtype=torch.float64).cpu()
        if self.moved.numel() and self.moved.shape != moved.shape:
            self.moved, moved = (part.sum(dim=1, keepdim=True) for part in (self.moved, moved))
        self.moved = self.moved + moved if self.moved.numel() else moved

    def end_batch(self) -> None:
        """Takes in what the batch has moved."""
        if self.moved.numel():
            squares = self.moved.square().sum(dim=1)
            self.losses = self.losses + squares if self.losses.numel() else squares
        self.moved = self.moved[:0]

    def result(self, layer: nn.Linear, tokens: int) -> LayerSensitivity:
        """Args: tokens: of all batches."""
        n, k = layer.weight.shape
        choices = [
            Choice(str(scheme), stored_bits(made), float(loss) / tokens / 2)
            # No losses where no gradient came.
            for scheme, made, loss in zip(self.schemes, self.made, self.losses, strict=False)
        ]
        dense = Choice(None, 8 * layer.weight.element_size() * n * k, 0.0)
        return LayerSensitivity(n, k, self.reads or self.name, (*choices, dense))


def _error_of(rows: Tensor, made: WeightParameters, start: int, stop: int) -> Tensor:
    """fp32 [R, K], of rows [start, stop) of a weight."""
    whole = isinstance(made, QuantizedWeight)
    codes = made.codes[start:stop] if whole else rounding.encode_rows(rows, made, start)
    return made.to_column_order(made.dequantize_rows(codes, start)) - rows.float()


def _look(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    errors: Mapping[int, _Errors],
    batches: Sequence[Any],
    seed: int,
    done: Callable[[int], None],
) -> int:
    """Makes the losses of `errors`, which are by the layer's id; how many tokens there were."""
    generator = torch.Generator().manual_seed(seed)
    tokens = 0
    # Inputs of one run, held so that no two of them are in the same memory.
    readers: dict[int, tuple[str, Tensor]] = {}
    sequences = [1]
    with contextlib.ExitStack() as stack:
        stack.enter_context(calibrating(model))
        stack.enter_context(frozen(model))
        for layer in {id(layer): layer for layer in layers.values()}.values():
            stack.callback(_watch(layer, errors[id(layer)], readers, sequences))
        for number, batch in enumerate(batches):
            readers.clear()
            done(number)
            loss, rows, sequences[0] = _loss(run_batch(model, batch), batch, generator)
            tokens += rows
            if loss.requires_grad:
                loss.backward()
            readers.clear()
            for each in errors.values():
                each.end_batch()
        done(len(batches))
    reached = [each for each in errors.values() if each.losses.numel()]
    if not reached:
        raise LayerError("no gradient of the model's output reaches any of the layers")
    for each in errors.values():
        like = [one.losses for one in reached if kind_of(one.name) == kind_of(each.name)]
        if not each.losses.numel() and like:
            each.losses = torch.stack(like).mean(dim=0)
    for each in errors.values():
        if not each.losses.isfinite().all():
            raise LayerError(
                f"{each.name}: a calibration batch gives it values that are not finite"
            )
    return tokens


def _watch(
    layer: nn.Linear, errors: _Errors, readers: dict[int, tuple[str, Tensor]], sequences: list[int]
) -> Any:
    """Makes the layer's forward tell its errors of what comes; the result undoes that.

    Args:
        sequences: of the present batch.
    """
    inner = layer.forward

    def forward(x: Tensor) -> Tensor:
        y = inner(x)
        if not torch.is_grad_enabled():
            return y
        # The first layer of a model whose parameters want no gradient begins the graph; a copy,
        # since what begins one cannot be changed in place.
        y = y if y.requires_grad else y.requires_grad_().clone()
        errors.reads = errors.reads or readers.setdefault(id(x), (errors.name, x))[0]
        x = x.detach()

        def keep(gradient: Tensor) -> None:
            if x.numel():
                with torch.no_grad():
                    errors.add(layer, x, gradient, sequences[0])

        y.register_hook(keep)
        return y

    return replace_forward(layer, forward)


def _loss(result: Any, batch: Any, generator: torch.Generator) -> tuple[Tensor, int, int]:
    """The sum over tokens of what the model loses by labels of its own; tokens; sequences."""
    output = output_of(result)
    kept = counted(batch, output)
    tokens = output[..., 0].numel() if kept is None else int(kept.sum())
    if gives_logits(result):
        return drawn_loss(output, generator, kept), tokens, len(output)
    noise = torch.randn(output.shape, generator=generator).to(output.device)
    return counted_rows(output.float() * noise, kept).sum(), tokens, len(output)
