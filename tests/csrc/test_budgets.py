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
ALL = ("80", "86", "89", "90a", "100", "120")
DEFAULT = ("80", "90a")
ARCHITECTURES = [
    pytest.param(each, marks=() if each in DEFAULT else pytest.mark.full) for each in ALL
]
# Each source for one of these two, in turn: compiling them for both takes minutes.
CASES = [
    pytest.param(
        source,
        each,
        marks=() if each == DEFAULT[number % 2] else pytest.mark.full,
        id=f"{source.stem}-{each}",
    )
    for number, source in enumerate(SOURCES)
    for each in ALL
]

RESERVED_SHARED = 1024
"""Bytes that sm_90 and later take of each block that uses shared memory, counted as its own."""

FOUR_BITS = ("Int4", "Table4", "Fp4", "Nibbles")


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


def chunk_instructions(stages: list[sass.Stage], chunks: int, others: bool = True) -> list[float]:
    """Instructions of a warp for a chunk, where one group, two, and more lie in its stage.

    The loops are those for a group a stage, for two and so on, twice as many each; `others`: and
    one for all others, which does not count.
    """
    return [
        (len(stage.way) + (stage.entering or 0) * 2**number) / chunks
        for number, stage in enumerate(stages[:-1] if others else stages)
    ]


def of_bits(kernel: sass.KernelCode, allowed: Any) -> Any:
    """Of a pair, what holds at the bits of the kernel's weights; else what holds at any."""
    return allowed[0 if has_four_bits(kernel.name) else 1] if isinstance(allowed, list) else allowed


def broken(kernel: sass.KernelCode, budget: dict[str, Any]) -> list[str]:
    """In what a kernel breaks its budget, in words."""
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
    found: dict[str, int] = {"global_loads": kernel.count("LDG", "128")}
    stages: list[sass.Stage] = []
    if "loops" in budget:
        loops = of_bits(kernel, budget["loops"])
        products = kernel.count("HMMA", "16816", "F32") + kernel.count("IMMA", "16832", "S8")
        tensor, rest = divmod(products, loops)
        if rest:
            return [*problems, f"tensor-core instructions are no multiple of {loops} loops"]
        stages = kernel.stages(tensor)
        found |= {"tensor": tensor}
        for what, operation, suffix in (
            ("ldmatrix", "LDSM", "4"),
            ("copies", "LDGSTS", "128"),
            ("weight_loads", "LDS", "128"),
        ):
            numbers = {kernel.count_on(stage.way, operation, suffix) for stage in stages}
            found[what] = numbers.pop() if len(numbers) == 1 else -1
    for what, number in found.items():
        if what in budget:
            allowed = of_bits(kernel, budget[what])
            if number != allowed:
                problems.append(f"{what} {number}, expected {allowed}")
    wide, expected = kernel.count("LDS", "128"), budget.get("shared_loads", 0)
    if wide < expected:
        problems.append(f"shared_loads {wide}, expected {expected} or more")
    if kernel.registers > budget["registers"]:
        problems.append(f"registers {kernel.registers}, allowed {budget['registers']}")
    if "global_stores" in budget:
        problems += broken_stores(kernel.stores("STG"), budget)
    if "chunk_instructions" in budget:
        numbers, allowed = (
            chunk_instructions(
                stages, of_bits(kernel, budget["chunks"]), others=kernel.count("IMMA") == 0
            ),
            budget["chunk_instructions"],
        )
        if len(numbers) != len(allowed):
            problems.append(f"chunk_instructions of {len(numbers)} loops, expected {len(allowed)}")
        elif any(number > most for number, most in zip(numbers, allowed, strict=True)):
            problems.append(f"instructions a chunk {numbers}, allowed {allowed}")
    if "stage_instructions" in budget:
        (number,) = [len(stage.way) for stage in stages]
        if number > budget["stage_instructions"]:
            problems.append(
                f"instructions a stage {number}, allowed {budget['stage_instructions']}"
            )
    return problems


def budget_of(name: str) -> dict[str, Any]:
    rows = [
        row
        for row in BUDGETS["budget"]
        for pattern in ([row["kernel"]] if isinstance(row["kernel"], str) else row["kernel"])
        if fnmatch.fnmatchcase(name, pattern)
    ]
    assert len(rows) == 1, f"{name} matches {len(rows)} rows of budgets.toml"
    (row,) = rows
    of_chunks = "chunks" in row
    for what, wanted in (
        ("chunk_instructions", of_chunks),
        ("stage_instructions", "loops" in row and not of_chunks),
    ):
        limits = [
            limit for pattern, limit in BUDGETS[what].items() if fnmatch.fnmatchcase(name, pattern)
        ]
        assert len(limits) == int(wanted), f"{name} matches {len(limits)} of {what}"
        row = row | ({what: limits[0]} if limits else {})
    return row


@pytest.mark.parametrize(("source", "architecture"), CASES)
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
        # mma.cu and grad.cu only choose; every other source has kernels.
        assert bool(kernels) == (source.stem not in ("mma", "grad"))
        if source.parent == instantiate.FOLDER:
            tokens = 4 if source.stem.startswith("mma_") else 2
            if source.stem.startswith("int8_"):
                tokens = 3 if source.stem.endswith("_grouped") else 4
            assert len(kernels) == 2 * tokens, "two types or kinds of x, so many numbers of tokens"


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
            weights = 32 if has_four_bits(decoder) or "LowInt" in decoder else 16
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
    (stage,) = kernel.stages(1)
    assert len(stage.way) == number
    assert stage.entering is None


