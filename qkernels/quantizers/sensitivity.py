"""What the model loses where one layer alone is quantized: an estimate from one backward pass.

An error E of a layer's weight moves its output at a token by E x, and the loss there by g . E x, g
the gradient of the loss with respect to that output. With labels that the model itself draws, the
KL divergence between the model and the one with the error is to second order

    KL = 1/2 mean over tokens of (g . E x)^2

(the Fisher information in place of the Hessian; each token's error taken by itself). So a sample of
the pairs (x, g) of each layer is all that is kept of the model's runs, and every scheme is then
rounded to and judged layer by layer. A model without logits loses the squared error of its first
output: g then is the gradient of a random projection of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from qkernels import rounding
from qkernels.calibration.forwards import run_batch
from qkernels.calibration.observe import calibrating
from qkernels.calibration.walks import replace_forward
from qkernels.errors import LayerError, QuantizationError
from qkernels.progress import Progress, silent
from qkernels.quantizers.allocation import Choice
from qkernels.quantizers.linear_forms import LinearForms
from qkernels.quantizers.method import LayerTask
from qkernels.quantizers.model import check_methods
from qkernels.quantizers.plan import plan_layers
from qkernels.quantizers.recipe import Recipe
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight, WeightParameters, row_slices

PAIRS = 256
"""Tokens of each layer whose input and gradient are kept."""


@dataclass(frozen=True)
class LayerSensitivity:
    """What one layer may become, and what that loses.

    Attributes:
        n, k: of its weight.
        reads: the first layer that reads the same tensor: projections to q, k and v have the same.
        choices: with the loss in nats a token of a model with logits; the last leaves it as it is.
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
    progress: Progress = silent,
) -> Sensitivity:
    """What each linear layer of `model` loses under each scheme.

    Beside the model it takes the memory of what a backward pass through one batch holds, and of one
    layer in fp32. The model is as before in the end.

    Args:
        schemes: to choose from, with 16-bit activations or those that need no calibration.
        calibration: batches as of `quantize_model`; a few thousand tokens are enough.
        include, exclude: as of `quantize_model`.
        method: a recipe of one method that needs no calibration, whose errors are judged.
        seed: of the labels that the model draws.
        progress: called as progress(done, total, layer name).

    Raises:
        LayerError: for a layer that no gradient reaches, or whose gradient is not finite, without
            batches, or where `method` learns from inputs.
        SchemeError: for a scheme that does not parse or that the method does not make.
    """
    parsed = list(dict.fromkeys(QuantScheme.parse(scheme) for scheme in schemes))
    if not parsed:
        raise LayerError("no scheme to choose from is given")
    recipe, batches = Recipe.parse(method), list(calibration)
    if len(recipe.parts) > 1:
        raise LayerError(f"layers are judged under one method, got {recipe}")
    if not batches:
        raise LayerError("calibration holds no batch")
    names = list(plan_layers(model, parsed[0], include, exclude, {}).schemes)
    for scheme in parsed:
        check_methods(recipe, dict.fromkeys(names, scheme), calibrated=False)
    forms = LinearForms(model, names)
    try:
        layers = {name: cast(nn.Linear, model.get_submodule(name)) for name in names}
        for name, layer in layers.items():
            rounding.check_weight(layer.weight.detach(), f"{name}.weight")
        seen = _look(model, layers, batches, seed)
        found: dict[str, LayerSensitivity] = {}
        first: dict[int, str] = {}
        for done, (name, layer) in enumerate(layers.items()):
            progress(done, len(layers), name)
            pairs = seen[id(layer)]
            same_as = first.setdefault(id(layer), name)
            if same_as != name:
                found[name] = _again(found[same_as], same_as)
                continue
            n, k = layer.weight.shape
            choices = [_choice(name, layer, scheme, recipe, pairs) for scheme in parsed]
            dense = Choice(None, 8 * layer.weight.element_size() * n * k, 0.0)
            found[name] = LayerSensitivity(n, k, pairs.reads or name, (*choices, dense))
        progress(len(layers), len(layers), "")
    finally:
        forms.undo()
    return Sensitivity(found)


def _again(first: LayerSensitivity, name: str) -> LayerSensitivity:
    choices = tuple(Choice(choice.scheme, 0, 0.0) for choice in first.choices)
    return LayerSensitivity(first.n, first.k, first.reads, choices, same_as=name)


def _choice(
    name: str, layer: nn.Linear, scheme: QuantScheme, recipe: Recipe, pairs: _Pairs
) -> Choice:
    weight = layer.weight.detach()
    (part,) = recipe.parts
    assert part.method.quantize is not None
    try:
        made = part.method.quantize(
            LayerTask(name, weight, None, scheme, None, None), part.parameters
        )
    except QuantizationError as error:
        raise type(error)(f"{name}: {error}") from None
    x, gradients = pairs.x.float(), pairs.gradients.float()
    moved = torch.zeros(len(x), dtype=torch.float64)
    for start, stop in row_slices(*weight.shape):
        rows = weight[start:stop]
        whole = isinstance(made, QuantizedWeight)
        codes = made.codes[start:stop] if whole else rounding.encode_rows(rows, made, start)
        found = made.to_column_order(made.dequantize_rows(codes, start))
        y = x @ (found - rows.float()).t()
        moved += (y * gradients[:, start:stop]).sum(dim=1).double().cpu()
    return Choice(str(scheme), stored_bits(made), float(moved.square().mean()) / 2)


