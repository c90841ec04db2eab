"""Quantization of rows: bit-equal to PyTorch, at every value, and honest about NaN and infinity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qkernels.triton_kernels import quantize_rows, quantize_rows_of
from qkernels.triton_kernels.quantize_rows import KINDS
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
    nan = x.isnan()
    expected = x.float().clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)
    assert torch.equal(q.view(torch.uint8)[~nan], expected.view(torch.uint8)[~nan])
    assert q.float()[nan].isnan().all()


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
    assert not static or s[4].isnan()
    got = q[4, 150].float()
    if static and bad == bad:
        assert got.abs() == LARGEST[dtype] and got.sign() == (1 if bad > 0 else -1)
    else:
        assert got == 0 if dtype == torch.int8 else got.isnan()


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


FUSED = KINDS[1:]
NORMS = ("rms_norm", "layer_norm")


def values_of(
    kind: str, x: Tensor, other: Tensor | None, gain: Tensor | None, bias: Tensor | None
) -> Tensor:
    """What is quantized, in float64; x + other is rounded first."""
    if kind not in NORMS:
        gate, up = x.double(), other.double()
        if kind == "silu_mul":
            return torch.nn.functional.silu(gate) * up
        form = "tanh" if "tanh" in kind else "none"
        return torch.nn.functional.gelu(gate, approximate=form) * up
    v = (x if other is None else x + other).double()
    v = v - v.mean(1, keepdim=True) if kind == "layer_norm" else v
    v = v / (v.square().mean(1, keepdim=True) + 1e-5).sqrt()
    v = v if gain is None else v * gain.double()
    return v if bias is None else v + bias.double()


def fused_operands(
    kind: str, dtype: torch.dtype, k: int, device: torch.device
) -> dict[str, Tensor]:
    other = torch.randn(5, k, device=device).to(dtype)
    gain, bias = torch.rand(2, k, device=device)
    operands = {"other": other}
    if kind in NORMS:
        operands["gain"] = gain.to(dtype)
    if kind == "layer_norm":
        operands["bias"] = bias
    return operands


@pytest.mark.parametrize("block", [None, 128], ids=["one-block", "passes"])
@pytest.mark.parametrize("rounds", [False, True], ids=["", "rounded"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", FUSED)
def test_fused_rows_are_what_they_say(
    kind: str,
    dtype: torch.dtype,
    rounds: bool,
    block: int | None,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = rows(5, 301, dtype, device)
    operands = fused_operands(kind, dtype, 301, device)
    for leave in ((), ("gain", "bias"), ("other",)):
        given = {name: part for name, part in operands.items() if name not in leave}
        if kind not in NORMS and leave:
            continue
        with poisoned_outputs(monkeypatch):
            got = quantize_rows_of(
                *(x, kind, torch.int8), **given, epsilon=1e-5, rounds=rounds, block=block
            )
        parts = (given.get(name) for name in ("other", "gain", "bias"))
        exact = values_of(kind, x, *parts)
        tops = exact.abs().amax(1, keepdim=True)
        if rounds:
            slack = torch.finfo(dtype).eps / 2 * exact.abs() + 2**-20 * tops + 2**-25
            assert ((got.rounded.double() - exact).abs() <= slack).all()
            expected, expected_s = expected_rows(got.rounded, torch.int8)
            assert same_bits(got.scales, expected_s) and same_bits(got.codes, expected)
        else:
            assert got.rounded is None
            scale = torch.where(tops == 0, 1, tops / 127)
            assert torch.allclose(got.scales.double()[:, None], scale, rtol=1e-5, atol=0)
            apart = got.codes.double() - exact / got.scales.double()[:, None]
            assert apart.abs().max() <= 0.5 + 2**-9
        if kind in NORMS and "other" in given:
            assert same_bits(got.total, x + given["other"])
        else:
            assert got.total is None


@pytest.mark.parametrize("block", [None, 128], ids=["one-block", "passes"])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_points(kind: str, block: int | None, device: torch.device) -> None:
    x = rows(5, 301, torch.float32, device)
    x[4] = x[4].abs() + 1
    operands = fused_operands(kind, torch.float32, 301, device) if kind != "plain" else {}
    got = quantize_rows_of(
        *(x, kind, torch.int8), **operands, epsilon=1e-5, has_zeros=True, block=block
    )
    parts = (operands.get(name) for name in ("other", "gain", "bias"))
    exact = x.double() if kind == "plain" else values_of(kind, x, *parts)
    low, high = exact.amin(1).clamp(max=0), exact.amax(1).clamp(min=0)
    scale = torch.where(low == high, 1, (high - low) / 255)
    assert torch.allclose(got.scales.double(), scale, rtol=1e-5, atol=0)
    assert ((got.zeros - (-128 - low / scale)).abs() <= 0.5 + 2**-8).all()
    codes = (exact / got.scales[:, None]).clamp(-600, 600)
    codes = (codes + got.zeros[:, None]).clamp(-128, 127)
    assert (got.codes - codes).abs().max() <= 0.5 + 2**-7
    x[1, 7], x[2, 300] = float("nan"), float("inf")
    got = quantize_rows_of(
        *(x, kind, torch.int8), **operands, epsilon=1e-5, has_zeros=True, block=block
    )
    assert got.scales[[1, 2]].isnan().all() and got.scales[[0, 3, 4]].isfinite().all()
    assert not got.zeros[[1, 2]].any()


def test_wrong_operands_are_named(device: torch.device) -> None:
    x = torch.zeros(2, 8, device=device)
    for kind, operands, message in (
        ("square", {}, "kind is one of plain, rms_norm"),
        ("plain", {"other": x}, "plain takes no other rows"),
        ("plain", {"rounds": True}, "plain rows are not rounded"),
        ("silu_mul", {}, "silu_mul needs the rows that it multiplies"),
        ("silu_mul", {"other": x[:1]}, r"both inputs are alike, .* \[2, 8\] and .* \[1, 8\]"),
        ("silu_mul", {"other": x, "gain": x[0]}, "silu_mul takes no gain"),
        ("rms_norm", {"bias": x[0]}, "rms_norm takes no bias"),
        ("rms_norm", {"gain": x[0, :4]}, r"the gain is fp16, bf16 or fp32 \[8\], got .* \[4\]"),
        ("plain", {"has_zeros": True, "scale": x[0, :1]}, "zero points go with int8 and a scale"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_rows_of(x, kind, torch.int8, **operands)
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
