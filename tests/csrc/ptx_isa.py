"""Runs PTX for one warp, as the PTX ISA says; nothing here comes from the kernels or the emulator.

It knows what nvcc writes around the functions of ptx.cuh, and their own instructions, each by its
whole name: another suffix is another instruction. To add one, write a function below with
`@instruction` (of a warp) or `@arithmetic` (of a lane's operands, whose widths in bits are given).
"""

from __future__ import annotations

import operator
import re
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import numpy as np

from tests.csrc.formats import FORMATS, SINGLE, Format

LANES = 32
HALF, BFLOAT16 = FORMATS


class PtxError(Exception):
    """PTX that is not known here, or is not allowed."""


# --- Reading


@dataclass(frozen=True)
class Instruction:
    """`operands`: a tuple for a vector, brackets kept round an address."""

    name: str
    operands: tuple[str | tuple[str, ...], ...]
    inline: bool  # from an asm statement

    def __str__(self) -> str:
        operands = (
            each if isinstance(each, str) else "{" + ", ".join(each) + "}" for each in self.operands
        )
        return f"{self.name} {', '.join(operands)}".strip() + ";"


@dataclass(frozen=True)
class Kernel:
    name: str
    widths: dict[str, int]  # of registers in bits, by what stands before their number
    code: tuple[Instruction, ...]


