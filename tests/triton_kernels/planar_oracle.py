"""What the tests of the Triton kernels share: weights with their dense values, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels.triton_kernels import PlanarWeight

_FLOAT8 = {"fp8e4m3": torch.float8_e4m3fn, "fp8e5m2": torch.float8_e5m2}
_GUARD = 256  # bytes before and after each output
_GUARD_BYTE = 0xA5


@dataclass(frozen=True)
class Case:
    """A weight to test with; `zeros` is None or the dtype of the zero points."""

    decode: str
    bits: int
    plane: int
    group_size: int
    n: int
    k: int
    zeros: torch.dtype | None = None
    scale_dtype: torch.dtype = torch.float16
    scale_mode: str = "float"

    def __str__(self) -> str:
        zeros = "" if self.zeros is None else "-z" + str(self.zeros).removeprefix("torch.")
        return (
            f"{self.decode}{self.bits}-p{self.plane}-g{self.group_size}-{self.n}x{self.k}"
            f"-{self.scale_mode}{zeros}"
        )


@dataclass(frozen=True)
class Weight:
    """A packed weight and the fp32 values [N, K] it stands for."""

    planar: PlanarWeight
    dense: Tensor
    integers: Tensor  # int64 [N, K]: value - zero, before any scale; zeros where not linear


def pack_words(codes: Tensor, bits: int, plane: int) -> Tensor:
    """uint8 [N, K] -> planar words by the formula of the layout, a value at a time."""
    if bits == 8:
        return codes.t().contiguous()
    n, k = codes.shape
    values = 32 // bits
    tiles = -(-k // (values * plane))
    padded = torch.zeros(n, tiles * values * plane, dtype=torch.int64, device=codes.device)
    padded[:, :k] = codes
    fields = padded.view(n, tiles, values, plane).permute(1, 3, 0, 2)  # tile, row, n, field
    shifts = torch.arange(values, device=codes.device) * bits
    words = (fields << shifts).sum(-1).reshape(tiles * plane, n)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


def make_weight(case: Case, device: torch.device, *, int8: bool = False, seed: int = 0) -> Weight:
    """A random weight; with `int8`, 8-bit words are shifted and two-level products fit int8."""
    generator = torch.Generator().manual_seed(seed)
    n, k, bits = case.n, case.k, case.bits
    groups = -(-k // case.group_size) if case.group_size else 1
    group = torch.arange(k) // case.group_size if case.group_size else torch.zeros(k).long()

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    codes = integers(0, 1 << bits, n, k).to(torch.uint8)
    codebook = None
    if case.decode == "codebook":
        codebook = torch.randn(1 << bits, generator=generator)
        value = codebook[codes.long()]
    elif case.decode in _FLOAT8:
        codes = torch.randn(n, k, generator=generator).to(_FLOAT8[case.decode]).view(torch.uint8)
        value = codes.view(_FLOAT8[case.decode]).float()
    else:
        value = codes.float() - (1 << (bits - 1) if case.decode == "signed" else 0)
    zeros = None
    if case.zeros == torch.uint8:
        zeros = integers(0, 1 << bits, groups, n).to(torch.uint8)
    elif case.zeros is not None:
        zeros = (torch.rand(groups, n, generator=generator) * (1 << bits)).to(case.zeros)
    if zeros is not None:
        value = value - zeros.float()[group].t()

    channel_scales, nested = None, None
    if case.scale_mode == "float":
        scales = (torch.rand(groups, n, generator=generator) * 0.1 + 0.01).to(case.scale_dtype)
        scale = scales.float()
    elif case.scale_mode == "two_level":
        scales = integers(1, 127 >> bits if int8 else 255, groups, n).to(torch.uint8)
        channel_scales = torch.rand(n, generator=generator) * 1e-3 + 1e-4
        scale = scales.float() * channel_scales
    else:
        scales = integers(0, 256, groups, n).to(torch.uint8)
        table = torch.rand(256, generator=generator)
        absmax = torch.rand(-(-n * groups // 256), generator=generator) + 0.5
        offset = torch.tensor([0.037])
        flat = torch.arange(n)[None, :] * groups + torch.arange(groups)[:, None]
        scale = table[scales.long()] * absmax[flat // 256] + offset
        nested = tuple(part.to(device) for part in (table, absmax, offset))

    words = pack_words(codes, bits, case.plane)
    if int8 and bits == 8:
        words = (words.int() - 128).to(torch.int8)

    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    planar = PlanarWeight(
        words=words.to(device),
        scales=scales.to(device),
        zeros=move(zeros),
        n=n,
        k=k,
        bits=bits,
        plane=case.plane,
        group_size=case.group_size,
        decode=case.decode,
        codebook=move(codebook),
        channel_scales=move(channel_scales),
        nested=nested,
    )
    dense = (scale[group].t() * value).to(device)
    is_integer = case.decode in ("signed", "unsigned") and case.zeros in (None, torch.uint8)
    exact = value.long() if is_integer else torch.zeros(n, k, dtype=torch.int64)
    return Weight(planar, dense, exact.to(device))


def activations(
    m: int, k: int, dtype: torch.dtype, device: torch.device, *, outliers: bool = True
) -> Tensor:
    """Normal rows whose every 50th channel is 100 times larger, like those of language models."""
    generator = torch.Generator().manual_seed(m * 1000 + k)
    x = torch.randn(m, k, generator=generator)
    if outliers:
        x[:, ::50] *= 100
    return x.to(dtype).to(device)


def frobenius_error(y: Tensor, expected: Tensor) -> float:
    """|y - expected| / |expected|, in float64; NaN and infinity in y give NaN or infinity."""
    return ((y.double() - expected).norm() / expected.norm()).item()


@contextmanager
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes `torch.empty` give NaN (ints: a pattern) with guards around it, checked at the end."""
    real_empty: Callable[..., Tensor] = torch.empty
    buffers: list[Tensor] = []

    def empty(size: Any, *, dtype: torch.dtype, device: Any) -> Tensor:
        shape = tuple(size)
        numel = int(torch.Size(shape).numel())
        length = numel * dtype.itemsize
        buffer = real_empty(length + 2 * _GUARD, dtype=torch.uint8, device=device)
        buffer.fill_(_GUARD_BYTE)
        buffers.append(buffer)
        out = buffer[_GUARD : _GUARD + length].view(dtype).view(shape)
        return out.fill_(float("nan")) if dtype.is_floating_point else out

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield
    assert buffers, "nothing was allocated while outputs were poisoned"
    for buffer in buffers:
        guards = torch.cat([buffer[:_GUARD], buffer[-_GUARD:]])
        assert (guards == _GUARD_BYTE).all(), "a kernel wrote outside its output"
