"""The safetensors files of a model folder: read tensor by tensor, written in shards."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qkernels.checkpoints.config import brief, read_json, shortened, typed
from qkernels.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
READ_BYTES = 16 << 20
"""Bytes of a file that are read at a time."""

_PICKLES = (".bin", ".pt", ".pth", ".pkl")
_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""What safetensors calls the types of torch."""


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies in its file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Store:
    """The tensors of a model folder by name; nothing but headers is read until one is asked for.

    They are those of model.safetensors.index.json and the files it names, else of
    model.safetensors, else of the only .safetensors file. Errors name `where`.

    Attributes:
        metadata: what the files' headers say beside their tensors.

    Raises:
        CheckpointError: for a file that is missing, damaged or truncated, and an index that names
            a file outside of the folder or a tensor that its file does not hold.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = self.where = Path(folder)
        self.config_path = self.folder / "config.json"
        self.metadata: dict[str, str] = {}
        self._entries: dict[str, _Entry] = {}
        index = self.folder / INDEX_FILE
        if not index.exists():
            self._entries.update(self._read_header(_only_file(self.folder)))
            return
        listed = _read_index(index)
        headers = {
            file: self._read_header(self.folder / file) for file in sorted(set(listed.values()))
        }
        for entries in headers.values():
            self._entries.update(entries)
        for name, file in listed.items():
            if name not in headers[file]:
                raise CheckpointError(f"{self.folder / file} lacks {name}, which {index} lists")
            self._entries[name] = headers[file][name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def nbytes(self, name: str) -> int:
        entry = self._entry(name)
        return entry.stop - entry.start

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor.

        Raises:
            CheckpointError: for a tensor that is missing, or of a type torch does not have.
        """
        entry = self._entry(name)
        if entry.dtype not in _DTYPES:
            raise CheckpointError(f"{entry.file}: {name} is of type {entry.dtype}: not supported")
        return _DTYPES[entry.dtype]

    def get(self, name: str) -> Tensor:
        """One tensor, in memory of its own.

        Raises:
            CheckpointError: for a tensor that is missing, or a file that changed under us.
        """
        entry, dtype, size = self._entry(name), self.dtype(name), self.nbytes(name)
        assert size == math.prod(entry.shape) * dtype.itemsize, entry
        # Read and not mapped: mapped pages would count beside the tensors made of them, and a file
        # that somebody cuts short would end the process.
        flat = torch.empty(size, dtype=torch.uint8)
        chunk = bytearray(min(size, READ_BYTES))
        with _opened(entry.file) as file:
            file.seek(entry.start)
            for start in range(0, size, READ_BYTES):
                part = memoryview(chunk)[: size - start]
                if file.readinto(part) != len(part):
                    raise CheckpointError(f"{entry.file} ends within {name}: it is truncated")
                flat[start : start + len(part)] = torch.frombuffer(part, dtype=torch.uint8)
        return flat.view(dtype).view(entry.shape)

    def take(
        self, name: str, shape: Sequence[int | None], dtypes: Sequence[torch.dtype] = ()
    ) -> Tensor:
        """A tensor that must have this shape, None for any length, and one of `dtypes` if given.

        Raises:
            CheckpointError: naming the file, the tensor, what it is and what it must be.
        """
        entry, dtype = self._entry(name), self.dtype(name)
        fits = len(shape) == len(entry.shape) and all(
            wanted in (None, size) for wanted, size in zip(shape, entry.shape, strict=True)
        )
        if not fits or (dtypes and dtype not in dtypes):
            accepted = " or ".join(str(d).removeprefix("torch.") for d in dtypes) or "any type"
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            got = f"{str(dtype).removeprefix('torch.')} {list(entry.shape)}"
            raise CheckpointError(f"{entry.file}: {name} must be {accepted} [{wanted}], got {got}")
        return self.get(name)

    def take_if_there(
        self, name: str, shape: Sequence[int | None], dtypes: Sequence[torch.dtype] = ()
    ) -> Tensor | None:
        """As `take`, and None for a tensor that is not stored."""
        return self.take(name, shape, dtypes) if name in self else None

    def _read_header(self, path: Path) -> dict[str, _Entry]:
        entries, metadata = _read_header(path)
        self.metadata.update(metadata)
        return entries

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise CheckpointError(
                f"{self.folder}: {name} is missing: copy or save the whole model anew"
            )
        return self._entries[name]


