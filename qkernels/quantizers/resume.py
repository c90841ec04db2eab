"""A folder of finished blocks, so that an interrupted run goes on where it stopped.

    run.json               what the run is: recipe, scheme of each layer, what the data were
    block-0007.safetensors one block: its layers in the plain layout, the parameters rewritten, and
                           as metadata its report

Files are written aside and renamed, so that a kill at any moment leaves whole files alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qkernels.errors import CheckpointError
from qkernels.fields import FIELDS
from qkernels.layouts import PLAIN, PackedWeight, pack
from qkernels.modules import WQLinear
from qkernels.quantizers.report import LayerReport
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight

RUN_FILE = "run.json"
_VERSION = 3
_ASIDE = ".tmp"

WHAT_DIFFERS = {
    "version": "another version of qkernels",
    "recipe": "the recipe",
    "observer": "the observer",
    "backend": "the backend",
    "schemes": "the schemes of layers",
    "model": "the model",
    "calibration": "the calibration batches",
}


@dataclass(frozen=True)
class FinishedBlock:
    """What a block became.

    Attributes:
        layers: by name, without those that are shared with a layer finished before.
        rewritten: parameters with new values, by their names in the model.
        scaled: what the inputs of layers are multiplied by, fp32 [K], by their names.
    """

    layers: dict[str, WQLinear]
    rewritten: dict[str, Tensor]
    reports: list[LayerReport]
    unreached: dict[str, str]
    scaled: dict[str, Tensor] = field(default_factory=dict)


class ResumeFolder:
    """The finished blocks of one run, which no other run may use until `close` is called.

    Args:
        folder: made where it is missing.
        run: JSON values that say which run it is, with the keys of `WHAT_DIFFERS`.

    Raises:
        CheckpointError: for a folder of another run, naming what differs, of something else, or
            whose run.json is damaged; for one that another run uses.
    """

    def __init__(self, folder: str | Path, run: Mapping[str, Any]) -> None:
        self._folder, self._run = Path(folder), {"version": _VERSION, **run}
        self.whole_model: str | None = None
        if self._folder.exists() and not self._folder.is_dir():
            raise CheckpointError(f"cannot resume from {folder}: it is no folder")
        self._folder.mkdir(parents=True, exist_ok=True)
        handle = _hold(self._folder)
        self._let_go = None if handle is None else weakref.finalize(self, os.close, handle)
        left_over = {*self._folder.glob(f"block-*.safetensors{_ASIDE}")}
        left_over |= {*self._folder.glob(RUN_FILE + _ASIDE)}
        if (self._folder / RUN_FILE).exists():
            self._check_same_run()
        elif {*self._folder.iterdir()} - left_over:
            raise CheckpointError(
                f"cannot resume from {folder}: it holds other files and no {RUN_FILE}; give an "
                "empty folder to begin with"
            )
        else:
            self._write_run()
        for file in left_over:
            file.unlink(missing_ok=True)

    def close(self) -> None:
        """Leaves the folder to others."""
        if self._let_go is not None:
            self._let_go()

    def take_whole_model(self, reason: str) -> None:
        """Begins again: blocks cannot be taken one by one, because of `reason`."""
        for file in self._folder.glob("block-*.safetensors"):
            file.unlink()
        self.whole_model = reason
        self._write_run()

    def save(self, number: int, block: FinishedBlock) -> None:
        """Stores block `number`."""
        tensors = {
            f"{name}.{part}": tensor.cpu().contiguous()
            for name, layer in block.layers.items()
            for part, tensor in _tensors(layer).items()
        }
        tensors |= {
            f"rewritten.{name}": tensor.cpu().contiguous()
            for name, tensor in block.rewritten.items()
        }
        tensors |= {f"scaled.{name}": factor.cpu().clone() for name, factor in block.scaled.items()}
        about = {
            "layers": list(block.layers),
            "scaled": list(block.scaled),
            "rewritten": list(block.rewritten),
            "reports": [asdict(report) for report in block.reports],
            "unreached": block.unreached,
        }
        path = self._path(number)
        aside = path.with_name(path.name + _ASIDE)
        try:
            save_file(tensors, aside, metadata={"block": json.dumps(about)})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{aside} cannot be written ({error}); the blocks finished before are kept, and "
                "the same run goes on from them"
            ) from None
        _rename(aside, path)

    def load(
        self, number: int, model: nn.Module, options: Mapping[str, Any]
    ) -> FinishedBlock | None:
        """Block `number`, its layers on the devices of the model's; None where it is not finished.

        A file that was truncated counts as not finished.
        """
        path = self._path(number)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["block"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError:
            return None
        reports = _reports(about)
        schemes = {report.name: QuantScheme.parse(report.scheme) for report in reports.values()}
        return FinishedBlock(
            layers={
                name: _layer(model.get_submodule(name), schemes[name], f"{name}.", tensors, options)
                for name in about["layers"]
            },
            rewritten={name: tensors[f"rewritten.{name}"] for name in about["rewritten"]},
            reports=list(reports.values()),
            unreached=about["unreached"],
            scaled={name: tensors[f"scaled.{name}"] for name in about["scaled"]},
        )

    def opened(self, number: int) -> OpenedBlock:
        """The finished block `number`, whose tensors are read one by one."""
        return OpenedBlock(self._path(number))

    def _path(self, number: int) -> Path:
        return self._folder / f"block-{number:04d}.safetensors"

    def _write_run(self) -> None:
        path = self._folder / RUN_FILE
        aside = path.with_name(path.name + _ASIDE)
        aside.write_text(json.dumps({**self._run, "whole_model": self.whole_model}, indent=2))
        _rename(aside, path)

    def _check_same_run(self) -> None:
        path = self._folder / RUN_FILE
        try:
            found = json.loads(path.read_text())
        except ValueError:
            found = None
        is_run = isinstance(found, dict) and "version" in found
        if is_run and found["version"] != _VERSION:
            different = ["version"]
        elif is_run and found.keys() == {*self._run, "whole_model"}:
            different = [key for key in self._run if found[key] != self._run[key]]
            self.whole_model = found["whole_model"]
        else:
            raise CheckpointError(f"{path} is damaged: remove {self._folder} to begin again")
        if different:
            names = " and ".join(WHAT_DIFFERS[key] for key in different)
            raise CheckpointError(
                f"cannot resume from {self._folder}: it is of a run that differs in {names}; give "
                "another folder, or the same arguments"
            )


def _hold(folder: Path) -> int | None:
    """Keeps other runs off of a folder until the result is closed, or this process ends; None where
    the system has no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise CheckpointError(
            f"another run uses {folder}: wait until it ends, or give another folder"
        ) from None
    except OSError:
        # Of a file system without locks.
        os.close(handle)
        return None
    return handle


