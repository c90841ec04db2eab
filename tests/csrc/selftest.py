"""The program of emulator_selftest.cu: one small kernel a run, in the emulator under sanitizers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "emulator_selftest.cu"
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-DQKERNELS_EMULATOR", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
]


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({key for key, _ in pairs}) == len(pairs)
    return dict(pairs)


@dataclass(frozen=True)
class Emulator:
    program: Path

    def start(self, case: str, **options: object) -> subprocess.CompletedProcess[str]:
        arguments = [f"{key}={value}" for key, value in options.items()]
        # A leak checker cannot run under a debugger or in some sandboxes, and is not the point.
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        return subprocess.run(
            [self.program, case, *arguments], capture_output=True, text=True, env=environment
        )

    def launches(self, case: str, **options: object) -> list[dict[str, Any]]:
        """What each launch did, of seeds 1, 2, ..."""
        done = self.start(case, **options)
        assert done.returncode == 0, done.stderr
        return [
            json.loads(line, object_pairs_hook=without_duplicates)
            for line in done.stdout.splitlines()
        ]

    def run(self, case: str, **options: object) -> dict[str, Any]:
        (launch,) = self.launches(case, **options)
        return launch


def build(folder: Path) -> Emulator:
    """The program in `folder`, made where it is not there. Skips where there is no compiler."""
    program = folder / "selftest"
    if program.exists():
        return Emulator(program)
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    sources = [*sorted((ROOT / "csrc/emulator").glob("*.cpp")), ROOT / "tests/csrc" / SOURCE]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [compiler, *FLAGS, f"-I{ROOT / 'csrc'}", "-x", "c++", "-c", source, "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, reversed(sources)))
    subprocess.run([compiler, "-fsanitize=address,undefined", *objects, "-o", program], check=True)
    return Emulator(program)
