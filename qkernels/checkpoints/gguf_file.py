"""Which files are GGUF files, and what their headers say, without their tensors."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qkernels.bits.gguf import GGUF_TYPES
from qkernels.errors import CheckpointError

MAGIC = b"GGUF"
DAMAGED = "cannot be read, it may be damaged or of an unsupported kind"


def gguf_file(path: str | Path) -> Path | None:
    """The GGUF file that `path` is, or the one of a folder without config.json; or None.

    Raises:
        CheckpointError: where a folder without config.json holds several.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "config.json").exists():
            return None
        found = sorted(path.glob("*.gguf"))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise CheckpointError(f"{path} holds several GGUF files ({names}): give one of them")
        path = found[0] if found else path
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return path if file.read(len(MAGIC)) == MAGIC else None


def has_quantized_tensors(path: Path) -> bool:
    """Whether a GGUF file holds matrices of types that schemes hold, by its header alone.

    Raises:
        CheckpointError: for a file that ends within its header.
    """
    gguf = package("gguf")
    names = {gguf.GGMLQuantizationType[name].value for name in GGUF_TYPES}
    try:
        with path.open("rb") as file:
            return any(kind in names for kind in _tensor_types(file))
    except (struct.error, KeyError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path} {DAMAGED} ({error})") from None


_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value, by the number of its type in the header."""
_STRING, _ARRAY = 8, 9


def _tensor_types(file: BinaryIO) -> Iterator[int]:
    """The type of each matrix, by its number in llama.cpp."""

    def number(form: str) -> int:
        (value,) = struct.unpack(f"<{form}", file.read(struct.calcsize(form)))
        return int(value)

    def skip(kind: int) -> None:
        if kind == _STRING:
            file.seek(number("Q"), 1)
        elif kind == _ARRAY:
            inner, count = number("I"), number("Q")
            if inner in _SIZES:
                file.seek(_SIZES[inner] * count, 1)
            else:
                for _ in range(count):
                    skip(inner)
        else:
            file.seek(_SIZES[kind], 1)

    file.seek(8)
    tensors, values = number("Q"), number("Q")
    for _ in range(values):
        skip(_STRING)
        skip(number("I"))
    for _ in range(tensors):
        skip(_STRING)
        dimensions = number("I")
        file.seek(8 * dimensions, 1)
        kind = number("I")
        file.seek(8, 1)
        if dimensions >= 2:
            yield kind


def package(name: str) -> Any:
    """A package that reading GGUF files needs.

    Raises:
        CheckpointError: where it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CheckpointError(
            f"loading a GGUF file needs {name} ({error}): pip install 'qkernels[models]'"
        ) from None
