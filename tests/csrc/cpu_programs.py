"""Builds the programs of tests/csrc/cpu: csrc/cpu without torch, and what judges its results."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS, PROGRAMS = ROOT / "csrc/cpu", ROOT / "tests/csrc/cpu"
MAINS = ("matrix", "faults")
ISAS = ("portable", "avx2", "avx512", "amx")
ARM_ISAS = ("neon", "neon_dot", "neon_i8mm")
JOBS = int(os.environ.get("JOBS", "2"))
FLAGS = (
    # More than line numbers (-g) takes gcc twice as long, at sanitized code of this kind.
    *("-std=c++17", "-O1", "-g1", "-ffp-contract=off", f"-I{ROOT / 'csrc'}", "-pthread"),
    # gcc 12's own intrinsics begin with values that they do not set.
    *("-Wall", "-Werror", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    # pack.cpp is for OpenMP, whose threads ThreadSanitizer takes for races.
    "-Wno-unknown-pragmas",
)
SOFTWARE_TILES = ("-DQK_SOFTWARE_TILES",)
"""Tiles in plain C++ in place of AMX, wherever there is AVX-512."""

AVX_VNNI = ("-DQK_AVX_VNNI_BY_AVX512",)
"""Products of AVX-VNNI beside AVX2, wherever there is AVX-512 VNNI."""

JUDGES = ("truth", "numbers")
"""What is not under test is compiled for speed and without sanitizers."""

# Those that take longest to compile come first, so that two compilers are through at once.
SLOWEST = ("kernels_portable", "kernels_amx", "kernels_neon", "kernels_avx512", "kernels_avx2")


def compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        pytest.skip("there is no g++")
    return found


def build(
    main: str,
    folder: Path,
    flags: tuple[str, ...],
    levels: dict[str, str] | None = None,
    gcc: str | None = None,
) -> Path:
    """The program `main`, one of MAINS, made in `folder`.

    Args:
        flags: more than FLAGS, for all files but JUDGES.
        levels: optimization of some files, by their names without a suffix.
        gcc: a compiler for another machine.
    """
    gcc = gcc or compiler()
    sources = [*KERNELS.glob("*.cpp"), *PROGRAMS.glob("*.cpp")]
    sources = [path for path in sources if path.stem == main or path.stem not in MAINS]
    order = {stem: place for place, stem in enumerate(SLOWEST)}
    sources.sort(key=lambda path: (order.get(path.stem, len(order)), path.stem))

    def compiled(source: Path) -> Path:
        target = folder / "_".join(source.relative_to(ROOT).with_suffix(".o").parts)
        own = ["-O2"] if source.stem in JUDGES else [*flags, (levels or {}).get(source.stem, "-O1")]
        if source.stem == "kernels_amx" and set(SOFTWARE_TILES) <= set(flags):
            own += ["-include", str(PROGRAMS / "software_tiles.h")]
        command = [gcc, *FLAGS, *own, "-c", source, "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(compiled, sources))
    program = folder / main
    subprocess.run([gcc, *FLAGS, *flags, *objects, "-o", program], check=True)
    return program
