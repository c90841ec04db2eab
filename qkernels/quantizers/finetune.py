"""Training of weights with quantization, as the last step of a recipe.

    min over W, s of  KL(p_dense || p_quantized),    W' = s (Q(W / s + z) - z)

by Adam over calibration batches, end to end, with the gradients of LSQ (`modules/fake_quant.py`).
Each weight begins with the code that the method before gave it: where the dense weight is, or as
near to that as the code goes. So codes change as well as scales; zero points stay. Where the model
is no nearer to the dense one on sequences that are kept aside, it stays as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkernels.errors import QuantizationError
from qkernels.fields import FIELDS
from qkernels.modules import FakeQuantLinear, WQLinear
from qkernels.modules.fake_quant import rounded_input
from qkernels.modules.kinds import linear_parts
from qkernels.quantizers.end_to_end import EndToEnd, quantized_layers
from qkernels.quantizers.gradients import frozen
from qkernels.quantizers.method import Method, ModelTask, check_seed
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight


@dataclass(frozen=True)
class FinetuneParameters:
    """Attributes:
    steps: of Adam.
    sequences: of calibration, in each step.
    lr: how far a step moves a weight, as a part of its scale.
    lr_scale: how far it moves a scale of 4 bits, as a part of it; see `distill`.
        Both fall to 0 by half a cosine.
    seed: of the order of sequences.
    """

    steps: int = 96
    sequences: int = 4
    lr: float = 0.01
    lr_scale: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.sequences < 1:
            raise ValueError(
                f"steps and sequences must be 1 or more, got {self.steps} and {self.sequences}"
            )
        for name, rate in (("lr", self.lr), ("lr_scale", self.lr_scale)):
            if not 0 < rate < 1:
                raise ValueError(f"{name} must be in (0, 1), got {rate:g}")
        check_seed(self.seed)


_EPSILON = 1e-16
"""Adam's: gradients of scales of 8 bits are about 1e-9."""


class _Trained:
    """A quantized layer whose weights and scales are trained.

    Attributes:
        fake: with the parameters.
    """

    def __init__(self, layer: WQLinear, dense: nn.Module) -> None:
        hub = layer.to_weight()
        # What happens to x before the codes stays; the codes are trained in their own order.
        self._before_codes = {
            name: value for name, value in hub.fields.items() if FIELDS[name].transform_x
        }
        plain = hub.replace(**dict.fromkeys(self._before_codes))
        weight = linear_parts(dense).weight.detach()
        if hub.perm is not None:
            weight = weight[:, hub.perm]
        packed = WQLinear.from_weight(plain, dtype=layer.dtype, check_kernels=False)
        self.fake = FakeQuantLinear.from_quantized(packed, weight)
        self._bias = hub.bias
        self._made = self._leaf = torch.empty(0)

    def begin(self) -> None:
        made = self.fake.fake_weight()
        self._made, self._leaf = made, made.detach().to(self.fake.dtype).requires_grad_()

    def end(self) -> None:
        self._made = self._leaf = torch.empty(0)

    def learn(self) -> None:
        if self._leaf.grad is not None:
            self._made.backward(self._leaf.grad.float())

    def forward(self, input: Tensor) -> Tensor:
        rows = input.flatten(0, -2)
        for name, value in self._before_codes.items():
            transform = FIELDS[name].transform_x
            assert transform is not None
            rows = transform(rows, value)
        x = rounded_input(rows.view(input.shape), self.fake.scheme, self.fake.activation_scale)
        bias = None if self._bias is None else self._bias.to(x.dtype)
        return F.linear(x, self._leaf.to(x.dtype), bias)

    def result(self) -> QuantizedWeight:
        return self.fake.quantized().replace(bias=self._bias, **self._before_codes)


def _finetune(task: ModelTask, parameters: FinetuneParameters) -> Mapping[str, QuantizedWeight]:
    layers = quantized_layers(task)
    with task.dense():
        dense = {name: task.model.get_submodule(name) for name in layers}
    # Neither what is saved for gradients nor what has them may come from inference mode.
    with frozen(task.model):
        trained: dict[str, _Trained] = {}
        left: dict[str, str] = {}
        for name, layer in layers.items():
            try:
                trained[name] = _Trained(layer, dense[name])
            except QuantizationError as error:
                left.setdefault(str(error), name)
        for reason, name in left.items():
            warnings.warn(
                f"{FINETUNE.name} leaves {name} and its like as they are: {reason}", stacklevel=2
            )
        if not trained:
            return {}
        run = EndToEnd(task, layers, trained)
        before = run.first_divergence(FINETUNE.name)
        groups = []
        for each in trained.values():
            fake = each.fake
            assert fake.scales is not None
            scale = float(fake.scales.detach().abs().mean())
            reach = 2.0 ** (4 - max(2, fake.scheme.bits))
            groups += [
                {"params": [fake.weight], "lr": parameters.lr * scale},
                {"params": [fake.scales], "lr": parameters.lr_scale * reach * scale},
            ]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=_EPSILON)
        run.train(optimizer, parameters.steps, parameters.sequences, parameters.seed)
        if run.divergence() >= before:
            return {}
        return {name: each.result() for name, each in trained.items()}


def _why_not(scheme: QuantScheme, parameters: FinetuneParameters) -> str | None:
    if scheme.scale_levels != "one":
        return "scales that are quantized themselves are not learned"
    if scheme.activation.is_static:
        return "static scales of activations are learned by qk.prepare_qat alone"
    return None


FINETUNE = Method(
    name="finetune",
    title="weights and scales trained to give the dense model's outputs",
    parameters=FinetuneParameters,
    finish=_finetune,
    uses_batches=True,
    why_not=_why_not,
)