def parse_instruction(text: str, inline: bool = False) -> Instruction:
    name, _, rest = text.strip().partition(" ")
    parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]]+", rest)
    operands = tuple(
        tuple(each.strip() for each in part[1:-1].split(",")) if part.startswith("{") else part
        for part in parts
    )
    return Instruction(name, operands, inline)


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a file of PTX, by name."""
    kernels = {}
    for name, body in re.findall(r"\.entry (\w+)\([^)]*\)\s*\{\n(.*?)\n\}", text, re.DOTALL):
        widths, code, inline = {}, [], False
        for line in body.replace("\t", " ").splitlines():
            if "inline asm" in line:
                inline = "begin" in line
                continue
            for statement in line.split("//")[0].split(";"):
                if found := re.fullmatch(r" *\.reg \.([a-z]+)(\d*) +(%\w+)<\d+> *", statement):
                    widths[found[3]] = int(found[2] or 1)
                elif statement.strip():
                    code.append(parse_instruction(statement, inline))
        kernels[name] = Kernel(name, widths, tuple(code))
    return kernels


# --- A warp and its memory

GLOBAL = 0x7F0000000000
APART = 0x10000000
SHARED = 0x400


@dataclass
class Memory:
    base: int
    bytes: bytearray

    def place(self, address: int, size: int) -> slice:
        begin = address - self.base
        if not 0 <= begin <= len(self.bytes) - size or address % size:
            raise PtxError(f"{size} bytes at {address:#x} are outside of memory or not aligned")
        return slice(begin, begin + size)

    def load(self, address: int, size: int) -> int:
        return int.from_bytes(self.bytes[self.place(address, size)], "little")

    def store(self, address: int, size: int, value: int) -> None:
        self.bytes[self.place(address, size)] = value.to_bytes(size, "little")


Values = list[int]  # of a register or an operand: bits, for each lane


class Warp:
    """One warp that is a whole grid, with parameters (in, out, n, mode) as ptx_probe.cu has them.

    `done` counts what it does to memory and together, in the words of ptx.cuh.
    """

    def __init__(self, kernel: Kernel, data: bytes, words: int, shared: int, n: int) -> None:
        self.kernel = kernel
        self.registers: dict[str, Values] = {}
        self.inputs = Memory(GLOBAL, bytearray(data))
        self.outputs = Memory(GLOBAL + APART, bytearray(4 * words))
        self.shared = Memory(SHARED, bytearray(b"\xff" * shared))
        parameters = struct.pack("<QQqi4x", self.inputs.base, self.outputs.base, n, 0)
        self.parameters = Memory(0, bytearray(parameters))
        self.done: Counter[str] = Counter()
        self.copies: list[tuple[int, bytes]] = []  # begun, in no group
        self.groups: list[list[tuple[int, bytes]]] = []  # that have not landed

    def run(self) -> list[int]:
        """Runs the kernel to its end, and returns its output as words."""
        for each in self.kernel.code:
            find(each.name)  # what is not known fails at once
        for each in self.kernel.code:
            entry, found = find(each.name)
            if entry.kind is not None:
                self.done[entry.kind] += 1
            entry.run(self, found, *each.operands)
        return list(struct.unpack(f"<{len(self.outputs.bytes) // 4}I", self.outputs.bytes))

    def width(self, register: str) -> int:
        found = re.fullmatch(r"(%[a-z]+)\d+", register)
        if found is None or found[1] not in self.kernel.widths:
            raise PtxError(f"{register} is no register")
        return self.kernel.widths[found[1]]

    def read(self, operand: str | tuple[str, ...], bits: int) -> Values:
        if not isinstance(operand, str):
            raise PtxError(f"a vector {operand}, where one operand is expected")
        if operand == "%tid.x" and bits == 32:
            return list(range(LANES))
        if re.fullmatch(r"-?(\d+|0x[0-9a-fA-F]+)", operand):
            return [int(operand, 0) % (1 << bits)] * LANES
        if re.fullmatch(r"0f[0-9A-Fa-f]{8}", operand) and bits == 32:
            return [int(operand[2:], 16)] * LANES
        if "qkernels_shared_memory" in operand and bits in (32, 64):
            return [SHARED] * LANES
        if self.width(operand) != bits:
            raise PtxError(f"{operand} has {self.width(operand)} bits, expected {bits}")
        if operand not in self.registers:
            raise PtxError(f"{operand} is read before it is written")
        return self.registers[operand]

    def write(self, register: str | tuple[str, ...], bits: int, values: Values) -> None:
        if not isinstance(register, str):
            raise PtxError(f"a vector {register}, where one operand is expected")
        if self.width(register) != bits:
            raise PtxError(f"{register} has {self.width(register)} bits, expected {bits}")
        self.registers[register] = [value % (1 << bits) for value in values]

    def addresses(self, operand: str | tuple[str, ...], bits: int) -> Values:
        """Of `[register + offset]`."""
        found = isinstance(operand, str) and re.fullmatch(r"\[([%\w]+)(?:\+(-?\d+))?\]", operand)
        if not found:
            raise PtxError(f"{operand} is no address")
        offset = int(found[2] or 0)
        if found[1].startswith(self.kernel.name + "_param"):
            return [offset] * LANES
        return [(base + offset) % (1 << bits) for base in self.read(found[1], bits)]

    def memory(self, space: str, address: int) -> Memory:
        if space == "global":
            return self.inputs if address < self.outputs.base else self.outputs
        return {"shared": self.shared, "param": self.parameters}[space]


def vector(operand: str | tuple[str, ...], size: int) -> tuple[str, ...]:
    if isinstance(operand, str) or len(operand) != size:
        raise PtxError(f"{operand} is no vector of {size}")
    return operand


def constant(operand: str | tuple[str, ...]) -> int:
    if not isinstance(operand, str) or not re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", operand):
        raise PtxError(f"{operand} is no integer constant")
    return int(operand, 0)


# --- The instructions


@dataclass(frozen=True)
class Entry:
    """`kind`: what ptx.cuh calls it, where the emulator counts it.

    `has_effects`: on memory or order, so that an asm statement with it must be volatile and clobber
    memory; others may be merged, moved and left out.
    """

    run: Callable[..., None]
    kind: str | None
    has_effects: bool
    operands: int


ENTRIES: dict[str, Entry] = {}


@cache
def find(name: str) -> tuple[Entry, re.Match[str]]:
    for pattern, entry in ENTRIES.items():
        if found := re.fullmatch(pattern, name):
            return entry, found
    raise PtxError(f"{name} is not known: tests/csrc/ptx_isa.py says how to add it")


def instruction(
    pattern: str, operands: int, kind: str | None = None, has_effects: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A function of the warp, the match of the instruction's name, and so many operands."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        def run(warp: Warp, found: re.Match[str], *given: str | tuple[str, ...]) -> None:
            if len(given) != operands:
                raise PtxError(f"{found[0]} has {len(given)} operands, expected {operands}")
            function(warp, found, *given)

        assert pattern not in ENTRIES
        ENTRIES[pattern] = Entry(run, kind, has_effects, operands)
        return function

    return add


def arithmetic(pattern: str, *widths: int) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """A function of a lane's operands; `widths`: of the result, then of those."""

    def add(function: Callable[..., int]) -> Callable[..., int]:
        @instruction(pattern, len(widths))
        def run(warp: Warp, _: re.Match[str], d: str, *given: str) -> None:
            values = [warp.read(each, bits) for each, bits in zip(given, widths[1:], strict=True)]
            warp.write(d, widths[0], [function(*lane) for lane in zip(*values, strict=True)])

        return function

    return add


