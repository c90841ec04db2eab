"""The specializations of every kernel that `compile.py` compiles without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import triton.language as tl

from .config import choose_gemm_config, choose_gemv_config, unrolled_fields
from .decode import DECODE
from .int8_gemm import groups_per_plane, int8_gemm_kernel
from .launch import grouping
from .pack import pack_dense_kernel, pack_planar_kernel, unpack_dense_kernel, unpack_planar_kernel
from .planar import values_per_word
from .quantize_rows import quantize_rows_kernel
from .reduce import sum_partials_kernel
from .weight_only_gemm import weight_only_gemm_kernel
from .weight_only_gemv import weight_only_gemv_kernel

_FLOATS = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}
_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
_N, _K = 4096, 4096
_SM_COUNT = 132


@dataclass(frozen=True)
class Specialization:
    """One kernel with its types, constants and options, as a launch would fix them.

    `types` gives each run-time argument its Triton type; arguments in neither `types` nor
    `constants` are pointers that are None. `aligned` names those divisible by 16.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: frozenset[str] = frozenset()
    options: dict[str, Any] = field(default_factory=dict)


def specializations(capability: int) -> Iterator[Specialization]:
    """Every kernel over its decodes, types, scale modes, groupings and alignments.

    Not the full product, which has thousands: each value of each axis appears, and the schedules
    are those the heuristic chooses on `capability`.
    """
    for decode, bits in _CODES:
        for x_type in ("fp16", "bf16"):
            yield _gemm(capability, decode, bits, x_type, m=16)
        yield _gemm(capability, decode, bits, "bf16", m=512, group_size=64)
        yield _gemv(capability, decode, bits, "bf16")
    for decode, bits in (("unsigned", 3), ("codebook", 4), ("fp8e4m3", 8)):
        yield _gemm(capability, decode, bits, "fp32", m=16)
        yield _gemv(capability, decode, bits, "fp16", group_size=24, aligned=False)
    for m in (1, 32, 64, 128, 4096):
        yield _gemm(capability, "unsigned", 4, "fp16", m=m)
    for plane in (16, 64):
        yield _gemm(capability, "unsigned", 2, "bf16", m=256, plane=plane)
    for group_size in (0, 24, 32, 512):
        yield _gemm(capability, "unsigned", 4, "bf16", m=16, group_size=group_size, aligned=False)
        yield _gemv(capability, "unsigned", 4, "bf16", group_size=group_size)
    for scale_mode in ("two_level", "nested"):
        yield _gemm(capability, "codebook", 4, "bf16", m=16, scale_mode=scale_mode)
        yield _gemv(capability, "codebook", 4, "bf16", scale_mode=scale_mode)
    for x_decode in ("fp8e4m3", "fp8e5m2"):
        yield _gemm(capability, "fp8e4m3", 8, "bf16", m=64, x_decode=x_decode)
        yield _gemv(capability, "fp8e4m3", 8, "bf16", x_decode=x_decode)
    for bits in (2, 3, 4, 8):
        for ending, group_size in (("channel", 0), ("two_level", 128), ("group", 512)):
            if bits != 8 or ending != "two_level":
                yield _int8(capability, bits, ending, m=64, group_size=group_size)
        yield _int8(capability, bits, "group", m=16, group_size=24, aligned=False)
    for m in (16, 1024):
        yield _int8(capability, 4, "group", m=m, group_size=64)
        yield _int8(capability, 8, "channel", m=m, group_size=0)
    for out_type in _FLOATS:
        yield _sum("fp32", out_type)
    yield _sum("i32", "bf16")
    for format_name, code, largest in (("int8", "i8", 127.0), ("fp8e4m3", "u8", 448.0)):
        for one_block in (True, False):
            yield _quantize(format_name, "bf16", code, largest, one_block)
    yield _quantize("fp8e5m2", "fp32", "u8", 57344.0, True)
    for bits in (2, 3, 4):
        yield from _packs(bits)
    yield from _dense_packs(8)


def sample(capability: int) -> list[Specialization]:
    """A few specializations that use every instruction the others do, for a quick check."""
    return [
        _gemm(capability, "unsigned", 4, "bf16", m=16),
        _gemm(capability, "fp8e4m3", 8, "fp16", m=512),
        _gemv(capability, "codebook", 4, "bf16"),
        _int8(capability, 4, "group", m=64, group_size=64),
        _int8(capability, 8, "channel", m=1024, group_size=0),
        _quantize("fp8e4m3", "bf16", "u8", 448.0, True),
    ]


