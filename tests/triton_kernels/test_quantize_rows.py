"""Quantization of rows: bit-equal to PyTorch, at every value, and honest about NaN and infinity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qkernels.triton_kernels import quantize_rows
from tests.triton_kernels.planar_oracle import poisoned_outputs

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
FORMATS = list(LARGEST)
FLOAT8 = FORMATS[1:]


def expected_rows(x: Tensor, dtype: torch.dtype, s: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition, in PyTorch, for finite x."""
    if s is None:
        s = x.float().abs().amax(1) / LARGEST[dtype]
        s = torch.where(s == 0, 1.0, s)
    v = (x.float() / s[:, None]).clamp(-LARGEST[dtype], LARGEST[dtype])
    return (v.round().to(torch.int8) if dtype == torch.int8 else v.to(dtype)), s


def rows(m: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of very different size; one all zero, one of outliers, one near the smallest normals."""
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(m, k, generator=generator)
    x[0] = 0
    x[1] *= torch.exp(4 * torch.randn(k, generator=generator))
    x[2, ::50] *= 100
    x[3] *= 1e-4
    return x.to(dtype).to(device)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("block", [None, 128], ids=["one-block", "two-passes"])
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_rows_are_those_of_pytorch(
    dtype: torch.dtype, x_dtype: torch.dtype, block: int | None, device: torch.device
) -> None:
    x = rows(9, 577, x_dtype, device)
    q, s = quantize_rows(x, dtype, block=block)
    expected, expected_s = expected_rows(x, dtype)
    assert same_bits(s, expected_s)
    assert same_bits(q, expected)


@pytest.mark.parametrize("k", [0, 1, 8192, 8193])
@pytest.mark.parametrize("m", [0, 1, 4])
def test_any_shape(m: int, k: int, device: torch.device) -> None:
    x = torch.linspace(-3, 5, m * k, device=device).reshape(m, k).half()
    q, s = quantize_rows(x, torch.int8)
    assert q.shape == (m, k)
    expected = expected_rows(x, torch.int8) if k else (q, torch.ones(m, device=device))
    assert same_bits(q, expected[0])
    assert same_bits(s, expected[1])


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_static_scale_saturates(dtype: torch.dtype, device: torch.device) -> None:
    x = rows(6, 300, torch.float32, device)
    scale = torch.tensor([0.75 / LARGEST[dtype]], device=device)
    q, s = quantize_rows(x, dtype, scale)
    expected, _ = expected_rows(x, dtype, scale.expand(6))
    assert same_bits(q, expected)
    assert (q.float().abs() == LARGEST[dtype]).any()
    assert torch.equal(s, scale.expand(6))


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_becomes_pytorchs_float8(
    x_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(x_dtype).reshape(16, -1).to(device)
    q, _ = quantize_rows(x, dtype, torch.ones(1, device=device))
    finite = x.isfinite()
    expected = x.float().clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)
    assert torch.equal(q.view(torch.uint8)[finite], expected.view(torch.uint8)[finite])
    assert not q.float()[~finite].isfinite().any()


def test_ties_go_to_even(device: torch.device) -> None:
    ties = torch.arange(-126, 126, device=device) + 0.5
    q, _ = quantize_rows(ties[None], torch.int8, torch.ones(1, device=device))
    assert torch.equal(q[0], ties.round().to(torch.int8))
    assert (q % 2 == 0).all()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_smallest_numbers_do_not_divide_by_zero(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.full((1, 20), 1e-45, device=device)
    q, s = quantize_rows(x, dtype)
    assert s.item() == 1
    assert (q.float() == 0).all()


@pytest.mark.parametrize("block", [None, 128], ids=["one-block", "two-passes"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_what_is_not_finite_shows_in_the_scale(
    dtype: torch.dtype, static: bool, bad: float, block: int | None, device: torch.device
) -> None:
    x = rows(6, 200, torch.float32, device)
    x[4, 150] = bad
    scale = torch.tensor(0.01, device=device) if static else None
    q, s = quantize_rows(x, dtype, scale, block=block)
    assert not s[4].isfinite()
    others = [0, 1, 2, 3, 5]
    assert s[others].isfinite().all()
    assert q[others].float().isfinite().all()
    if dtype == torch.int8:
        assert q[4, 150] == 0
    else:
        assert not q[4, 150].float().isfinite()


def test_any_strides(device: torch.device) -> None:
    x = rows(6, 200, torch.float16, device)
    expected, expected_s = quantize_rows(x, torch.int8)
    for view in (x.t().contiguous().t(), x.repeat_interleave(2, dim=1)[:, ::2]):
        assert not view.is_contiguous()
        q, s = quantize_rows(view, torch.int8)
        assert same_bits(q, expected)
        assert same_bits(s, expected_s)


@pytest.mark.parametrize("block", [None, 128], ids=["one-block", "two-passes"])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_writes_all_of_the_output_and_nothing_else(
    dtype: torch.dtype, block: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rows(5, 201, torch.float32, device)
    expected, expected_s = expected_rows(x, dtype)
    with poisoned_outputs(monkeypatch):
        q, s = quantize_rows(x, dtype, block=block)
    assert same_bits(q, expected)
    assert same_bits(s, expected_s)


def test_wrong_operands_are_named(device: torch.device) -> None:
    x = torch.zeros(2, 8, device=device)
    with pytest.raises(ValueError, match=r"cannot quantize to torch.int4: accepted are torch.int8"):
        quantize_rows(x, torch.int4)
    with pytest.raises(ValueError, match=r"x is fp16, bf16 or fp32 \[M, K\], got torch.int32"):
        quantize_rows(x.int(), torch.int8)
    with pytest.raises(ValueError, match=r"got torch.float32 \[8\]"):
        quantize_rows(x[0], torch.int8)
    with pytest.raises(ValueError, match=r"fp32 with one element, got torch.float32 \[2\]"):
        quantize_rows(x, torch.int8, torch.ones(2, device=device))
    with pytest.raises(ValueError, match=r"the scale is on meta"):
        quantize_rows(x, torch.int8, torch.ones(1, device="meta"))
