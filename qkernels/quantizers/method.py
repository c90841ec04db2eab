"""What a quantization method is: a row of `methods.METHODS`, and what it is given to work on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from qkernels.calibration.batches import Tokens
from qkernels.calibration.distributed import ALONE, Processes
from qkernels.calibration.statistics import LayerInputs, Needs
from qkernels.calibration.walks import DENSE, QUANTIZED, Walk
from qkernels.quantizers.changes import Changes
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight, WeightParameters

_T = TypeVar("_T")


@dataclass(frozen=True)
class NoParameters:
    """Of a method that takes none."""


@dataclass(frozen=True)
class LayerTask:
    """One layer to quantize.

    Attributes:
        weight: [N, K], fp16, bf16 or fp32, finite.
        bias: [N] or None.
        inputs: what calibration collected, at least what the method asked for; None without
            calibration.
        activation_scale: that of x, which the result must carry, for static activations, fp32 [P]
            where each position has one; else None.
        activation_zero: the zero point of x, int32 [P] where each position has one, which the
            driver adds to the result; methods get None, and the same as `input_zero`, for those
            that round x.
        input_factor: fp32 [K], what x was multiplied by before `inputs` and `weight` are of it,
            which the driver adds to the result; or None.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    scheme: QuantScheme
    inputs: LayerInputs | None
    activation_scale: float | Tensor | None
    activation_zero: int | Tensor | None = None
    input_zero: int | Tensor | None = None
    input_factor: Tensor | None = None


@dataclass(frozen=True)
class BlockTask:
    """One block whose layers are about to be quantized.

    Attributes:
        module: the block; the whole model where it has no blocks, a layer where that is outside.
        layers: the layers that will be quantized, by their names in the model.
        schemes: the scheme of each.
        inputs: what calibration collected for each; empty without calibration.
        processes: that calibrate together, each with batches of its own.
        tokens: those of each calibration batch, which tell padding apart.
    """

    name: str
    module: nn.Module
    layers: Mapping[str, nn.Linear]
    schemes: Mapping[str, QuantScheme]
    inputs: Mapping[str, LayerInputs]
    walk: Walk
    changes: Changes
    processes: Processes = ALONE
    tokens: Sequence[Tokens] = ()

    def shared(self, step: str, make: Callable[[], _T]) -> _T | None:
        """What `make` makes where this block's batches are looked at beyond their statistics: in
        the first process that has such batches, for all of them. None where none has.

        Args:
            step: a name for it.
        """
        return self.processes.made_by_first(step, bool(self.batches()), make)

    def batches(self, *, dense: bool = False) -> Sequence[int]:
        """The calibration batches that reach the block, by number."""
        return self.walk.batches(DENSE if dense else QUANTIZED)

    def run(self, batch: int, *, dense: bool = False) -> Any:
        """The output of the block, as it now is, for a batch.

        Args:
            dense: on the inputs that it has in the model before quantization, which are there where
                the method asks for statistics of them.
        """
        return self.walk.run(batch, DENSE if dense else QUANTIZED)

    def rewrite(self, parameter: str, values: Tensor) -> None:
        """Gives new values to a parameter of the block, such as `input_layernorm.weight`.

        What follows in the recipe gets statistics of the block as it is then.

        Args:
            parameter: its name inside of the block.
            values: of the parameter's shape; rounded to its type.
        """
        self.changes.rewrite(f"{self.name}.{parameter}".lstrip("."), values)

    def scale_inputs(self, layer: str, factor: Tensor) -> None:
        """Multiplies what reaches one of `layers` by a factor, and divides its weight by that.

        For what nothing in front of the layer can take: the quantized layer has an `input_factor`.
        Where it may not, because the format that the model is for holds none or another module has
        the same weight, nothing is done.

        Args:
            layer: its name in the model.
            factor: fp32 [K], > 0.
        """
        if not self.changes.may_scale_inputs(layer):
            return
        weight = self.layers[layer].weight.detach()
        self.changes.rewrite(f"{layer}.weight", weight.float() / factor)
        self.changes.scale_inputs(layer, factor)


@dataclass(frozen=True)
class ModelTask:
    """The whole model, before its first block is taken or behind its last.

    Attributes:
        layers: the layers of the plan, by their names in the model: those that will be quantized,
            or the quantized ones.
        schemes: the scheme of each.
        batches: of calibration, in the form that `calibration.forwards.run_batch` takes; none
            without calibration.
        row_weights: layer -> batch -> fp32 [T]: what each of its inputs counts in statistics of it,
            in the order in which it meets them. Empty before a method fills it.
        changes: where a layer is replaced, or a parameter rewritten.
    """

    model: nn.Module
    layers: Mapping[str, nn.Module]
    schemes: Mapping[str, QuantScheme]
    batches: Sequence[Any]
    row_weights: dict[str, dict[int, Tensor]]
    changes: Changes

    def dense(self) -> contextlib.AbstractContextManager[None]:
        """A context in which no layer is quantized; what was rewritten stays."""
        return self.changes.all_dense()

    def rewrite(self, parameter: str, values: Tensor) -> None:
        """Gives a parameter of the model new values, rounded to its type; before the first block.

        To what follows they are the values that it always had.
        """
        self.changes.rewrite_model(parameter, values)

    def scale_inputs(self, layer: str, factor: Tensor) -> None:
        """Multiplies what reaches one of `layers`, an `nn.Linear`, by a factor fp32 [K] > 0, and
        divides its weight by that; before the first block. See `BlockTask.scale_inputs`."""
        if not self.changes.may_scale_inputs(layer):
            return
        weight = self.layers[layer].get_parameter("weight").detach()
        self.changes.rewrite_model(f"{layer}.weight", weight.float() / factor)
        self.changes.scale_model_inputs(layer, factor)