_CODES = (
    ("unsigned", 2),
    ("unsigned", 3),
    ("unsigned", 4),
    ("unsigned", 8),
    ("signed", 4),
    ("codebook", 4),
    ("fp8e4m3", 8),
    ("fp8e5m2", 8),
)

_INTEGERS = ("M", "N", "K", "G", "group_size", "stride_xm", "tiles_per_split")


def _weight_parts(
    bits: int, group_size: int, decode: str, scale_mode: str, plane: int, aligned: bool
) -> tuple[dict[str, str], dict[str, Any]]:
    types = {
        "words_ptr": "*i32" if bits != 8 else "*u8",
        "scales_ptr": "*fp16" if scale_mode == "float" else "*u8",
    }
    if decode == "unsigned":
        types["zeros_ptr"] = "*u8"
    if decode == "codebook":
        types["codebook_ptr"] = "*fp32"
    if scale_mode == "two_level":
        types["channel_scales_ptr"] = "*fp32"
    if scale_mode == "nested":
        for name in ("nested_table_ptr", "nested_absmax_ptr", "nested_offset_ptr"):
            types[name] = "*fp32"
    types.update(dict.fromkeys(_INTEGERS, "i32"), bias_ptr="*bf16", x_scale_ptr="*fp32")
    values = values_per_word(bits)
    constants = {
        "stride_xk": 1,
        "x_scale_stride": 1,
        "BITS": bits,
        "VALUES": values,
        "PLANE": plane,
        "GROUPING": grouping(group_size, values * plane, plane),
        "EVEN_K": aligned and _K % (values * plane) == 0,
    }
    return types, constants


def _aligned(types: dict[str, str], aligned: bool) -> frozenset[str]:
    # PyTorch aligns what it allocates; sizes and strides are aligned where the shape is.
    pointers = {name for name, kind in types.items() if kind.startswith("*")}
    return frozenset(pointers | ({"N", "K", "stride_xm"} if aligned else set()))


def _gemm(
    capability: int,
    decode: str,
    bits: int,
    x_type: str,
    *,
    m: int,
    group_size: int = 128,
    scale_mode: str = "float",
    plane: int = 32,
    aligned: bool = True,
    x_decode: str | None = None,
) -> Specialization:
    config = choose_gemm_config(
        *(m, _N, _K, bits, plane, divmod(capability, 10), _SM_COUNT),
        group_size=group_size,
        x_bytes=_BYTES[x_type],
    )
    plane = config.block_k if bits == 8 else plane
    types, constants = _weight_parts(bits, group_size, decode, scale_mode, plane, aligned)
    split = config.split_k > 1
    types |= {"x_ptr": "*u8" if x_decode else f"*{x_type}"}
    types["out_ptr"] = "*fp32" if split else f"*{x_type}"
    constants |= {
        "DECODE": DECODE[decode],
        "X_DECODE": DECODE[x_decode] if x_decode else None,
        "COMPUTE": _FLOATS[x_type],
        "SCALE_MODE": scale_mode,
        "UNROLL": unrolled_fields(config, bits, _BYTES[x_type], divmod(capability, 10)),
        "SPLIT_K": config.split_k,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "GROUP_M": config.group_m,
    }
    name = f"{decode}{bits} x {x_decode or x_type} m{m} g{group_size} p{plane} {scale_mode}"
    return Specialization(
        name + ("" if aligned else " unaligned"),
        weight_only_gemm_kernel,
        types,
        constants,
        _aligned(types, aligned),
        {
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": scale_mode != "nested",
        },
    )


def _gemv(
    capability: int,
    decode: str,
    bits: int,
    x_type: str,
    *,
    group_size: int = 128,
    scale_mode: str = "float",
    plane: int = 32,
    aligned: bool = True,
    x_decode: str | None = None,
) -> Specialization:
    config = choose_gemv_config(
        *(1, _N, _K, bits, plane, divmod(capability, 10), _SM_COUNT), group_size=group_size
    )
    plane = config.block_k if bits == 8 else plane
    types, constants = _weight_parts(bits, group_size, decode, scale_mode, plane, aligned)
    types |= {"x_ptr": "*u8" if x_decode else f"*{x_type}", "out_ptr": "*fp32"}
    constants |= {
        "DECODE": DECODE[decode],
        "X_DECODE": DECODE[x_decode] if x_decode else None,
        "SCALE_MODE": scale_mode,
        "SPLIT_K": config.split_k,
        "BLOCK_N": config.block_n,
    }
    name = f"{decode}{bits} x {x_decode or x_type} g{group_size} p{plane} {scale_mode}"
    return Specialization(
        name + ("" if aligned else " unaligned"),
        weight_only_gemv_kernel,
        types,
        constants,
        _aligned(types, aligned),
        {"num_warps": config.num_warps, "enable_fp_fusion": True},
    )


