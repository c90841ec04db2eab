"""What nvcc made of a kernel: resources and instructions, read from a cubin by cuobjdump."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter, deque
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

INTEGER = ("LOP3", "SHF", "PRMT", "IADD3", "VIADD", "LEA", "SEL", "IMAD", "SGXT", "BMSK", "I2F")
"""Instructions of the integer pipes, IMAD included, which nvcc also takes for moves and shifts."""

_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
"""Bytes of a load or store by its suffix; 4 without one."""


@dataclass(frozen=True)
class Instruction:
    """`target` is the address it jumps to; `may_pass`: what follows it in memory may run next."""

    address: int
    text: str  # with all suffixes, such as LDGSTS.E.BYPASS.128
    target: int | None
    may_pass: bool


class NoWay(Exception):
    """No jump leads from one instruction to another."""


@dataclass(frozen=True)
class Stage:
    """A loop over stages: what a warp runs at least, from a barrier to itself.

    The way leads through a copy and every tensor-core instruction; what is not needed each time,
    such as the scales of a new group, is not on it. `entering`: what a new group adds, where its
    sums are scaled or, of integers, its multipliers and zero points are loaded.
    """

    way: list[int]
    entering: int | None


@dataclass(frozen=True)
class KernelCode:
    """One instantiation: `name` is demangled, without namespaces and parameters."""

    name: str
    registers: int
    stack: int
    shared: int
    local: int
    code: tuple[Instruction, ...]

    @cached_property
    def instructions(self) -> Counter[str]:
        """How often each instruction stands in the code."""
        return Counter(each.text for each in self.code)

    @cached_property
    def _following(self) -> list[list[int]]:
        place = {each.address: i for i, each in enumerate(self.code)}
        following = [[i + 1] if each.may_pass else [] for i, each in enumerate(self.code)]
        for after, each in zip(following, self.code, strict=True):
            if each.target is not None:
                after.append(place[each.target])
        return [[i for i in after if i < len(self.code)] for after in following]

    @cached_property
    def _before(self) -> list[list[int]]:
        before: list[list[int]] = [[] for _ in self.code]
        for i, following in enumerate(self._following):
            for after in following:
                before[after].append(i)
        return before

    def count(self, operation: str, *suffixes: str) -> int:
        """Instructions of an operation that have all of these suffixes."""
        return sum(
            number
            for text, number in self.instructions.items()
            if text.split(".")[0] == operation and set(suffixes) <= set(text.split(".")[1:])
        )

    def stores(self, operation: str) -> Counter[int]:
        """How often STG or STS stand in the code, by the bytes that a thread stores."""
        widths: Counter[int] = Counter()
        for text, number in self.instructions.items():
            name, *suffixes = text.split(".")
            if name == operation:
                (width,) = [_WIDTHS[each] for each in suffixes if each in _WIDTHS] or [4]
                widths[width] += number
        return widths

    def integer_operations(self) -> int:
        return sum(self.count(operation) for operation in INTEGER)

    def places(self, operation: str) -> list[int]:
        """Where in `code` an operation stands."""
        return [i for i, each in enumerate(self.code) if each.text.split(".")[0] == operation]

    def way(self, stops: list[int]) -> list[int]:
        """The fewest instructions that lead from the first of these places through all others.

        In order, without the first one. What a branch can skip is skipped.
        """
        found: list[int] = []
        for start, end in pairwise(stops):
            before: dict[int, int | None] = dict.fromkeys(self._following[start])
            waiting = deque(before)
            while end not in before:
                if not waiting:
                    raise NoWay(f"{self.name}: no way from instruction {start} to {end}")
                here = waiting.popleft()
                for i in self._following[here]:
                    if i not in before:
                        before[i] = here
                        waiting.append(i)
            part: list[int] = []
            at: int | None = end
            while at is not None:
                part.append(at)
                at = before[at]
            found += reversed(part)
        return found

    @staticmethod
    def _distances(start: int, edges: list[list[int]], closed: set[int]) -> dict[int, int]:
        """The fewest edges that lead from `start` to each place that they lead to, by way of none
        that is closed."""
        distances = {i: 1 for i in edges[start] if i not in closed}
        waiting = deque(distances)
        while waiting:
            here = waiting.popleft()
            for i in edges[here]:
                if i not in distances and i not in closed:
                    distances[i] = distances[here] + 1
                    waiting.append(i)
        return distances

    def stages(self, tensor: int) -> list[Stage]:
        """The loops over stages, the shortest first; `tensor`: HMMA or IMMA that each has.

        There is one for each kind of groups: a warp may have one of its stage, or several.
        """
        places = self.places("HMMA") or self.places("IMMA")
        of_group, barriers = self.places("FFMA"), set(self.places("BAR"))
        if self.places("IMMA"):
            of_group += [i for i, each in enumerate(self.code) if each.text == "LDS.U16"]
        found = []
        for first in range(0, len(places), tensor):
            products = places[first : first + tensor]
            barrier = max(i for i in self.places("BAR") if i < products[0])
            copy = min(i for i in self.places("LDGSTS") if i > barrier)
            copied, middle = self.way([barrier, copy]), self.way([copy, products[0]])
            way = [*copied, *middle, *self.way([*products, barrier])]
            # What is behind another barrier is not of this loop.
            after = self._distances(copy, self._following, barriers)
            before = self._distances(products[0], self._before, barriers)
            entering = [after[i] + before[i] for i in of_group if i in after and i in before]
            found.append(Stage(way, min(entering) - len(middle) if entering else None))
        return sorted(found, key=lambda stage: len(stage.way))

    def count_on(self, way: list[int], operation: str, suffix: str) -> int:
        texts = (self.code[i].text.split(".") for i in way)
        return sum(text[0] == operation and suffix in text for text in texts)


def find_cuobjdump() -> str | None:
    """cuobjdump of the CUDA toolkit, or the one that Triton carries."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        own = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        return str(own) if own.exists() else None
    return found


