"""The table of checkpoint formats, and what is asked of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from qkernels.checkpoints.awq import AWQ_GEMM
from qkernels.checkpoints.awq_gemv import AWQ_FAST_ROW, AWQ_GEMV_ROW
from qkernels.checkpoints.bitsandbytes import BITSANDBYTES
from qkernels.checkpoints.compressed_tensors import COMPRESSED_TENSORS
from qkernels.checkpoints.config import Config, brief, quantization_of, read_config
from qkernels.checkpoints.format import Format, WeightKind
from qkernels.checkpoints.gguf import GGUF
from qkernels.checkpoints.gguf_file import gguf_file, has_quantized_tensors
from qkernels.checkpoints.gptq import GPTQ_1, GPTQ_2
from qkernels.checkpoints.hqq import HQQ
from qkernels.checkpoints.marlin import MARLIN_ROW
from qkernels.checkpoints.native import NATIVE
from qkernels.checkpoints.store import Store
from qkernels.checkpoints.torchao import TORCHAO
from qkernels.errors import CheckpointError
from qkernels.scheme import WEIGHT_TYPES, QuantScheme

FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        COMPRESSED_TENSORS,
        NATIVE,
        AWQ_GEMM,
        AWQ_GEMV_ROW,
        AWQ_FAST_ROW,
        GPTQ_1,
        GPTQ_2,
        MARLIN_ROW,
        BITSANDBYTES,
        HQQ,
        TORCHAO,
        GGUF,
    )
}
"""In the order in which `save_pretrained` takes the first that holds all layers."""


def find_format(config: Config, store: Store) -> Format:
    """The format of a model folder.

    Raises:
        CheckpointError: where no row of the table knows it.
    """
    for row in FORMATS.values():
        if row.detect(config, store):
            return row
    section = quantization_of(config)
    if section is None:
        raise CheckpointError(f"{store.folder / 'config.json'} has no quantization_config")
    raise CheckpointError(
        f"{store.folder} is in the format {brief(section.get('quant_method'))}; known are "
        f"{', '.join(FORMATS)}"
    )


def is_quantized(folder: str | Path) -> bool:
    """Whether `folder` holds a quantized model, of whatever format; False for what is no model."""
    try:
        file = gguf_file(folder)
        if file is not None:
            return has_quantized_tensors(file)
        config = read_config(folder)
        if quantization_of(config) is not None:
            return True
        store = Store(folder)
        return any(row.detect(config, store) for row in FORMATS.values())
    except CheckpointError:
        return False


def check_holds(format: str, weights: Mapping[str, WeightKind]) -> Format:
    """The row of `format`, which can be written and holds all weights, by their layers' names.

    Raises:
        CheckpointError: for a format that is unknown or only read, or a weight that it cannot hold,
            with the formats that can.
    """
    if format not in FORMATS:
        raise CheckpointError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    row = FORMATS[format]
    if not row.writes:
        able = ", ".join(name for name, other in FORMATS.items() if other.writes)
        raise CheckpointError(f"{format} is only read; formats that are written are {able}")
    for name, weight in weights.items():
        reason = row.why_not(weight)
        if reason is not None:
            able = ", ".join(_holding({name: weight})) or "none"
            raise CheckpointError(
                f"{name} is {weight.scheme}, and {format} {reason}; formats that hold it: {able}"
            )
    reason = row.why_not_all(weights)
    if reason is not None:
        able = ", ".join(_holding(weights)) or "none"
        raise CheckpointError(f"{format} {reason}; formats that hold them: {able}")
    return row


def first_holding(weights: Mapping[str, WeightKind]) -> str:
    """The name of the first format of the table that is written and holds all weights."""
    return _holding(weights)[0]


def check_scheme(format: str, scheme: QuantScheme, instead_of: str | None = None) -> None:
    """Raises CheckpointError where `format` cannot be written or holds no weights of `scheme`.

    Args:
        instead_of: see `WeightKind`.
    """
    kind = replace(WeightKind.of_scheme(scheme), instead_of=instead_of)
    check_holds(format, {"the weight": kind})


def _holding(weights: Mapping[str, WeightKind]) -> list[str]:
    rows = FORMATS.values()
    return [row.name for row in rows if row.writes and row.why_not_all(weights) is None]


def weight_types(row: Format) -> list[str]:
    """The weight types that a format holds under some scheme without extra levels or fields."""
    schemes = {name: QuantScheme(weight=weight) for name, weight in WEIGHT_TYPES.items()}
    return [
        name
        for name, scheme in schemes.items()
        if row.why_not(WeightKind.of_scheme(scheme)) is None
    ]
