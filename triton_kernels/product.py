"""What the launchers of the products share: operands that fit, and the launches of a product."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .config import GemmConfig, GemvConfig
from .decode import DECODE
from .launch import Launch, ceil_div
from .operands import XOperand
from .planar import PlanarWeight, values_per_word
from .reduce import Ending, ending_of, sum_launch

FLOAT_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_FLOAT8_DECODE = {torch.float8_e4m3fn: "fp8e4m3", torch.float8_e5m2: "fp8e5m2"}


class Product(NamedTuple):
    """Operands of y = x @ w.T that fit each other, and `out` [M, N], where y goes.

    Attributes:
        x: [M, K] as the kernel reads it: float8 as bytes.
        x_decode: row of `DECODE` for float8 x, or None.
        compute: the type that the products are computed in.
    """

    x: Tensor
    weight: PlanarWeight
    ending: Ending
    out: Tensor
    compute: torch.dtype
    x_decode: str | None = None

    @property
    def m(self) -> int:
        """Rows of x."""
        return self.x.shape[0]


def float_product(
    x: Tensor,
    weight: PlanarWeight,
    bias: Tensor | None,
    x_scale: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Product:
    """The product of a float x and a weight, `out` not yet written.

    float8 x is read as bytes, since Triton refuses float8_e4m3fn below sm_89; its product is
    computed in the output type, which holds every float8 value exactly, and is bf16 unless given.

    Raises:
        ValueError: for operands that no weight-only kernel takes or that do not fit, with values.
    """
    if weight.words.dtype == torch.int8:
        raise ValueError("the words are int8, which only int8_gemm reads: pack them as uint8 codes")
    x_decode = _FLOAT8_DECODE.get(x.dtype)
    if x_decode is None and x.dtype not in FLOAT_TYPES:
        raise ValueError(
            f"x is {x.dtype}: weight-only products take fp16, bf16, fp32, float8_e4m3fn or "
            "float8_e5m2"
        )
    if x_decode is None:
        compute, out_dtype = x.dtype, out_dtype or x.dtype
    else:
        compute = out_dtype = out_dtype or torch.bfloat16
        x = x.view(torch.uint8)
    out = new_output(x, weight, bias, x_scale, out_dtype)
    return Product(x, weight, ending_of(x_scale, None, bias), out, compute, x_decode)


def new_output(
    x: Tensor,
    weight: PlanarWeight,
    bias: Tensor | None,
    x_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """An unwritten y [M, N] for x @ w.T + b.

    Raises:
        ValueError: where the operands do not fit, with their values.
    """
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
    return torch.empty((x.shape[0], weight.n), dtype=out_dtype, device=x.device)


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


def product_launches(
    kernel: Any,
    blocks: tuple[int, ...],
    product: Product,
    config: GemmConfig | GemvConfig,
    options: dict[str, Any],
    *,
    partials: torch.dtype = torch.float32,
    **constants: Any,
) -> list[Launch]:
    """The launches that compute a product: `kernel`, and the sum of its parts where K is split.

    Args:
        blocks: the grid, to which the parts of K are added as its last dimension.
        options: Triton's, beside num_warps.
        partials: the type in which a part of K is handed on.
        constants: arguments that this kernel alone has.
    """
    weight, out = product.weight, product.out
    plane = plane_of(weight, config)
    values = values_per_word(weight.bits)
    tile = plane * values
    tiles = ceil_div(weight.k, tile)
    tiles_per_split = ceil_div(tiles, config.split_k)
    split_k = ceil_div(tiles, tiles_per_split)
    target = out
    if split_k > 1:
        target = torch.empty((split_k, *out.shape), dtype=partials, device=out.device)
    arguments = {
        "x": x_operand(product),
        "weight": weight.operand,
        "ending": product.ending,
        "out_ptr": target,
        "M": product.m,
        "G": weight.groups,
        "tiles_per_split": tiles_per_split,
        "BITS": weight.bits,
        "VALUES": values,
        "PLANE": plane,
        "GROUPING": grouping(weight.group_size, tile, plane),
        "EVEN_K": weight.k % tile == 0,
        "SPLIT_K": split_k,
        "BLOCK_N": config.block_n,
        **constants,
    }
    options = {"num_warps": config.num_warps, **options}
    launches = [Launch(kernel, (*blocks, split_k), arguments, options)]
    if split_k > 1:
        launches.append(sum_launch(target, out, product.ending))
    return launches


def plane_of(weight: PlanarWeight, config: GemmConfig | GemvConfig) -> int:
    """Columns of K in a plane; with 8-bit weights, those of a step."""
    return config.block_k if weight.bits == 8 else weight.plane


def x_operand(product: Product) -> XOperand:
    """x as a kernel takes it."""
    x, decode = product.x, product.x_decode
    return XOperand(x, x.stride(0), x.stride(1), None if decode is None else DECODE[decode])


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


def fields_of_a_group(fields: int, plane: int, group_size: int) -> int:
    """The most successive fields of `fields` unrolled ones that always have one group in common.

    It divides `fields`, so that a kernel loads scales once for each run of as many.
    """
    return math.gcd(fields, group_size // plane) if group_size % plane == 0 else 1
