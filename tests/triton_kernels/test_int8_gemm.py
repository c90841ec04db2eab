"""The int8 GEMM: exact integer sums, and its three ways to scale them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qkernels.triton_kernels import GemmConfig, int8_gemm, quantize_rows
from tests.bounds import FROBENIUS_BOUND
from tests.triton_kernels.planar_oracle import (
    Case,
    activations,
    frobenius_error,
    make_weight,
    poisoned_outputs,
)

# Per channel, two-level, and groups that cover tiles (256 and more), planes, or cross planes.
CASES = (
    Case("unsigned", 4, 32, 64, 96, 576, torch.uint8),
    Case("signed", 4, 32, 0, 33, 300),
    Case("signed", 4, 64, 24, 70, 330),
    Case("unsigned", 4, 32, 24, 40, 200, torch.uint8, scale_mode="two_level"),
    Case("signed", 4, 32, 256, 20, 600, None, torch.float32),
    Case("signed", 4, 64, 128, 48, 576, scale_mode="two_level"),
    Case("signed", 3, 32, 0, 20, 330),
    Case("unsigned", 3, 32, 16, 17, 100, torch.uint8, torch.bfloat16),
    Case("signed", 2, 32, 64, 130, 160, scale_mode="two_level"),
    Case("unsigned", 2, 64, 96, 24, 700, torch.uint8),
    Case("signed", 8, 0, 0, 96, 576, None, torch.float32),
    Case("signed", 8, 0, 64, 19, 200),
    Case("signed", 8, 0, 40, 30, 130),
)
MAIN = CASES[0]
CONFIGS = (
    GemmConfig(block_m=16, block_n=64, block_k=32, split_k=1),
    GemmConfig(block_m=32, block_n=32, block_k=64, split_k=2, group_m=2),
)


@pytest.mark.parametrize("config", CONFIGS, ids=["split1", "split2"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_integer_sums_are_exact(case: Case, config: GemmConfig, device: torch.device) -> None:
    # Scales of powers of two, and sums under 2^24: then fp32 holds every step exactly.
    weight = make_weight(case, device, int8=True)
    powers = [0.5, 1.0, 2.0]
    rows = torch.arange(weight.planar.groups, device=device)
    columns = torch.arange(case.n, device=device)
    index = (rows[:, None] + columns[None, :]) % 3
    generator = torch.Generator().manual_seed(1)
    xq = torch.randint(-16, 17, (5, case.k), generator=generator, dtype=torch.int8).to(device)
    if case.scale_mode == "float":
        scales = torch.tensor(powers, device=device)[index].to(case.scale_dtype)
        planar = dataclasses.replace(weight.planar, scales=scales)
        per_group = scales.double()
    else:
        channel = torch.tensor(powers, device=device)[columns % 3]
        planar = dataclasses.replace(weight.planar, channel_scales=channel)
        per_group = planar.scales.double() * channel.double()
    group = torch.arange(case.k, device=device) // (case.group_size or case.k)
    dense = per_group[group].t() * weight.integers.double()
    x_scale = torch.tensor([1.0, 0.5, 2.0, 0.25, 4.0], device=device)
    y = int8_gemm(xq, x_scale, planar, out_dtype=torch.float32, config=config)
    expected = (xq.double() @ dense.t()) * x_scale.double()[:, None]
    assert expected.abs().max() * 8 < 2**24
    assert torch.equal(y.double(), expected)


@pytest.mark.parametrize("config", CONFIGS, ids=["split1", "split2"])
def test_extreme_sums_are_exact(config: GemmConfig, device: torch.device) -> None:
    case = dataclasses.replace(CASES[10], k=1000)
    weight = make_weight(case, device, int8=True).planar
    words = torch.where(torch.arange(case.n, device=device) % 2 == 0, 127, -128).to(torch.int8)
    weight = dataclasses.replace(
        weight,
        words=words.expand(case.k, -1).contiguous(),
        scales=torch.ones(1, case.n, device=device),
    )
    xq = torch.full((2, case.k), 127, dtype=torch.int8, device=device)
    xq[1] = -127
    x_scale = torch.ones(1, device=device)
    y = int8_gemm(xq, x_scale, weight, out_dtype=torch.float32, config=config)
    assert torch.equal(y.long(), xq.long() @ words.long().expand(case.k, -1))


@pytest.mark.parametrize("m", [0, 1, 3, 16, 17, 129])
def test_any_number_of_rows(m: int, device: torch.device) -> None:
    for case in (MAIN, CASES[10]):
        _check_product(case, m, torch.bfloat16, None, device)


@pytest.mark.parametrize("config", [None, CONFIGS[1]], ids=["chosen", "split2"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_close_to_float64(case: Case, config: GemmConfig | None, device: torch.device) -> None:
    dtype = (torch.float32, torch.float16, torch.bfloat16)[CASES.index(case) % 3]
    _check_product(case, 3, dtype, config, device)


def _check_product(
    case: Case, m: int, dtype: torch.dtype, config: GemmConfig | None, device: torch.device
) -> None:
    weight = make_weight(case, device, int8=True)
    xq, x_scale = quantize_rows(activations(m, case.k, torch.float32, device), torch.int8)
    bias = torch.linspace(-20, 20, case.n, device=device).to(torch.float16)
    y = int8_gemm(xq, x_scale, weight.planar, bias, out_dtype=dtype, config=config)
    assert y.shape == (m, case.n)
    assert y.dtype == dtype
    if m:
        x = x_scale.double()[:, None] * xq.double()
        expected = x @ weight.dense.double().t() + bias.double()
        assert frobenius_error(y, expected) <= FROBENIUS_BOUND[dtype]


@pytest.mark.parametrize("config", CONFIGS, ids=["split1", "split2"])
def test_same_bits_twice(config: GemmConfig, device: torch.device) -> None:
    weight = make_weight(MAIN, device).planar
    xq, x_scale = quantize_rows(activations(5, MAIN.k, torch.float32, device), torch.int8)
    first, second = (
        int8_gemm(xq, x_scale, weight, out_dtype=torch.float32, config=config) for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("config", CONFIGS, ids=["split1", "split2"])
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[12]], ids=str)
def test_writes_all_of_the_output_and_nothing_else(
    case: Case, config: GemmConfig, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    with poisoned_outputs(monkeypatch):
        _check_product(case, 3, torch.float32, config, device)


def test_any_strides_of_x(device: torch.device) -> None:
    case = CASES[2]
    weight = make_weight(case, device).planar
    xq, x_scale = quantize_rows(activations(4, case.k, torch.float32, device), torch.int8)
    expected = int8_gemm(xq, x_scale, weight, out_dtype=torch.float32)
    y = int8_gemm(xq.t().contiguous().t(), x_scale, weight, out_dtype=torch.float32)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("static", [False, True])
def test_what_is_not_finite_stays_in_its_row(
    bad: float, static: bool, device: torch.device
) -> None:
    weight = make_weight(MAIN, device).planar
    x = activations(3, MAIN.k, torch.float16, device)
    x[1, 7] = bad
    scale = torch.tensor(0.1, device=device) if static else None
    xq, x_scale = quantize_rows(x, torch.int8, scale)
    y = int8_gemm(xq, x_scale, weight, out_dtype=torch.float32)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


def test_wrong_operands_are_named(device: torch.device) -> None:
    weight = make_weight(MAIN, device).planar
    xq = torch.zeros(2, MAIN.k, dtype=torch.int8, device=device)
    x_scale = torch.ones(2, device=device)

    def product(xq=xq, x_scale=x_scale, weight=weight, bias=None, **options):
        return int8_gemm(xq, x_scale, weight, bias, **{"out_dtype": torch.float16, **options})

    with pytest.raises(ValueError, match=r"xq is torch.float32, expected torch.int8"):
        product(xq=xq.float())
    with pytest.raises(ValueError, match=r"x has shape \[2, 575\], expected \[M, 576\]"):
        product(xq=xq[:, 1:])
    with pytest.raises(ValueError, match=r"x_scale has shape \[3\], expected \[2\] or \[1\]"):
        product(x_scale=torch.ones(3, device=device))
    with pytest.raises(ValueError, match=r"out_dtype torch.int8 is not one of"):
        product(out_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"plane 16 is too small for int8 products: use 32 or 64"):
        product(weight=make_weight(dataclasses.replace(MAIN, plane=16), device).planar)
    with pytest.raises(ValueError, match=r"need linear codes, got decode 'codebook'"):
        product(weight=make_weight(Case("codebook", 4, 32, 64, 96, 576), device).planar)
    real_zeros = dataclasses.replace(weight, zeros=weight.zeros.half())
    with pytest.raises(ValueError, match=r"need integer zeros .uint8., got torch.float16"):
        product(weight=real_zeros)
    with pytest.raises(
        ValueError, match=r"are int8 words .code - 128. without zeros, got torch.ui"
    ):
        product(weight=make_weight(CASES[10], device).planar)
    nested = dataclasses.replace(MAIN, scale_mode="nested")
    with pytest.raises(ValueError, match=r"take no nested scales"):
        product(weight=make_weight(nested, device).planar)
    shifted = make_weight(CASES[10], device, int8=True).planar
    with pytest.raises(ValueError, match=r"block_k 16 is too small"):
        product(xq=xq, weight=shifted, config=GemmConfig(block_k=16))
