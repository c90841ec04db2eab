"""What a contestant is: a row that says what it can run, and how."""

from __future__ import annotations

import math
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
        copy: how to copy `state`. A copy shares no memory of the weight with what it is of.
        weight_bytes: bytes of the packed weight where `state` hides its tensors.
    """

    state: Any
    run: Callable[[Any, Any], Any]
    to_input: Callable[[Tensor], Any] = same
    to_output: Callable[[Any, Any], Tensor] = lambda output, _: output
    kernel: Callable[[int], str] | None = None
    copy: Callable[[Any], Any] = deepcopy
    weight_bytes: int | None = None

    @property
    def stored_bytes(self) -> int:
        """Bytes of the packed weight: of all tensors in `state` unless `weight_bytes` says."""
        if self.weight_bytes is not None:
            return self.weight_bytes
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
        quantizes_x: rounds x to 8 bits though the scheme does not; its error may be larger.
        own_process: brings threads of its own, so that on the CPU it runs in a process of its own.
    """

    name: str
    why_not: Callable[[Problem], str | None]
    prepare: Callable[[Problem, QuantizedWeight], Prepared]
    math: str | None = None
    dense: bool = False
    quantizes_x: bool = False
    own_process: bool = False

    def math_for(self, scheme: QuantScheme) -> str:
        if self.math is not None:
            return self.math
        return "int8" if scheme.integer_activation else "half"


@dataclass(frozen=True, eq=False)
class Buffers:
    """x [M, K] and memory for y [M, N], both fp32: what a runtime with tensors of its own reads
    and writes without copies."""

    x: Tensor
    y: Tensor

    @staticmethod
    def of(x: Tensor, n: int) -> Buffers:
        # NaN, so that what is not written shows.
        return Buffers(x.float().contiguous(), torch.full((x.shape[0], n), math.nan))


def nibbles(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte along the last dimension, the first in the low half."""
    return (codes[..., 1::2] << 4 | codes[..., ::2]).contiguous()


def first_reason(*checks: tuple[bool, str]) -> str | None:
    """The reason of the first check that does not hold, or None."""
    return next((reason for holds, reason in checks if not holds), None)


def no_group_of(problem: Problem, sizes: tuple[int, ...]) -> str | None:
    """Why the groups of the scheme are not of one of these sizes, all of them whole, or None."""
    size = problem.scheme.group_size
    return first_reason(
        (size in sizes, f"group size {size} is not one of {sizes}"),
        (
            problem.k % (size or 1) == 0,
            f"K={problem.k} is not a multiple of the group size {size}",
        ),
    )