def signed(value: int, bits: int) -> int:
    return value - (value >> (bits - 1) << bits)


# Around the functions of ptx.cuh: numbers wrap, and a generic address of global memory is its own.
arithmetic(r"mov\.[bufs]32", 32, 32)(lambda a: a)
arithmetic(r"mov\.[bufs]64", 64, 64)(lambda a: a)
arithmetic(r"cvta\.to\.global\.u64", 64, 64)(lambda a: a)
arithmetic(r"add\.[us]32", 32, 32, 32)(operator.add)
arithmetic(r"add\.[us]64", 64, 64, 64)(operator.add)
arithmetic(r"sub\.[us]32", 32, 32, 32)(operator.sub)
arithmetic(r"and\.b32", 32, 32, 32)(operator.and_)
arithmetic(r"or\.b32", 32, 32, 32)(operator.or_)
arithmetic(r"shl\.b32", 32, 32, 32)(lambda a, b: a << b if b < 32 else 0)
arithmetic(r"mul\.wide\.u32", 64, 32, 32)(operator.mul)
arithmetic(r"mul\.wide\.s32", 64, 32, 32)(lambda a, b: signed(a, 32) * signed(b, 32))
arithmetic(r"cvt\.s64\.s32", 64, 32)(lambda a: signed(a, 32))
arithmetic(r"cvt\.u64\.u32", 64, 32)(lambda a: a)
arithmetic(r"cvt\.u32\.u64", 32, 64)(lambda a: a)
arithmetic(r"cvt\.u32\.u16", 32, 16)(lambda a: a)
arithmetic(r"setp\.gt\.s64", 1, 64, 64)(lambda a, b: signed(a, 64) > signed(b, 64))
arithmetic(r"setp\.lt\.s64", 1, 64, 64)(lambda a, b: signed(a, 64) < signed(b, 64))
arithmetic(r"selp\.b32", 32, 32, 32, 1)(lambda a, b, p: a if p else b)


@instruction(r"ret", 0)
def ret(warp: Warp, _: re.Match[str]) -> None:
    """Kernels have no branches, so this stands at their end."""


@arithmetic(r"lop3\.b32", 32, 32, 32, 32, 32)
def lop3(a: int, b: int, c: int, table: int) -> int:
    d = 0
    for i in range(32):
        row = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)
        d |= (table >> row & 1) << i
    return d


@arithmetic(r"prmt\.b32", 32, 32, 32, 32)
def prmt(a: int, b: int, selector: int) -> int:
    pool = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
    chosen = []
    for i in range(4):
        control = selector >> 4 * i & 0xF
        byte = pool[control & 7]
        chosen.append((0xFF if byte & 0x80 else 0) if control & 8 else byte)
    return int.from_bytes(bytes(chosen), "little")


def rounded(form: Format, exact: Callable[..., Fraction | float], *numbers: float) -> int:
    """The bits of a result with one rounding; in fp64, infinities and signs of zeros are right."""
    with np.errstate(all="ignore"):
        close = float(exact(*(np.float64(number) for number in numbers)))
    if np.isfinite(numbers).all():
        close = form.nearest(Fraction(exact(*map(Fraction, numbers))), close)
    return form.bits(close)


