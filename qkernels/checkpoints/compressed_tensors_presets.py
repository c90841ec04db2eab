"""Config groups by name: what compressed-tensors understands by "W4A16": ["Linear"].

A preset is spelled as a group of config.json would spell it. Source: the compressed-tensors package
(Neural Magic, Apache-2.0), read as documentation.
"""

from __future__ import annotations

from typing import Any

_UINT8, _FP8 = "torch.uint8", "torch.float8_e4m3fn"


def _arguments(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}


def _inputs(bits: int, kind: str, strategy: str = "token", **more: Any) -> dict[str, Any]:
    return _arguments(bits, kind, strategy, **{"dynamic": True, **more})


def _groups(bits: int, **more: Any) -> dict[str, Any]:
    return _arguments(bits, "int", "group", group_size=128, **more)


def _micro(bits: int) -> dict[str, Any]:
    """Floating numbers in groups of 32 that share a power of two."""
    return _arguments(bits, "float", "group", group_size=32, scale_dtype=_UINT8)


def _preset(
    weights: dict[str, Any] | None, inputs: dict[str, Any] | None = None
) -> dict[str, dict[str, Any] | None]:
    return {"weights": weights, "input_activations": inputs}


_NVFP4 = _arguments(4, "float", "tensor_group", group_size=16, scale_dtype=_FP8)
_NVFP4_INPUTS = _inputs(4, "float", "tensor_group", group_size=16, dynamic="local")
_FP8_BLOCK = _arguments(8, "float", "block", block_structure=[128, 128])
_INT8 = _preset(_arguments(8, "int", "channel"), _inputs(8, "int"))

PRESETS: dict[str, dict[str, dict[str, Any] | None]] = {
    "UNQUANTIZED": _preset(None),
    "W8A8": _INT8,
    "INT8": _INT8,
    "W4A16_ASYM": _preset(_groups(4, symmetric=False)),
    "W4AFP8": _preset(_groups(4), _inputs(8, "float")),
    "FP8": _preset(_arguments(8, "float", "tensor"), _inputs(8, "float", "tensor", dynamic=False)),
    "FP8_DYNAMIC": _preset(_arguments(8, "float", "channel"), _inputs(8, "float")),
    "FP8_BLOCK": _preset(_FP8_BLOCK, _inputs(8, "float", "group", group_size=128)),
    "NVFP4A16": _preset(_NVFP4),
    "NVFP4": _preset(_NVFP4, _NVFP4_INPUTS),
    "MXFP4A16": _preset(_micro(4)),
    "MXFP4": _preset(_micro(4), _inputs(4, "float", "group", group_size=32)),
    "MXFP4XFP8": _preset(_micro(4), _inputs(8, "float", "group", group_size=128)),
    "MXFP6A16": _preset(_micro(6)),
    "MXFP6A8": _preset(_micro(6), _inputs(8, "float", "group", group_size=32)),
    "MXFP8A16": _preset(_micro(8)),
    "MXFP8": _preset(_micro(8), _inputs(8, "float", "group", group_size=32)),
    **{f"W{bits}A16": _preset(_groups(bits)) for bits in range(2, 9)},
    **{f"W{bits}A8": _preset(_groups(bits), _inputs(8, "int")) for bits in range(2, 8)},
    **{f"W{bits}A4": _preset(_groups(bits), _inputs(4, "int")) for bits in range(2, 5)},
}
"""By name, in capitals."""
