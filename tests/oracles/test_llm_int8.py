"""LLM.int8() beside that of bitsandbytes: the same weight, the same columns in 16 bits.

The package takes outliers out of x, and then the scale of each row from all that is left; the
other values of their columns, which are multiplied in 16 bits as well, count there. Ours takes the
columns out first, as the paper does. Here those values are small, so that both scales are one.
"""

import pytest
import torch

import qkernels as qk
from qkernels import reference
from tests.bounds import FROBENIUS_BOUND
from tests.oracles.packages import package

bnb = package("bitsandbytes")

N, K, ROWS, THRESHOLD = 64, 256, 32, 6.0
OUTLYING = [5, 77]
ALMOST_ALL = 0.999
"""Of the codes: one program divides by the scale and the other multiplies by its inverse, so that
what is half way between two codes may go either way."""


def inputs(dtype, threshold=THRESHOLD):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, K, generator=generator)
    x[:, OUTLYING] *= 0.1
    x[::3, 5] = 40
    # Just as large as an outlier has to be.
    x[3, 77] = -threshold
    return x.to(dtype)


def theirs():
    generator = torch.Generator().manual_seed(1)
    layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False, threshold=THRESHOLD)
    weight = 0.05 * torch.randn(N, K, generator=generator)
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    # In training it multiplies weights that are dequantized.
    return layer.to("cpu").eval()


def ours(layer, dtype, backend):
    state = layer.state
    hub = qk.QuantizedWeight(
        scheme=qk.QuantScheme.parse(f"w8a8-outliers{THRESHOLD:g}-sfp32"),
        codes=(state.CB.int() + 128).to(torch.uint8),
        scales=(state.SCB / 127)[:, None],
        bias=layer.bias.detach(),
    )
    return qk.WQLinear.from_weight(hub, dtype=dtype, backend=backend)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_product_is_the_same(dtype, backend):
    layer, x = theirs(), inputs(dtype)
    with torch.no_grad():
        wanted = layer(x).double()
        made = ours(layer, dtype, backend)
        got = made(x).double()
    assert layer.state.idx.tolist() == OUTLYING
    assert (got - wanted).norm() <= FROBENIUS_BOUND[dtype] * wanted.norm()
    # What rounding activations costs is more than that, and what outliers would cost without it.
    exact = x.double() @ made.dequantize().double().T + layer.bias.detach().double()
    rounding = (wanted - exact).norm()
    assert rounding > (got - wanted).norm()
    plain = qk.WQLinear.from_weight(
        made.to_weight().replace(scheme=qk.QuantScheme.parse("w8a8-sfp32")), dtype=dtype
    )
    assert (plain(x).double() - exact).norm() > 2 * rounding


def test_columns_scales_and_codes_are_the_same():
    x = inputs(torch.float16)
    wanted, largest, columns = bnb.functional.int8_vectorwise_quant(x.clone(), THRESHOLD)
    apart = reference.outlier_columns(x, THRESHOLD)
    assert apart.tolist() == columns.tolist() == OUTLYING
    codes, scales = reference.quantize_rows(reference.without_columns(x, apart), torch.int8)
    assert torch.equal(scales * 127, largest)
    other = (codes.int() - wanted.int()).abs()
    assert other.max() <= 1 and (other == 0).float().mean() >= ALMOST_ALL
