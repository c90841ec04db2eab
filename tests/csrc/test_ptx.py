"""csrc/cuda/ptx.cuh: each asm statement and each access says what its body in the emulator does.

Nobody runs PTX here. nvcc compiles ptx_probe.cu, a kernel for each function, ptx_isa.py interprets
what comes out, and the emulator runs the same kernels: outputs must be equal bit for bit, and so
must what is done to memory, by the names that the emulator has for it. Then operands, suffixes and
constants of every asm statement are changed, one at a time, and each change must be noticed.

To add a function: its two bodies, a kernel in ptx_probe.cu, its instruction in ptx_isa.py where
that does not know it yet, and inputs in `INPUTS` where random words will not do.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from tests.csrc import ptx_isa
from tests.csrc.formats import FORMATS, Format
from tests.csrc.ptx_isa import Instruction, Kernel, PtxError, Warp
from tests.csrc.selftest import ROOT, Emulator

CUDA = ROOT / "csrc" / "cuda"
SOURCE = (CUDA / "ptx.cuh").read_text()
PROBE = ROOT / "tests" / "csrc" / "ptx_probe.cu"

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not in PATH")

WORDS, SHARED, N = 1024, 4096, 20
"""Of `out`; bytes of shared memory; the n of kernels that mask."""


@cache
def compiled(architecture: str) -> dict[str, Kernel]:
    command = ["nvcc", "-std=c++17", f"-arch=sm_{architecture}", f"-I{ROOT / 'csrc'}", "-ptx"]
    with TemporaryDirectory() as folder:
        target = Path(folder) / "probe.ptx"
        done = subprocess.run([*command, PROBE, "-o", target], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        text = target.read_text()
    kernels = ptx_isa.parse(text)
    assert len(kernels) == text.count(".entry")
    return kernels


# --- Inputs: 24 rows of 32 words


def random_words(generator: np.random.Generator) -> np.ndarray:
    return generator.integers(0, 1 << 32, size=(24, 32), dtype=np.uint32)


def halves(form: Format) -> Callable[[np.random.Generator], np.ndarray]:
    """Near 1, so that sums round, and in every other lane any finite ones; zeros; of both signs."""

    def make(generator: np.random.Generator) -> np.ndarray:
        near = form.one + generator.integers(-1 << 9, 1 << 9, size=(24, 64))
        near |= generator.integers(0, 2, size=near.shape) << 15
        below = form.bits(float("inf"))
        any_finite = generator.integers(0, below, size=near.shape)
        any_finite |= generator.integers(0, 2, size=near.shape) << 15
        numbers = np.where(np.arange(64) % 4 < 2, near, any_finite)
        numbers[:2, :4] = [[0, 0x8000] * 2, [form.one] * 2 + [form.one | 0x8000] * 2]
        return numbers.astype(np.uint16).view(np.uint32)

    return make


def floats(generator: np.random.Generator) -> np.ndarray:
    """Of exponents that overflow and underflow in fp16."""
    numbers = generator.normal(size=(24, 32)) * 2.0 ** generator.integers(-28, 18, size=(24, 32))
    return numbers.astype(np.float32).view(np.uint32)


def singles(generator: np.random.Generator) -> np.ndarray:
    """Near 1 or any finite ones, as `halves`; in row 3, every other one NaN."""
    near = 0x3F800000 + generator.integers(-1 << 20, 1 << 20, size=(24, 32))
    any_finite = generator.integers(0, 0x7F800000, size=near.shape)
    numbers = np.where(np.arange(32) % 2 == 0, near, any_finite)
    numbers |= generator.integers(0, 2, size=near.shape) << 31
    numbers[:2, :4] = [[0, 1 << 31] * 2, [0x3F800000, 0xBF800000] * 2]
    numbers[0, 4:6], numbers[1, 4:6] = [0, 1 << 31], [1 << 31, 0]
    numbers[3, ::2] = 0x7FC00000
    return numbers.astype(np.uint32)


def magnitudes(generator: np.random.Generator) -> np.ndarray:
    return singles(generator) & 0x7FFFFFFF


def small_integers(form: Format) -> Callable[[np.random.Generator], np.ndarray]:
    """Whose products have exact sums: six rows of pairs, and fp32 from there on."""

    def make(generator: np.random.Generator) -> np.ndarray:
        table = np.array([form.bits(float(i)) for i in range(-8, 9)], dtype=np.uint16)
        pairs = table[generator.integers(0, 17, size=(6, 64))].view(np.uint32)
        sums = generator.integers(-100, 100, size=(18, 32)).astype(np.float32)
        return np.concatenate([pairs, sums.view(np.uint32)])

    return make


def places(generator: np.random.Generator) -> np.ndarray:
    """In row 4, lanes in another order."""
    words = random_words(generator)
    words[4] = generator.permutation(32)
    return words


HALF, BFLOAT16 = FORMATS
INPUTS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    **{f"{name}_half": halves(HALF) for name in ("fma2", "sub2", "mul2", "to_float")},
    **{f"{name}_bfloat16": halves(BFLOAT16) for name in ("fma2", "sub2", "mul2", "to_float")},
    **{f"pack2_{form.name}": floats for form in FORMATS},
    **{f"mma_{form.name}": small_integers(form) for form in FORMATS},
    "ldmatrix": places,
    **dict.fromkeys(("add_single", "mul_single", "fma_single", "extremes"), singles),
    "divide": lambda generator: singles(generator) | 1,
    "sqrt": magnitudes,
}


@cache
def inputs(kernel: str) -> bytes:
    return INPUTS.get(kernel, random_words)(np.random.default_rng(1)).tobytes()


# --- The same twice


@dataclass(frozen=True)
class Result:
    """What a kernel left in `out`, and how often its warp did what."""

    out: list[int]
    done: dict[str, int]


def interpreted(kernel: Kernel) -> Result:
    warp = Warp(kernel, inputs(kernel.name), WORDS, SHARED, N)
    return Result(warp.run(), dict(warp.done))


NO_INSTRUCTION = {"within"}

FROM_SM_90 = {"start_next_kernel", "wait_for_kernels_before", "prefetch"}
"""Functions that are nothing on older GPUs."""


def instructions_on(architecture: str, done: dict[str, int]) -> dict[str, int]:
    """What an emulated kernel does on GPUs of this architecture."""
    missing = FROM_SM_90 if int(architecture.rstrip("a")) < 90 else set()
    return {kind: passes for kind, passes in done.items() if kind not in missing}


def emulated(emulator: Emulator, name: str, path: Path) -> Result:
    path.write_bytes(inputs(name))
    launch = emulator.run(
        f"probe_{name}", **{"in": path}, words=WORDS, shared=SHARED, n=N, threads=32
    )
    assert launch["error"] == ""
    done: Counter[str] = Counter()
    for kind, sites in launch["sites"].items():
        # ldmatrix is recorded twice, as an access of a lane and as a meeting of the warp.
        passes = {site["line"]: site["passes"] for site in sites}
        if passes and kind not in NO_INSTRUCTION:
            done[kind] += sum(passes.values())
    assert all(passes % 32 == 0 for passes in done.values())
    return Result(launch["out"], {kind: passes // 32 for kind, passes in done.items()})


DEFAULT = ("80", "90a")
ARCHITECTURES = [
    pytest.param(each, marks=() if each in DEFAULT else pytest.mark.full)
    for each in ("80", "86", "89", "90a", "100", "120")
]


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ptx_does_what_the_emulator_does(
    emulator: Emulator, architecture: str, tmp_path: Path
) -> None:
    wrong = []
    for name, kernel in compiled(architecture).items():
        ptx, emulation = interpreted(kernel), emulated(emulator, name, tmp_path / "in")
        assert any(ptx.out), f"{name} leaves nothing"
        done = instructions_on(architecture, emulation.done)
        if (ptx.out, ptx.done) != (emulation.out, done):
            wrong.append((name, ptx.done, done, ptx.out == emulation.out))
    assert wrong == []


# --- What the source says


@dataclass(frozen=True)
class Statement:
    """An asm statement; `template` is its PTX with %0, %1, ... for operands."""

    text: str
    volatile: bool
    template: str
    clobbers_memory: bool

    @property
    def name(self) -> str:
        return self.template.split(" ")[0].rstrip(";")

    def matches(self, instruction: Instruction) -> bool:
        seen: set[str] = set()

        def operand(found: re.Match[str]) -> str:
            if found[1] in seen:
                return rf"(?P=o{found[1]})"
            seen.add(found[1])
            return rf"(?P<o{found[1]}>[%\w.-]+)"

        pattern = re.sub(r"%(\d+)", operand, re.sub(r"([\[\]{}.])", r"\\\1", self.template))
        return instruction.inline and re.fullmatch(pattern, str(instruction)) is not None


def statements(source: str) -> list[Statement]:
    code = re.sub(r"//.*", "", source)
    found = re.finditer(r'\basm(\s+volatile)?\s*\(((?:\s*"[^"]*")+)(.*?)\)\s*;', code, re.DOTALL)
    result = [
        Statement(
            text=each[0],
            volatile=each[1] is not None,
            template="".join(re.findall(r'"([^"]*)"', each[2])),
            clobbers_memory='"memory"' in each[3],
        )
        for each in found
    ]
    assert len(result) == len(re.findall(r"\basm\b", code))
    return result


def instructions(source: str) -> list[Statement]:
    """Without those that have no PTX, which hide from the compiler how a value came about."""
    return [each for each in statements(source) if each.template]


def problems(source: str) -> list[str]:
    """What has effects must stay where it is, and what has none may be merged and left out; what
    hides a value must stay where it is, too."""
    named = []
    for each in statements(source):
        orders = each.template != "" and ptx_isa.find(each.name)[0].has_effects
        stays = orders or each.template == ""
        if (each.volatile, each.clobbers_memory) != (stays, orders):
            named.append(
                f"asm {each.template!r} {'must' if stays else 'need not'} be volatile and "
                f"{'must' if orders else 'need not'} clobber memory"
            )
    return named


def test_what_has_effects_is_volatile_and_clobbers_memory() -> None:
    assert problems(SOURCE) == []


def test_a_statement_that_may_not_be_merged_or_must_not_be_is_named() -> None:
    for each in statements(SOURCE):
        changes = []
        if each.volatile:
            changes.append(each.text.replace(" volatile", ""))
        else:
            changes.append(each.text.replace("asm(", "asm volatile("))
        if each.clobbers_memory:
            changes.append(each.text.replace('"memory"', ""))
        for change in changes:
            (named,) = problems(SOURCE.replace(each.text, change))
            assert repr(each.template) in named


def test_kernels_have_no_statements_of_their_own() -> None:
    others = [path for path in CUDA.rglob("*.cu*") if path.name != "ptx.cuh"]
    assert len(others) > 5
    code = {path: re.sub(r"//.*", "", path.read_text()) for path in others}
    assert [path for path, text in code.items() if re.search(r"\basm\b", text)] == []


def without_kernel(source: str) -> list[str]:
    """Functions of ptx.cuh that ptx_probe.cu does not call."""
    pattern = r"^ *QK_DEVICE (?:[\w ]+[\s*]+)?(\w+)(?:<\w+>)?\("
    found = re.findall(pattern, re.sub(r"//.*", "", source), re.MULTILINE)
    assert len(set(found)) > 25
    return sorted(set(found) - set(re.findall(r"ptx::(\w+)", PROBE.read_text())))


def test_every_function_has_a_kernel() -> None:
    assert without_kernel(SOURCE) == []


def test_a_function_without_a_kernel_is_named() -> None:
    more = "QK_DEVICE uint32_t quarter(uint32_t a) {\n"
    specialized = "template <>\nQK_DEVICE uint32_t* halve<Half>(uint32_t a) {\n"
    named = set(without_kernel(SOURCE + more + specialized)) - set(without_kernel(SOURCE))
    assert named == {"halve", "quarter"}


@needs_nvcc
def test_every_statement_is_compiled() -> None:
    inline = [each for kernel in compiled("90a").values() for each in kernel.code if each.inline]
    found = instructions(SOURCE)
    assert len({each.template for each in found}) == len(found)
    for statement in found:
        assert any(map(statement.matches, inline)), statement.template
    for each in inline:
        assert sum(statement.matches(each) for statement in found) <= 1, str(each)


# --- Changes to the PTX of one statement, which must be noticed

COMMUTATIVE = dict.fromkeys(("add", "fma", "max", "min", "mul"), (1, 2))
"""Operands that make no difference."""

OTHER_SUFFIXES = ("rz", "ftz", "ca", "x2", "m16n8k8", "v2", "relaxed", "cta", "sys", "s32", "b64")


def flat(instruction: Instruction) -> list[str]:
    return [
        name
        for each in instruction.operands
        for name in ([each] if isinstance(each, str) else each)
    ]


def with_operands(instruction: Instruction, names: list[str]) -> Instruction:
    left = iter(names)
    operands = tuple(
        next(left) if isinstance(each, str) else tuple(next(left) for _ in each)
        for each in instruction.operands
    )
    return replace(instruction, operands=operands)


def inner(operand: str) -> str:
    return operand.strip("[]")


Change = Callable[[Instruction], Instruction | None]
"""None: the instruction is left out."""


STORED_TYPES = {"b32", "u32", "s32", "f32"}
"""A store of any of them stores the same bits."""


def changed_names(name: str, vocabulary: set[str]) -> Iterator[str]:
    parts = name.split(".")
    for i, part in enumerate(parts):
        yield ".".join(parts[:i] + parts[i + 1 :])
        same = STORED_TYPES if parts[0] == "st" and part in STORED_TYPES else {part}
        for other in vocabulary - same:
            yield ".".join([*parts[:i], other, *parts[i + 1 :]])


def operand_changes(sample: Instruction) -> Iterator[tuple[str, Change]]:
    """Of the kind that a slip of the pen makes; `sample` has the operands that all have."""

    def swap(i: int, j: int) -> Change:
        def change(each: Instruction) -> Instruction:
            names = flat(each)
            a, b = inner(names[i]), inner(names[j])
            names[i], names[j] = names[i].replace(a, b), names[j].replace(b, a)
            return with_operands(each, names)

        return change

    names = flat(sample)
    for i, j in combinations(range(len(names)), 2):
        if names[i] != names[j] and COMMUTATIVE.get(sample.name.split(".")[0]) != (i, j):
            yield f"operands {i} and {j} swapped", swap(i, j)
    for i, name in enumerate(names):
        if re.fullmatch(r"\d+", name):
            for step in (1, -1):
                yield (
                    f"constant {i} {step:+}",
                    lambda each, i=i, step=step: with_operands(
                        each,
                        [*flat(each)[:i], str(int(flat(each)[i]) + step), *flat(each)[i + 1 :]],
                    ),
                )
    for i in range(len(sample.operands)):
        yield (
            f"without operand {i}",
            lambda each, i=i: replace(each, operands=each.operands[:i] + each.operands[i + 1 :]),
        )
        if not isinstance(sample.operands[i], str):
            yield (
                f"vector {i} shorter",
                lambda each, i=i: replace(
                    each,
                    operands=(*each.operands[:i], each.operands[i][:-1], *each.operands[i + 1 :]),
                ),
            )
    yield "another operand", lambda each: replace(each, operands=(*each.operands, "%r1"))
    yield "left out", lambda each: None


Places = dict[str, set[int]]
"""Instructions by their place in the code of kernels, by the kernels' names."""


