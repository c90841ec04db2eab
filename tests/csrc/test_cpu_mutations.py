"""The cases of tests/csrc/cpu notice faults: with any one of csrc/cpu/faults.h, a result is wrong.

One program holds all faults, and turns on one after the other.
"""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.csrc.cpu_programs import ISAS, JOBS, KERNELS, SOFTWARE_TILES, build
from tests.csrc.sharing import held

SECONDS = 600
RIGHT, NOT_HERE = 0, 2
Outcomes = dict[str, tuple[int, str]]
"""How the program ended and what it said, for each set of instructions."""


def names_in_the_sources() -> list[str]:
    texts = (path.read_text() for path in KERNELS.iterdir() if path.name != "faults.h")
    return [name for text in texts for name in re.findall(r"\bQK_FAULT\((\w+)\)", text)]


def verdicts(said: str) -> dict[str, str]:
    """What became of each fault, by its name, as the program says it."""
    return dict(line.split(": ") for line in said.splitlines())


def run(program: Path, isa: str, told: Path) -> None:
    """Leaves in `told` how the program ended, in the first line, and all it said."""
    done = subprocess.run([program, isa], capture_output=True, text=True, timeout=SECONDS)
    told.write_text(f"{done.returncode}\n{done.stdout}{done.stderr}")


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory) -> Outcomes:
    """Made by the first of several processes of pytest, while the others wait."""
    with held(tmp_path_factory, "cpu_faults") as folder:
        told = {isa: folder / f"{isa}.txt" for isa in ISAS}
        if not all(path.exists() for path in told.values()):
            program = build("faults", folder, ("-DQKERNELS_FAULTS", *SOFTWARE_TILES))
            with ThreadPoolExecutor(JOBS) as pool:
                list(pool.map(lambda isa: run(program, isa, told[isa]), ISAS))
    ends = {isa: path.read_text().split("\n", 1) for isa, path in told.items()}
    return {isa: (int(status), said) for isa, (status, said) in ends.items()}


def met(outcomes: Outcomes, isa: str) -> dict[str, str] | None:
    """What became of the faults that the cases come by; None where this machine lacks `isa`."""
    status, said = outcomes[isa]
    if status == NOT_HERE:
        return None
    assert status == RIGHT, said[-4000:]
    return verdicts(said)


@pytest.mark.parametrize("isa", ISAS)
def test_every_fault_is_noticed(outcomes, isa):
    found = met(outcomes, isa)
    if found is None:
        pytest.skip(outcomes[isa][1].strip())
    assert found
    assert not {fault: verdict for fault, verdict in found.items() if verdict != "noticed"}


def test_every_fault_is_met(outcomes):
    names = names_in_the_sources()
    assert sorted(set(names)) == sorted(names), "a name stands in two places"
    # Those of NEON are for test_cpu_arm.py.
    names = [name for name in names if not name.startswith("neon_")]
    found = {isa: met(outcomes, isa) for isa in ISAS}
    missed = set(names).difference(*(faults for faults in found.values() if faults is not None))
    absent = [isa for isa, faults in found.items() if faults is None]
    if missed and absent:
        pytest.skip(f"{', '.join(absent)}, which do not run here, may come by {sorted(missed)}")
    assert not missed
