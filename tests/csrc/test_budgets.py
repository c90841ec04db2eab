"""Every instantiation of every CUDA kernel, compiled, within csrc/cuda/budgets.toml."""

import fnmatch
import hashlib
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import tomllib

from tests.csrc import sass

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "budgets"
BUDGETS = tomllib.loads((CUDA / "budgets.toml").read_text())
SOURCES = sorted(CUDA.glob("*.cu"))
DEFAULT = ("80", "90a")
ARCHITECTURES = [
    pytest.param(each, marks=() if each in DEFAULT else pytest.mark.full)
    for each in ("80", "86", "89", "90a", "100", "120")
]

RESERVED_SHARED = 1024
"""Bytes that sm_90 and later take of each block that uses shared memory, counted as its own."""

FOUR_BITS = ("Int4", "Table4", "Fp4")

needs_tools = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not in PATH"),
    pytest.mark.skipif(
        sass.find_cuobjdump() is None, reason="neither the CUDA toolkit's cuobjdump nor Triton's"
    ),
]


def compiled(source: Path, architecture: str) -> Path:
    """The cubin of a source, made once for the same sources and compiler."""
    headers = sorted((*CUDA.glob("*.cuh"), *CUDA.glob("*.h")))
    digest = hashlib.sha256(subprocess.check_output(["nvcc", "--version"]))
    for path in (source, *headers):
        digest.update(path.read_bytes())
    CACHE.mkdir(parents=True, exist_ok=True)
    cubin = CACHE / f"{source.stem}-{architecture}-{digest.hexdigest()[:16]}.cubin"
    if not cubin.exists():
        part = cubin.with_suffix(".part")
        command = ["nvcc", "-std=c++17", f"-arch=sm_{architecture}", f"-I{ROOT / 'csrc'}"]
        done = subprocess.run(
            [*command, "-cubin", "-o", str(part), str(source)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        part.rename(cubin)
    return cubin


def broken(kernel: sass.KernelCode, budget: dict[str, int]) -> list[str]:
    """In what a kernel breaks its budget, in words."""
    narrow_copies = kernel.count("LDGSTS") - kernel.count("LDGSTS", "128")
    found = {
        "registers": kernel.registers,
        "tensor": kernel.count("HMMA"),
        "ldmatrix": kernel.count("LDSM", "4"),
        "copies": kernel.count("LDGSTS", "128"),
        "shared_loads": kernel.count("LDS", "128"),
        "global_loads": kernel.count("LDG", "128"),
    }
    spilled = kernel.stack + kernel.local + kernel.count("LDL") + kernel.count("STL")
    problems = [
        f"{what} {number}, none allowed"
        for what, number in (
            ("spills or stack", spilled),
            ("static shared memory", kernel.shared % RESERVED_SHARED),
            ("copies of less than 16 bytes", narrow_copies),
        )
        if number
    ]
    for what in ("tensor", "ldmatrix"):
        if what in budget and found[what] != budget[what]:
            problems.append(f"{what} {found[what]}, expected {budget[what]}")
    if found["registers"] > budget["registers"]:
        problems.append(f"registers {found['registers']}, allowed {budget['registers']}")
    for what in ("copies", "shared_loads", "global_loads"):
        if found[what] < budget.get(what, 0):
            problems.append(f"{what} {found[what]}, expected {budget[what]} or more")
    return problems


def budget_of(name: str) -> dict[str, int]:
    rows = [row for row in BUDGETS["budget"] if fnmatch.fnmatchcase(name, row["kernel"])]
    assert len(rows) == 1, f"{name} matches {len(rows)} rows of budgets.toml"
    return rows[0]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestBudgets:
    pytestmark = needs_tools

    def test_kernels_keep_their_budgets(self, source, architecture):
        kernels = sass.read(compiled(source, architecture))
        problems = [
            f"{kernel.name} for sm_{architecture}: {problem}"
            for kernel in kernels
            for problem in broken(kernel, budget_of(kernel.name))
        ]
        assert not problems, "\n".join(problems)
        # weight_only.cu only chooses; every other source has kernels.
        assert bool(kernels) == (source.stem != "weight_only")
        if source.stem.startswith("weight_only_mma_"):
            assert len(kernels) == 8, "two types of x, four numbers of tokens"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestDecoders:
    pytestmark = needs_tools

    def test_integer_operations_a_weight(self, architecture):
        kernels = {
            kernel.name: kernel
            for kernel in sass.read(
                compiled(Path(__file__).with_name("decode_probe.cu"), architecture)
            )
        }
        for decoder, allowed in BUDGETS["integer_operations"].items():
            spent = kernels[f"decode_kernel<{decoder}>"].integer_operations()
            spent -= kernels[f"nothing_kernel<{decoder}>"].integer_operations()
            weights = 32 if decoder.startswith(FOUR_BITS) else 16
            assert spent / weights <= allowed, (
                f"{decoder} for sm_{architecture}: {spent} of {weights}"
            )
            assert spent > 0


SASS = """
		Function : _Z1fv
	.headerflags	@"EF_CUDA_SM80"
        /*0000*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
                                                                     /* 0x000 */
        /*0010*/               @!P0 HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0020*/                   LDS.128 R4, [R1] ;
        /*0030*/               @P1 LDGSTS.E [R1], [R2.64] ;
"""
USAGE = " Function _Z1fv:\n  REG:40 STACK:0 SHARED:0 LOCAL:8 CONSTANT[0]:376 TEXTURE:0"


def test_the_parser_reads_what_cuobjdump_writes():
    (kernel,) = sass.parse(USAGE, SASS, {"_Z1fv": "void qkernels::f<qkernels::Half, (int)8>(P)"})
    assert kernel.name == "f<Half, 8>"
    assert (kernel.registers, kernel.stack, kernel.shared, kernel.local) == (40, 0, 0, 8)
    assert kernel.instructions == Counter(
        {"LDGSTS.E.BYPASS.128": 1, "HMMA.16816.F32": 1, "LDS.128": 1, "LDGSTS.E": 1}
    )
    assert kernel.count("LDGSTS") == 2 and kernel.count("LDGSTS", "128") == 1


def test_a_broken_budget_is_named():
    (kernel,) = sass.parse(USAGE, SASS, {"_Z1fv": "f(P)"})
    budget = {"registers": 39, "tensor": 2, "copies": 2, "shared_loads": 1}
    assert broken(kernel, budget) == [
        "spills or stack 8, none allowed",
        "copies of less than 16 bytes 1, none allowed",
        "tensor 1, expected 2",
        "registers 40, allowed 39",
        "copies 1, expected 2 or more",
    ]