def places_of(chosen: Callable[[Instruction], bool]) -> Places:
    found = {
        name: {i for i, each in enumerate(kernel.code) if chosen(each)}
        for name, kernel in compiled("90a").items()
    }
    return {name: places for name, places in found.items() if places}


@cache
def right(name: str) -> Result:
    return interpreted(compiled("90a")[name])


def is_noticed(places: Places, change: Change) -> bool:
    """Whether a kernel does something else, or nothing, where `change` is made at `places`."""
    for name, chosen in places.items():
        kernel = compiled("90a")[name]
        code = [change(each) if i in chosen else each for i, each in enumerate(kernel.code)]
        try:
            result = interpreted(replace(kernel, code=tuple(filter(None, code))))
        except PtxError:
            return True
        if result != right(name):
            return True
    return False


def renamed(name: str) -> Change:
    return lambda each: replace(each, name=name)


@needs_nvcc
@pytest.mark.parametrize("statement", instructions(SOURCE), ids=lambda each: each.template)
def test_changes_of_a_statement_are_noticed(statement: Statement) -> None:
    places = places_of(statement.matches)
    name, (first, *_) = next(iter(places.items()))
    sample = compiled("90a")[name].code[first]
    assert not is_noticed(places, lambda each: each)
    parts = {part for each in instructions(SOURCE) for part in each.name.split(".")}
    others = changed_names(sample.name, parts | set(OTHER_SUFFIXES))
    changes = [*((other, renamed(other)) for other in others), *operand_changes(sample)]
    assert [what for what, change in changes if not is_noticed(places, change)] == []


@needs_nvcc
def test_changes_of_what_nvcc_makes_of_an_intrinsic_are_noticed() -> None:
    ours = {each.name for each in instructions(SOURCE)}
    names = {
        each.name
        for kernel in compiled("90a").values()
        for each in kernel.code
        if each.name not in ours and ptx_isa.find(each.name)[0].kind is not None
    }
    assert {"ld.global.cg.v4.u32", "bar.sync", "bar.warp.sync", "atom.global.add.u32"} <= names
    missed = []
    for name in names:
        places = places_of(lambda each, name=name: each.name == name)
        others = changed_names(name, {"cg", "nc", "ca", "cta", "warp", "sys", "shared"})
        changes = [(other, renamed(other)) for other in others]
        changes += [("left out", lambda each: None)]
        missed += [(name, what) for what, change in changes if not is_noticed(places, change)]
    assert missed == []
