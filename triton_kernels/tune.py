"""Measures schedules on the GPU at hand: the only writer of the tables in tuned/.

    python -m qkernels.triton_kernels.tune --n 4096 --k 4096 --bits 4 --m 1 16 64

Weights rotate over more data than the L2 cache holds, so that every launch reads them from memory.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton

from .config import (
    GemmConfig,
    GemvConfig,
    choose_gemm_config,
    choose_gemv_config,
    config_fields,
    problem_of,
    tuned_path,
)
from .int8_gemm import int8_gemm
from .launch import device_facts
from .planar import PlanarWeight, word_rows
from .quantize_rows import quantize_rows
from .weight_only_gemm import weight_only_gemm
from .weight_only_gemv import weight_only_gemv

KERNELS = ("weight_only_gemm", "weight_only_gemv", "int8_gemm")
_CACHE_BYTES = 256 << 20
_REPEATS = 20
# What a candidate may raise that the next one need not: too much shared memory, or registers.
_CANDIDATE_ERRORS = (triton.runtime.errors.OutOfResources, triton.CompilationError)


def random_weight(kernel: str, n: int, k: int, bits: int, plane: int, group: int) -> PlanarWeight:
    """A weight of random codes on the GPU, in the form `kernel` reads."""
    rows, groups = word_rows(k, bits, plane), -(-k // group) if group else 1
    if bits == 8:
        dtype = torch.int8 if kernel == "int8_gemm" else torch.uint8
        words = torch.randint(0, 127, (rows, n), device="cuda").to(dtype)
    else:
        words = torch.randint(-(2**31), 2**31, (rows, n), device="cuda").to(torch.int32)
    scales = torch.rand(groups, n, device="cuda").half() * 0.01 + 0.001
    return PlanarWeight(words, scales, None, n, k, bits, plane, group, "signed")


def gemm_candidates(start: GemmConfig, bits: int) -> Iterator[GemmConfig]:
    """Schedules around the heuristic's choice."""
    splits = sorted({1, 2, 4, 8, 16, start.split_k})
    block_ks = (32, 64, 128) if bits == 8 else (start.block_k,)
    block_ms = sorted({max(16, start.block_m // 2), start.block_m, min(128, start.block_m * 2)})
    for block_m, block_n, block_k, split_k, stages in itertools.product(
        block_ms, (64, 128), block_ks, splits, (1, 2, 3, 4)
    ):
        yield GemmConfig(block_m, block_n, block_k, split_k, block_n // 16, stages)


def gemv_candidates(start: GemvConfig, bits: int) -> Iterator[GemvConfig]:
    """Schedules around the heuristic's choice."""
    splits = sorted({1, 2, 4, 8, 16, 32, start.split_k})
    block_ks = (32, 64, 128) if bits == 8 else (start.block_k,)
    for block_n, block_k, split_k, warps in itertools.product(
        (32, 64, 128, 256), block_ks, splits, (2, 4, 8)
    ):
        yield GemvConfig(block_n, block_k, split_k, warps)


def microseconds(launch: Callable[[int], Any], rotations: int) -> float:
    """Median time of one launch; `launch(i)` uses the i-th copy of the weight."""
    launch(0)
    torch.cuda.synchronize()
    times = []
    for repeat in range(_REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for i in range(rotations):
            launch((repeat + i) % rotations)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / rotations)
    return statistics.median(times)


def tune(kernel: str, n: int, k: int, bits: int, plane: int, group: int, m: int) -> dict[str, Any]:
    """The entry of the tuned table for one problem: its fastest config and the time."""
    _, capability, sm_count = device_facts(torch.device("cuda", torch.cuda.current_device()))
    rotations = max(2, _CACHE_BYTES * 8 // (n * k * bits))
    weights = [random_weight(kernel, n, k, bits, plane, group) for _ in range(rotations)]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    candidates: Iterator[Any]
    x_bytes = 1 if kernel == "int8_gemm" else 2
    problem = problem_of(m, weights[0], x_bytes, capability, sm_count)
    if kernel == "weight_only_gemv":
        candidates = gemv_candidates(choose_gemv_config(problem), bits)
    else:
        candidates = gemm_candidates(choose_gemm_config(problem), bits)
    xq, scale = quantize_rows(x, torch.int8)

    def launch(config: Any, i: int) -> None:
        if kernel == "int8_gemm":
            int8_gemm(xq, scale, weights[i], out_dtype=torch.bfloat16, config=config)
        elif kernel == "weight_only_gemv":
            weight_only_gemv(x, weights[i], config=config)
        else:
            weight_only_gemm(x, weights[i], config=config)

    best: tuple[float, Any] | None = None
    for config in candidates:
        try:
            time = microseconds(partial(launch, config), rotations)
        except _CANDIDATE_ERRORS as error:
            print(f"  {config}: {type(error).__name__}")
            continue
        if best is None or time < best[0]:
            best = (time, config)
    if best is None:
        raise RuntimeError(f"no schedule of {kernel} runs on this GPU for m={m} n={n} k={k}")
    print(f"{kernel} w{bits} m={m} n={n} k={k}: {best[0]:.1f} us with {best[1]}")
    return {
        "kernel": kernel,
        "bits": bits,
        "n": n,
        "k": k,
        "m": m,
        "microseconds": round(best[0], 2),
        "config": config_fields(best[1]),
    }


def write_entries(entries: list[dict[str, Any]], gpu: str) -> None:
    """Adds `entries` to the table of that GPU, in place of older ones of the same problem."""
    path = tuned_path(gpu)

    def problem(entry: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(entry[name] for name in ("kernel", "bits", "n", "k", "m"))

    old = json.loads(path.read_text(encoding="utf-8"))["entries"] if path.exists() else []
    merged = {problem(entry): entry for entry in [*old, *entries]}
    table = {
        "gpu": gpu,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "entries": [merged[key] for key in sorted(merged)],
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def main() -> int:
    """The command line; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description="Tune the Triton kernels on this GPU.")
    parser.add_argument("--n", type=int, required=True)
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), required=True)
    parser.add_argument("--m", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--plane", type=int, choices=(16, 32, 64), default=32)
    parser.add_argument("--group", type=int, default=128, help="0 for per channel")
    parser.add_argument("--kernel", choices=KERNELS, nargs="+", default=list(KERNELS))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("tuning measures on a GPU, and PyTorch sees none here", file=sys.stderr)
        return 2
    n, k, bits = arguments.n, arguments.k, arguments.bits
    entries = [
        tune(kernel, n, k, bits, arguments.plane, arguments.group, m)
        for kernel in arguments.kernel
        for m in arguments.m
    ]
    write_entries(entries, torch.cuda.get_device_name())
    return 0


if __name__ == "__main__":
    sys.exit(main())
