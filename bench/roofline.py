"""The ceilings of the machine, measured in the same run, and how near a time comes to them.

floor = max(bytes / bandwidth, operations / peak)        % of roofline = floor / time
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.subjects.dense import DTYPE_NAMES, dtype_name

CPU_BUFFER_BYTES = 512 << 20
CPU_MATRIX = 2048
CUDA_BUFFER_BYTES = 1 << 30
CUDA_MATRIX = 8192
OWN_SECONDS = 1.0
_REPEATS = 5


@dataclass(frozen=True)
class Roofline:
    """Measured ceilings.

    Attributes:
        bandwidth: bytes per second: reads on the CPU; bytes read plus written of a copy on CUDA.
        peaks: operations per second by "fp32", "bf16", "fp16", "int8", as far as measured.
    """

    bandwidth: float
    peaks: dict[str, float] = field(default_factory=dict)

    def peak(self, math: str) -> float:
        """The peak that bounds a subject of this `math`.

        A 16-bit weight-only kernel may compute in any float type, and an integer kernel in any
        type, so that the highest of those is the ceiling; 0 where none was measured.
        """
        floats = [value for name, value in self.peaks.items() if name != "int8"]
        candidates = {
            "fp32": [self.peaks.get("fp32", 0.0)],
            "half": floats,
            "int8": list(self.peaks.values()),
        }[math]
        return max(candidates, default=0.0)

    def floor(self, n_bytes: int, operations: int, math: str) -> float:
        """The fewest seconds for so many bytes and operations; 0 where nothing was measured."""
        memory = n_bytes / self.bandwidth if self.bandwidth else 0.0
        peak = self.peak(math)
        return max(memory, operations / peak if peak else 0.0)

    def percent(self, n_bytes: int, operations: int, math: str, seconds: float) -> float | None:
        """Percent of the roofline reached, or None where no ceiling was measured."""
        floor = self.floor(n_bytes, operations, math)
        return 100 * floor / seconds if floor else None


def measure(device: str, dtype: torch.dtype, *, with_int8: bool, small: bool = False) -> Roofline:
    """Measures bandwidth and peaks of `device` in about a second; `small` sizes are for tests."""
    if device == "cuda":
        size = 512 if small else CUDA_MATRIX
        bandwidth = _cuda_copy(1 << 20 if small else CUDA_BUFFER_BYTES)
    else:
        size = 64 if small else CPU_MATRIX
        bandwidth = _cpu_read(1 << 20 if small else CPU_BUFFER_BYTES)
    dtypes = {dtype, torch.bfloat16, torch.float32} if device == "cpu" else {dtype, torch.bfloat16}
    peaks = {
        name: _matrix_peak(device, DTYPE_NAMES[name], size)
        for name in sorted(dtype_name(value) for value in dtypes)
    }
    if with_int8 and hasattr(torch.ops.aten, "_int_mm"):
        peaks["int8"] = _matrix_peak(device, torch.int8, size)
    if device == "cpu":
        # torch's products of this size keep AMX waiting: loops on registers alone show more.
        own = _own_peaks(0.01 if small else OWN_SECONDS)
        bandwidth = max(bandwidth, own.get("read", 0.0))
        peaks = {name: max(peak, own.get(name, 0.0)) for name, peak in peaks.items()}
    return Roofline(bandwidth, peaks)


def _own_peaks(seconds: float) -> dict[str, float]:
    """What the compiled extension measures: "read" in bytes/s, peaks in operations/s by type.

    Empty where the extension is not built, or does not measure.
    """
    try:
        compiled = importlib.import_module("qkernels._C")
    except ImportError:
        return {}
    if not hasattr(compiled, "cpu_peaks"):
        return {}
    return dict(compiled.cpu_peaks(torch.get_num_threads(), seconds))


def _fastest(call: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of some calls: a ceiling is what the machine can, not what it did."""
    call()
    times = []
    for _ in range(_REPEATS):
        if device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        else:
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    return max(min(times), 1e-9)


def _cpu_read(n_bytes: int) -> float:
    """The best of reductions that only read. Which one streams best differs between machines."""
    columns = 4096
    # Ones in every page: untouched pages would all be the one zero page, which a cache holds.
    buffer = torch.ones(max(1, n_bytes // 4 // columns), columns)
    vector = torch.ones(columns)
    actual = buffer.numel() * buffer.element_size()
    candidates: list[Callable[[], Tensor]] = [
        buffer.sum,
        buffer.max,
        lambda: torch.mv(buffer, vector),
    ]
    return max(actual / _fastest(call, "cpu") for call in candidates)


def _cuda_copy(n_bytes: int) -> float:
    source = torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * n_bytes / _fastest(lambda: target.copy_(source), "cuda")


def _matrix_peak(device: str, dtype: torch.dtype, size: int) -> float:
    """Operations per second of a square product, on random data."""
    if dtype is torch.int8:
        a, b = (
            torch.randint(-127, 128, (size, size), dtype=dtype, device=device) for _ in range(2)
        )
        seconds = _fastest(lambda: torch.ops.aten._int_mm(a, b.t()), device)
    else:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = _fastest(lambda: torch.nn.functional.linear(a, b), device)
    return 2 * size**3 / seconds
