"""ZeroQuant: rounding to nearest, and a block's weights trained to give what the dense block gives.

    min over W of  |block(W'; x) - block_dense(x_dense)|^2,    W' = W rounded to nearest

Layer-by-layer knowledge distillation (Yao et al. 2022, ZeroQuant, section 4.2): one block is
trained at a time, so that no gradient leaves it, and no label is needed. Gradients pass rounding of
weights and inputs as if it were not there. In the paper a block is given what dense blocks give;
here, what the quantized ones in front of it do, as it will be. The paper's granularities are
schemes: groups of a weight's columns and activations per token, `w8a8`, `w4a8-g128`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qkernels import rounding
from qkernels.calibration.statistics import Needs
from qkernels.modules.fake_quant import rounded_input
from qkernels.quantizers.descent import Descent
from qkernels.quantizers.method import BlockTask, LayerTask, Method
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight

_BETAS = 0.9, 0.99
_EPSILON = 1e-20
"""Of Adam."""


@dataclass(frozen=True)
class ZeroQuantParameters:
    """Attributes:
    steps: of Adam; 0 rounds to nearest.
    batch: sequences of a step.
    lr: how far the first step moves a weight, as a part of what the layer's weights are in the
        mean; it falls linearly to 0.
    """

    steps: int = 100
    batch: int = 4
    lr: float = 0.01

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1:
            raise ValueError(
                f"steps must be 0 or more and batch 1 or more, got {self.steps} and {self.batch}"
            )
        if not 0 < self.lr <= 1:
            raise ValueError(f"lr must be in (0, 1], got {self.lr:g}")


class TrainedWeight:
    """A weight that is rounded to nearest whenever it is asked for.

    Attributes:
        learned: the weight, fp32 [N, K].
    """

    def __init__(self, task: LayerTask) -> None:
        self._task = task
        self.learned = [task.weight.float().clone()]
        self._size = float(self.learned[0].square().mean().sqrt())
        self._fitted = rounding.fit(
            self.learned[0], task.scheme, activation_scale=task.activation_scale
        )
        self._steps = 0
        self._moments = [torch.zeros_like(self.learned[0]) for _ in range(2)]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W' [N, K]."""
        return self.quantized().dequantize().to(dtype)

    def step(self, gradient: Tensor, rate: float) -> None:
        """Adam's."""
        gradient, (mean, square) = gradient.float(), self._moments
        self._steps += 1
        mean.lerp_(gradient, 1 - _BETAS[0])
        square.lerp_(gradient.square(), 1 - _BETAS[1])
        first, second = (1 - beta**self._steps for beta in _BETAS)
        moved = mean / first / ((square / second).sqrt() + _EPSILON)
        self.learned[0].sub_(moved, alpha=rate * self._size)

    def rounded_input(self, x: Tensor) -> Tensor:
        static = self._fitted.activation_scale
        return rounded_input(x, self._task.scheme, static, self._task.input_zero)

    def quantized(self) -> QuantizedWeight:
        """What W' is stored as."""
        return rounding.quantize(
            self.learned[0], self._task.scheme, activation_scale=self._task.activation_scale
        )


def _statistics(scheme: QuantScheme, parameters: ZeroQuantParameters) -> Needs:
    # Some statistic of dense inputs, so that the dense model runs beside.
    return Needs(dense=("rows",)) if parameters.steps else Needs()


def _quantize_block(
    task: BlockTask, layers: Mapping[str, LayerTask], parameters: ZeroQuantParameters
) -> dict[str, QuantizedWeight]:
    # Neither what is saved for gradients nor what has them may come from inference mode.
    with torch.inference_mode(False), torch.no_grad():
        trained = {name: TrainedWeight(layer) for name, layer in layers.items()}
        if layers and parameters.steps:
            Descent(task, trained, parameters).run()
        return {name: own.quantized() for name, own in trained.items()}


ZEROQUANT = Method(
    name="zeroquant",
    title="weights trained, block by block, to give the dense block's outputs",
    parameters=ZeroQuantParameters,
    statistics=_statistics,
    quantize_block=_quantize_block,
    uses_batches=True,
    most_sequences=lambda parameters: parameters.batch,
)
