"""csrc/cpu under sanitizers: each format, shape, set of instructions and number of threads.

AddressSanitizer and UBSan see what compiled code reads and writes. The instructions that load and
store tiles are inline assembly in gcc's headers, which no sanitizer sees: for them, tiles are
plain C++.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.csrc.cpu_programs import AVX_VNNI, FLAGS, ISAS, SOFTWARE_TILES, build, compiler

MEMORY = "address,undefined"
THREADS = "thread"


@dataclass(frozen=True)
class Matrix:
    program: Path
    launcher: tuple[str, ...] = ()

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        # A leak checker cannot run under a debugger or in some sandboxes, and is not the point.
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        command = [*self.launcher, self.program, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment)


def launcher_of(sanitizer: str, folder: Path) -> tuple[str, ...]:
    """What to start sanitized programs with; skips where they are not built or do not run."""
    source, program = folder / "probe.cpp", folder / "probe"
    source.write_text("int main() { return 0; }\n")
    command = [compiler(), *FLAGS, f"-fsanitize={sanitizer}", source, "-o", program]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"g++ does not link -fsanitize={sanitizer}: {done.stderr.strip()[-200:]}")
    # ThreadSanitizer of gcc 12 finds addresses that newer kernels draw at random unexpected.
    setarch = shutil.which("setarch")
    fixed_addresses = [(setarch, "-R")] if setarch else []
    for launcher in [(), *fixed_addresses]:
        done = subprocess.run([*launcher, program], capture_output=True, text=True)
        if done.returncode == 0:
            return launcher
    pytest.skip(f"programs of -fsanitize={sanitizer} do not run: {done.stderr.strip()[-200:]}")


def built(sanitizer: str, folder: Path, *flags: str) -> Matrix:
    launcher = launcher_of(sanitizer, folder)
    # Plain C++ with both sanitizers takes 26 s to optimize, a third of all, and 3 s not to.
    levels = {"kernels_portable": "-O0"} if sanitizer == MEMORY else {}
    sanitized = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", *flags)
    return Matrix(build("matrix", folder, sanitized, levels), launcher)


def succeeds(done: subprocess.CompletedProcess[str]):
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    assert " 0 failures" in done.stdout


# One test for each program, so that no two processes of pytest build the same one.


def test_memory(tmp_path: Path):
    # Threads, below, have AVX2 without.
    matrix = built(MEMORY, tmp_path, *SOFTWARE_TILES, *AVX_VNNI)
    succeeds(matrix.run())
    # That can fail: without the last element of y.
    for isa in ISAS:
        done = matrix.run("--break", isa)
        if done.returncode == 2:
            continue  # this machine has no such instructions
        assert done.returncode != 0
        assert "heap-buffer-overflow" in done.stderr
        assert "write_output" in done.stderr


def test_threads(tmp_path: Path):
    # What is shared among threads does not depend on the format: each fifth case will do.
    succeeds(built(THREADS, tmp_path).run("--every=5"))
