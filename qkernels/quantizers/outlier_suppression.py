"""Outlier Suppression's gamma migration: norms' weights go behind the rounding of activations.

    (x / gamma) (W diag(gamma))^T,    x = gamma * normalized + beta

A norm's weight makes a few columns of its output large; without it the output is as even as what
was normalized (Wei et al. 2022, section 4.1). Where linear layers alone read a norm, its weight
becomes 1 and theirs is multiplied; where a residual reads it as well, as behind the norms of BERT,
the norm stays and each layer has 1 / gamma as a factor of its input. Which layers read which norm
is seen in one run of the model, and whether others do by running it with the weight moved.

The paper's second part, token-wise clipping, is the observer `tokenwise`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.calibration.forwards import run_batch
from qkernels.calibration.neighbours import are_alike, scaled, with_parameters
from qkernels.quantizers.gradients import output_of
from qkernels.quantizers.method import (
    Method,
    ModelTask,
    NoParameters,
    why_no_rounded_activations,
)
from qkernels.quantizers.probe import few_tokens

_LEAST = 1e-3
"""Of |gamma|, as a part of its mean: what is smaller is made no larger than that."""


@dataclass
class _Norm:
    """Attributes:
    module: with a weight [K] that its output is a multiple of.
    plus_one: that is 1 + weight.
    readers: names of the linear layers that are given its output.
    """

    module: nn.Module
    plus_one: bool
    readers: list[str] = field(default_factory=list)

    def gamma(self) -> Tensor:
        """fp32 [K], > 0: signs stay where they are."""
        gamma = self.module.get_parameter("weight").detach().float()
        gamma = (gamma + 1 if self.plus_one else gamma).abs()
        return gamma.clamp(min=_LEAST * float(gamma.mean()))


def _prepare(task: ModelTask, parameters: NoParameters) -> None:
    batch = few_tokens(task, OUTLIER_SUPPRESSION.name)
    planned = {
        id(layer): name
        for name, layer in reversed(list(task.layers.items()))
        if not task.schemes[name].weight_only
    }
    names = {id(module): name for name, module in task.model.named_modules()}
    wanted = output_of(run_batch(task.model, batch))
    for norm in _norms_read_by_linear_layers(task.model, batch):
        mine = [planned[i] for name in norm.readers if (i := _id(task.model, name)) in planned]
        if not mine:
            continue
        gamma = norm.gamma()
        name = names[id(norm.module)]
        without = scaled(norm.module, 1 / gamma, 0, norm.plus_one)
        moved = {f"{name}.{key}": values for key, values in without}
        for reader in norm.readers:
            weight = task.model.get_submodule(reader).get_parameter("weight")
            moved[f"{reader}.weight"] = weight.detach().float() * gamma
        if len(mine) == len(norm.readers) and _computes(task.model, batch, moved, wanted):
            for parameter, values in moved.items():
                task.rewrite(parameter, values)
            continue
        for reader in mine:
            task.scale_inputs(reader, 1 / gamma)


def _id(model: nn.Module, name: str) -> int:
    return id(model.get_submodule(name))


def _norms_read_by_linear_layers(model: nn.Module, batch: Any) -> list[_Norm]:
    """In the order in which they run. A layer is given the very memory that a norm has filled."""
    outputs: list[tuple[Tensor, _Norm]] = []

    def note_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or not args or not isinstance(args[0], Tensor):
            return
        scaled = _scaled_by_weight(module, args[0], output)
        if scaled is not None:
            known = next((norm for _, norm in outputs if norm.module is module), None)
            outputs.append((output, known or _Norm(module, plus_one=scaled == 1)))

    def note_input(name: str) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0] if args else None
            if not isinstance(x, Tensor):
                return
            for output, norm in outputs:
                if x.data_ptr() == output.data_ptr() and x.shape[-1] == output.shape[-1]:
                    norm.readers += [name] if name not in norm.readers else []

        return before

    with ExitStack() as stack:
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            if isinstance(module, nn.Linear):
                hook = module.register_forward_pre_hook(note_input(name))
                stack.callback(hook.remove)
            elif weight is not None and weight.dim() == 1:
                stack.callback(module.register_forward_hook(note_output).remove)
        run_batch(model, batch)
    found = {id(norm): norm for _, norm in outputs if norm.readers}
    return list(found.values())


def _scaled_by_weight(module: nn.Module, x: Tensor, output: Tensor) -> int | None:
    """0 where a norm multiplies by its weight, 1 where by 1 + weight, None where by neither."""
    weight = module.get_parameter("weight").detach()
    forward = type(module).forward
    for shift in (0, 1):
        at_zero = {"weight": torch.full_like(weight, -shift)}
        if module._parameters.get("bias") is not None:
            at_zero["bias"] = torch.zeros_like(weight)
        with with_parameters(module, at_zero):
            if not forward(module, x).any() and output.any():
                return shift
    return None


def _computes(
    model: nn.Module, batch: Any, parameters: Mapping[str, Tensor], wanted: Tensor
) -> bool:
    """Whether the model gives the same under other parameters."""
    with with_parameters(model, parameters):
        got = output_of(run_batch(model, batch))
    return are_alike(got, wanted)


OUTLIER_SUPPRESSION = Method(
    name="outlier_suppression",
    title="norms' weights moved behind the rounding of activations",
    prepare_model=_prepare,
    scales_inputs=lambda parameters: True,
    why_idle=why_no_rounded_activations,
)