def _only_file(folder: Path) -> Path:
    if (folder / WEIGHTS_FILE).exists():
        return folder / WEIGHTS_FILE
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(
            f"{folder} holds several .safetensors files ({names}) and neither {WEIGHTS_FILE} nor "
            f"{INDEX_FILE}, which says what they hold"
        )
    pickles = sorted(path.name for path in folder.glob("*.*") if path.suffix in _PICKLES)
    hint = ""
    if pickles:
        hint = (
            f" ({pickles[0]} is a pickle, which may run code and is never read: save the model "
            "anew as safetensors, with the package that made it)"
        )
    raise CheckpointError(f"{folder} holds no .safetensors file{hint}")


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> file of an index."""
    weights = typed(read_json(path).get("weight_map"), dict, f"weight_map of {path}")
    for name, file in weights.items():
        typed(file, str, f"weight_map[{brief(name)}] of {path}")
        # Without following links: caches of downloads keep the files elsewhere.
        ways = (PurePosixPath(file), PureWindowsPath(file))
        if not file or any(way.is_absolute() or way.drive or ".." in way.parts for way in ways):
            raise CheckpointError(f"{path} names the file {brief(file)}, outside of the folder")
    return weights


def _read_header(path: Path) -> tuple[dict[str, _Entry], dict[str, str]]:
    """The tensors of a file, and its metadata."""
    try:
        # It holds the header to the file: types, sizes, and that tensors cover it without overlap.
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except OSError as error:
        gone = isinstance(error, FileNotFoundError)
        reason = "does not exist" if gone else f"cannot be read: {shortened(error)}"
        raise CheckpointError(f"{shortened(path)} {reason}") from None
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged or truncated ({shortened(error)}): copy it anew"
        ) from None
    metadata = header.pop("__metadata__", None) or {}
    entries = {}
    for name, about in header.items():
        start, stop = (8 + length + offset for offset in about["data_offsets"])
        entries[name] = _Entry(path, about["dtype"], tuple(about["shape"]), start, stop)
    return entries, metadata


def _opened(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


class ShardWriter:
    """Writes tensors as they come to model.safetensors, or to shards with an index.

    No more than one shard is held at a time. `finish` gives the files their names.

    Args:
        folder: is there, and holds none of the files.
        max_shard_size: bytes, or such as "5GB" (10^9) or "5GiB" (2^30). A larger tensor gets a
            shard of its own.

    Raises:
        CheckpointError: for a size that is none, a name written twice, or a full disk.
    """

    def __init__(self, folder: Path, max_shard_size: int | str) -> None:
        self.folder = folder
        self._most = shard_bytes(max_shard_size)
        self._shard: dict[str, Tensor] = {}
        self._storages: set[int] = set()
        self._held = 0
        self._written: list[dict[str, int]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        if name in self._shard or any(name in shard for shard in self._written):
            raise CheckpointError(f"two tensors of the model are called {name}")
        if self._shard and self._held + tensor.nbytes > self._most:
            self._flush()
        kept = tensor.detach().cpu().contiguous()
        # safetensors takes no two names of one storage.
        if kept.untyped_storage().data_ptr() in self._storages:
            kept = kept.clone()
        self._storages.add(kept.untyped_storage().data_ptr())
        self._shard[name] = kept
        self._held += tensor.nbytes

    def finish(self) -> None:
        if self._shard:
            self._flush()
        count = len(self._written)
        if count == 1:
            self._part(0).rename(self.folder / WEIGHTS_FILE)
            return
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for i, name in enumerate(names):
            self._part(i).rename(self.folder / name)
        index = {
            "metadata": {"total_size": sum(sum(shard.values()) for shard in self._written)},
            "weight_map": {
                key: name for shard, name in zip(self._written, names, strict=True) for key in shard
            },
        }
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def _part(self, i: int) -> Path:
        return self.folder / f"part-{i}"

    def _flush(self) -> None:
        path = self._part(len(self._written))
        try:
            # A file made here has the mode that the umask leaves; those of safetensors are private.
            path.touch()
            mode = path.stat().st_mode
            save_file(self._shard, path, metadata={"format": "pt"})
            path.chmod(mode)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be written: {error}") from None
        self._written.append({name: tensor.nbytes for name, tensor in self._shard.items()})
        self._shard, self._storages, self._held = {}, set(), 0


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("KMGT", start=1)}


def shard_bytes(size: int | str) -> int:
    """`size` in bytes: a number, or one with a unit such as "500MB" or "2GiB".

    Raises:
        CheckpointError: for anything else.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?) *([KMGT]i?)?B?", str(size))
    number = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if number < 1:
        raise CheckpointError(f"max_shard_size {size!r} is no size: give bytes, or such as '5GB'")
    return number
