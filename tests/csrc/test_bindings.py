"""Host code of the CUDA bindings with a CUDA that is made up: counters of blocks, launches, choices
that are not made twice."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.csrc.cpu_programs import ROOT, compiler
from tests.csrc.test_cpu_matrix import MEMORY, THREADS, Matrix, launcher_of

FLAGS = ("-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-pthread")
SOURCES = ROOT / "tests/csrc"


def build(source: str, sanitizer: str, folder: Path) -> Matrix:
    launcher, program = launcher_of(sanitizer, folder), folder / "program"
    sanitized = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    includes = (f"-I{ROOT / 'csrc'}", f"-I{SOURCES / 'made_up_cuda'}")
    command = [compiler(), *FLAGS, *sanitized, *includes, SOURCES / source, "-o", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Matrix(program, launcher)


@pytest.mark.parametrize("sanitizer", [MEMORY, THREADS])
def test_counters_of_blocks(sanitizer: str, tmp_path: Path):
    cases = re.findall(r"CASE\((\w+)\),", (SOURCES / "counter_pool.cpp").read_text())
    assert "many_threads" in cases
    program = build("counter_pool.cpp", sanitizer, tmp_path)
    done = {case: program.run(case) for case in cases}
    assert not {case: each.stderr for case, each in done.items() if each.returncode != 0}
    assert program.run("no_such_case").returncode == 2


@pytest.mark.parametrize("sanitizer", [MEMORY, THREADS])
def test_launches(sanitizer: str, tmp_path: Path):
    done = build("launch.cpp", sanitizer, tmp_path).run()
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("sanitizer", [MEMORY, THREADS])
def test_last_choice(sanitizer: str, tmp_path: Path):
    done = build("last_choice.cpp", sanitizer, tmp_path).run()
    assert done.returncode == 0, done.stderr
