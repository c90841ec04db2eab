"""torch's dynamic int8 linear layer: int8 weights by channel, x rounded to 8 bits by tensor."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch

from bench.subjects.base import Prepared, Problem, Subject, first_reason
from qkernels.scheme import Activation
from qkernels.weight import QuantizedWeight

_ENGINE = "onednn"


def _why_not(problem: Problem) -> str | None:
    scheme = problem.scheme
    return first_reason(
        (problem.device == "cpu", "runs on the CPU only"),
        (
            _ENGINE in torch.backends.quantized.supported_engines,
            f"this torch has no engine {_ENGINE} for quantized layers",
        ),
        (
            scheme.weight.name == "int8"
            and scheme.symmetric
            and scheme.group_size is None
            and not scheme.per_tensor
            and scheme.activation == Activation("int8"),
            f"runs w8a8, not {scheme}",
        ),
    )


@contextmanager
def _engine() -> Iterator[None]:
    """Packs with oneDNN, which has int8 products in AMX; a layer runs with what packed it."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = _ENGINE
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def _copy(layer: Any) -> Any:
    with _engine():
        return deepcopy(layer)


def _prepare(problem: Problem, weight: QuantizedWeight) -> Prepared:
    from torch.ao.nn.quantized.dynamic import Linear

    scales = weight.scales[:, 0].double()
    zeros = torch.zeros_like(scales, dtype=torch.int64)
    with _engine(), warnings.catch_warnings():
        # torch will drop its quantized tensors some day; this row then goes with them.
        warnings.filterwarnings(
            "ignore", message=".*quantized tensor creation", category=UserWarning
        )
        # Exact: the values are codes times these scales.
        quantized = torch.quantize_per_channel(weight.dequantize(), scales, zeros, 0, torch.qint8)
        layer = Linear(problem.k, problem.n, bias_=False)
        layer.set_weight_bias(quantized, None)
    return Prepared(
        state=layer,
        run=lambda module, x: module(x),
        to_input=lambda x: x.float(),
        copy=_copy,
        weight_bytes=problem.n * problem.k + 4 * problem.n,
    )


ROWS = (Subject("torch dynamic int8 linear", _why_not, _prepare, own_process=True),)
