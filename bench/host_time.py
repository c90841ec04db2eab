"""Host time of a call: what Python, torch and the operator take around a kernel.

    python -m bench.host_time [--repeats 200]

Layers are so small that the kernel takes a fraction of the call: 64 x 64, one row of x, one thread.
The CUDA kernels are run by the code that runs them on a GPU, with a stub in place of each launch:
by the emulator, which `QKERNELS_EMULATOR` names and `csrc/emulator/build.py` makes (without
--sanitize). The Triton kernels are called as on a GPU, up to Triton's own launcher, in whose place
is a stub. What torch takes to allocate on a GPU is not in that.

The minimum is the call itself; the median holds what else the machine does.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

import qkernels as qk

CALLS_AT_ONCE = 200
"""Calls between two readings of the clock, which itself takes as long as a part of one."""

N = K = 64

CPU_SCHEMES = ("w4a16-g64", "w8a8", "w4a8-g64", "nf4-g64", "fp8-a8", "w4a16-g24")
TRITON_SCHEMES = ("w4a16-g64", "w2a16-g64", "nf4-g64")
EMULATED_SCHEMES = ("w4a16-g64", "w8a16", "nf4-g64", "w4a16-g24")

Case = tuple[str, Callable[[], object]]


def _layer(scheme: str, backend: str | None = None, *, check_kernels: bool = True) -> qk.WQLinear:
    return qk.WQLinear.from_linear(
        nn.Linear(K, N), scheme, backend=backend, check_kernels=check_kernels
    )


def _call(layer: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    return lambda: layer(x)


def cpu_cases() -> Iterator[Case]:
    """Calls of layers on the CPU, after a dense layer to compare them with."""
    x = torch.randn(1, K, dtype=torch.bfloat16)
    yield "nn.Linear, bf16", _call(nn.Linear(K, N, dtype=torch.bfloat16).requires_grad_(False), x)
    for scheme in CPU_SCHEMES:
        yield f"WQLinear, {scheme}", _call(_layer(scheme), x)
    layer = _layer("w4a16-g64")
    yield "WQLinear, w4a16-g64, x [2, 3, K]", _call(layer, x.expand(2, 3, K).contiguous())
    yield "WQLinear, w4a16-g64, with a gradient", _call(layer, x.clone().requires_grad_())
    quantized, int8 = qk.quantize_activation(x), _layer("w8a8")
    yield "WQLinear, w8a8, x quantized before", lambda: int8(quantized)
    buffers = list(layer.packed.buffers.values())
    operator = torch.ops.qkernels.linear.default
    yield (
        "the operator alone, w4a16-g64",
        lambda: operator(x, buffers, layer.bias, layer._spec),
    )


def emulated_cases(library: str) -> Iterator[Case]:
    """Calls of layers on the emulated CUDA kernels, none of which is launched."""
    torch.ops.load_library(library)
    ctypes.CDLL(library).qkernels_emulator_skip_launches(1)
    for scheme in EMULATED_SCHEMES:
        layer = _layer(scheme, "emulated")
        yield f"CUDA, WQLinear, {scheme}, M = 1", _call(layer, torch.randn(1, K).half())
    layer = _layer("w4a16-g64", "emulated")
    yield "CUDA, WQLinear, w4a16-g64, M = 64", _call(layer, torch.randn(64, K).half())


def triton_cases() -> Iterator[Case]:
    """Calls of layers on the Triton kernels, none of which is launched."""
    function = importlib.import_module("triton.runtime.interpreter").InterpretedFunction
    function.run = lambda *arguments, **options: None
    for scheme in TRITON_SCHEMES:
        # What a check of the kernels would compare is never written.
        layer = _layer(scheme, "interpreted", check_kernels=False)
        yield f"Triton, WQLinear, {scheme}, M = 1", _call(layer, torch.randn(1, K).half())
    for scheme in ("w4a16-g64", "w8a8"):
        layer = _layer(scheme, "interpreted", check_kernels=False)
        yield f"Triton, WQLinear, {scheme}, M = 64", _call(layer, torch.randn(64, K).half())


def measure(cases: list[Case], repeats: int) -> dict[str, list[float]]:
    """Microseconds of a call, `repeats` times for each case; the cases take turns."""
    samples: dict[str, list[float]] = {name: [] for name, _ in cases}
    for _, run in cases:
        run()
    for _ in range(repeats):
        for name, run in cases:
            start = time.perf_counter_ns()
            for _ in range(CALLS_AT_ONCE):
                run()
            samples[name].append((time.perf_counter_ns() - start) / CALLS_AT_ONCE / 1e3)
    return samples


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.host_time", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--repeats", type=int, default=200, help="samples of each case (200)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = list(cpu_cases())
    if importlib.util.find_spec("triton") is None:
        print("without Triton: it is not installed", file=sys.stderr)
    else:
        # Triton reads it when it is first imported, which is at the first call of its kernels.
        os.environ["TRITON_INTERPRET"] = "1"
        cases += triton_cases()
    library = os.environ.get("QKERNELS_EMULATOR")
    if library is None:
        print("without CUDA: QKERNELS_EMULATOR names no emulator", file=sys.stderr)
    else:
        cases += emulated_cases(library)
    print(f"{'us a call, ' + str(options.repeats) + ' samples':42} {'minimum':>8} {'median':>8}")
    for name, samples in measure(cases, options.repeats).items():
        print(f"{name:42} {min(samples):8.2f} {statistics.median(samples):8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
