"""Which kernel runs a problem, and why the others do not. Nothing else chooses kernels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from qkernels import compiled
from qkernels.backends import cpu as cpu_backend
from qkernels.backends import cuda as cuda_backend
from qkernels.backends import reference as reference_backend
from qkernels.backends import triton as triton_backend
from qkernels.backends.kernel import Kernel, Problem
from qkernels.backends.rows import ROW_KERNELS, capability, select_rows
from qkernels.errors import NoKernelError
from qkernels.fields import optional_fields
from qkernels.layouts import LAYOUTS, PLAIN, Layout
from qkernels.scheme import QuantScheme

KERNELS: list[Kernel] = [
    *cuda_backend.KERNELS,
    *triton_backend.KERNELS,
    *cpu_backend.KERNELS,
    *reference_backend.KERNELS,
    # Behind the reference, which never refuses, so that simulators run only where they are asked
    # for by name.
    *triton_backend.INTERPRETED_KERNELS,
    *cuda_backend.EMULATED_KERNELS,
]
"""In order of priority. Whoever changes it calls `forget_choices`."""

ROW_KERNELS[:] = [
    *cuda_backend.ROW_KERNELS,
    *triton_backend.ROW_KERNELS,
    *cpu_backend.ROW_KERNELS,
    *reference_backend.ROW_KERNELS,
    *triton_backend.INTERPRETED_ROW_KERNELS,
    *cuda_backend.EMULATED_ROW_KERNELS,
]


def backends() -> tuple[str, ...]:
    """The names of the backends, in the order of their first kernels."""
    return tuple(dict.fromkeys(kernel.backend for kernel in KERNELS))


@dataclass(frozen=True)
class Explanation:
    """What `explain` says of one kernel: chosen, able but not needed, or the reason why not."""

    kernel: str
    backend: str
    chosen: bool
    reason: str | None

    def __str__(self) -> str:
        verdict = "chosen" if self.chosen else self.reason or "could run, but comes later in order"
        return f"{self.kernel}: {verdict}"


def check_backend(backend: str | None) -> None:
    """Raises NoKernelError for a backend name that no kernel has."""
    if backend is not None and backend not in backends():
        raise NoKernelError(f"backend {backend!r} is not one of {', '.join(backends())}")


@dataclass(frozen=True)
class Choice:
    """A kernel, and the numbers of rows of x for which it stays the choice.

    Attributes:
        least_rows, most_rows: the range around the m that was asked for; most_rows None has no end.
    """

    kernel: Kernel
    least_rows: int
    most_rows: int | None


def choose(problem: Problem, backend: str | None = None) -> Choice:
    """`select`, with the range of m for which it gives the same kernel.

    Kernels refuse by m through their rows' limits alone, so the answer changes nowhere else.

    Raises:
        NoKernelError: as `select` does.
    """
    chosen, m = select(problem, backend), problem.m
    least, most = 0, None
    for kernel in KERNELS:
        asked = backend is None or kernel.backend == backend
        if not asked or kernel.refusal_of_any_rows(problem) is not None:
            continue
        first, last = kernel.rows(problem)
        # Where the limits of this kernel begin and end, each the first m of a range.
        for edge in (first, None if last is None else last + 1):
            if edge is not None and edge <= m:
                least = max(least, edge)
            elif edge is not None:
                most = edge - 1 if most is None else min(most, edge - 1)
        if kernel is chosen:
            break
    return Choice(chosen, least, most)


def forget_choices() -> None:
    """Has every kernel chosen anew, after one was found to be wrong."""
    select.cache_clear()
    select_grad_input.cache_clear()
    select_rows.cache_clear()
    extension = compiled.extension()
    if extension is not None:
        extension.forget_routes()


@lru_cache(maxsize=4096)
def select(problem: Problem, backend: str | None = None) -> Kernel:
    """The first kernel, in order, that can run `problem`; of `backend` alone where it is named.

    Raises:
        NoKernelError: listing every kernel with its reason.
    """
    check_backend(backend)
    reasons = []
    for kernel in KERNELS:
        if backend is not None and kernel.backend != backend:
            continue
        reason = kernel.refusal(problem)
        if reason is None:
            return kernel
        reasons.append(f"  {kernel.name}: {reason}")
    raise NoKernelError(
        f"no kernel runs {problem.scheme} with m={problem.m}, n={problem.n}, k={problem.k}, "
        f"x {problem.x_dtype} on {problem.device}:\n" + "\n".join(reasons)
    )


@lru_cache(maxsize=4096)
def select_grad_input(problem: Problem, backend: str | None = None) -> Kernel | None:
    """The kernel that gives the gradient of x: that which `select` gives for the product, where it
    has one; None where the reference does.

    x_dtype is that of the gradient, which may be one that no kernel of `backend` multiplies.
    """
    check_backend(backend)
    for kernel in KERNELS:
        if (backend is None or kernel.backend == backend) and kernel.refusal(problem) is None:
            return kernel if kernel.grad_input is not None else None
    return None


def layout_for(
    scheme: QuantScheme,
    n: int,
    k: int,
    device: torch.device | str,
    backend: str | None = None,
    fields: Iterable[str] = (),
) -> Layout:
    """The layout to load a weight in: that of the kernel which would run a single token.

    `fields` are the names of what the weight has beside its codes.

    Raises:
        NoKernelError: where `backend` cannot run the scheme on the device.
    """
    problem = make_problem(scheme, n=n, k=k, m=1, device=device, layout=None, fields=fields)
    kernel = select(problem, backend)
    return PLAIN if kernel.layout is None else LAYOUTS[kernel.layout]


def make_problem(
    scheme: QuantScheme,
    *,
    n: int,
    k: int,
    m: int,
    device: torch.device | str,
    layout: str | None,
    x_dtype: torch.dtype = torch.bfloat16,
    batch_invariant: bool = False,
    fields: Iterable[str] = (),
) -> Problem:
    """A `Problem` on `device`, whose compute capability is looked up once.

    Of `fields`, the names of a weight's fields, the optional ones are asked about.
    """
    device = torch.device(device)
    return Problem(
        m=m,
        n=n,
        k=k,
        x_dtype=x_dtype,
        scheme=scheme,
        layout=layout,
        device=device.type,
        capability=capability(device),
        batch_invariant=batch_invariant,
        fields=optional_fields(scheme, fields),
    )


def explain(
    scheme: QuantScheme | str,
    *,
    n: int,
    k: int,
    m: int = 1,
    device: torch.device | str = "cpu",
    x_dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
    batch_invariant: bool = False,
    fields: Iterable[str] = (),
) -> list[Explanation]:
    """Every kernel, in order, with whether it would run x [m, k] times a weight [n, k] and why not.

    `fields` are names of optional fields that the weight has, such as perm.

    Raises:
        SchemeError: where `scheme` does not parse.
        NoKernelError: where `backend` names no backend.
        ValueError: for sizes below their least value, or a device that is not there.
    """
    scheme = QuantScheme.parse(scheme)
    for name, size, least in (("n", n, 1), ("k", k, 1), ("m", m, 0)):
        if size < least:
            raise ValueError(f"{name} must be {least} or more, got {size}")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} is not there: torch finds no CUDA GPU")
    check_backend(backend)
    problem = make_problem(
        scheme,
        n=n,
        k=k,
        m=m,
        device=device,
        layout=None,
        x_dtype=x_dtype,
        batch_invariant=batch_invariant,
        fields=fields,
    )
    # The weight would be packed for the kernel that runs one token; the others must read the same.
    first = select(replace(problem, m=1, x_dtype=torch.bfloat16, batch_invariant=False), backend)
    layout = PLAIN.name if first.layout is None else first.layout
    problem = replace(problem, layout=layout)
    chosen = select(problem, backend)
    return [
        Explanation(kernel.name, kernel.backend, kernel is chosen, kernel.refusal(problem))
        for kernel in KERNELS
    ]
