"""Tile sizes: a tuned table where one was measured, else a heuristic.

The tables are tuned/<GPU name>.json, written by `tune.py` and by nothing else:

    {"gpu": "...", "triton": "...", "date": "...",
     "entries": [{"kernel": "weight_only_gemm", "bits": 4, "n": 4096, "k": 4096, "m": 16,
                  "microseconds": ..., "config": {"block_m": 16, ...}}, ...]}

An entry serves its own kernel, bits, N and K; of several, the one with the nearest M in log space.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .launch import device_facts
from .planar import PlanarWeight, values_per_word

TUNED_FOLDER = Path(__file__).parent / "tuned"

SHARED_MEMORY = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
"""KiB of shared memory a block can have, by capability (CUDA programming guide); else 99."""


@dataclass(frozen=True)
class GemmConfig:
    """Schedule of a GEMM.

    Attributes:
        block_m, block_n: tile of y that a program computes.
        block_k: columns of K a step covers with 8-bit weights; others step by V planes.
        split_k: parts of K that are summed by a second kernel; 1 for none.
        group_m: row blocks that are computed next to each other, to share weights in L2.
    """

    block_m: int = 32
    block_n: int = 64
    block_k: int = 64
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 2
    group_m: int = 8

    def __post_init__(self) -> None:
        _check_powers(self, ("block_m", 16), ("block_n", 16), ("block_k", 16), ("num_warps", 1))
        _check_counts(self, "split_k", "num_stages", "group_m")


@dataclass(frozen=True)
class GemvConfig:
    """Schedule of a GEMV: see GemmConfig; a program computes `block_n` outputs of one row."""

    block_n: int = 64
    block_k: int = 64
    split_k: int = 1
    num_warps: int = 4

    def __post_init__(self) -> None:
        _check_powers(self, ("block_n", 1), ("block_k", 1), ("num_warps", 1))
        _check_counts(self, "split_k")


def _check_powers(config: GemmConfig | GemvConfig, *fields: tuple[str, int]) -> None:
    for name, least in fields:
        value = getattr(config, name)
        if value < least or value & (value - 1):
            raise ValueError(f"{name} is a power of two of at least {least}, got {value}")


def _check_counts(config: GemmConfig | GemvConfig, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is 1 or more, got {getattr(config, name)}")


class Problem(NamedTuple):
    """All that a schedule may depend on: y [m, n] = x [m, k] @ w.T, and the GPU.

    Attributes:
        bits, plane, group_size: those of the weight, see `PlanarWeight`.
        x_bytes: size of an element that is multiplied: 1 for int8 products.
        capability, sm_count: compute capability and number of multiprocessors.
    """

    m: int
    n: int
    k: int
    bits: int
    plane: int
    group_size: int = 0
    x_bytes: int = 2
    capability: tuple[int, int] = (8, 0)
    sm_count: int = 1


def choose_gemm_config(problem: Problem) -> GemmConfig:
    """The heuristic schedule of a GEMM."""
    m, n, x_bytes = problem.m, problem.n, problem.x_bytes
    most = 128
    if x_bytes == 1 and problem.group_size:
        most = 64  # group scales on int8 products need a second accumulator in registers
    elif x_bytes == 4:
        most = 32  # no tensor core: each lane holds its operands and sums in registers
    block_m = min(most, max(16, _next_power(m)))
    # The wider tile reads x half as often; the narrower one gives small layers more programs.
    wide = x_bytes < 4 and -(-m // block_m) * -(-n // 128) >= problem.sm_count
    block_n = 128 if wide else 64
    if not wide:
        block_m = min(block_m, 64)
    block_k = _block_k(problem.group_size, 64 if block_m <= 64 else 32)
    plane, tile = _plane_and_tile(problem, block_k)
    word_bytes = plane * block_n * (1 if problem.bits == 8 else 4)
    # A stage holds the words and x of the fields that a step unrolls. Two blocks share a processor
    # where that leaves them two stages.
    step = plane * fields_at_once(problem.bits)
    stage = word_bytes + step * block_m * x_bytes
    budget = SHARED_MEMORY.get(problem.capability, 99) * 1024
    stages = max(budget // 2 // stage, min(2, budget // stage))
    if _crosses_groups(problem.group_size, plane):
        stages = 1  # gathered scales would be kept for every stage, tile by tile
    blocks = -(-m // block_m) * -(-n // block_n)
    # 16 channels a warp, one row of operand fragments: only then does Triton decode the weights in
    # the registers that the tensor core reads. With more it writes them back to shared memory first
    # (seen in the code of Triton 3.6 for sm_80 and sm_90).
    num_warps = block_n // 16
    return GemmConfig(
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        split_k=_split_k(blocks, problem, tile),
        num_warps=num_warps,
        num_stages=max(1, min(4, stages)),
    )


def fields_at_once(bits: int) -> int:
    """Fields of a word that a kernel unrolls: a divisor of their number.

    All, so that the loads of all run ahead; of the 32 of 1-bit codes a quarter, since with all of
    them Triton 3.7 took up to 160 s to compile a GEMM for sm_80; 8 of them take 2 s.
    """
    return 8 if bits == 1 else values_per_word(bits)


def unrolled_fields(
    config: GemmConfig, bits: int, x_bytes: int, capability: tuple[int, int]
) -> int:
    """`fields_at_once` of a GEMM, which are fewer in two cases.

    fp32 has no tensor core: a product is thousands of multiply-adds, and V copies of them took
    minutes to compile. And for 10.x and 11.x Triton gives each unrolled product sums of its own in
    tensor memory, which has 512 columns of 128 lanes: 3.6 those of 16-bit products, 3.8 those of
    int8 too. Beyond the 512 it compiles a kernel that only traps. A quarter of them leaves room for
    a second block, as Triton rounds their number up to a power of two.
    """
    values = fields_at_once(bits)
    if x_bytes == 4:
        return 1
    if capability[0] not in (10, 11):
        return values
    # The sums of a small tile take as much as those of a 64 x 64 one, at most.
    most = max(1, 128 * 128 // max(64 * 64, config.block_m * config.block_n))
    return max(part for part in range(1, values + 1) if values % part == 0 and part <= most)


def choose_gemv_config(problem: Problem) -> GemvConfig:
    """The heuristic schedule of a product with few rows of x."""
    # Fewer outputs, and columns of K, than the 128 lanes: only then does Triton load scales and x
    # where they are used, each lane its own; else they pass through shared memory, between two
    # barriers.
    block_n, block_k = 64, _block_k(problem.group_size, 64)
    plane, tile = _plane_and_tile(problem, block_k)
    if _crosses_groups(problem.group_size, plane):
        # A scale and an address for every weight: what fits the registers.
        block_n, block_k = 32, 32
        plane, tile = _plane_and_tile(problem, block_k)
    blocks = problem.m * -(-problem.n // block_n)
    # A lane has 4 loads of 16 bytes under way, with 8 bits 2: the fewer, the more programs.
    split_k = _split_k(blocks, problem, tile, per_processor=8 if problem.bits == 8 else 4)
    return GemvConfig(block_n=block_n, block_k=block_k, split_k=split_k)


def _plane_and_tile(problem: Problem, block_k: int) -> tuple[int, int]:
    plane = block_k if problem.bits == 8 else problem.plane
    return plane, plane * values_per_word(problem.bits)


def _next_power(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def _block_k(group_size: int, most: int) -> int:
    """The largest step along K, up to `most`, that no group boundary crosses; else `most`."""
    if group_size == 0:
        return most
    aligned = math.gcd(group_size, most)
    return aligned if aligned >= 32 else most


def _crosses_groups(group_size: int, plane: int) -> bool:
    return group_size % plane != 0


def _split_k(blocks: int, problem: Problem, tile: int, per_processor: int = 2) -> int:
    """Parts of K that give every processor so many programs, while each part keeps a tile."""
    return max(1, min(-(-problem.k // tile), per_processor * problem.sm_count // blocks))


def gemm_config_for(
    kernel: str, m: int, weight: PlanarWeight, device: torch.device, x_bytes: int = 2
) -> GemmConfig:
    """The schedule of `kernel` for `m` rows on `device`: tuned where measured, else heuristic."""
    return _gemm_config(*_question(kernel, m, weight, device, x_bytes))


def gemv_config_for(kernel: str, m: int, weight: PlanarWeight, device: torch.device) -> GemvConfig:
    """Like `gemm_config_for`, of a GEMV kernel."""
    return _gemv_config(*_question(kernel, m, weight, device, 2))


def _question(
    kernel: str, m: int, weight: PlanarWeight, device: torch.device, x_bytes: int
) -> tuple[str, str, Problem]:
    gpu, capability, sm_count = device_facts(device)
    return gpu, kernel, problem_of(m, weight, x_bytes, capability, sm_count)


def problem_of(
    m: int, weight: PlanarWeight, x_bytes: int, capability: tuple[int, int], sm_count: int
) -> Problem:
    """The problem of `m` rows of x and a weight on a GPU of that kind."""
    shape = (m, weight.n, weight.k, weight.bits, weight.plane, weight.group_size)
    return Problem(*shape, x_bytes, capability, sm_count)


@lru_cache(maxsize=4096)
def _gemm_config(gpu: str, kernel: str, problem: Problem) -> GemmConfig:
    tuned = tuned_config(gpu, kernel, problem)
    return choose_gemm_config(problem) if tuned is None else GemmConfig(**tuned)


@lru_cache(maxsize=4096)
def _gemv_config(gpu: str, kernel: str, problem: Problem) -> GemvConfig:
    tuned = tuned_config(gpu, kernel, problem)
    return choose_gemv_config(problem) if tuned is None else GemvConfig(**tuned)


def tuned_config(
    gpu: str, kernel: str, problem: Problem, folder: Path = TUNED_FOLDER
) -> dict[str, Any] | None:
    """The measured config of this problem with the nearest M in log space, or None."""
    entries = _tuned_entries(gpu, folder).get((kernel, problem.bits, problem.n, problem.k))
    if not entries:
        return None
    return min(entries, key=lambda entry: abs(math.log(entry["m"] / max(problem.m, 1))))["config"]


@lru_cache(maxsize=16)
def _tuned_entries(gpu: str, folder: Path) -> dict[tuple[str, int, int, int], list[dict[str, Any]]]:
    path = tuned_path(gpu, folder)
    entries: dict[tuple[str, int, int, int], list[dict[str, Any]]] = {}
    if not path.exists():
        return entries
    for entry in json.loads(path.read_text(encoding="utf-8"))["entries"]:
        key = (entry["kernel"], entry["bits"], entry["n"], entry["k"])
        entries.setdefault(key, []).append(entry)
    return entries


def tuned_path(gpu: str, folder: Path = TUNED_FOLDER) -> Path:
    """Where the tuned table of the GPU of that name lies."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


def config_fields(config: GemmConfig | GemvConfig) -> dict[str, int]:
    """`config` as an entry of a tuned table carries it."""
    return dataclasses.asdict(config)
