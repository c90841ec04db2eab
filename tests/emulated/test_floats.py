"""x of fp32 on the tensor cores in the emulator: in three bf16 numbers each, which lose no bit."""

import pytest
import torch

from qkernels import WQLinear, rounding
from tests import truth
from tests.bounds import FROBENIUS_BOUND
from tests.emulated.emulator import needs_emulator, set_seed
from tests.emulated.test_weight_only import of_integers

pytestmark = needs_emulator


def layer_of(weight, **options):
    return WQLinear.from_weight(weight, backend="emulated", **options)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("m", [1, 2, 3, 6, 33])
def test_every_bit_of_x_counts(bits, m):
    """One number of a row is not 0, of 24 bits, and its weight is a power of two."""
    n, k = 40, 200
    weight = of_integers(n, k, 64, bits)
    weight = weight.replace(
        codes=torch.full_like(weight.codes, 1), zeros=torch.zeros_like(weight.zeros)
    )
    x = torch.zeros(m, k)
    column = torch.arange(m) * 31 % k
    x[torch.arange(m), column] = (torch.randint(1 << 23, 1 << 24, (m,)) * 2.0 ** (m - 20)).float()
    exact = x.double() @ weight.dequantize().double().t()
    assert torch.equal(layer_of(weight)(x), exact.float())


@pytest.mark.parametrize("text", ["w4a16-g32", "w2a16-g64", "w3a16", "w8a16-g24", "fp8e4m3-a16"])
@pytest.mark.parametrize("m", [1, 5, 6, 70])
def test_any_numbers(text, m):
    n, k = 97, 523
    weight = rounding.quantize(torch.randn(n, k), text, bias=torch.randn(n))
    x = torch.randn(m, k)
    y = layer_of(weight)(x)
    assert y.dtype == torch.float32
    assert truth.error(y, truth.product(weight, x)) <= FROBENIUS_BOUND[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_real_zero_points(dtype):
    n, k = 40, 200
    weight = rounding.quantize(torch.randn(n, k), "w4a16-g48", bias=torch.randn(n))
    weight = weight.replace(zeros=(weight.zeros.float() + torch.rand(weight.zeros.shape)).to(dtype))
    x = torch.randn(3, k)
    assert (
        truth.error(layer_of(weight)(x), truth.product(weight, x)) <= FROBENIUS_BOUND[torch.float32]
    )


def test_what_is_no_number_stays_in_its_row():
    weight = of_integers(40, 200, 64, 4)
    weight = weight.replace(
        codes=torch.full_like(weight.codes, 1), zeros=torch.zeros_like(weight.zeros)
    )
    x = torch.ones(5, 200)
    x[0, 3], x[1, 4], x[2, 5] = float("inf"), float("-inf"), float("nan")
    x[3, 6] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)
    y = layer_of(weight)(x)
    assert (y[0] == float("inf")).all() and (y[1] == float("-inf")).all()
    assert y[2:4].isnan().all() and y[4].isfinite().all()


def test_the_largest_number_does_not_overflow():
    weight = of_integers(40, 200, 64, 4)
    weight = weight.replace(
        codes=torch.full_like(weight.codes, 1), zeros=torch.zeros_like(weight.zeros)
    )
    x = torch.zeros(1, 200)
    largest = torch.finfo(torch.float32).max
    x[0, 70] = largest  # in a group whose scale is 1
    assert (layer_of(weight)(x) == largest).all()


def test_a_batch_invariant_row_is_what_it_is_alone():
    layer = layer_of(rounding.quantize(torch.randn(97, 1500), "w4a16-g32"), batch_invariant=True)
    x = torch.randn(30, 1500)
    y = layer(x)
    for row in range(30):
        set_seed(row)
        assert torch.equal(layer(x[row : row + 1])[0], y[row])


def test_no_rows_and_rows_that_are_not_aligned():
    weight = rounding.quantize(torch.randn(40, 200), "w4a16-g32")
    layer = layer_of(weight)
    assert layer(torch.randn(0, 200)).shape == (0, 40)
    wide = torch.randn(3, 2, 203)
    x = wide[..., 1:201]
    y = layer(x)
    assert y.shape == (3, 2, 40)
    assert torch.equal(y, layer(x.contiguous()))
