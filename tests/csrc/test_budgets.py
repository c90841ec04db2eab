"""Every instantiation of every CUDA kernel, compiled, within csrc/cuda/budgets.toml."""

import fnmatch
import hashlib
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tomllib

from csrc.cuda import instantiate
from tests.csrc import sass

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CUDA = CSRC / "cuda"
CACHE = ROOT / "build" / "budgets"
BUDGETS = tomllib.loads((CUDA / "budgets.toml").read_text())
SOURCES = [
    *sorted(CUDA.rglob("*.cu")),
    *(instantiate.FOLDER / name for name in instantiate.sources()),
]
DEFAULT = ("80", "90a")
ARCHITECTURES = [
    pytest.param(each, marks=() if each in DEFAULT else pytest.mark.full)
    for each in ("80", "86", "89", "90a", "100", "120")
]

RESERVED_SHARED = 1024
"""Bytes that sm_90 and later take of each block that uses shared memory, counted as its own."""

FOUR_BITS = ("Int4", "Table4", "Fp4")


def has_four_bits(name: str) -> bool:
    """Whether the decoder in a kernel's name takes codes of 4 bits."""
    return any(decoder in name for decoder in FOUR_BITS)


needs_tools = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not in PATH"),
    pytest.mark.skipif(
        sass.find_cuobjdump() is None, reason="neither the CUDA toolkit's cuobjdump nor Triton's"
    ),
]