def short_name(demangled: str) -> str:
    """`void qkernels::f<qkernels::Half, 8>(qkernels::P)` -> `f<Half, 8>`."""
    text = re.sub(r"\(anonymous namespace\)::|qkernels::|\(int\)|\(bool\)", "", demangled)
    text = text.removeprefix("void ").replace("> >", ">>")
    return text[: text.rindex("(")] if text.endswith(")") else text


_USAGE = re.compile(
    r"Function (?P<name>[^\s:]+):\s+REG:(?P<registers>\d+) STACK:(?P<stack>\d+) "
    r"SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)"
)
_INSTRUCTION = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<predicate>@!?U?P\w+\s+)?"
    r"(?P<text>[A-Z][A-Z0-9_.]*)(?P<operands>[^;]*);"
)
_TARGET = re.compile(r"(?P<condition>!?U?P\d,)?\s*(?P<address>0x[0-9a-f]+)\s*$")


def instruction(found: re.Match[str]) -> Instruction:
    """A line of `cuobjdump -sass`. CALL.REL.NOINC is a jump where there are no functions."""
    operation = found["text"].split(".")[0]
    conditional = found["predicate"] is not None
    jump = _TARGET.search(found["operands"]) if operation in ("BRA", "CALL") else None
    ends = operation in ("BRA", "CALL", "BRX", "EXIT", "RET")
    return Instruction(
        address=int(found["address"], 16),
        text=found["text"],
        target=int(jump["address"], 16) if jump else None,
        may_pass=not ends or conditional or bool(jump and jump["condition"]),
    )


def parse(usage: str, sass: str, demangle: dict[str, str]) -> list[KernelCode]:
    """The kernels of `cuobjdump -res-usage` and `-sass`; `demangle` maps the mangled names."""
    code: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    for line in sass.splitlines():
        if "Function : " in line:
            current = code.setdefault(line.split("Function : ")[1].strip(), [])
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(instruction(found))
    kernels = []
    for found in _USAGE.finditer(usage):
        numbers = {key: int(found[key]) for key in ("registers", "stack", "shared", "local")}
        name = found["name"]
        kernels.append(
            KernelCode(short_name(demangle[name]), **numbers, code=tuple(code.get(name, ())))
        )
    return kernels


def read(cubin: Path) -> list[KernelCode]:
    """The kernels of a cubin."""
    tool = find_cuobjdump()
    assert tool is not None

    def run(*command: str, text: str | None = None) -> str:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    usage, sass = run(tool, "-res-usage", str(cubin)), run(tool, "-sass", str(cubin))
    names = [found["name"] for found in _USAGE.finditer(usage)]
    plain = run("c++filt", text="\n".join(names)).splitlines()
    return parse(usage, sass, dict(zip(names, plain, strict=True)))
