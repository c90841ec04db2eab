"""Weight-only GEMM and GEMV against the dense weight, over codes, scales, groups and tails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qkernels.triton_kernels import GemmConfig, GemvConfig, weight_only_gemm, weight_only_gemv
from tests.bounds import FROBENIUS_BOUND
from tests.triton_kernels.planar_oracle import (
    Case,
    activations,
    frobenius_error,
    make_weight,
    poisoned_outputs,
)

# Planes that a group covers whole (tile, plane) and crosses (element); K and N with tails.
CASES = (
    Case("unsigned", 4, 32, 64, 96, 576, torch.uint8),
    Case("unsigned", 4, 16, 24, 33, 200, torch.float32),
    Case("signed", 4, 64, 0, 40, 576, None, torch.bfloat16),
    Case("signed", 4, 16, 32, 130, 160, None, scale_mode="two_level"),
    Case("unsigned", 3, 16, 16, 70, 330, torch.uint8, torch.bfloat16),
    Case("signed", 3, 32, 128, 20, 576, None, torch.float32),
    Case("unsigned", 2, 16, 40, 17, 300, torch.float16),
    Case("signed", 2, 16, 256, 48, 600),
    Case("unsigned", 8, 0, 64, 64, 192, torch.uint8),
    Case("signed", 8, 0, 0, 19, 77),
    Case("codebook", 4, 32, 64, 80, 330, scale_mode="nested"),
    Case("codebook", 4, 16, 24, 21, 100, scale_mode="nested"),
    Case("codebook", 4, 16, 128, 32, 300),
    Case("fp8e4m3", 8, 0, 0, 48, 130, None, torch.float32),
    Case("fp8e5m2", 8, 0, 48, 30, 200, None, torch.bfloat16),
    Case("codebook", 1, 16, 24, 33, 600, None, torch.float32),
    Case("codebook", 1, 16, 512, 20, 540, scale_mode="two_level"),
    Case("codebook", 1, 32, 0, 70, 300, None, torch.bfloat16),
    Case("codebook", 1, 64, 64, 40, 130, scale_mode="nested"),
    Case("codebook", 2, 16, 40, 33, 300),
    Case("codebook", 2, 32, 0, 21, 600, None, torch.float32),
    Case("codebook", 2, 16, 32, 70, 300, scale_mode="nested"),
    Case("codebook", 3, 32, 48, 40, 330, None, torch.bfloat16),
    Case("codebook", 3, 16, 0, 17, 200, scale_mode="nested"),
    Case("codebook", 3, 16, 64, 130, 330),
    # Three whole tiles, so that x is not masked: a part of K must not reach beyond them.
    Case("signed", 4, 32, 64, 20, 768),
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAIN = CASES[0]
ROWS = (0, 1, 3, 16, 17, 129)

Product = Callable[..., Tensor]
# Each kernel with and without a split of K that leaves the last part shorter.
SCHEDULES = (
    (weight_only_gemm, GemmConfig(block_m=32, block_n=64, block_k=32, split_k=1, group_m=2)),
    (weight_only_gemm, GemmConfig(block_m=16, block_n=128, block_k=32, split_k=2)),
    (weight_only_gemv, GemvConfig(block_n=64, block_k=32, split_k=1)),
    (weight_only_gemv, GemvConfig(block_n=32, block_k=16, split_k=3)),
)


def _schedule_id(value: object) -> str | None:
    if callable(value):
        return value.__name__
    return f"split{value.split_k}" if isinstance(value, GemmConfig | GemvConfig) else None


# One type a case, each type in turn; the first case in all of them.
EXACT = [(MAIN, dtype) for dtype in DTYPES] + [
    (case, DTYPES[index % 3]) for index, case in enumerate(CASES) if index
]


@pytest.mark.parametrize(("case", "dtype"), EXACT, ids=str)
def test_gemm_of_the_identity_is_the_weight(
    case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    weight = make_weight(case, device)
    y = weight_only_gemm(torch.eye(case.k, dtype=dtype, device=device), weight.planar)
    assert torch.equal(y, weight.dense.to(dtype).t())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gemv_of_unit_vectors_is_the_weight(case: Case, device: torch.device) -> None:
    weight = make_weight(case, device)
    columns = [0, case.k // 2, case.k - 1]
    x = torch.eye(case.k, device=device)[columns]
    y, expected = weight_only_gemv(x, weight.planar), weight.dense.t()[columns]
    if case.scale_mode == "nested":  # product and sum of a scale may be fused in a GEMV
        assert frobenius_error(y, expected.double()) <= FROBENIUS_BOUND[torch.float32]
    else:
        assert torch.equal(y, expected)


@pytest.mark.parametrize(("product", "config"), SCHEDULES, ids=_schedule_id)
@pytest.mark.parametrize("m", ROWS)
def test_any_number_of_rows(product: Product, config: object, m: int, device: torch.device) -> None:
    if m > 17 and product is weight_only_gemv:
        pytest.skip("the GEMV runs one program a row: 17 rows tell what 129 would")
    _check_product(product, config, MAIN, torch.bfloat16, m, device)


@pytest.mark.parametrize(("product", "config"), SCHEDULES[1:3], ids=_schedule_id)
@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_close_to_float64(
    product: Product, config: object, case: Case, device: torch.device
) -> None:
    dtype = DTYPES[CASES.index(case) % 3]
    _check_product(product, config, case, dtype, 3, device)


@pytest.mark.parametrize("product", [weight_only_gemm, weight_only_gemv])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chosen_config_is_close(product: Product, dtype: torch.dtype, device: torch.device) -> None:
    _check_product(product, None, MAIN, dtype, 5, device)


def _check_product(
    product: Product, config: object, case: Case, dtype: torch.dtype, m: int, device: torch.device
) -> None:
    weight = make_weight(case, device)
    x = activations(m, case.k, dtype, device)
    bias = torch.linspace(-20, 20, case.n, device=device).to(dtype)
    y = product(x, weight.planar, bias, config=config)
    assert y.shape == (m, case.n)
    assert y.dtype == dtype
    if m:
        expected = x.double() @ weight.dense.double().t() + bias.double()
        assert frobenius_error(y, expected) <= FROBENIUS_BOUND[dtype]


@pytest.mark.parametrize(("product", "config"), SCHEDULES, ids=_schedule_id)
def test_same_bits_twice(product: Product, config: object, device: torch.device) -> None:
    weight = make_weight(MAIN, device)
    x = activations(5, MAIN.k, torch.float16, device)
    first, second = (product(x, weight.planar, config=config) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("product", "config"), SCHEDULES, ids=_schedule_id)
@pytest.mark.parametrize("case", [CASES[1], CASES[9]], ids=str)
def test_writes_all_of_the_output_and_nothing_else(
    product: Product,
    config: object,
    case: Case,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = make_weight(case, device)
    x = activations(3, case.k, torch.float32, device)
    with poisoned_outputs(monkeypatch):
        y = product(x, weight.planar, config=config)
    expected = x.double() @ weight.dense.double().t()
    assert frobenius_error(y, expected) <= FROBENIUS_BOUND[torch.float32]


@pytest.mark.parametrize("product", [weight_only_gemm, weight_only_gemv])
def test_any_strides_of_x(product: Product, device: torch.device) -> None:
    case = CASES[1]
    weight = make_weight(case, device).planar
    x = activations(4, case.k, torch.float16, device)
    expected = product(x, weight)
    wide = torch.full((4, 2 * case.k + 3), float("nan"), dtype=x.dtype, device=device)
    wide[:, : 2 * case.k : 2] = x
    assert torch.equal(product(x.t().contiguous().t(), weight), expected)
    assert torch.equal(product(wide[:, : 2 * case.k : 2], weight), expected)
    one_row = product(x[1:2].expand(3, -1), weight)
    assert torch.equal(one_row, expected[1:2].expand(3, -1))


@pytest.mark.parametrize(("product", "config"), SCHEDULES, ids=_schedule_id)
@pytest.mark.parametrize("x_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_activations(
    product: Product, config: object, x_dtype: torch.dtype, device: torch.device
) -> None:
    case = CASES[13]
    weight = make_weight(case, device)
    x = activations(3, case.k, torch.float32, device, outliers=False).to(x_dtype)
    scale = torch.tensor([0.5, 3.0, 0.01], device=device)
    for x_scale, out_dtype in ((scale, torch.float16), (scale[:1], None)):
        y = product(x, weight.planar, x_scale=x_scale, out_dtype=out_dtype, config=config)
        assert y.dtype == (out_dtype or torch.bfloat16)
        expected = x_scale.double()[:, None] * (x.double() @ weight.dense.double().t())
        assert frobenius_error(y, expected) <= FROBENIUS_BOUND[y.dtype]


@pytest.mark.parametrize("product", [weight_only_gemm, weight_only_gemv])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(
    product: Product, bad: float, device: torch.device
) -> None:
    weight = make_weight(MAIN, device)
    x = activations(3, MAIN.k, torch.float16, device, outliers=False)
    x[1, 7] = bad
    y = product(x, weight.planar)
    is_used = weight.dense[:, 7] != 0
    assert not y[1, is_used].isfinite().any()
    assert y[[0, 2]].isfinite().all()
    float8 = x.to(torch.float8_e5m2)
    assert not product(float8, weight.planar)[1, is_used].isfinite().any()


def test_fp16_sums_do_not_overflow(device: torch.device) -> None:
    weight = make_weight(MAIN, device)
    x = torch.full((1, MAIN.k), 6e4, dtype=torch.float16, device=device)
    x[:, 1::2] *= -1
    expected = x.double() @ weight.dense.double().t()
    y = weight_only_gemm(x, weight.planar, out_dtype=torch.float32)
    # The weights are rounded to fp16, and these sums cancel.
    size = x.double().norm() * weight.dense.double().norm()
    assert (y.double() - expected).norm() <= FROBENIUS_BOUND[torch.float16] * size


@pytest.mark.parametrize("product", [weight_only_gemm, weight_only_gemv])
def test_wrong_operands_are_named(product: Product, device: torch.device) -> None:
    weight = make_weight(MAIN, device).planar
    x = activations(3, MAIN.k, torch.float16, device)
    with pytest.raises(ValueError, match=r"x has shape \[3, 575\], expected \[M, 576\]"):
        product(x[:, :-1], weight)
    with pytest.raises(ValueError, match=r"x is torch.int32: weight-only products take fp16"):
        product(x.int(), weight)
    with pytest.raises(ValueError, match=r"bias has shape \[95\], expected \[96\]"):
        product(x, weight, torch.zeros(95, device=device))
    with pytest.raises(ValueError, match=r"x_scale has shape \[2\], expected \[3\] or \[1\]"):
        product(x, weight, x_scale=torch.ones(2, device=device))
    with pytest.raises(ValueError, match=r"x_scale is torch.float16, expected torch.float32"):
        product(x, weight, x_scale=torch.ones(3, device=device, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"out_dtype torch.int8 is not one of fp16, bf16, fp32"):
        product(x, weight, out_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"x is on meta"):
        product(x.to("meta"), weight)
    shifted = make_weight(CASES[9], device, int8=True).planar
    with pytest.raises(ValueError, match=r"the words are int8, which only int8_gemm reads"):
        product(activations(3, CASES[9].k, torch.float16, device), shifted)


def test_wrong_weights_are_named(device: torch.device) -> None:
    weight = make_weight(MAIN, device).planar

    def changed(**fields: object) -> None:
        dataclasses.replace(weight, **fields)

    with pytest.raises(ValueError, match=r"words has shape \[96, 95\], expected \[96, 96\]"):
        changed(words=weight.words[:, :-1])
    with pytest.raises(ValueError, match=r"scales has shape \[9, 96\], expected \[6, 96\]"):
        changed(group_size=96)
    with pytest.raises(ValueError, match=r"group size 8 is too small: use 16 or more"):
        changed(group_size=8)
    with pytest.raises(ValueError, match=r"plane 24 is not one of 16, 32, 64"):
        changed(plane=24)
    with pytest.raises(ValueError, match=r"decode 'nf4' is not one of unsigned, signed"):
        changed(decode="nf4")
    with pytest.raises(ValueError, match=r"fp8e4m3 codes have 8 bits, got 4"):
        changed(decode="fp8e4m3")
    with pytest.raises(ValueError, match=r"decode 'codebook' was given no codebook"):
        changed(decode="codebook")
    with pytest.raises(ValueError, match=r"codebook has shape \[8\], expected \[16\]"):
        changed(decode="codebook", codebook=torch.zeros(8, device=device))
    with pytest.raises(ValueError, match=r"unsigned codes have 2, 3, 4, 8 bits, got 1"):
        changed(bits=1)
    with pytest.raises(ValueError, match=r"zeros is torch.int32, expected torch.uint8 or"):
        changed(zeros=weight.zeros.int())
    with pytest.raises(ValueError, match=r"scales has strides .*: make it contiguous"):
        changed(scales=weight.scales.t().contiguous().t())
    with pytest.raises(ValueError, match=r"words is torch.int64, expected torch.int32"):
        changed(words=weight.words.long())
    with pytest.raises(ValueError, match=r"scales is torch.float16, expected torch.uint8"):
        changed(channel_scales=torch.ones(MAIN.n, device=device))
