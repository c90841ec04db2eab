"""What the commands that load a model share: its options, and loading it with a moving bar."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qkernels.cli.console import note, progress_bar

if TYPE_CHECKING:
    import torch

    import qkernels as qk
    from qkernels.checkpoints.dense_folder import DenseFolder
    from qkernels.quantizers.streaming import Streamed


class Precision(str, Enum):
    """The 16- and 32-bit types a model can be loaded in."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.value]

    @classmethod
    def of(cls, dtype: torch.dtype) -> Precision:
        """The one that has a type."""
        return next(precision for precision in cls if precision.dtype == dtype)


ModelArgument = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="A model folder or a .gguf file on this machine."),
]
PrecisionOption = Annotated[
    Precision, typer.Option("--dtype", help="Of the layers that are not quantized.")
]
StoredPrecisionOption = Annotated[
    Precision | None,
    typer.Option(
        "--dtype",
        help="Of the layers that are not quantized. [default: bf16, and what a quantized model was "
        "saved in]",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option("--device", help="cpu, cuda, cuda:1 ...; auto takes a GPU where there is one."),
]


def find_device(name: str) -> torch.device:
    """The device that `name` spells.

    Raises:
        QuantizationError: for a device that does not exist or is not on this machine.
    """
    import torch

    from qkernels.errors import QuantizationError

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise QuantizationError(f"device {name!r} is not one of auto, cpu, cuda, cuda:1 ...")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise QuantizationError(f"device {name!r} is not there: torch finds no such GPU")
    return device


def load(
    path: Path,
    precision: Precision | None,
    device: str,
    *,
    dense: bool = False,
    tokenizer: bool = True,
) -> tuple[Any, Any]:
    """The model at `path` on a device, and its tokenizer; `dense` refuses quantized models."""
    target = find_device(device)
    from qkernels.models import loading

    with _noted(), progress_bar(f"loading {path}") as update:
        if dense:
            dtype = (precision or Precision.bf16).dtype
            model, encoder = loading.load_dense(path, dtype, tokenizer=tokenizer)
        else:
            stored = None if precision is None else precision.dtype
            model, encoder = loading.load_model_and_tokenizer(
                path, stored, tokenizer=tokenizer, progress=update
            )
    return model.to(target), encoder


def open_folder(
    path: Path, precision: Precision, device: str, *, tokenizer: bool
) -> tuple[DenseFolder, Any]:
    """The model at `path`, its weights left there, and its tokenizer."""
    target = find_device(device)
    from qkernels.models import loading

    with _noted():
        return loading.open_dense(path, precision.dtype, target, tokenizer=tokenizer)


@contextlib.contextmanager
def _noted() -> Iterator[None]:
    """Within, warnings of unused tensors become notes, when all is done."""
    from qkernels.checkpoints.dense_folder import UnusedTensorsWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnusedTensorsWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, UnusedTensorsWarning):
            note(f"note: {warning.message}")
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def quantize_with_bar(model: Any, scheme: qk.QuantScheme, **options: Any) -> qk.QuantizationReport:
    """`qkernels.quantize_model` with a progress bar."""
    import qkernels as qk

    method = options.pop("method", "rtn")
    with progress_bar(f"quantizing to {scheme}") as update:
        return qk.quantize_model(model, method, scheme, progress=update, **options)


def stream_with_bar(folder: DenseFolder, scheme: qk.QuantScheme, **options: Any) -> Streamed:
    """`streaming.stream` with a progress bar."""
    from qkernels.quantizers.streaming import stream

    with progress_bar(f"quantizing to {scheme}") as update:
        return stream(folder, options.pop("method"), scheme, progress=update, **options)


def check_file(path: Path) -> None:
    """Raises where a file that is written in the end could not be."""
    from qkernels.errors import QuantizationError

    parent = path.absolute().parent
    if not parent.is_dir():
        raise QuantizationError(f"the folder {parent} does not exist: make it")
    if path.is_dir():
        raise QuantizationError(f"{path} is a folder: name a file")
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise QuantizationError(f"{path} cannot be written to: name another file")


def check_takes_text(model: Any, remedy: str) -> None:
    """Raises QuantizationError for a model that takes more than the token ids of a text."""
    from qkernels.errors import QuantizationError

    if getattr(model.config, "is_encoder_decoder", False) or model.main_input_name != "input_ids":
        raise QuantizationError(f"a {type(model).__name__} takes more than a text: {remedy}")


def mebibytes(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"
