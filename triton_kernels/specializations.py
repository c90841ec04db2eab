"""The specializations of every kernel that `compile.py` compiles without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import Problem, choose_gemm_config, choose_gemv_config, problem_of
from .decode import CODE_BITS
from .int8_gemm import int8_launches, int8_product
from .launch import Launch
from .operands import NESTED_BLOCK
from .pack import (
    dense_launch,
    pack_dense_kernel,
    pack_planar_kernel,
    planar_launch,
    unpack_dense_kernel,
    unpack_planar_kernel,
)
from .planar import PlanarWeight, word_rows
from .product import Product, float_product
from .quantize_rows import KINDS, Rows, quantize_launch
from .reduce import ending_of, sum_launch
from .weight_only_gemm import gemm_launches
from .weight_only_gemv import gemv_launches

_N, _K = 4096, 4096
_SM_COUNT = 132

_FP16, _BF16, _FP32 = torch.float16, torch.bfloat16, torch.float32
_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Specialization:
    """A launch, on tensors of the meta device, that stands for all that share its compiled code."""

    name: str
    launch: Launch


def specializations(capability: int) -> Iterator[Specialization]:
    """Every kernel over its decodes, types, scale modes, groupings and alignments.

    Not the full product, which has thousands: each value of each axis appears, and the schedules
    are those the heuristic chooses on `capability`.
    """
    for decode, bits in _CODES:
        for x_type in (_FP16, _BF16):
            yield _gemm(capability, decode, bits, x_type, m=16)
        yield _gemm(capability, decode, bits, _BF16, m=512, group_size=64)
        yield _gemv(capability, decode, bits, _BF16)
    for decode, bits in (("unsigned", 3), ("codebook", 1), ("codebook", 4), ("fp8e4m3", 8)):
        yield _gemm(capability, decode, bits, _FP32, m=16)
        yield _gemv(capability, decode, bits, _FP16, group_size=24, aligned=False)
    for m in (1, 32, 64, 128, 4096):
        yield _gemm(capability, "unsigned", 4, _FP16, m=m)
    for bits in (1, 2, 3):
        yield _gemm(capability, "codebook", bits, _BF16, m=64)
        yield _gemv(capability, "codebook", bits, _BF16)
    for plane in (16, 64):
        yield _gemm(capability, "codebook", 1, _BF16, m=16, plane=plane)
        yield _gemm(capability, "unsigned", 2, _BF16, m=256, plane=plane)
    for group_size in (0, 24, 32, 512):
        yield _gemm(capability, "unsigned", 4, _BF16, m=16, group_size=group_size, aligned=False)
        yield _gemv(capability, "unsigned", 4, _BF16, group_size=group_size)
    for scale_mode in ("two_level", "nested"):
        yield _gemm(capability, "codebook", 4, _BF16, m=16, scale_mode=scale_mode)
        yield _gemv(capability, "codebook", 4, _BF16, scale_mode=scale_mode)
    for x_type in (_E4M3, _E5M2):
        yield _gemm(capability, "fp8e4m3", 8, x_type, m=64)
        yield _gemv(capability, "fp8e4m3", 8, x_type)
    for bits in CODE_BITS["signed"]:
        for ending, group_size in (("channel", 0), ("two_level", 128), ("group", 512)):
            if bits != 8 or ending != "two_level":
                yield _int8(capability, bits, ending, m=64, group_size=group_size)
        yield _int8(capability, bits, "group", m=16, group_size=24, aligned=False)
    for m in (16, 1024):
        yield _int8(capability, 4, "group", m=m, group_size=64)
        yield _int8(capability, 8, "channel", m=m, group_size=0)
    for out_type in (_FP16, _BF16, _FP32):
        yield _sum(_FP32, out_type)
    yield _sum(torch.int32, _BF16)
    for k in (4096, 16384):
        yield _quantize(torch.int8, _BF16, k)
        yield _quantize(_E4M3, _BF16, k)
        yield _quantize(torch.int8, _BF16, k, has_zeros=True)
        for kind in KINDS[1:]:
            yield _quantize(torch.int8, _BF16, k, kind=kind, rounds=True)
    yield _quantize(_E5M2, _FP32, 4096)
    yield _quantize(torch.int8, _FP16, 4096, kind="layer_norm", has_zeros=True)
    for bits in (1, 2, 3, 4):
        yield from _packs(bits)
    yield from _dense_packs(8)


def sample(capability: int) -> list[Specialization]:
    """A few specializations that use every instruction the others do, for a quick check."""
    return [
        _gemm(capability, "unsigned", 4, _BF16, m=16),
        _gemm(capability, "fp8e4m3", 8, _FP16, m=512),
        _gemv(capability, "codebook", 4, _BF16),
        _int8(capability, 4, "group", m=64, group_size=64),
        _int8(capability, 8, "channel", m=1024, group_size=0),
        _quantize(_E4M3, _BF16, 4096),
        _quantize(torch.int8, _BF16, 4096, kind="layer_norm", has_zeros=True, rounds=True),
        _quantize(torch.int8, _BF16, 4096, kind="gelu_mul"),
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


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _weight(
    decode: str,
    bits: int,
    group_size: int,
    scale_mode: str,
    plane: int,
    aligned: bool,
    words: torch.dtype,
) -> PlanarWeight:
    # What PyTorch allocates is aligned; sizes and strides are where the shape is.
    n, k = (_N, _K) if aligned else (_N + 1, _K + 1)
    groups = -(-k // group_size) if group_size else 1
    parts: dict[str, Any] = {}
    if decode == "codebook":
        parts["codebook"] = _empty(1 << bits, dtype=_FP32)
    if scale_mode == "two_level":
        parts["channel_scales"] = _empty(n, dtype=_FP32)
    if scale_mode == "nested":
        blocks = -(-n * groups // NESTED_BLOCK)
        parts["nested"] = tuple(_empty(size, dtype=_FP32) for size in (256, blocks, 1))
    return PlanarWeight(
        words=_empty(word_rows(k, bits, plane), n, dtype=words),
        scales=_empty(groups, n, dtype=_FP16 if scale_mode == "float" else torch.uint8),
        zeros=_empty(groups, n, dtype=torch.uint8) if decode == "unsigned" else None,
        n=n,
        k=k,
        bits=bits,
        plane=plane,
        group_size=group_size,
        decode=decode,
        **parts,
    )


def _float(
    decode: str,
    bits: int,
    x_type: torch.dtype,
    *,
    m: int,
    group_size: int = 128,
    scale_mode: str = "float",
    plane: int = 32,
    aligned: bool = True,
) -> tuple[str, Product]:
    words = torch.int32 if bits != 8 else torch.uint8
    weight = _weight(decode, bits, group_size, scale_mode, plane, aligned, words)
    x, x_scale = _empty(m, weight.k, dtype=x_type), _empty(m, dtype=_FP32)
    product = float_product(x, weight, _empty(weight.n, dtype=_BF16), x_scale, None)
    name = f"{decode}{bits} x {_name(x_type)} m{m} g{group_size} p{plane} {scale_mode}"
    return name + ("" if aligned else " unaligned"), product


def _gemm(
    capability: int, decode: str, bits: int, x_type: torch.dtype, *, m: int, **options: Any
) -> Specialization:
    name, product = _float(decode, bits, x_type, m=m, **options)
    problem = _problem(capability, product, product.compute.itemsize)
    config = choose_gemm_config(problem)
    return Specialization(name, gemm_launches(product, config, problem.capability)[0])


def _gemv(
    capability: int, decode: str, bits: int, x_type: torch.dtype, **options: Any
) -> Specialization:
    name, product = _float(decode, bits, x_type, m=1, **options)
    config = choose_gemv_config(_problem(capability, product))
    return Specialization(name, gemv_launches(product, config)[0])


def _int8(
    capability: int, bits: int, ending: str, *, m: int, group_size: int, aligned: bool = True
) -> Specialization:
    scale_mode = "two_level" if ending == "two_level" else "float"
    words = torch.int32 if bits != 8 else torch.int8
    weight = _weight("signed", bits, group_size, scale_mode, 32, aligned, words)
    xq, x_scale = _empty(m, weight.k, dtype=torch.int8), _empty(m, dtype=_FP32)
    product = int8_product(xq, x_scale, weight, _empty(weight.n, dtype=_BF16), _BF16)
    problem = _problem(capability, product, 1)
    config = choose_gemm_config(problem)
    name = f"int{bits} m{m} g{group_size} {ending}" + ("" if aligned else " unaligned")
    return Specialization(name, int8_launches(product, config, problem.capability)[0])


def _problem(capability: int, product: Product, x_bytes: int = 2) -> Problem:
    gpu = (divmod(capability, 10), _SM_COUNT)
    return problem_of(product.m, product.weight, x_bytes, *gpu)


def _sum(partial: torch.dtype, out_type: torch.dtype) -> Specialization:
    # Integer sums are yet to be scaled by the channel.
    w_scale = _empty(_N, dtype=_FP32) if partial == torch.int32 else None
    ending = ending_of(_empty(16, dtype=_FP32), w_scale, _empty(_N, dtype=_BF16))
    partials, out = _empty(4, 16, _N, dtype=partial), _empty(16, _N, dtype=out_type)
    name = f"{_name(partial)} to {_name(out_type)}"
    return Specialization(name, sum_launch(partials, out, ending))


def _quantize(
    dtype: torch.dtype,
    x_type: torch.dtype,
    k: int,
    *,
    kind: str = "plain",
    has_zeros: bool = False,
    rounds: bool = False,
) -> Specialization:
    def rows(of: torch.dtype) -> Tensor:
        return _empty(16, k, dtype=of)

    is_norm = kind in ("rms_norm", "layer_norm")
    gain = _empty(k, dtype=x_type) if is_norm else None
    bias = _empty(k, dtype=x_type) if kind == "layer_norm" else None
    outputs = Rows(
        rows(torch.int8 if dtype == torch.int8 else torch.uint8),
        _empty(16, dtype=_FP32),
        _empty(16, dtype=torch.int32) if has_zeros else None,
        rows(x_type) if is_norm else None,
        rows(x_type) if rounds else None,
    )
    x, other = rows(x_type), None if kind == "plain" else rows(x_type)
    launch = quantize_launch(x, kind, dtype, other, (gain, bias), 1e-6, None, outputs)
    name = f"{kind} {_name(x_type)} to {_name(dtype)} k{k}"
    name += " zeros" * has_zeros + " rounded" * rounds
    return Specialization(name, launch)


def _packs(bits: int) -> Iterator[Specialization]:
    words = _empty(word_rows(_K, bits, 32), _N, dtype=torch.int32)
    codes = _empty(_N, _K, dtype=torch.uint8)
    for kernel in (pack_planar_kernel, unpack_planar_kernel):
        yield Specialization(f"{bits} bits", planar_launch(kernel, words, codes, bits, 32))
    yield from _dense_packs(bits)


def _dense_packs(bits: int) -> Iterator[Specialization]:
    words = _empty(_N, _K * bits // 32, dtype=torch.int32)
    codes = _empty(_N, _K, dtype=torch.uint8)
    for kernel in (pack_dense_kernel, unpack_dense_kernel):
        yield Specialization(f"{bits} bits", dense_launch(kernel, words, codes, bits))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
