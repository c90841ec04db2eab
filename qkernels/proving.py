"""A kernel proves itself: before it is trusted on a device, it runs one small problem there.

The problem has tails in M, N and K, zero points and a bias. Its result, and the gradient of x where
the kernel gives one, are compared with the reference on the same device; a kernel that differs, or
whose launch fails, is kept from being chosen for the rest of the process, with one warning, and the
next one in order takes its place.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qkernels import reference, rounding
from qkernels.backends import failures
from qkernels.backends.kernel import Kernel, Problem
from qkernels.backends.triton import launch_errors
from qkernels.errors import NoKernelError
from qkernels.layouts import LAYOUTS, PLAIN, Layout, pack
from qkernels.preparation import rows_of
from qkernels.scheme import QuantScheme
from qkernels.select import KERNELS, choose, forget_choices, layout_for, make_problem
from qkernels.weight import QuantizedWeight

N, K = 49, 200
"""Neither is a multiple of any tile, panel or word."""

SCHEMES = (
    *("w4a16-g64", "w4a16-g64-sym", "w8a16-g64", "w3a16-g64", "w2a16-g32", "w4a16-g24"),
    *("nf4-g64", "nf4-g64-dq", "fp4-g32", "log3-g64", "binary-g64", "fp8e4m3-a16", "fp8e5m2-a16"),
    *("w8a8", "w4a8-g64", "w4a8-g64-asym", "w4a8-g64-flat", "w4a4-g64", "fp8-a8", "w4afp8-g64"),
    *("w8a8-static", "w8a8-tokenasym"),
)
"""What `prove_all` runs: each way of decoding, of scaling and of multiplying."""

BOUNDS = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6, torch.float32: 2.0**-11}
"""The largest |y - reference| / |reference| (Frobenius) that is trusted.

