"""A tiny model of a class, with random weights from a fixed seed, and inputs that it runs on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from bench.survey.classes import ModelClass
from bench.survey.hints import CONFIGS, INPUTS
from bench.survey.inputs import Inputs, candidates, parameters
from bench.survey.shrink import tiny_config

MAX_PARAMETERS = 30_000_000
"""A class that is larger has a size that no rule makes small."""

MODEL_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    *(NotImplementedError, OSError, RuntimeError, TypeError, ValueError),
)
"""What code of models raises on inputs that it is not made for."""

WEIGHT_STD = 0.125
"""Of the weights of layers, 1 / sqrt(K): with the models' own 0.02 a layer adds little to what goes
around it, and an error of a layer would not be seen."""

BIAS_STD = 0.1


class DoesNotStart(Exception):
    """A class whose tiny model cannot be built, or run dense."""


@dataclass(frozen=True)
class Example:
    """How a tiny model of a class is made, and inputs that it runs on."""

    cls: type[PreTrainedModel]
    config: Any
    dtype: torch.dtype
    inputs: Inputs

    def model(self) -> PreTrainedModel:
        """The model, with the same weights at each call."""
        return _build(self.cls, self.config, self.dtype)


def example(model_class: ModelClass, dtype: torch.dtype) -> Example:
    """A tiny model of this class that runs.

    Raises:
        DoesNotStart: with the errors of the inputs that were tried.
        Errors of the model's own code where it cannot be built.
    """
    cls = getattr(transformers, model_class.name)
    kind = getattr(cls, "config_class", None) or CONFIG_MAPPING[model_class.model_type]
    config = tiny_config(kind, CONFIGS.get(kind.__name__, {}) | CONFIGS.get(cls.__name__, {}))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config).parameters())
    if size > MAX_PARAMETERS:
        raise DoesNotStart(f"its tiny model still has {size:,} parameters")
    model = _build(cls, config, dtype)
    torch.manual_seed(1)
    given = INPUTS.get(cls.__name__) or INPUTS.get(kind.__name__)
    errors = []
    for inputs in candidates(model) if given is None else [given(model)]:
        inputs = cast(inputs, dtype)
        try:
            found = run(model, inputs)
        except MODEL_ERRORS as error:
            errors.append(error)
            continue
        if not any(tensor.isfinite().any() for tensor in found.values()):
            errors.append(ValueError(f"no finite number is in {sorted(found)}"))
            continue
        return Example(cls, config, dtype, inputs)
    if not errors:
        raise DoesNotStart(f"no inputs are known for {list(parameters(model))}")
    raise DoesNotStart(f"no inputs fit: {type(errors[0]).__name__}: {errors[0]}") from errors[0]


def run(model: PreTrainedModel, inputs: Inputs) -> dict[str, Tensor]:
    """The floating tensors that a forward gives, by their place in its output."""
    torch.manual_seed(2)
    with torch.no_grad():
        return dict(_tensors("", model(**copy.deepcopy(inputs))))


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs with what is floating in another type."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _tensors(place: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield place, value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _tensors(f"{place}.{name}" if place else str(name), part)
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _tensors(f"{place}[{index}]", part)


def _build(cls: type[PreTrainedModel], config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose every layer counts, biases included, which are zero before training."""
    torch.manual_seed(0)
    model = cls._from_config(copy.deepcopy(config), dtype=dtype)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.is_floating_point():
                    continue
                if parameter.dim() in (2, 3):
                    parameter.normal_(0.0, WEIGHT_STD)
                elif name.endswith("bias"):
                    parameter.add_(torch.randn_like(parameter), alpha=BIAS_STD)
    return model.eval()
