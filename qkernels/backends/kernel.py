"""The question put to a kernel, and the row that answers it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkernels.layouts import PackedWeight
from qkernels.scheme import QuantScheme

_LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Problem:
    """Everything that the choice of a kernel may depend on, and nothing else.

    Attributes:
        m, n, k: x is [m, k], the weight [n, k].
        layout: name of the layout the weight is in; None where it is still to be chosen.
        device: "cpu" or "cuda".
        capability: compute capability such as (9, 0), or None without a GPU.
        batch_invariant: a row's result must not depend on the other rows nor on m.
    """

    m: int
    n: int
    k: int
    x_dtype: torch.dtype
    scheme: QuantScheme
    layout: str | None
    device: str
    capability: tuple[int, int] | None
    batch_invariant: bool = False


Run = Callable[[Tensor, PackedWeight, Tensor | None, Problem], Tensor]
WhyNot = Callable[[Problem], str | None]
RunQuantized = Callable[[Tensor, Tensor, PackedWeight, Tensor | None, Problem], Tensor]
RouteOf = Callable[[Problem, torch.device], Any]
"""(problem, device of the weight) -> qkernels._C.Route: what is the same at every call."""


@dataclass(frozen=True)
class Kernel:
    """A row of the kernel table.

    Attributes:
        backend: the family that `backend=` arguments name.
        layout: name of the layout it reads; None reads any.
        why_not: the reason, in a user's words, why it cannot run a problem, or None.
        run: (x [M, K], packed weight, bias or None, problem) -> y [M, N]; x's columns are in the
            order of the codes.
        run_quantized: (int8 x [M, K], its row scales fp32 [M], packed weight, bias or None,
            problem, whose x_dtype is that of y) -> y [M, N]; None where x is not quantized.
        route: how compiled code runs it without asking Python at every call; None where it cannot.
    """

    name: str
    backend: str
    layout: str | None
    why_not: WhyNot
    run: Run
    run_quantized: RunQuantized | None = None
    route: RouteOf | None = None

    def refusal(self, problem: Problem) -> str | None:
        """Why this kernel cannot run `problem`, its layout included; None where it can."""
        reason = self.why_not(problem)
        if reason is None and self.layout is not None and problem.layout not in (None, self.layout):
            return f"reads the {self.layout} layout, and the weight is in {problem.layout}"
        return reason


def no_gpu(problem: Problem) -> str | None:
    """Why no GPU kernel can run `problem`: another device, or too old a GPU; else None."""
    if problem.device != "cuda":
        return f"needs a CUDA GPU, and the weight is on {problem.device}"
    if problem.capability is not None and problem.capability < _LEAST_CAPABILITY:
        return f"needs compute capability 8.0 or more, this GPU has {problem.capability}"
    return None


def kernel_rows(
    backend: str, layout: str, no_device: WhyNot, kernels: Mapping[str, tuple[WhyNot, Run]]
) -> tuple[Kernel, ...]:
    """The rows of a backend, named `<backend>_<kernel>`; `no_device` refuses for all of them."""

    def row(name: str, why_not: WhyNot, run: Run) -> Kernel:
        def refuses(problem: Problem) -> str | None:
            return no_device(problem) or why_not(problem)

        return Kernel(f"{backend}_{name}", backend, layout, refuses, run)

    return tuple(row(name, why_not, run) for name, (why_not, run) in kernels.items())


def run_by(route: RouteOf) -> Run:
    """The `run` of a kernel that has a route."""

    def run(x: Tensor, packed: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
        y: Tensor = route(problem, packed.device).run(x, _kernel_buffers(packed), bias)
        return y

    return run


def run_quantized_by(route: RouteOf) -> RunQuantized:
    """The `run_quantized` of a kernel that has a route."""

    def run(
        x: Tensor, scale: Tensor, packed: PackedWeight, bias: Tensor | None, problem: Problem
    ) -> Tensor:
        buffers = _kernel_buffers(packed)
        y: Tensor = route(problem, packed.device).run(x, buffers, bias, scale, problem.x_dtype)
        return y

    return run


def _kernel_buffers(packed: PackedWeight) -> dict[str, Tensor]:
    """The buffers but for the order of columns, in which x comes already."""
    return {name: buffer for name, buffer in packed.buffers.items() if name != "perm"}