A wrong kernel is off by far more, and a right one by rounding: of weights and sums to 16 bits where
x has them; of fp32 products to tf32 on some devices where it has not.
"""


@dataclass(frozen=True)
class Proof:
    """What came of one kernel on one scheme; `reason` is None where it is right."""

    kernel: str
    scheme: str
    x_dtype: torch.dtype
    m: int
    error: float | None
    reason: str | None


_proved: set[tuple[Kernel, str, QuantScheme, torch.dtype]] = set()
_asked: set[tuple[object, ...]] = set()


def proven_layout(
    scheme: QuantScheme,
    n: int,
    k: int,
    device: torch.device | str,
    *,
    backend: str | None = None,
    batch_invariant: bool = False,
    fields: Iterable[str] = (),
) -> Layout:
    """`select.layout_for`, once every kernel that would read that layout is known to be right.

    Raises:
        NoKernelError: where `backend` cannot run the scheme on the device.
    """
    fields = tuple(fields)
    while True:
        layout = layout_for(scheme, n, k, device, backend, fields)
        if not prove(
            scheme,
            n,
            k,
            device,
            layout.name,
            backend=backend,
            batch_invariant=batch_invariant,
            fields=fields,
        ):
            return layout


def prove(
    scheme: QuantScheme,
    n: int,
    k: int,
    device: torch.device | str,
    layout: str,
    *,
    backend: str | None = None,
    batch_invariant: bool = False,
    fields: Iterable[str] = (),
) -> bool:
    """Checks each kernel that a weight in `layout` on `device` may meet, once in a process.

    Warns of one that is wrong, once, and keeps it from being chosen. Does nothing while a CUDA
    graph is captured or a program is traced: the kernel is then checked with its next layer.

    Returns:
        Whether a kernel was found wrong, so that another layout may be the best now.
    """
    device, fields = torch.device(device), tuple(fields)
    asked = (scheme, n, k, str(device), layout, backend, batch_invariant, fields)
    if asked in _asked or device.type == "meta" or _is_tracing(device):
        return False
    found_wrong = False
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for dtype in BOUNDS:
            problem = make_problem(
                scheme,
                n=n,
                k=k,
                m=0,
                device=device,
                layout=layout,
                x_dtype=dtype,
                batch_invariant=batch_invariant,
                fields=fields,
            )
            found_wrong |= _prove_range(problem, device, backend)
    _asked.add(asked)
    return found_wrong


def forget_proofs() -> None:
    """Checks every kernel again, and trusts those that were found wrong until then."""
    _proved.clear()
    _asked.clear()
    failures.forget()
    forget_choices()


def _prove_range(problem: Problem, device: torch.device, backend: str | None) -> bool:
    """`prove` for one type of x: over all numbers of rows, by the ranges that share a kernel."""
    found_wrong, m = False, 0
    while True:
        try:
            choice = choose(replace(problem, m=m), backend)
        except NoKernelError:
            return found_wrong  # of this type of x: the call that wants it will say why
        kernel, small = choice.kernel, small_scheme(problem.scheme, problem.k)
        key = (kernel, str(device), small, problem.x_dtype)
        if kernel.proves_itself and key not in _proved:
            _proved.add(key)
            proof = run_proof(kernel, small, problem.x_dtype, device)
            if proof is not None and proof.reason is not None:
                _distrust(proof, device)
                found_wrong = True
                continue  # with the kernel that is next for this m
        if choice.most_rows is None:
            return found_wrong
        m = choice.most_rows + 1


def small_scheme(scheme: QuantScheme, k: int) -> QuantScheme:
    """`scheme` with groups that the small problem has several of, or one where k has one."""
    if scheme.group_size is None:
        return scheme
    if scheme.groups(k) == 1:
        return replace(scheme, group_size=K)
    group = scheme.group_size
    while group > K // 2 and group % 2 == 0 and group // 2 >= 16:
        group //= 2
    return replace(scheme, group_size=group)


def run_proof(
    kernel: Kernel, scheme: QuantScheme, dtype: torch.dtype, device: torch.device
) -> Proof | None:
    """One small problem through `kernel`, or None where it runs none of this kind."""
    layout = LAYOUTS[kernel.layout or PLAIN.name]
    problem = make_problem(scheme, n=N, k=K, m=0, device=device, layout=layout.name, x_dtype=dtype)
    if kernel.refusal_of_any_rows(problem) is not None:
        return None
    least, most = kernel.rows(problem)
    # More rows than the least, but no whole number of tiles.
    m = max(least + 1, 3) if most is None else min(max(least + 1, 3), most)
    problem = replace(problem, m=m)
    source = torch.Generator().manual_seed(0)
    weight, x, bias = (
        torch.randn(shape, generator=source, dtype=torch.float32, device="cpu")
        for shape in ((N, K), (m, K), (N,))
    )
    weight, x, bias = weight.to(device), x.to(device, dtype), bias.to(device)
    scale = float(x.abs().max()) / scheme.activation.largest if _is_static(scheme) else None
    quantized = _quantized(weight, scheme, bias, scale)

    def proof(error: float | None, reason: str | None) -> Proof:
        return Proof(kernel.name, str(scheme), dtype, m, error, reason)

    # What a launch may raise: errors of torch, of the driver and of Triton's compiler.
    errors: tuple[type[Exception], ...] = (RuntimeError, ValueError, OSError, *launch_errors())
    try:
        packed = pack(quantized, layout)
        y, grad = kernel.run(rows_of(x, packed), packed, bias, problem), None
        if kernel.grad_input is not None:
            grad = kernel.grad_input(y, packed, problem)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except errors as failed:
        return proof(None, f"fails ({type(failed).__name__}: {_first_line(failed)})")
    plain = pack(quantized, PLAIN)
    error, what = _relative_error(y, reference.linear(x, plain, bias).double()), ""
    if grad is not None and error <= BOUNDS[dtype]:
        # Of y, which was found right: any numbers do.
        of_grad = _relative_error(grad, reference.grad_input(y, plain).double())
        error, what = max(error, of_grad), "" if of_grad <= error else "in the gradient of x "
    if error <= BOUNDS[dtype]:
        return proof(error, None)
    return proof(error, f"is off {what}by {error:.2g} where {BOUNDS[dtype]:.2g} is rounding")


def _quantized(
    weight: Tensor, scheme: QuantScheme, bias: Tensor, scale: float | None
) -> QuantizedWeight:
    activation = scheme.activation
    if activation.granularity != "staticasym":
        return rounding.quantize(weight, scheme, bias=bias, activation_scale=scale)
    symmetric = replace(scheme, activation=replace(activation, granularity="static"))
    quantized = rounding.quantize(weight, symmetric, bias=bias, activation_scale=scale)
    zero = torch.tensor(-3, dtype=torch.int32, device=weight.device)
    return quantized.replace(scheme=scheme, activation_zero=zero)


def prove_all(device: torch.device) -> Iterator[Proof]:
    """Every kernel that runs on `device` on every kind of scheme: for a report, not to be trusted.

    Kernels that are found wrong stay choosable: `prove` decides on that.
    """
    for kernel in KERNELS:
        if not kernel.proves_itself:
            continue
        for text in SCHEMES:
            for dtype in BOUNDS:
                proof = run_proof(kernel, QuantScheme.parse(text), dtype, device)
                if proof is not None:
                    yield proof


def _is_static(scheme: QuantScheme) -> bool:
    return scheme.activation.is_static


def _relative_error(y: Tensor, want: Tensor) -> float:
    if y.shape != want.shape or not bool(y.isfinite().all()):
        return float("inf")
    return float((y.double() - want).norm() / want.norm())


def _is_tracing(device: torch.device) -> bool:
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _distrust(proof: Proof, device: torch.device) -> None:
    failures.record(proof.kernel, device.type, f"failed its check on this machine: {proof.reason}")
    forget_choices()
    warnings.warn(
        f"the kernel {proof.kernel} {proof.reason} on {proof.scheme} with x of {proof.x_dtype} on "
        f"{device}, so that others run in its place for the rest of this process; please report it "
        "with the output of `qkernels doctor --check`",
        RuntimeWarning,
        stacklevel=4,
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no reason given"