class OpenedBlock:
    """The file of a finished block.

    Attributes:
        layers: names of the layers that it holds.
        rewritten: names of the parameters that it holds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["block"])
        self._reports = _reports(about)
        self.layers: list[str] = about["layers"]
        self.rewritten: list[str] = about["rewritten"]

    def weight(self, layer: str) -> QuantizedWeight:
        """One of `layers`, with its bias."""
        report, prefix = self._reports[layer], f"{layer}."
        with safe_open(self._path, framework="pt") as file:
            mine = [prefix + part for part in ("words", *FIELDS, "bias")]
            tensors = {key: file.get_tensor(key) for key in mine if key in file.keys()}  # noqa: SIM118
        return _weight(QuantScheme.parse(report.scheme), (report.n, report.k), prefix, tensors)

    def parameter(self, name: str) -> Tensor:
        """One of `rewritten`."""
        with safe_open(self._path, framework="pt") as file:
            found: Tensor = file.get_tensor(f"rewritten.{name}")
        return found


def _reports(about: Mapping[str, Any]) -> dict[str, LayerReport]:
    """The reports of a block's layers, by name."""
    return {report["name"]: LayerReport(**report) for report in about["reports"]}


def fingerprint_model(model: nn.Module) -> str:
    """A hash of a model's modules and of every number in its parameters and buffers."""
    parts: Iterator[object] = (part for item in model.state_dict().items() for part in item)
    return fingerprint((repr(model), *parts))


def fingerprint_batches(batches: Iterable[Any]) -> str:
    """A hash of calibration batches: tensors, or tuples, lists and dicts that hold them."""
    return fingerprint(part for batch in batches for part in _leaves(batch))


def digest_of_layers(layers: Mapping[str, nn.Module], rewritten: Mapping[str, Tensor]) -> str:
    """A hash of every number in quantized layers, and in parameters beside them."""
    tensors = [
        part for layer in layers.values() for part in _tensors(cast(WQLinear, layer)).items()
    ]
    return fingerprint(part for item in (*tensors, *rewritten.items()) for part in item)


def _leaves(value: Any) -> Iterator[object]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, tuple | list):
        yield f"{type(value).__name__} of {len(value)}"
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def fingerprint(parts: Iterable[object]) -> str:
    """A hash of tensors, their types and shapes, and of whatever else has a `repr`."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype} {list(part.shape)}".encode())
            held = part.detach().cpu().contiguous()
            # Without a copy, and for types that numpy does not have.
            digest.update((ctypes.c_char * held.nbytes).from_address(held.data_ptr() or 1))
        else:
            digest.update(repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _tensors(layer: WQLinear) -> dict[str, Tensor]:
    """A layer in the layout that is the same on every machine."""
    weight = layer.to_weight()
    bias = {} if weight.bias is None else {"bias": weight.bias}
    return {**pack(weight, PLAIN).buffers, **bias}


def _layer(
    original: nn.Module,
    scheme: QuantScheme,
    prefix: str,
    tensors: Mapping[str, Tensor],
    options: Mapping[str, Any],
) -> WQLinear:
    weight = original.weight
    assert isinstance(weight, Tensor)
    n, k = weight.shape
    hub = _weight(scheme, (n, k), prefix, tensors)
    return WQLinear.from_weight(hub, device=weight.device, dtype=weight.dtype, **options)


def _weight(
    scheme: QuantScheme, shape: tuple[int, int], prefix: str, tensors: Mapping[str, Tensor]
) -> QuantizedWeight:
    names = [name for name in ("words", *FIELDS) if prefix + name in tensors]
    buffers = {name: tensors[prefix + name] for name in names}
    return PackedWeight(scheme, PLAIN, *shape, buffers).unpack(tensors.get(prefix + "bias"))


def _rename(aside: Path, path: Path) -> None:
    """Puts a finished file in its place, once it is on the disk."""
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)