def _int8(
    capability: int, bits: int, ending: str, *, m: int, group_size: int, aligned: bool = True
) -> Specialization:
    config = choose_gemm_config(
        *(m, _N, _K, bits, 32, divmod(capability, 10), _SM_COUNT),
        group_size=group_size,
        x_bytes=1,
    )
    plane = config.block_k if bits == 8 else 32
    scale_mode = "two_level" if ending == "two_level" else "float"
    types, constants = _weight_parts(bits, group_size, "signed", scale_mode, plane, aligned)
    types["x_ptr"] = "*i8"
    if bits == 8:
        types["words_ptr"] = "*i8"
    if ending == "channel":
        types["channel_scales_ptr"] = "*fp32"
    partial = "*fp32" if ending == "group" else "*i32"
    types["out_ptr"] = partial if config.split_k > 1 else "*bf16"
    constants |= {
        "SIGNED": True,
        "EPILOGUE": ending,
        "GROUPS_PER_PLANE": groups_per_plane(plane, group_size),
        "SPLIT_K": config.split_k,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "GROUP_M": config.group_m,
    }
    return Specialization(
        f"int{bits} m{m} g{group_size} p{plane} {ending}" + ("" if aligned else " unaligned"),
        int8_gemm_kernel,
        types,
        constants,
        _aligned(types, aligned),
        {
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": True,
        },
    )


def _sum(partial: str, out_type: str) -> Specialization:
    types = {
        "partials_ptr": f"*{partial}",
        "x_scale_ptr": "*fp32",
        "bias_ptr": "*bf16",
        "out_ptr": f"*{out_type}",
        "M": "i32",
        "N": "i32",
    }
    if partial == "i32":
        types["w_scale_ptr"] = "*fp32"
    constants = {"x_scale_stride": 1, "SPLIT_K": 4, "BLOCK": 512}
    name = f"{partial} to {out_type}"
    return Specialization(name, sum_partials_kernel, types, constants, _aligned(types, True))


def _quantize(
    format_name: str, x_type: str, code: str, largest: float, one_block: bool
) -> Specialization:
    types = {"x_ptr": f"*{x_type}", "q_ptr": f"*{code}", "s_ptr": "*fp32"}
    types |= {"M": "i32", "K": "i32", "stride_xm": "i32"}
    constants = {
        "stride_xk": 1,
        "FORMAT": format_name,
        "LARGEST": largest,
        "ONE_BLOCK": one_block,
        "BLOCK": 4096 if one_block else 8192,
    }
    name = f"{x_type} to {format_name} " + ("one block" if one_block else "two passes")
    return Specialization(
        name,
        quantize_rows_kernel,
        types,
        constants,
        _aligned(types, True),
        {"num_warps": 8, "enable_fp_fusion": False},
    )


def _packs(bits: int) -> Iterator[Specialization]:
    types = {"words_ptr": "*i32", "codes_ptr": "*u8", "N": "i32", "K": "i32"}
    constants = {"BITS": bits, "VALUES": values_per_word(bits), "PLANE": 32, "BLOCK_N": 128}
    for kernel in (pack_planar_kernel, unpack_planar_kernel):
        yield Specialization(f"{bits} bits", kernel, types, constants, _aligned(types, True))
    yield from _dense_packs(bits)


def _dense_packs(bits: int) -> Iterator[Specialization]:
    types = {"words_ptr": "*i32", "codes_ptr": "*u8", "R": "i32", "K": "i32", "W": "i32"}
    for kernel, block in ((pack_dense_kernel, "BLOCK_W"), (unpack_dense_kernel, "BLOCK_K")):
        constants = {"BITS": bits, "BLOCK_R": 8, block: 128}
        yield Specialization(f"{bits} bits", kernel, types, constants, _aligned(types, True))
