"""csrc/cpu for 64-bit Arm: cross-compiled, and run in an emulator of several CPUs (qemu-user).

Speed says nothing there. What instructions give is the emulator's, rounding included.
"""

import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from tests.csrc.cpu_programs import ARM_ISAS, build
from tests.csrc.test_cpu_mutations import names_in_the_sources, verdicts

COMPILERS = ("aarch64-linux-gnu-g++",)
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
CPUS = {"neon": "cortex-a53", "neon_dot": "cortex-a76", "neon_i8mm": "max"}
"""For each set of instructions an emulated CPU that has no better one: others are illegal there."""
NOT_HERE = 2
SECONDS = 3600


def found(names: tuple[str, ...]) -> str:
    """The first of some programs that is there; skips where none is."""
    paths = [path for path in map(shutil.which, names) if path is not None]
    if not paths:
        pytest.skip(f"there is no {names[0]}")
    return paths[0]


def emulated(cpu: str, program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [found(EMULATORS), "-cpu", cpu, program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)


def built(main: str, folder: Path, *flags: str) -> Path:
    found(EMULATORS)
    # Without a loader and libraries of the other machine.
    flags = ("-static", *flags)
    return build(main, folder, flags, {"kernels_portable": "-O0"}, found(COMPILERS))


def run_cases(matrix: Path, every: int, isas: tuple[str, ...]) -> None:
    for isa in isas:
        done = emulated(CPUS.get(isa, "cortex-a53"), matrix, f"--every={every}", isa)
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        assert f" 0 failures, up to {isa}" in done.stdout


def test_each_set_of_instructions(tmp_path: Path):
    """On each CPU, its best instructions, and that those it lacks are known to be missing."""
    matrix = built("matrix", tmp_path)
    run_cases(matrix, 31, ARM_ISAS)
    for isa, better in pairwise(ARM_ISAS):
        assert emulated(CPUS[isa], matrix, better).returncode == NOT_HERE
    # x86's are of another kind of CPU.
    assert emulated("max", matrix, "avx2", "amx").returncode == NOT_HERE


@pytest.mark.full
def test_all_cases(tmp_path: Path):
    run_cases(built("matrix", tmp_path), 1, ("portable", *ARM_ISAS))


@pytest.mark.full
def test_every_fault_is_noticed(tmp_path: Path):
    """Those in code for Arm alone; test_cpu_mutations.py has the others."""
    program = built("faults", tmp_path, "-DQKERNELS_FAULTS")
    names = {name for name in names_in_the_sources() if name.startswith("neon_")}
    best = ARM_ISAS[-1]
    done = emulated(CPUS[best], program, best, "neon_")
    assert done.returncode == 0, done.stdout[-2000:]
    found = {name: verdict for name, verdict in verdicts(done.stdout).items() if name in names}
    assert found == dict.fromkeys(names, "noticed")
