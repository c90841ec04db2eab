"""The cases of tests/csrc/cpu notice faults: with any one of csrc/cpu/faults.h, a result is wrong.

One program holds all faults, and turns on the one that it is told to.
"""

import fcntl
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.csrc.cpu_programs import ISAS, JOBS, KERNELS, SOFTWARE_TILES, build

# Far more than a fault takes that does not loop for ever.
SECONDS = 600
RIGHT, WRONG, NOT_HERE = 0, 1, 2


def names_in_the_sources() -> list[str]:
    texts = (path.read_text() for path in KERNELS.iterdir() if path.name != "faults.h")
    return [name for text in texts for name in re.findall(r"\bQK_FAULT\((\w+)\)", text)]


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> Path:
    """Built by the first of several processes of pytest, while the others wait."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= "cpu_faults"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "faults").exists():
            build("faults", folder, ("-DQKERNELS_FAULTS", *SOFTWARE_TILES))
    return folder / "faults"


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=SECONDS)


def faults_met(program: Path, isa: str) -> set[str] | None:
    """The faults that the cases come by with `isa`; None where this machine does not run it."""
    done = run(program, isa)
    if done.returncode == NOT_HERE:
        return None
    assert done.returncode == RIGHT, f"without a fault: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return set(done.stdout.split())


@pytest.mark.parametrize("isa", ISAS)
def test_every_fault_is_noticed(program, isa):
    met = faults_met(program, isa)
    if met is None:
        pytest.skip(run(program, isa).stdout.strip())
    with ThreadPoolExecutor(JOBS) as pool:
        done = dict(zip(met, pool.map(lambda fault: run(program, isa, fault), met), strict=True))
    assert not {fault: result for fault, result in done.items() if result.returncode != WRONG}


def test_every_fault_is_met(program):
    names = names_in_the_sources()
    assert sorted(set(names)) == sorted(names), "a name stands in two places"
    # Those of NEON are for test_cpu_arm.py.
    names = [name for name in names if not name.startswith("neon_")]
    met = {isa: faults_met(program, isa) for isa in ISAS}
    missed = set(names).difference(*(found for found in met.values() if found is not None))
    absent = [isa for isa, found in met.items() if found is None]
    if missed and absent:
        pytest.skip(f"{', '.join(absent)}, which do not run here, may come by {sorted(missed)}")
    assert not missed
