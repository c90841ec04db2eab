"""Ahead-of-time compilation of every kernel to a cubin, for any capability, without a GPU.

    python -m qkernels.triton_kernels.compile --capability 90

prints registers, spills, memory and barriers of each specialization. It shows that the kernels
build for a GPU nobody has at hand, and that they fit: budgets.toml says what each may use.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from .config import SHARED_MEMORY
from .launch import Launch
from .numerics import INTERPRETED
from .specializations import Specialization, sample, specializations

CAPABILITIES = (80, 86, 89, 90, 100, 120)


@dataclass(frozen=True)
class Record:
    """What came out of a compilation; sizes in bytes.

    Attributes:
        stack: of a lane, to which registers spill.
        shared: shared memory of a block.
        tensor_memory: columns of it that a block takes, of 512; 0 where there is none.
        barriers, loop_barriers: where all warps wait for each other, in the code and in its loops.
    """

    kernel: str
    specialization: str
    cubin_bytes: int
    registers: int
    stack: int
    shared: int
    tensor_memory: int
    barriers: int
    loop_barriers: int
    assembly: str = field(repr=False)


def compile_one(spec: Specialization, capability: int) -> Record:
    """Compiles to a cubin.

    Raises:
        RuntimeError: where Triton gave up and compiled a kernel that traps.
        triton.CompilationError, subprocess.CalledProcessError: where a kernel does not compile.
    """
    assert not INTERPRETED.value, "kernels that were defined for the interpreter do not compile"
    source = source_of(spec.launch)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=spec.launch.options)
    assembly = compiled.asm["ptx"]
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    if "trap;" in assembly:
        raise RuntimeError(
            f"{source.name} {spec.name} compiled to a trap for {capability}: Triton found "
            f"no room for it (tensor memory: {tensor_memory} columns)"
        )
    registers, stack = _resources(compiled.asm["cubin"])
    return Record(
        source.name,
        spec.name,
        len(compiled.asm["cubin"]),
        registers,
        stack,
        compiled.metadata.shared,
        tensor_memory,
        *count_barriers(assembly),
        assembly,
    )


def source_of(launch: Launch) -> ASTSource:
    """What Triton would compile for a launch: types, constants, and numbers divisible by 16."""
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def type_of(value: Any, path: tuple[int, ...], param: Any) -> Any:
        if isinstance(value, tuple):
            return type(value)(*(type_of(part, (*path, i), param) for i, part in enumerate(value)))
        is_number = isinstance(value, int) and not param.is_constexpr
        is_specialized = is_number and not param.do_not_specialize
        if isinstance(value, Tensor) or (is_specialized and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        is_float = isinstance(value, float) and not param.is_constexpr
        if isinstance(value, Tensor) or is_float:
            return mangle_type(value)
        if is_number and not (is_specialized and value == 1):
            return mangle_type(value)
        constants[path] = value
        return "constexpr"

    signature = {
        param.name: type_of(launch.arguments[param.name], (index,), param)
        for index, param in enumerate(launch.kernel.params)
    }
    return ASTSource(launch.kernel, signature, constants, attributes)


def count_barriers(assembly: str) -> tuple[int, int]:
    """(all, those in loops) of the barriers of a block in PTX.

    A loop is what lies between a label and a jump back to it.
    """
    labels: dict[str, int] = {}
    loops: list[range] = []
    barriers = []
    for number, line in enumerate(assembly.splitlines()):
        if label := re.match(r"(\$\w+):", line):
            labels[label[1]] = number
        elif jump := re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line):
            if jump[1] in labels:
                loops.append(range(labels[jump[1]], number))
        elif re.search(r"\bbar(?:rier)?\.sync\b", line):
            barriers.append(number)
    return len(barriers), sum(any(at in loop for loop in loops) for at in barriers)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of a cubin; registers spill to the stack."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found is not None, f"cuobjdump printed no resource usage: {report!r}"
    return int(found[1]), int(found[2])


def compile_all(capability: int, *, only_sample: bool = False) -> list[Record]:
    """Compiles every specialization (or the sample) for a capability such as 90.

    Raises:
        ValueError: for a capability that is not one of CAPABILITIES.
        RuntimeError and others: see `compile_one`.
    """
    if capability not in CAPABILITIES:
        accepted = ", ".join(map(str, CAPABILITIES))
        raise ValueError(f"capability {capability} is not one of {accepted}")
    specs = sample(capability) if only_sample else specializations(capability)
    return [compile_one(spec, capability) for spec in specs]


def shared_limit(capability: int) -> int:
    """Bytes of shared memory a block can have."""
    return SHARED_MEMORY.get(divmod(capability, 10), 99) * 1024


def main() -> None:
    """The command line: a table of one capability, the heaviest kernels first."""
    parser = argparse.ArgumentParser(description="Compile every Triton kernel without a GPU.")
    parser.add_argument("--capability", type=int, choices=CAPABILITIES, default=90)
    parser.add_argument("--sample", action="store_true", help="only a few specializations")
    arguments = parser.parse_args()
    records = compile_all(arguments.capability, only_sample=arguments.sample)
    print(
        f"{'kernel':24} {'specialization':56} {'cubin':>8} {'regs':>4} {'stack':>5} {'shared':>7} "
        f"{'tensor':>6} {'barriers':>8} {'in loops':>8}"
    )
    for record in sorted(records, key=lambda record: (-record.stack, -record.registers)):
        print(
            f"{record.kernel:24} {record.specialization:56} {record.cubin_bytes:8} "
            f"{record.registers:4} {record.stack:5} {record.shared:7} {record.tensor_memory:6} "
            f"{record.barriers:8} {record.loop_barriers:8}"
        )


if __name__ == "__main__":
    main()
