"""qkernels itself: `WQLinear` as users call it, and every row of the kernel table on its own."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.subjects.base import Prepared, Problem, Subject
from qkernels import WQLinear, explain
from qkernels.backends.kernel import Kernel
from qkernels.backends.kernel import Problem as KernelProblem
from qkernels.layouts import LAYOUTS, PLAIN, PackedWeight, pack
from qkernels.select import KERNELS, make_problem
from qkernels.weight import QuantizedWeight

KERNEL_PREFIX = "qkernels "
"""What the names of all subjects here begin with, before the kernel's."""

LAYER = KERNEL_PREFIX + "WQLinear"
"""The row that times the whole module: dispatch, the kernel that `select` chose, and its bias."""


def chosen_kernel(problem: Problem) -> str:
    """Name of the kernel that `WQLinear` runs for `problem`."""
    explanations = explain(
        problem.scheme,
        n=problem.n,
        k=problem.k,
        m=problem.m,
        device=problem.device,
        x_dtype=problem.dtype,
    )
    return next(row.kernel for row in explanations if row.chosen)


def _prepare_layer(problem: Problem, weight: QuantizedWeight) -> Prepared:
    layer = WQLinear.from_weight(weight, device=problem.device)
    return Prepared(
        state=layer,
        run=lambda module, x: module(x),
        kernel=lambda m: chosen_kernel(problem.with_m(m)),
    )


def _kernel_row(kernel: Kernel) -> Subject:
    layout = PLAIN if kernel.layout is None else LAYOUTS[kernel.layout]

    def question(problem: Problem, m: int) -> KernelProblem:
        return make_problem(
            problem.scheme,
            n=problem.n,
            k=problem.k,
            m=m,
            device=problem.device,
            layout=layout.name,
            x_dtype=problem.dtype,
        )

    def why_not(problem: Problem) -> str | None:
        if kernel.is_simulator:
            return "a simulator: its time says nothing"
        return kernel.refusal(question(problem, problem.m))

    def prepare(problem: Problem, weight: QuantizedWeight) -> Prepared:
        packed = pack(weight, layout, torch.device(problem.device))
        # Made before timing: `WQLinear` does not look these up at every call either.
        questions: dict[int, KernelProblem] = {}

        def run(state: PackedWeight, x: Tensor) -> Tensor:
            m = x.shape[0]
            if m not in questions:
                questions[m] = question(problem, m)
            return kernel.run(x, state, None, questions[m])

        return Prepared(state=packed, run=run, kernel=lambda m: kernel.name, copy=copy_packed)

    return Subject(KERNEL_PREFIX + kernel.name, why_not, prepare)


def copy_packed(packed: PackedWeight) -> PackedWeight:
    """A packed weight with its own buffers."""
    buffers = {name: buffer.clone() for name, buffer in packed.buffers.items()}
    return PackedWeight(packed.scheme, packed.layout, packed.n, packed.k, buffers)


def _rows() -> tuple[Subject, ...]:
    kernels = [_kernel_row(kernel) for kernel in KERNELS]
    return (Subject(LAYER, lambda problem: None, _prepare_layer), *kernels)


ROWS = _rows()