def in_pairs(form: Format, exact: Callable[..., Fraction | float], *words: int) -> int:
    d = 0
    for shift in (0, 16):
        numbers = (form.number(word >> shift & 0xFFFF) for word in words)
        d |= rounded(form, exact, *numbers) << shift
    return d


def float_of(bits: int) -> float:
    return float(np.uint32(bits).view(np.float32))


def bits_of(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


arithmetic(r"fma\.rn\.f16x2", 32, 32, 32, 32)(
    lambda a, b, c: in_pairs(HALF, lambda x, y, z: x * y + z, a, b, c)
)
arithmetic(r"fma\.rn\.bf16x2", 32, 32, 32, 32)(
    lambda a, b, c: in_pairs(BFLOAT16, lambda x, y, z: x * y + z, a, b, c)
)
arithmetic(r"sub\.rn\.f16x2", 32, 32, 32)(lambda a, b: in_pairs(HALF, operator.sub, a, b))
arithmetic(r"mul\.rn\.f16x2", 32, 32, 32)(lambda a, b: in_pairs(HALF, operator.mul, a, b))
# The first operand goes to the upper half.
arithmetic(r"cvt\.rn\.f16x2\.f32", 32, 32, 32)(
    lambda a, b: (
        rounded(HALF, lambda x: x, float_of(a)) << 16 | rounded(HALF, lambda x: x, float_of(b))
    )
)
arithmetic(r"cvt\.rn\.bf16x2\.f32", 32, 32, 32)(
    lambda a, b: (
        rounded(BFLOAT16, lambda x: x, float_of(a)) << 16
        | rounded(BFLOAT16, lambda x: x, float_of(b))
    )
)
arithmetic(r"cvt\.f32\.f16", 32, 16)(lambda a: bits_of(HALF.number(a)))


def in_single(exact: Callable[..., Fraction | float], *words: int) -> int:
    return rounded(SINGLE, exact, *map(float_of, words))


arithmetic(r"add\.rn\.f32", 32, 32, 32)(lambda a, b: in_single(operator.add, a, b))
arithmetic(r"mul\.rn\.f32", 32, 32, 32)(lambda a, b: in_single(operator.mul, a, b))
arithmetic(r"fma\.rn\.f32", 32, 32, 32, 32)(
    lambda a, b, c: in_single(lambda x, y, z: x * y + z, a, b, c)
)


@arithmetic(r"div\.rn\.f32", 32, 32, 32)
def divide(a: int, b: int) -> int:
    if float_of(b) == 0:  # which a fraction cannot be divided by
        with np.errstate(all="ignore"):
            return SINGLE.bits(float(np.float32(float_of(a)) / np.float32(float_of(b))))
    return in_single(operator.truediv, a, b)


@arithmetic(r"sqrt\.rn\.f32", 32, 32)
def square_root(a: int) -> int:
    """fp64 has more than twice the digits, so that rounding its root again changes nothing."""
    with np.errstate(all="ignore"):
        return SINGLE.bits(float(np.float32(np.sqrt(np.float64(float_of(a))))))


def extreme(is_least: bool, a: int, b: int) -> int:
    x, y = float_of(a), float_of(b)
    if np.isnan(x) or np.isnan(y):
        return SINGLE.bits(y if np.isnan(x) else x)
    if x == y:  # -0 is below +0
        return a | b if is_least else a & b
    return a if (x < y) is is_least else b


arithmetic(r"min\.f32", 32, 32, 32)(lambda a, b: extreme(True, a, b))
arithmetic(r"max\.f32", 32, 32, 32)(lambda a, b: extreme(False, a, b))


# --- What a warp computes together; the layouts are those of the ISA's chapters of each


@instruction(
    r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(f16\.f16|bf16\.bf16)\.f32", 4, kind="mma"
)
def mma(warp: Warp, found: re.Match[str], *operands: tuple[str, ...]) -> None:
    """The order of the sums is open, so the inputs must make them exact."""
    form = HALF if found[1] == "f16.f16" else BFLOAT16
    d_names, *names = (
        vector(each, size) for each, size in zip(operands, (4, 4, 2, 4), strict=True)
    )
    a_words, b_words, c_words = ([warp.read(name, 32) for name in each] for each in names)
    a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for lane in range(LANES):
        group, thread = lane >> 2, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            column = thread * 2 + (i & 1) + (0 if i < 4 else 8)
            a[row, column] = form.number(a_words[i // 2][lane] >> i % 2 * 16 & 0xFFFF)
        for i in range(4):
            row = thread * 2 + (i & 1) + (0 if i < 2 else 8)
            b[row, group] = form.number(b_words[i // 2][lane] >> i % 2 * 16 & 0xFFFF)
            c[group + (0 if i < 2 else 8), thread * 2 + (i & 1)] = float_of(c_words[i][lane])
    with np.errstate(all="ignore"):
        sums = a @ b + c
    for i, name in enumerate(d_names):
        lanes = [(lane >> 2, lane % 4) for lane in range(LANES)]
        values = [
            sums[group + (0 if i < 2 else 8), thread * 2 + (i & 1)] for group, thread in lanes
        ]
        warp.write(name, 32, [bits_of(value) for value in values])


@instruction(r"mma\.sync\.aligned\.m16n8k32\.row\.col\.s32\.s8\.s8\.s32", 4, kind="mma")
def mma_of_bytes(warp: Warp, _: re.Match[str], *operands: tuple[str, ...]) -> None:
    """Sums wrap around, as without .satfinite."""
    d_names, *names = (
        vector(each, size) for each, size in zip(operands, (4, 4, 2, 4), strict=True)
    )
    a_words, b_words, c_words = ([warp.read(name, 32) for name in each] for each in names)
    a, b = np.zeros((16, 32), dtype=np.int64), np.zeros((32, 8), dtype=np.int64)
    for lane in range(LANES):
        group, thread = lane >> 2, lane % 4
        for i in range(16):
            row = group if i < 4 or 8 <= i < 12 else group + 8
            column = thread * 4 + (i & 3) + (0 if i < 8 else 16)
            a[row, column] = signed(a_words[i // 4][lane] >> i % 4 * 8 & 0xFF, 8)
        for i in range(8):
            row = thread * 4 + (i & 3) + (0 if i < 4 else 16)
            b[row, group] = signed(b_words[i // 4][lane] >> i % 4 * 8 & 0xFF, 8)
    sums = a @ b
    for i, name in enumerate(d_names):
        places = [
            ((lane >> 2) + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)) for lane in range(LANES)
        ]
        values = [
            (int(sums[at]) + before) % (1 << 32)
            for at, before in zip(places, c_words[i], strict=True)
        ]
        warp.write(name, 32, values)


@instruction(r"shfl\.sync\.bfly\.b32", 5, kind="shuffle", has_effects=True)
def shuffle(warp: Warp, _: re.Match[str], d: str, a: str, b: str, c: str, lanes: str) -> None:
    """`d` may be a register, and a predicate behind a bar. c: the last lane, of no parts of a
    warp."""
    everyone = [0xFFFFFFFF] * LANES, [LANES - 1] * LANES
    if (warp.read(lanes, 32), warp.read(c, 32)) != everyone:
        raise PtxError(f"shfl of lanes {lanes} up to {c}, expected all")
    values, masks = warp.read(a, 32), warp.read(b, 32)
    warp.write(d.split("|")[0], 32, [values[lane ^ masks[lane]] for lane in range(LANES)])


@instruction(r"movmatrix\.sync\.aligned\.m8n8\.trans\.b16", 2, kind="movmatrix")
def movmatrix(warp: Warp, _: re.Match[str], d: str, a: str) -> None:
    """Thread T has elements 2 (T % 4) and the one after of row T / 4."""
    words = warp.read(a, 32)
    rows = [[words[row * 4 + i // 2] >> i % 2 * 16 & 0xFFFF for i in range(8)] for row in range(8)]
    columns = list(zip(*rows, strict=True))
    lanes = [(columns[lane // 4], lane % 4 * 2) for lane in range(LANES)]
    warp.write(d, 32, [row[at] | row[at + 1] << 16 for row, at in lanes])


@instruction(
    r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16", 2, kind="ldmatrix", has_effects=True
)
def ldmatrix(warp: Warp, _: re.Match[str], r: tuple[str, ...], address: str) -> None:
    rows = warp.addresses(address, 32)
    for i, name in enumerate(vector(r, 4)):
        matrix = [warp.shared.load(row, 16) for row in rows[8 * i : 8 * i + 8]]
        warp.write(name, 32, [matrix[lane // 4] >> lane % 4 * 32 for lane in range(LANES)])


# --- Memory


def load(warp: Warp, found: re.Match[str], d: str | tuple[str, ...], address: str) -> None:
    _access(warp, found, d, address, stores=False)


def store(warp: Warp, found: re.Match[str], address: str, a: str | tuple[str, ...]) -> None:
    _access(warp, found, a, address, stores=True)


def _access(
    warp: Warp, found: re.Match[str], held: str | tuple[str, ...], at: str, stores: bool
) -> None:
    """A register may be wider than what it holds of memory."""
    space, size = found["space"], int(found["bits"]) // 8
    names = vector(held, int(found["vector"][2:])) if found["vector"] else (held,)
    addresses = warp.addresses(at, 64 if space == "global" else 32)
    for address in addresses:
        warp.memory(space, address).place(address, size * len(names))
    for i, name in enumerate(names):
        if not isinstance(name, str) or warp.width(name) < 8 * size:
            raise PtxError(f"{name} is no register of {8 * size} bits or more")
        places = [address + i * size for address in addresses]
        memories = [warp.memory(space, place) for place in places]
        if stores:
            values = [value % (1 << 8 * size) for value in warp.read(name, warp.width(name))]
            for memory, place, value in zip(memories, places, values, strict=True):
                memory.store(place, size, value)
        else:
            values = [m.load(place, size) for m, place in zip(memories, places, strict=True)]
            warp.write(name, warp.width(name), values)


def _accesses(space: str) -> str:
    return rf"\.(?P<space>{space})%s(?P<vector>\.v2|\.v4|)\.[buf](?P<bits>8|16|32|64)"


instruction("ld" + _accesses("param") % "", 2)(load)
instruction("ld" + _accesses("shared") % "", 2, kind="load_shared")(load)
instruction("ld" + _accesses("global") % r"\.nc", 2, kind="load_global")(load)
instruction("ld" + _accesses("global") % r"\.cg", 2, kind="load_global_written")(load)
instruction("st" + _accesses("shared") % "", 2, kind="store_shared", has_effects=True)(store)
instruction("st" + _accesses("global") % "", 2, kind="store_global", has_effects=True)(store)


EVICT_FIRST = 0x12F0000000000000
"""What createpolicy gives is opaque."""


@instruction(r"createpolicy\.fractional\.L2::evict_first\.b64", 2)
def create_policy(warp: Warp, _: re.Match[str], policy: str, fraction: str) -> None:
    if fraction != "1.0":
        raise PtxError(f"a policy for {fraction} of the accesses, expected all")
    warp.write(policy, 64, [EVICT_FIRST] * LANES)


@instruction(r"cp\.async\.cg\.shared\.global", 4, kind="copy_async_16", has_effects=True)
def copy_async(warp: Warp, _: re.Match[str], to: str, source: str, size: str, given: str) -> None:
    """Past the first-level cache, which only 16 bytes can go; fewer are filled up with zeros."""
    if constant(size) != 16:
        raise PtxError(f"cp.async.cg of {size} bytes")
    sources, counts = warp.addresses(source, 64), warp.read(given, 32)
    for address, begin, count in zip(warp.addresses(to, 32), sources, counts, strict=True):
        warp.shared.place(address, 16)
        warp.memory("global", begin).place(begin, 16)
        if count > 16:
            raise PtxError(f"{count} of 16 bytes are to be copied")
        copied = warp.memory("global", begin).load(begin, 16).to_bytes(16, "little")[:count]
        warp.copies.append((address, copied.ljust(16, b"\0")))


@instruction(
    r"cp\.async\.cg\.shared\.global\.L2::cache_hint",
    5,
    kind="copy_async_16",
    has_effects=True,
)
def copy_async_hinted(warp: Warp, found: re.Match[str], *operands: str) -> None:
    *others, policy = operands
    if warp.read(policy, 64) != [EVICT_FIRST] * LANES:
        raise PtxError(f"{policy} is no cache policy")
    copy_async(warp, found, *others)


@instruction(r"cp\.async\.bulk\.prefetch\.L2\.global", 2, kind="prefetch", has_effects=True)
def prefetch(warp: Warp, _: re.Match[str], address: str, size: str) -> None:
    """To the second-level cache, which shows in no value."""
    for begin, count in zip(warp.addresses(address, 64), warp.read(size, 32), strict=True):
        if count % 16:
            raise PtxError(f"{count} bytes are no multiple of 16")
        for piece in range(begin, begin + count, 16):
            warp.memory("global", piece).place(piece, 16)


@instruction(r"cp\.async\.commit_group", 0, kind="copy_async_commit", has_effects=True)
def commit_group(warp: Warp, _: re.Match[str]) -> None:
    warp.groups.append(warp.copies)
    warp.copies = []


@instruction(r"cp\.async\.wait_group", 1, kind="copy_async_wait", has_effects=True)
def wait_group(warp: Warp, _: re.Match[str], left: str) -> None:
    """Copies land as late as they may."""
    if constant(left) < 0:
        raise PtxError(f"cp.async.wait_group {left}")
    while len(warp.groups) > constant(left):
        for address, copied in warp.groups.pop(0):
            warp.shared.store(address, 16, int.from_bytes(copied, "little"))


def add_atomically(warp: Warp, _: re.Match[str], d: str, address: str, a: str) -> None:
    addresses, values = warp.addresses(address, 64), warp.read(a, 32)
    assert len(set(addresses)) == LANES, "in what order lanes add is not said"
    before = [warp.memory("global", each).load(each, 4) for each in addresses]
    for each, old, value in zip(addresses, before, values, strict=True):
        warp.memory("global", each).store(each, 4, (old + value) % (1 << 32))
    warp.write(d, 32, before)


instruction(r"atom\.global\.add\.u32", 3, kind="atomic_add", has_effects=True)(add_atomically)
instruction(r"atom\.acq_rel\.gpu\.add\.u32", 3, kind="count_block", has_effects=True)(
    add_atomically
)


# --- Order: one warp needs none, so these are only counted


@instruction(r"bar\.sync|barrier\.sync", 1, kind="sync_threads", has_effects=True)
def bar_sync(warp: Warp, _: re.Match[str], barrier: str) -> None:
    if constant(barrier) != 0:
        raise PtxError(f"barrier {barrier} is not the one of __syncthreads")


@instruction(r"bar\.warp\.sync", 1, kind="sync_warp", has_effects=True)
def bar_warp_sync(warp: Warp, _: re.Match[str], lanes: str) -> None:
    if warp.read(lanes, 32) != [0xFFFFFFFF] * LANES:
        raise PtxError(f"bar.warp.sync of lanes {lanes}, expected all")


# Other kernels are not there, so that these have nothing to wait for.


@instruction(r"griddepcontrol\.launch_dependents", 0, kind="start_next_kernel", has_effects=True)
def launch_dependents(warp: Warp, _: re.Match[str]) -> None:
    pass


@instruction(r"griddepcontrol\.wait", 0, kind="wait_for_kernels_before", has_effects=True)
def wait_for_prerequisites(warp: Warp, _: re.Match[str]) -> None:
    pass
