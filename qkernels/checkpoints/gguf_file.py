"""Which files are GGUF files, and what the package that reads them says of their headers."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from qkernels.bits.gguf import GGUF_TYPES
from qkernels.checkpoints.gguf_header import MAGIC, GgufTensor, read_header
from qkernels.errors import CheckpointError

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
        CheckpointError: for a file that does not hold what its header says.
    """
    names = {package("gguf").GGMLQuantizationType[name].value for name in GGUF_TYPES}
    return any(len(tensor.shape) >= 2 and tensor.kind in names for tensor in header(path))


def header(path: Path) -> list[GgufTensor]:
    """The tensors that the header of a GGUF file names.

    Raises:
        CheckpointError: for a file that does not hold what its header says.
    """
    sizes = package("gguf").GGML_QUANT_SIZES
    return read_header(path, {kind.value: size for kind, size in sizes.items()})


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
