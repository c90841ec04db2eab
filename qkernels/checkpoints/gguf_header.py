"""The header of a GGUF file, held to the file before anything is made of what it claims.

magic, version, number of tensors, number of values; then key, type and value of each value, and
name, sizes, type and offset of each tensor; then, aligned, their data. Numbers are little-endian,
strings have their length before them, arrays the type and number of their values.

The gguf package makes objects for each value and reads beyond the end as nothing, so that a count
that is too large would take it all memory there is.
Source: the GGUF specification of ggml (MIT licence), read as documentation.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from qkernels.checkpoints.config import brief
from qkernels.errors import CheckpointError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""What struct calls the types of values, by their numbers."""
_STRING, _ARRAY = 8, 9
_DEPTH = 8
"""Arrays within arrays; nobody writes more than one."""
_VALUES = 1 << 23
"""Values of all arrays: the largest vocabularies, with scores, types and merges, have 2 million."""
_LAYERS = 1000
"""More layers than any model has."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the header: `shape` as numpy counts, `kind` by its number in llama.cpp."""

    name: str
    shape: tuple[int, ...]
    kind: int


def read_header(path: Path, sizes: Mapping[int, tuple[int, int]]) -> list[GgufTensor]:
    """The tensors of a GGUF file.

    Args:
        sizes: number of a type -> numbers and bytes of a block.

    Raises:
        CheckpointError: naming the file, and what its header claims that is not there.
    """
    with path.open("rb") as file:
        return _Header(path, file).tensors(sizes)


class _Header:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file, self._at = path, file, 0
        self._size = path.stat().st_size
        self._values = 0

    def tensors(self, sizes: Mapping[int, tuple[int, int]]) -> list[GgufTensor]:
        if self._take(4, "its magic") != MAGIC:
            raise self._wrong("does not begin with GGUF")
        version = self._number("I", "its version")
        if version not in _VERSIONS:
            raise self._wrong(
                f"is of version {version}, or in big-endian order: versions "
                f"{' and '.join(map(str, _VERSIONS))} in little-endian order are read; convert it "
                "with llama.cpp"
            )
        count, values = self._number("Q", "its counts"), self._number("Q", "its counts")
        # The least that each of them takes: two lengths and a type, or a name, a size and so on.
        self._check_room(13 * values, f"{values} values")
        said = dict(self._value() for _ in range(values))
        self._check_room(24 * count, f"{count} tensors")
        found = [self._tensor() for _ in range(count)]
        for key, value in said.items():
            if value is not None and key.endswith("block_count") and value > max(count, _LAYERS):
                raise self._wrong(f"says {key}={value}, and holds {count} tensors")
        alignment = said.get("general.alignment", 32)
        if alignment is None or alignment < 1 or alignment & (alignment - 1):
            raise self._wrong(f"says general.alignment={alignment}, which is no power of two")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for tensor, offset in found:
            if tensor.name in tensors:
                raise self._wrong(f"names the tensor {brief(tensor.name)} a second time")
            if tensor.kind not in sizes:
                raise self._wrong(f"has {brief(tensor.name)} of the unknown type {tensor.kind}")
            numbers, nbytes = sizes[tensor.kind]
            end = start + offset + math.prod(tensor.shape) // numbers * nbytes
            if tensor.shape[-1] % numbers or end > self._size:
                raise self._wrong(
                    f"ends within {brief(tensor.name)} {list(tensor.shape)}, or its rows are no "
                    f"blocks of {numbers}: it is truncated or damaged"
                )
            tensors[tensor.name] = tensor
        return list(tensors.values())

    def _value(self) -> tuple[str, int | None]:
        """A key, and its value where that is one whole number."""
        key = self._string("a key")
        kind = self._number("I", key)
        if kind not in _FORMS:
            self._skip(kind, key, 0)
            return key, None
        (value,) = struct.unpack(f"<{_FORMS[kind]}", self._take(_nbytes(kind), key))
        return key, value if isinstance(value, int) and kind != 7 else None

    def _skip(self, kind: int, key: str, depth: int) -> None:
        if kind in _FORMS:
            self._pass(_nbytes(kind), key)
        elif kind == _STRING:
            self._pass(self._number("Q", key), f"{key}, a string")
        elif kind == _ARRAY and depth < _DEPTH:
            inner, count = self._number("I", key), self._number("Q", key)
            least = _nbytes(inner) if inner in _FORMS else 8
            self._check_room(least * count, f"{count} values of {key}")
            self._values += count
            if self._values > _VALUES:
                raise self._wrong(f"has more than {_VALUES} values in arrays, {key} among them")
            if inner in _FORMS:
                self._pass(least * count, key)
            else:
                for _ in range(count):
                    self._skip(inner, key, depth + 1)
        else:
            raise self._wrong(f"has a value of the unknown type {kind}, or too deep: {key}")

    def _tensor(self) -> tuple[GgufTensor, int]:
        name = self._string("the name of a tensor")
        dimensions = self._number("I", name)
        if not 1 <= dimensions <= 4:
            raise self._wrong(f"has {brief(name)} with {dimensions} dimensions")
        shape = [self._number("Q", name) for _ in range(dimensions)]
        kind, offset = self._number("I", name), self._number("Q", name)
        if min(shape) < 1:
            raise self._wrong(f"has {brief(name)} of sizes {shape}")
        return GgufTensor(name, tuple(reversed(shape)), kind), offset

    def _string(self, what: str) -> str:
        length = self._number("Q", what)
        # No name is longer, and what follows is held in memory.
        if length > 1 << 16:
            raise self._wrong(f"has {length} bytes in {what}")
        raw = self._take(length, what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self._wrong(f"has {brief(raw)} for {what}, which is no text") from None

    def _number(self, form: str, what: str) -> int:
        (value,) = struct.unpack(f"<{form}", self._take(struct.calcsize(form), what))
        return int(value)

    def _take(self, size: int, what: str) -> bytes:
        self._check_room(size, what)
        self._at += size
        return self._file.read(size)

    def _pass(self, size: int, what: str) -> None:
        self._check_room(size, what)
        self._at += size
        self._file.seek(self._at)

    def _check_room(self, size: int, what: str) -> None:
        if size > self._size - self._at:
            raise self._wrong(f"ends before {what}: it is truncated or damaged")

    def _wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path} {what}")


def _nbytes(kind: int) -> int:
    return struct.calcsize(f"<{_FORMS[kind]}")
