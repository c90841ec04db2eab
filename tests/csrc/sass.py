"""What nvcc made of a kernel: resources and instructions, read from a cubin by cuobjdump."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

INTEGER = ("LOP3", "SHF", "PRMT", "IADD3", "VIADD", "LEA", "SEL", "IMAD", "SGXT", "BMSK", "I2F")
"""Instructions of the integer pipes, IMAD included, which nvcc also takes for moves and shifts."""


@dataclass(frozen=True)
class KernelCode:
    """One instantiation: `name` is demangled, without namespaces and parameters."""

    name: str
    registers: int
    stack: int
    shared: int
    local: int
    instructions: Counter[str]  # with all suffixes, such as LDGSTS.E.BYPASS.128

    def count(self, operation: str, *suffixes: str) -> int:
        """Instructions of an operation that have all of these suffixes."""
        return sum(
            number
            for text, number in self.instructions.items()
            if text.split(".")[0] == operation and set(suffixes) <= set(text.split(".")[1:])
        )

    def integer_operations(self) -> int:
        return sum(self.count(operation) for operation in INTEGER)


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
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


def parse(usage: str, sass: str, demangle: dict[str, str]) -> list[KernelCode]:
    """The kernels of `cuobjdump -res-usage` and `-sass`; `demangle` maps the mangled names."""
    code: dict[str, Counter[str]] = {}
    current: Counter[str] | None = None
    for line in sass.splitlines():
        if "Function : " in line:
            current = code.setdefault(line.split("Function : ")[1].strip(), Counter())
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current[found[1]] += 1
    kernels = []
    for found in _USAGE.finditer(usage):
        numbers = {key: int(found[key]) for key in ("registers", "stack", "shared", "local")}
        name = found["name"]
        kernels.append(
            KernelCode(
                short_name(demangle[name]), **numbers, instructions=code.get(name, Counter())
            )
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
