"""The question put to a kernel, and the row that answers it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkernels.backends import failures
from qkernels.layouts import LAYOUTS, PackedWeight
from qkernels.layouts.padding import kernel_group
from qkernels.scheme import QuantScheme

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

PREPARED = frozenset({"input_factor", "perm"})
"""Optional fields of a weight that are applied to x before a kernel sees it: see `preparation`."""

WEIGHT_ROUNDINGS = ("none", "x_dtype", "bf16_terms", "integers")
"""How a kernel rounds weights before it multiplies them.

    none         the fp32 weight, at most rounded once to x's type
    x_dtype      scales and codebook values to x's type, then their product once more
    bf16_terms   codebook values to one, two or three bf16 numbers, as many as x's type takes;
                 scales not at all
    integers     integer products, exact
"""

_LEAST_CAPABILITY = (8, 0)
_ACTIVATIONS = {"none": "16-bit", "int8": "int8", "int4": "int4", "fp8": "fp8"}
_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Problem:
    """Everything that the choice of a kernel may depend on, and nothing else.

    Attributes:
        m, n, k: x is [m, k], the weight [n, k].
        layout: name of the layout the weight is in; None where it is still to be chosen.
        device: "cpu" or "cuda".
        capability: compute capability such as (9, 0), or None without a GPU.
        batch_invariant: a row's result must not depend on the other rows nor on m.
        fields: the optional fields that the weight has; see `fields.optional_fields`.
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
    fields: frozenset[str] = frozenset()


Run = Callable[[Tensor, PackedWeight, Tensor | None, Problem], Tensor]
WhyNot = Callable[[Problem], str | None]
RunQuantized = Callable[[Tensor, Tensor, PackedWeight, Tensor | None, Problem], Tensor]
GradInput = Callable[[Tensor, PackedWeight, Problem], Tensor]
RouteOf = Callable[[Problem, torch.device], Any]
RowLimit = int | Mapping[int, int]
"""A number of rows, or one for groups of so many columns and more: {0: 40, 128: 96}."""


def _fine(problem: Problem) -> None:
    return None


