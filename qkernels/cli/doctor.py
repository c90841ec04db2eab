"""`qkernels doctor`: which backends this machine has, and the reason for each one it has not."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from qkernels.cli import models
from qkernels.cli.console import output, progress_bar, table

if TYPE_CHECKING:
    from qkernels.proving import Proof

_INTERPRETER_NEEDS_NUMPY = (2, 4)
"""Triton 3.6's interpreter fails on run-time loop bounds from this numpy on."""


@dataclass(frozen=True)
class Finding:
    """One backend or part: there, with what it is, or not there, with the reason."""

    name: str
    there: bool
    detail: str


def doctor(
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Run every kernel of this machine on small problems, for a report."
        ),
    ] = False,
    device: models.DeviceOption = "auto",
) -> None:
    """Which backends this machine has, and the reason for each one it has not."""
    _backends()
    if check:
        _check(device)


def _check(device: str) -> None:
    """A row for each kernel, and one for each problem it gets wrong; exits with 1 for those."""
    from qkernels.proving import prove_all

    console, target = output(), models.find_device(device)
    proofs: dict[str, list[Proof]] = {}
    with progress_bar("checking kernels") as update:
        for proof in prove_all(target):
            proofs.setdefault(proof.kernel, []).append(proof)
            update(detail=f"{proof.kernel} {proof.scheme}")
    rows = table(
        *("kernel", "problems", "wrong", "largest error", "first one that is wrong"),
        numbers=("problems", "wrong", "largest error"),
    )
    wrong = 0
    for kernel, its in proofs.items():
        bad = [proof for proof in its if proof.reason is not None]
        errors = [proof.error for proof in its if proof.error is not None]
        first = f"{bad[0].scheme}, x {bad[0].x_dtype}: {bad[0].reason}" if bad else ""
        rows.add_row(kernel, str(len(its)), str(len(bad)), f"{max(errors, default=0):.1e}", first)
        wrong += len(bad)
    console.print(f"Kernels on {target}, against the reference", style="bold")
    console.print(rows)
    if wrong:
        raise typer.Exit(1)


def _backends() -> None:
    import torch

    from qkernels import machine

    console = output()
    backends = table("backend", "here", "what or why not")
    findings = (_reference(), _extension(), _cpu_kernels(), _kernels(), *_triton(), _cuda())
    for finding in findings:
        mark = Text("yes", "green") if finding.there else Text("no", "yellow")
        backends.add_row(finding.name, mark, finding.detail)
    console.print("Backends", style="bold")
    console.print(backends)
    facts = table("what", "value")
    about = machine.describe()
    facts.add_row("system", f"{about['system']} {about['architecture']}")
    facts.add_row("CPU", f"{about['cpu']}, {about['cores']} cores")
    facts.add_row("CPU instruction sets", " ".join(about["cpu_isa"]) or "none that kernels ask for")
    facts.add_row("torch threads", str(torch.get_num_threads()))
    for name, version in machine.versions().items():
        facts.add_row(name, version or "not installed")
    console.print("Machine", style="bold")
    console.print(facts)


def _reference() -> Finding:
    return Finding("reference", True, "plain PyTorch: every scheme, shape and device")


def _extension() -> Finding:
    name = "_C (C++)"
    try:
        extension = importlib.import_module("qkernels._C")
    except ImportError as error:
        return Finding(name, False, f"{error}; the CPU runs the reference instead")
    info = extension.build_info()
    cuda = "no CUDA kernels"
    if info.get("cuda"):
        cuda = f"CUDA kernels for {', '.join(info.get('cuda_architectures', []))}"
    openmp = "OpenMP" if info.get("openmp") else "no OpenMP"
    parts = (info.get("compiler"), f"torch {info.get('torch_version')}", openmp, cuda)
    return Finding(name, True, ", ".join(str(part) for part in parts if part))


def _cpu_kernels() -> Finding:
    from qkernels.backends import cpu as backend

    problem = backend.build_problem()
    if problem is not None:
        return Finding("cpu kernels", False, problem)
    reasons = {isa: backend.why_no_isa(isa) for isa in backend.ISAS}
    able = [isa for isa, reason in reasons.items() if reason is None]
    missing = [reason for reason in reasons.values() if reason is not None]
    return Finding("cpu kernels", True, "; ".join((", ".join(able), *dict.fromkeys(missing))))


def _kernels() -> Finding:
    import torch

    from qkernels.backends import cuda as backend
    from qkernels.select import explain

    name = "cuda kernels"
    problem = backend.build_problem()
    if problem is not None:
        return Finding(name, False, problem)
    built = f"for {', '.join(backend.built_architectures())}"
    if not torch.cuda.is_available():
        return Finding(name, False, f"built {built}, but there is no CUDA GPU")
    rows = explain("w4a16-g128", n=4096, k=4096, m=16, device="cuda")
    reasons = [row.reason for row in rows if row.backend == "cuda"]
    return Finding(name, None in reasons, built if None in reasons else str(reasons[0]))


def _triton() -> list[Finding]:
    from qkernels.backends import triton as backend

    problem = backend.import_problem()
    if problem is not None:
        return [Finding("triton", False, problem), Finding("triton interpreter", False, problem)]
    import triton

    return [_triton_on_gpu(triton.__version__), _triton_interpreter(triton.__version__)]


def _triton_on_gpu(version: str) -> Finding:
    import torch

    from qkernels.select import explain

    if not torch.cuda.is_available():
        return Finding("triton", False, f"Triton {version} is here, but there is no CUDA GPU")
    rows = explain("w2a16-g128", n=4096, k=4096, m=16, device="cuda")
    reasons = [row.reason for row in rows if row.backend == "triton"]
    able = None in reasons
    return Finding("triton", able, f"Triton {version}" if able else str(reasons[0]))


def _triton_interpreter(version: str) -> Finding:
    if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        reason = "off: for tests, it runs the kernels slowly on the CPU where TRITON_INTERPRET=1"
        return Finding("triton interpreter", False, reason)
    try:
        import numpy as np
    except ImportError as error:
        return Finding("triton interpreter", False, f"{error}: pip install 'qkernels[triton]'")
    numpy_version = tuple(int(part) for part in np.__version__.split(".")[:2])
    if version.startswith("3.6.") and numpy_version >= _INTERPRETER_NEEDS_NUMPY:
        reason = f"Triton {version} needs numpy below 2.4 for it, found {np.__version__}"
        return Finding("triton interpreter", False, reason)
    return Finding("triton interpreter", True, f"Triton {version}, numpy {np.__version__}")


def _cuda() -> Finding:
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        major, minor = torch.cuda.get_device_capability()
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        detail = f"{name}, compute capability {major}.{minor}, {gib:.0f} GiB, CUDA "
        return Finding("CUDA device", True, f"{detail}{torch.version.cuda}")
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA"
        return Finding("CUDA device", False, reason)
    reason = f"torch {torch.__version__} is built for CUDA {torch.version.cuda} but finds no GPU"
    return Finding("CUDA device", False, reason)
