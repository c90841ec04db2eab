"""What a contestant is: a row that says what it can run, and how."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qkernels.layouts import PackedWeight
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight


@dataclass(frozen=True)
class Problem:
    """Everything a row may depend on: y [m, n] = x [m, k] @ W.T, x in `dtype` on `device`."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    device: str
    scheme: QuantScheme

    def with_m(self, m: int) -> Problem:
        return replace(self, m=m)


def same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Prepared:
    """A weight ready to run.

    Attributes:
        state: all that `run` reads besides x; copied to rotate over more memory than caches hold.
        run: (state, input) -> output; the only part that is timed.
        to_input: x [M, K] -> what `run` takes; outside of the timing.
        to_output: (what `run` returned, its input) -> y [M, N], for the accuracy check.
        kernel: m -> the name of the kernel that runs, where the row can tell.
        copy: how to copy `state`.
    """

    state: Any
    run: Callable[[Any, Any], Any]
    to_input: Callable[[Tensor], Any] = same
    to_output: Callable[[Any, Any], Tensor] = lambda output, _: output
    kernel: Callable[[int], str] | None = None
    copy: Callable[[Any], Any] = deepcopy

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in `state`."""
        return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(self.state))


def _tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, torch.nn.Module):
        return [*state.buffers(), *state.parameters()]
    if isinstance(state, PackedWeight):
        return list(state.buffers.values())
    if isinstance(state, (tuple, list)):
        return [tensor for part in state for tensor in _tensors(part)]
    return []


@dataclass(frozen=True)
class Subject:
    """A row of the benchmark.

    Attributes:
        name: unique name shown in tables.
        why_not: a reason why the problem cannot be run, or None. Asked before `prepare`, once for
            each M; never touches a device that the problem does not name.
        prepare: builds the weight. Called once for each layer; works for every M that `why_not`
            lets pass. May raise: the row is then reported as failed, with the message.
        math: which measured peak bounds it: "fp32", "half" or "int8"; None where the scheme's
            activations say.
        dense: reads `weight.dequantize()` in 16 or 32 bits instead of packed codes.
    """

    name: str
    why_not: Callable[[Problem], str | None]
    prepare: Callable[[Problem, QuantizedWeight], Prepared]
    math: str | None = None
    dense: bool = False

    def math_for(self, scheme: QuantScheme) -> str:
        if self.math is not None:
            return self.math
        return "int8" if scheme.integer_activation else "half"


def first_reason(*checks: tuple[bool, str]) -> str | None:
    """The reason of the first check that does not hold, or None."""
    return next((reason for holds, reason in checks if not holds), None)
