"""What a quantization method is: a row of `methods.METHODS`, and what it is given to work on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qkernels.calibration.statistics import LayerInputs, Needs
from qkernels.calibration.walks import DENSE, QUANTIZED, Walk
from qkernels.quantizers.changes import Changes
from qkernels.scheme import QuantScheme
from qkernels.weight import WeightParameters


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
        activation_scale: that of x, which the result must carry, for static activations; else None.
        activation_zero: the zero point of x, which the driver adds to the result; methods get None.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    scheme: QuantScheme
    inputs: LayerInputs | None
    activation_scale: float | None
    activation_zero: int | None = None


@dataclass(frozen=True)
class BlockTask:
    """One block whose layers are about to be quantized.

    Attributes:
        module: the block; the whole model where it has no blocks, a layer where that is outside.
        layers: the layers that will be quantized, by their names in the model.
        schemes: the scheme of each.
        inputs: what calibration collected for each; empty without calibration.
    """

    name: str
    module: nn.Module
    layers: Mapping[str, nn.Linear]
    schemes: Mapping[str, QuantScheme]
    inputs: Mapping[str, LayerInputs]
    walk: Walk
    changes: Changes

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


def no_statistics(scheme: QuantScheme, parameters: Any) -> Needs:
    """For methods that look at weights alone."""
    return Needs()


def any_scheme(scheme: QuantScheme, parameters: Any) -> None:
    """For methods that take every scheme."""


def at_once(parameters: Any) -> bool:
    """For methods that calibrate all layers of a block together."""
    return False


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table.

    A method prepares blocks, quantizes layers, or both; a recipe ends in one that quantizes.

    Attributes:
        name: how a recipe names it.
        title: a few words for listings.
        parameters: a frozen dataclass whose fields are bool, int, float, str or a Literal of str,
            with defaults. Its `__post_init__` may raise a ValueError for values out of range.
        statistics: (scheme, parameters) -> what calibration must collect of a layer.
        prepare_block: rewrites a block before its layers are quantized, by `BlockTask.rewrite`.
        quantize: (task, parameters) -> a `QuantizedWeight` [N, K]; or only its `WeightParameters`,
            where the codes are the nearest values, which are then made in slices of rows.
        in_stages: parameters -> whether the layers of a block are quantized in the order in which
            it runs them, each behind the quantized ones before it.
        why_not: (scheme, parameters) -> the reason, in a user's words, why it cannot make that
            scheme, or None.
    """

    name: str
    title: str
    parameters: type[Any] = NoParameters
    statistics: Callable[[QuantScheme, Any], Needs] = no_statistics
    prepare_block: Callable[[BlockTask, Any], None] | None = None
    quantize: Callable[[LayerTask, Any], WeightParameters] | None = None
    in_stages: Callable[[Any], bool] = at_once
    why_not: Callable[[QuantScheme, Any], str | None] = any_scheme

    def __post_init__(self) -> None:
        assert self.prepare_block is not None or self.quantize is not None, self.name