@dataclass(frozen=True, eq=False, kw_only=True)
class Kernel:
    """A row of the kernel table. Rows are compared by identity.

    Attributes:
        name: what `explain` calls it.
        backend: the family that `backend=` arguments name.
        layout: name of the layout it reads; None reads any.
        activations: the types of activations, of a scheme, that it multiplies.
        activation_zeros: it multiplies activations with zero points too.
        activation_positions: it multiplies static activations with a scale per position too.
        activation_outliers: it keeps columns with outliers apart, where the scheme says so.
        x_dtypes: the types of x that it takes.
        least_rows, most_rows: the rows of x that it is for; None for any number.
        varies: why a row's result depends on the other rows or their number, which
            `batch_invariant` does not accept; None where it does not.
        exact: its sums are exact, so that it gives the bits of every other exact kernel. Under
            `batch_invariant` kernels that are not exact serve every number of rows alone.
        weight_rounding: one of `WEIGHT_ROUNDINGS`.
        fields: the optional fields of a weight that it is right for; None for all.
        is_simulator: it imitates another device, for tests: its time says nothing.
        proves_itself: it is checked on a device before it is trusted there; see `proving`.
        where: the reason why it does not run on a problem's device, or None.
        why_not: any other reason, in a user's words, or None; it does not look at m.
        run: (x [M, K], packed weight, bias or None, problem) -> y [M, N]; x's columns are in the
            order of the codes.
        run_quantized: (int8 x [M, K], its row scales fp32 [M], packed weight, bias or None,
            problem, whose x_dtype is that of y) -> y [M, N]; None where x is not quantized.
        route: (problem, device of the weight) -> qkernels._C.Route, by which compiled code runs it
            without Python, for any m; None where there is no such code. See `by_route`.
        grad_input: (grad [M, N], packed weight, problem) -> grad [M, N] @ W, [M, K] with columns in
            the order of the codes, in grad's type: the gradient of x where this kernel multiplied
            it; None where the reference gives that.
    """

    name: str
    backend: str
    layout: str | None
    activations: tuple[str, ...]
    activation_zeros: bool = False
    activation_positions: bool = False
    activation_outliers: bool = False
    x_dtypes: tuple[torch.dtype, ...] = FLOATS
    least_rows: RowLimit = 0
    most_rows: RowLimit | None = None
    varies: str | None = None
    exact: bool = False
    weight_rounding: str = "none"
    fields: frozenset[str] | None = PREPARED
    is_simulator: bool = False
    proves_itself: bool = True
    where: WhyNot = _fine
    why_not: WhyNot = _fine
    run: Run
    run_quantized: RunQuantized | None = None
    route: RouteOf | None = None
    grad_input: GradInput | None = None

    def __post_init__(self) -> None:
        assert self.weight_rounding in WEIGHT_ROUNDINGS, self.weight_rounding

    def refusal(self, problem: Problem) -> str | None:
        """Why this kernel is not to run `problem`, its layout included; None where it may."""
        reason = self.refusal_of_any_rows(problem)
        if reason is not None:
            return reason
        least, most = self.rows(problem)
        if problem.m < least:
            return f"is for {least} rows of x and more, got {problem.m}"
        if most is not None and problem.m > most:
            return f"is for {most} rows of x at most, got {problem.m}"
        return None

    def refusal_of_any_rows(self, problem: Problem) -> str | None:
        """Why this kernel runs `problem` for no number of rows of x; None where it does."""
        return (
            self.where(problem)
            or failures.reason(self.name, problem.device)
            or self._why_not_types(problem)
            or self._why_not_layout(problem)
            or self.why_not(problem)
            or (self.varies if problem.batch_invariant else None)
        )

    def rows(self, problem: Problem) -> tuple[int, int | None]:
        """The least and the most rows of x that this kernel is for; None for any number."""
        if problem.batch_invariant and not self.exact:
            return 0, None
        group = kernel_group(problem.scheme, problem.k)
        most = None if self.most_rows is None else _limit(self.most_rows, group)
        return _limit(self.least_rows, group), most

    def _why_not_types(self, problem: Problem) -> str | None:
        activation = problem.scheme.activation.dtype
        if activation not in self.activations:
            taken = " or ".join(_ACTIVATIONS[each] for each in self.activations)
            has = _ACTIVATIONS[activation]
            return f"multiplies {taken} activations, and the scheme has {has} ones"
        if problem.scheme.activation.has_zeros and not self.activation_zeros:
            return "knows no zero points of activations"
        if problem.scheme.activation.by_position and not self.activation_positions:
            return "knows no scales of activations per position"
        if problem.scheme.activation.outliers and not self.activation_outliers:
            return "keeps no columns with outliers apart"
        if problem.x_dtype not in self.x_dtypes:
            taken = " or ".join(_DTYPES[dtype] for dtype in self.x_dtypes)
            return f"takes x of {taken}, not {problem.x_dtype}"
        if self.fields is not None and not problem.fields <= self.fields:
            return f"does not know {', '.join(sorted(problem.fields - self.fields))}"
        return None

    def _why_not_layout(self, problem: Problem) -> str | None:
        if self.layout is None:
            return None
        reason = LAYOUTS[self.layout].why_not(problem.scheme)
        if reason is not None:
            return f"reads the {self.layout} layout, which {reason}"
        if problem.layout not in (None, self.layout):
            return f"reads the {self.layout} layout, and the weight is in {problem.layout}"
        return None


def by_route(route: RouteOf, *, quantized: bool = False) -> dict[str, Any]:
    """`run`, `run_quantized` and `route` of a kernel that compiled code runs.

    Args:
        quantized: x may come as int8.
    """

    def run(x: Tensor, packed: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
        return run_quantized(x, None, packed, bias, problem)

    def run_quantized(
        x: Tensor, scale: Tensor | None, packed: PackedWeight, bias: Tensor | None, problem: Problem
    ) -> Tensor:
        buffers = {name: held for name, held in packed.buffers.items() if name not in PREPARED}
        y: Tensor = route(problem, packed.device).run(x, buffers, bias, scale, problem.x_dtype)
        return y

    return {"run": run, "run_quantized": run_quantized if quantized else None, "route": route}


def _limit(limit: RowLimit, group: int) -> int:
    if isinstance(limit, int):
        return limit
    return limit[max(least for least in limit if least <= group)]


def no_gpu(problem: Problem) -> str | None:
    """Why no GPU kernel can run `problem`: another device, or too old a GPU; else None."""
    if problem.device != "cuda":
        return f"needs a CUDA GPU, and the weight is on {problem.device}"
    if problem.capability is not None and problem.capability < _LEAST_CAPABILITY:
        return f"needs compute capability 8.0 or more, this GPU has {problem.capability}"
    return None