def compiled(source: Path, architecture: str) -> Path:
    """The cubin of a source, made once for the same sources and compiler."""
    instantiate.write()
    headers = sorted((*CSRC.glob("*.h"), *CUDA.rglob("*.cuh"), *CUDA.rglob("*.h")))
    digest = hashlib.sha256(subprocess.check_output(["nvcc", "--version"]))
    for path in (source, *headers):
        digest.update(path.read_bytes())
    CACHE.mkdir(parents=True, exist_ok=True)
    cubin = CACHE / f"{source.stem}-{architecture}-{digest.hexdigest()[:16]}.cubin"
    if not cubin.exists():
        part = cubin.with_suffix(".part")
        command = ["nvcc", "-std=c++17", f"-arch=sm_{architecture}", f"-I{CSRC}"]
        done = subprocess.run(
            [*command, "-cubin", "-o", str(part), str(source)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        part.rename(cubin)
    return cubin


def broken_stores(stores: Counter[int], budget: dict[str, Any]) -> list[str]:
    """In what the stores to global memory, by their bytes, break a kernel's budget."""
    allowed = {int(width): number for width, number in budget["narrow_stores"].items()}
    problems = [
        f"stores of {width} bytes {number}, allowed {allowed.get(width, 0)}"
        for width, number in sorted(stores.items())
        if width < 16 and number > allowed.get(width, 0)
    ]
    if stores[16] != budget["global_stores"]:
        problems.append(f"global_stores {stores[16]}, expected {budget['global_stores']}")
    return problems


def broken(kernel: sass.KernelCode, budget: dict[str, Any]) -> list[str]:
    """In what a kernel breaks its budget, in words."""
    found = {
        "tensor": lambda: kernel.count("HMMA", "16816", "F32"),
        "ldmatrix": lambda: kernel.count("LDSM", "4"),
        "copies": lambda: kernel.count_on(kernel.stage_way, "LDGSTS", "128"),
        "weight_loads": lambda: kernel.count_on(kernel.chunk_way, "LDS", "128"),
        "global_loads": lambda: kernel.count("LDG", "128"),
    }
    spilled = kernel.stack + kernel.local + kernel.count("LDL") + kernel.count("STL")
    is_bfloat16 = "<Bfloat16" in kernel.name
    other_tensor = kernel.count("HMMA") - kernel.count("HMMA", "BF16")
    narrow_copies = kernel.count("LDGSTS") - kernel.count("LDGSTS", "128")
    problems = [
        f"{what} {number}, none allowed"
        for what, number in (
            ("spills or stack", spilled),
            ("static shared memory", kernel.shared % RESERVED_SHARED),
            ("copies of less than 16 bytes", narrow_copies),
            (
                "tensor-core instructions of another type",
                other_tensor if is_bfloat16 else kernel.count("HMMA", "BF16"),
            ),
        )
        if number
    ]
    for what, count in found.items():
        if what in budget:
            allowed, number = budget[what], count()
            if isinstance(allowed, list):
                allowed = allowed[0 if has_four_bits(kernel.name) else 1]
            if number != allowed:
                problems.append(f"{what} {number}, expected {allowed}")
    wide, expected = kernel.count("LDS", "128"), budget.get("shared_loads", 0)
    if wide < expected:
        problems.append(f"shared_loads {wide}, expected {expected} or more")
    if "global_stores" in budget:
        problems += broken_stores(kernel.stores("STG"), budget)
    if kernel.registers > budget["registers"]:
        problems.append(f"registers {kernel.registers}, allowed {budget['registers']}")
    if "chunk_instructions" in budget:
        number, allowed = kernel.chunk_instructions(), budget["chunk_instructions"]
        if number > allowed:
            problems.append(f"instructions a chunk {number:g}, allowed {allowed}")
    return problems


def budget_of(name: str) -> dict[str, Any]:
    rows = [row for row in BUDGETS["budget"] if fnmatch.fnmatchcase(name, row["kernel"])]
    assert len(rows) == 1, f"{name} matches {len(rows)} rows of budgets.toml"
    limits = [
        limit
        for pattern, limit in BUDGETS["chunk_instructions"].items()
        if fnmatch.fnmatchcase(name, pattern)
    ]
    # What decides at few tokens is held for all decoders.
    least = 1 if fnmatch.fnmatchcase(name, "weight_only_mma_kernel<*, 8>") else 0
    assert least <= len(limits) <= 1, f"{name} matches {len(limits)} of chunk_instructions"
    return rows[0] | ({"chunk_instructions": limits[0]} if limits else {})


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
        # mma.cu only chooses; every other source has kernels.
        assert bool(kernels) == (source.stem != "mma")
        if source.parent == instantiate.FOLDER:
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
        budgets = BUDGETS["integer_operations"]
        assert {f"decode_kernel<{decoder}>" for decoder in budgets} == {
            name for name in kernels if name.startswith("decode_kernel")
        }
        for decoder, allowed in budgets.items():
            spent = kernels[f"decode_kernel<{decoder}>"].integer_operations()
            spent -= kernels[f"nothing_kernel<{decoder}>"].integer_operations()
            weights = 32 if has_four_bits(decoder) else 16
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


STORES = """
		Function : _Z1fv
        /*0000*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0010*/               @P0 STG.E.U16 [R2.64], R4 ;
        /*0020*/                   STG.E.STRONG.SM [R2.64], R4 ;
        /*0030*/                   STG.E.64 [R2.64], R4 ;
        /*0040*/                   STG.E.S8 [R2.64], R4 ;
        /*0050*/                   STG.E.U16 [R2.64], R4 ;
        /*0060*/                   STS.128 [R2], R4 ;
"""


def test_narrow_stores_are_told_from_wide_ones():
    (kernel,) = sass.parse(USAGE, STORES, {"_Z1fv": "f(P)"})
    assert kernel.stores("STG") == {16: 1, 8: 1, 4: 1, 2: 2, 1: 1}
    assert kernel.stores("STS") == {16: 1}
    budget = {"registers": 40, "global_stores": 1, "narrow_stores": {"1": 1, "2": 2, "4": 1}}
    assert broken(kernel, budget)[1:] == ["stores of 8 bytes 1, allowed 0"]
    budget = {"registers": 40, "global_stores": 2, "narrow_stores": {"2": 1, "4": 1, "8": 1}}
    assert broken(kernel, budget)[1:] == [
        "stores of 1 bytes 1, allowed 0",
        "stores of 2 bytes 2, allowed 1",
        "global_stores 1, expected 2",
    ]


# Instructions 1 to 8 are a loop from barrier to barrier, which has to copy (3) and multiply (6) and
# can skip 5.
LOOP = """
		Function : _Z1fv
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0020*/               @P1 BRA 0x40 ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0040*/              @!P0 BRA P3, 0x60 ;
        /*0050*/                   LDS R4, [R1] ;
        /*0060*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0070*/               @P0 CALL.REL.NOINC {jump} ;
        /*0080*/                   BRA 0x10 ;
        /*0090*/                   EXIT ;
"""


@pytest.mark.parametrize(("jump", "number"), [("0x90", 7), ("0x10", 6)])
def test_the_shortest_way_through_a_stage(jump, number):
    (kernel,) = sass.parse(USAGE, LOOP.format(jump=jump), {"_Z1fv": "f(P)"})
    assert kernel.chunk_instructions() == number
    assert broken(kernel, {"registers": 40, "chunk_instructions": number - 1})[-1] == (
        f"instructions a chunk {number}, allowed {number - 1}"
    )
    assert len(broken(kernel, {"registers": 40, "chunk_instructions": number})) == 1


def test_two_chunks_a_stage_are_a_loop_of_their_own():
    inner = LOOP.replace("@P0 CALL.REL.NOINC {jump}", "@P0 BRA 0x40")
    (kernel,) = sass.parse(USAGE, inner, {"_Z1fv": "f(P)"})
    # 7 of the stage, and the branches 4 and 7 with the HMMA for the second chunk.
    assert kernel.chunk_instructions() == (7 + 3) / 2


def test_what_cannot_be_reached_has_no_way():
    (kernel,) = sass.parse(USAGE, LOOP.format(jump="0x90"), {"_Z1fv": "f(P)"})
    with pytest.raises(AssertionError, match="no way from instruction 9 to 1"):
        kernel.way([9, 1])


def test_a_broken_budget_is_named():
    (kernel,) = sass.parse(USAGE, SASS, {"_Z1fv": "f<Bfloat16, Fp8E4M3>(P)"})
    budget = {"registers": 39, "tensor": 2, "shared_loads": 2, "global_loads": [0, 1]}
    assert broken(kernel, budget) == [
        "spills or stack 8, none allowed",
        "copies of less than 16 bytes 1, none allowed",
        "tensor-core instructions of another type 1, none allowed",
        "tensor 1, expected 2",
        "global_loads 0, expected 1",
        "shared_loads 1, expected 2 or more",
        "registers 40, allowed 39",
    ]


def test_copies_and_loads_count_where_they_are_needed():
    code = LOOP.format(jump="0x90").replace("P3, 0x60", "0x60").replace("LDS R4", "LDS.128 R4")
    (skipped,) = sass.parse(USAGE, code, {"_Z1fv": "f(P)"})
    (straight,) = sass.parse(USAGE, code.replace("@!P0 BRA", "     MOV"), {"_Z1fv": "f(P)"})
    loads = [k.count_on(k.chunk_way, "LDS", "128") for k in (skipped, straight)]
    assert loads == [0, 1]
    assert [k.count_on(k.stage_way, "LDGSTS", "128") for k in (skipped, straight)] == [1, 1]