def check_seed(seed: int) -> None:
    """Raises ValueError for one that no generator takes."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be 0 or more and fit 63 bits, got {seed}")


def no_statistics(scheme: QuantScheme, parameters: Any) -> Needs:
    """For methods that look at weights alone."""
    return Needs()


def any_scheme(scheme: QuantScheme, parameters: Any) -> None:
    """For methods that take every scheme."""


def any_number(parameters: Any) -> int | None:
    """For methods that take batches as they come."""
    return None


def at_once(parameters: Any) -> bool:
    """For methods that calibrate all layers of a block together."""
    return False


def needs_batches(parameters: Any) -> bool:
    """For methods that go without statistics only where they ask for none."""
    return False


def zeros_are_codes(parameters: Any) -> bool:
    """For methods whose zero points are integers."""
    return False


def no_more_fields(parameters: Any) -> frozenset[str]:
    """For methods whose weights are what their scheme says."""
    return frozenset()


def folds_what_it_scales(parameters: Any) -> bool:
    """For methods that leave inputs as they are, or let what is in front of a layer scale them."""
    return False


def always_at_work(schemes: Collection[QuantScheme], parameters: Any) -> None:
    """For methods that do something whatever the schemes."""


def why_no_rounded_activations(schemes: Collection[QuantScheme], parameters: Any) -> str | None:
    """For methods that make activations easier to round: `Method.why_idle`."""
    if any(not scheme.weight_only for scheme in schemes):
        return None
    return (
        f"{' and '.join(sorted(map(str, schemes)))} leaves activations in 16 bits; choose a scheme "
        "such as w8a8, or awq"
    )


def no_embeddings(parameters: Any) -> bool:
    """For methods that leave embeddings as they are."""
    return False


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table.

    A recipe is of methods that prepare, one that quantizes, and methods that finish. A method that
    quantizes may prepare as well.

    Attributes:
        name: how a recipe names it.
        title: a few words for listings.
        parameters: a frozen dataclass whose fields are bool, int, float, str or a Literal of str,
            with defaults. Its `__post_init__` may raise a ValueError for values out of range.
        statistics: (scheme, parameters) -> what calibration must collect of a layer.
        prepare_model: rewrites the model, or says what its inputs count, before its first block.
        prepare_block: rewrites a block before its layers are quantized, by `BlockTask.rewrite`.
        quantize: (task, parameters) -> a `QuantizedWeight` [N, K]; or only its `WeightParameters`,
            where the codes are the nearest values, which are then made in slices of rows.
        quantize_block: (block, its layers, parameters) -> the same for each of the layers, for a
            method that quantizes those of a block together. They are the ones that calibration
            reached, each once.
        finish: (model, parameters) -> layers of the quantized model -> what they become, with the
            scheme and shape that they have.
        uses_batches: it runs the calibration batches itself, so that processes cannot share them.
        most_sequences: parameters -> how many sequences of calibration it runs at once, at most, or
            None where it is all the same; larger batches are cut.
        in_stages: parameters -> whether the layers of a block are quantized in the order in which
            it runs them, each behind the quantized ones before it.
        draws_tokens: parameters -> whether its statistics are of tokens drawn at random where no
            batches are given; it does without them where the model embeds none.
        real_zeros: parameters -> whether its zero points are no integers.
        adds: parameters -> the fields that its weights have beyond those of their scheme.
        scales_inputs: parameters -> whether layers may get a factor of their input.
        rewrites_embeddings: parameters -> whether it does, so that these must stay in 16 bits.
        why_not: (scheme, parameters) -> the reason, in a user's words, why it cannot make that
            scheme, or None.
        why_idle: (the schemes of a model's layers, parameters) -> the reason why it would do
            nothing to any of them, or None.
    """

    name: str
    title: str
    parameters: type[Any] = NoParameters
    statistics: Callable[[QuantScheme, Any], Needs] = no_statistics
    prepare_model: Callable[[ModelTask, Any], None] | None = None
    prepare_block: Callable[[BlockTask, Any], None] | None = None
    quantize: Callable[[LayerTask, Any], WeightParameters] | None = None
    quantize_block: (
        Callable[[BlockTask, Mapping[str, LayerTask], Any], Mapping[str, WeightParameters]] | None
    ) = None
    finish: Callable[[ModelTask, Any], Mapping[str, QuantizedWeight]] | None = None
    uses_batches: bool = False
    most_sequences: Callable[[Any], int | None] = any_number
    in_stages: Callable[[Any], bool] = at_once
    draws_tokens: Callable[[Any], bool] = needs_batches
    real_zeros: Callable[[Any], bool] = zeros_are_codes
    adds: Callable[[Any], frozenset[str]] = no_more_fields
    scales_inputs: Callable[[Any], bool] = folds_what_it_scales
    rewrites_embeddings: Callable[[Any], bool] = no_embeddings
    why_not: Callable[[QuantScheme, Any], str | None] = any_scheme
    why_idle: Callable[[Collection[QuantScheme], Any], str | None] = always_at_work

    def __post_init__(self) -> None:
        assert self.prepares + self.quantizes + self.finishes, self.name
        assert not (self.finishes and (self.prepares or self.quantizes)), self.name
        assert self.quantize is None or self.quantize_block is None, self.name

    @property
    def prepares(self) -> bool:
        """Whether it does something before layers are quantized."""
        return self.prepare_model is not None or self.prepare_block is not None

    @property
    def quantizes(self) -> bool:
        """Whether it quantizes layers."""
        return self.quantize is not None or self.quantize_block is not None

    @property
    def finishes(self) -> bool:
        """Whether it works on the quantized model."""
        return self.finish is not None