def test_what_a_new_group_adds():
    code = LOOP.format(jump="0x90").replace("LDS R4", "FFMA R4")
    (kernel,) = sass.parse(USAGE, code, {"_Z1fv": "f(P)"})
    (stage,) = kernel.stages(1)
    assert (len(stage.way), stage.entering) == (7, 1)


TWO_LOOPS = """
		Function : _Z1fv
        /*0000*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0020*/                   MOV R1, R2 ;
        /*0030*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0040*/               @P0 BRA 0x0 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0070*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0080*/               @P0 BRA 0x50 ;
        /*0090*/                   EXIT ;
"""


def test_each_loop_has_its_own_products():
    (kernel,) = sass.parse(USAGE, TWO_LOOPS, {"_Z1fv": "f(P)"})
    assert [stage.way for stage in kernel.stages(1)] == [[6, 7, 8, 5], [1, 2, 3, 4, 0]]


def test_instructions_of_a_chunk():
    stages = [sass.Stage(list(range(length)), 2) for length in (10, 12, 20)]
    assert chunk_instructions(stages, 2) == [(10 + 2) / 2, (12 + 4) / 2]
    plain = [sass.Stage(list(range(length)), None) for length in (10, 12, 20)]
    assert chunk_instructions(plain, 1) == [10, 12]


def test_what_cannot_be_reached_has_no_way():
    (kernel,) = sass.parse(USAGE, LOOP.format(jump="0x90"), {"_Z1fv": "f(P)"})
    with pytest.raises(sass.NoWay, match="no way from instruction 9 to 1"):
        kernel.way([9, 1])


def test_a_broken_budget_is_named():
    (kernel,) = sass.parse(USAGE, SASS, {"_Z1fv": "f<Bfloat16, Fp8E4M3>(P)"})
    budget = {"registers": 39, "shared_loads": 2, "global_loads": [0, 1]}
    assert broken(kernel, budget) == [
        "spills or stack 8, none allowed",
        "copies of less than 16 bytes 1, none allowed",
        "tensor-core instructions of another type 1, none allowed",
        "global_loads 0, expected 1",
        "shared_loads 1, expected 2 or more",
        "registers 40, allowed 39",
    ]
    (kernel,) = sass.parse(USAGE, LOOP.format(jump="0x90"), {"_Z1fv": "f<Half, Int4>(P)"})
    budget = {"registers": 40, "loops": [1, 1], "chunks": [2, 1], "tensor": [2, 1], "copies": 0}
    assert broken(kernel, budget)[1:] == ["tensor 1, expected 2", "copies 1, expected 0"]
    budget = {"registers": 40, "loops": [2, 1], "chunks": [2, 1]}
    assert "tensor-core instructions are no multiple of 2 loops" in broken(kernel, budget)


def test_too_many_instructions_are_named(monkeypatch):
    (kernel,) = sass.parse(USAGE, LOOP.format(jump="0x90"), {"_Z1fv": "f<Half, Int4>(P)"})
    stages = [sass.Stage(list(range(length)), 2) for length in (4, 6, 8)]
    monkeypatch.setattr(sass.KernelCode, "stages", lambda self, tensor: stages)
    budget = {"registers": 40, "loops": [1, 1], "chunks": [2, 1]}
    assert broken(kernel, budget | {"chunk_instructions": [3, 5]})[1:] == []
    assert broken(kernel, budget | {"chunk_instructions": [3, 4]})[1:] == [
        "instructions a chunk [3.0, 5.0], allowed [3, 4]"
    ]
    assert broken(kernel, budget | {"chunk_instructions": [3]})[1:] == [
        "chunk_instructions of 2 loops, expected 1"
    ]


def test_too_many_instructions_of_a_stage_are_named():
    (kernel,) = sass.parse(USAGE, LOOP.format(jump="0x90"), {"_Z1fv": "f<Half, Int4>(P)"})
    budget = {"registers": 40, "loops": [1, 1]}
    assert broken(kernel, budget | {"stage_instructions": 7})[1:] == []
    assert broken(kernel, budget | {"stage_instructions": 6})[1:] == [
        "instructions a stage 7, allowed 6"
    ]


def test_copies_and_loads_count_where_they_are_needed():
    code = LOOP.format(jump="0x90").replace("P3, 0x60", "0x60").replace("LDS R4", "LDS.128 R4")
    (skipped,) = sass.parse(USAGE, code, {"_Z1fv": "f(P)"})
    (straight,) = sass.parse(USAGE, code.replace("@!P0 BRA", "     MOV"), {"_Z1fv": "f(P)"})
    for operation, numbers in (("LDS", [0, 1]), ("LDGSTS", [1, 1])):
        ways = [(kernel, kernel.stages(1)[0].way) for kernel in (skipped, straight)]
        assert [k.count_on(way, operation, "128") for k, way in ways] == numbers