def stored_bits(made: WeightParameters) -> int:
    """Bits of a weight as checkpoints pack it: zero points that are integers take as many as codes.
    Kernels may fill theirs up."""
    bits = made.scheme.bits * made.n * made.k
    for name, value in made.fields.items():
        packed = name == "zeros" and not value.is_floating_point()
        bits += value.numel() * (made.scheme.bits if packed else 8 * value.element_size())
    return bits


@dataclass
class _Pairs:
    """A sample of the inputs of a layer and of the gradients at its outputs: those of all tokens
    that drew the least numbers.

    Attributes:
        x, gradients: [P, K] and [P, N], P at most `PAIRS`, in their types.
        reads: the first layer that was given the same tensor.
    """

    x: Tensor = field(default_factory=lambda: torch.empty(0))
    gradients: Tensor = field(default_factory=lambda: torch.empty(0))
    drawn: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    reads: str = ""

    def add(self, x: Tensor, gradients: Tensor, generator: torch.Generator) -> None:
        """Takes in rows [T, K] and [T, N]."""
        drawn = torch.cat(
            (self.drawn, torch.rand(len(x), dtype=torch.float64, generator=generator))
        )
        kept = drawn.argsort(stable=True)[:PAIRS]
        old, new = kept[kept < len(self.drawn)], kept[kept >= len(self.drawn)] - len(self.drawn)
        if len(self.drawn):
            x, gradients = (
                torch.cat((mine[old.to(mine.device)], more[new.to(more.device)]))
                for mine, more in ((self.x, x), (self.gradients, gradients))
            )
        else:
            x, gradients = x[new.to(x.device)], gradients[new.to(x.device)]
        before = len(self.drawn)
        self.drawn = torch.cat((drawn[:before][old], drawn[before:][new]))
        self.x, self.gradients = x, gradients


def _look(
    model: nn.Module, layers: Mapping[str, nn.Linear], batches: Sequence[Any], seed: int
) -> dict[int, _Pairs]:
    """What reaches each layer and what it does to the loss, by the layer's id."""
    seen = {id(layer): _Pairs() for layer in layers.values()}
    names = {id(layer): name for name, layer in reversed(list(layers.items()))}
    generator = torch.Generator().manual_seed(seed)
    # Inputs of one run, held so that no two of them are in the same memory.
    readers: dict[int, tuple[str, Tensor]] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(calibrating(model))
        stack.enter_context(_without_gradients(model.parameters()))
        stack.enter_context(torch.enable_grad())
        for layer in {id(layer): layer for layer in layers.values()}.values():
            stack.callback(_watch(layer, names[id(layer)], seen[id(layer)], readers, generator))
        for batch in batches:
            readers.clear()
            loss = _loss(run_batch(model, batch), generator)
            if loss.requires_grad:
                loss.backward()
            readers.clear()
    for name, layer in layers.items():
        pairs = seen[id(layer)]
        if not len(pairs.drawn):
            raise LayerError(
                f"{name}: no gradient of the model's output reaches it: exclude it, or give "
                "batches that do"
            )
        if not (pairs.x.isfinite().all() and pairs.gradients.isfinite().all()):
            raise LayerError(f"{name}: a calibration batch gives it values that are not finite")
    return seen


def _watch(
    layer: nn.Linear,
    name: str,
    pairs: _Pairs,
    readers: dict[int, tuple[str, Tensor]],
    generator: torch.Generator,
) -> Any:
    """Makes the layer's forward keep pairs; the result undoes that."""
    inner = layer.forward

    def forward(x: Tensor) -> Tensor:
        y = inner(x)
        if not torch.is_grad_enabled():
            return y
        # The first layer of a model whose parameters want no gradient begins the graph; a copy,
        # since what begins one cannot be changed in place.
        y = y if y.requires_grad else y.requires_grad_().clone()
        pairs.reads = pairs.reads or readers.setdefault(id(x), (name, x))[0]
        rows = x.detach().reshape(-1, x.shape[-1])

        def keep(gradient: Tensor) -> None:
            if len(rows):
                pairs.add(rows, gradient.detach().reshape(len(rows), -1), generator)

        y.register_hook(keep)
        return y

    return replace_forward(layer, forward)


@contextlib.contextmanager
def _without_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within, parameters want no gradients, so that none is computed or kept."""
    wanting = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for parameter in wanting:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def _loss(output: Any, generator: torch.Generator) -> Tensor:
    """The sum over tokens of what the model loses by labels of its own."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        logits = logits.flatten(0, -2).float()
        logarithms = logits.log_softmax(dim=1)
        drawn = torch.multinomial(logarithms.detach().exp().cpu(), 1, generator=generator)
        return -logarithms.gather(1, drawn.to(logits.device)).sum()
    tensors = (part for part in tree_flatten(output)[0] if isinstance(part, Tensor))
    first = next((part for part in tensors if part.is_floating_point()), None)
    if first is None:
        raise LayerError(f"the model gives a {type(output).__name__} without a floating tensor")
    noise = torch.randn(first.shape, generator=generator).to(first.device)
    return (first.float() * noise).sum()
