"""What the launchers share: checks of x and its companions, and a weight as kernel arguments."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .decode import DECODE
from .planar import PlanarWeight, values_per_word

FLOAT_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
FLOAT8_DECODE = {torch.float8_e4m3fn: "fp8e4m3", torch.float8_e5m2: "fp8e5m2"}


@lru_cache(maxsize=64)
def device_facts(device: torch.device) -> tuple[str, tuple[int, int], int]:
    """(name, compute capability, multiprocessors); a CPU counts as one of capability 8.0."""
    if device.type != "cuda":
        return device.type, (8, 0), 1
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    return properties.name, capability, properties.multi_processor_count


def check_product(
    x: Tensor,
    weight: PlanarWeight,
    bias: Tensor | None,
    x_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Raises ValueError, naming the values, where the operands of x @ w.T + b do not fit."""
    if x.dim() != 2 or x.shape[1] != weight.k:
        raise ValueError(f"x has shape {list(x.shape)}, expected [M, {weight.k}]")
    if out_dtype not in FLOAT_TYPES:
        raise ValueError(f"out_dtype {out_dtype} is not one of fp16, bf16, fp32")
    if x.device != weight.words.device:
        raise ValueError(f"x is on {x.device}, the weight is on {weight.words.device}")
    if bias is not None:
        _check_vector("bias", bias, (weight.n,), tuple(FLOAT_TYPES), x.device)
    if x_scale is not None:
        _check_vector("x_scale", x_scale, (x.shape[0], 1), (torch.float32,), x.device)


def _check_vector(
    name: str,
    tensor: Tensor,
    lengths: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    if tensor.dim() != 1 or tensor.shape[0] not in lengths:
        expected = " or ".join(f"[{length}]" for length in lengths)
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {expected}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, x is on {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has stride {tensor.stride(0)}: make it contiguous")


def float_operand(
    x: Tensor, out_dtype: torch.dtype | None
) -> tuple[Tensor, str | None, torch.dtype]:
    """(x as a kernel reads it, decode name of float8 x or None, output type).

    float8 x is read as bytes, since Triton refuses float8_e4m3fn below sm_89; its product is
    computed in the output type, which holds every float8 value exactly, and is bf16 unless given.

    Raises:
        ValueError: for a type of x that no weight-only kernel takes.
    """
    if x.dtype in FLOAT8_DECODE:
        return x.view(torch.uint8), FLOAT8_DECODE[x.dtype], out_dtype or torch.bfloat16
    if x.dtype not in FLOAT_TYPES:
        raise ValueError(
            f"x is {x.dtype}: weight-only products take fp16, bf16, fp32, float8_e4m3fn or "
            "float8_e5m2"
        )
    return x, None, out_dtype or x.dtype


def check_weight_only(weight: PlanarWeight) -> None:
    """Raises ValueError for the words of an int8 product, whose codes are shifted."""
    if weight.words.dtype == torch.int8:
        raise ValueError("the words are int8, which only int8_gemm reads: pack them as uint8 codes")


def weight_arguments(weight: PlanarWeight, tile: int, plane: int) -> dict[str, Any]:
    """Kernel arguments that describe `weight` to a kernel with K tiles of `tile` = V * `plane`."""
    table, absmax, offset = weight.nested if weight.nested is not None else (None, None, None)
    return {
        "words_ptr": weight.words,
        "scales_ptr": weight.scales,
        "zeros_ptr": weight.zeros,
        "codebook_ptr": weight.codebook,
        "channel_scales_ptr": weight.channel_scales,
        "nested_table_ptr": table,
        "nested_absmax_ptr": absmax,
        "nested_offset_ptr": offset,
        "N": weight.n,
        "K": weight.k,
        "G": weight.groups,
        "group_size": weight.group_size,
        "DECODE": DECODE[weight.decode],
        "BITS": weight.bits,
        "VALUES": values_per_word(weight.bits),
        "PLANE": plane,
        "GROUPING": grouping(weight.group_size, tile, plane),
        "SCALE_MODE": weight.scale_mode,
        "EVEN_K": weight.k % tile == 0,
    }


def grouping(group_size: int, tile: int, plane: int) -> str:
    """How groups lie on the tiles of K: what one vector of scales covers.

    "channel": everything; "tile": one word tile (V planes); "plane": one plane; "element": a plane
    crosses groups, so that scales are gathered per element.
    """
    if group_size == 0:
        return "channel"
    if group_size % tile == 0:
        return "tile"
    return "plane" if group_size % plane == 0 else "element"
