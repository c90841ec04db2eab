"""Offsets of groups, as formats have them that store a least value in place of a zero point."""

import pytest
import torch

import qkernels as qk
from qkernels import rounding
from qkernels.backends import cpu
from qkernels.errors import WeightError
from qkernels.layouts import LAYOUTS, pack
from qkernels.weight import QuantizedWeight
from tests.bounds import FROBENIUS_BOUND

SCHEMES = [
    *("w4a16-g32", "w4a16-g24", "w4a16", "w3a16-g32", "w2a16-g32", "w4a16-gtensor"),
    *("w8a16-g16-sfp32", "w4a16-g64-sbf16"),
]
N, K = 50, 200


def quantized(text, dtype=torch.float16) -> tuple[QuantizedWeight, torch.Tensor]:
    """A weight with offsets, and fp64 of what it is, computed here."""
    torch.manual_seed(0)
    weight = rounding.quantize(torch.randn(N, K), text)
    offsets = (torch.randn(weight.scales.shape) / 8).to(dtype)
    length = weight.scheme.group_length(K)
    spread = [part.double().expand(N, -1) for part in (weight.scales, weight.zeros, offsets)]
    s, z, o = (part.repeat_interleave(length, 1)[:, :K] for part in spread)
    return weight.replace(offsets=offsets), s * (weight.codes.double() - z) + o


@pytest.mark.parametrize("text", SCHEMES)
def test_they_are_part_of_the_weight(text):
    weight, truth = quantized(text)
    assert torch.allclose(weight.dequantize().double(), truth, atol=1e-6)
    for layout in LAYOUTS.values():
        if layout.why_not(weight.scheme) is None:
            assert torch.equal(pack(weight, layout).unpack().dequantize(), weight.dequantize())
    # The codes nearest to a weight are those that it has.
    assert torch.equal(rounding.encode_rows(weight.dequantize(), weight, 0), weight.codes)
    if "tensor" not in text:
        assert torch.equal(weight.rows(16, 40).dequantize(), weight.dequantize()[16:40])


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("dtype", FROBENIUS_BOUND)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_products(text, dtype, backend):
    weight, _ = quantized(text)
    layer = qk.WQLinear.from_weight(weight, backend=backend)
    truth = layer.dequantize().double()
    for m in (0, 1, 2, 5, 17, 130):
        x = torch.randn(m, K).to(dtype)
        want = x.double() @ truth.T
        assert (layer(x).double() - want).norm() <= FROBENIUS_BOUND[dtype] * want.norm()


FLOAT_ROWS = [
    row
    for row in cpu.KERNELS
    if row.fields is not None and "offsets" in row.fields and row not in cpu.COMPOSED
]


@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("text", SCHEMES)
def test_products_with_each_set_of_instructions(isa, text):
    if cpu.why_no_isa(isa) is not None:
        pytest.skip(cpu.why_no_isa(isa))
    weight, _ = quantized(text)
    buffers = pack(weight, LAYOUTS["vnni"]).buffers
    route = cpu._made(weight.scheme, N, K, isa, False, False)
    for m in (1, 3, 7):
        x = torch.randn(m, K)
        y = route.run(x, buffers, None, None, x.dtype)
        want = x.double() @ weight.dequantize().double().T
        assert (y.double() - want).norm() <= FROBENIUS_BOUND[torch.float32] * want.norm()


def test_other_kernels_leave_them_to_those():
    names = {f"cpu_{isa}_float" for isa in ("avx512", "avx2", "neon", "portable")}
    names.add("cpu_avx512_pairs")
    assert {row.name for row in FLOAT_ROWS} == names
    for row in qk.explain("w4a16-g32", n=N, k=K, m=64, fields=("offsets",)):
        if row.kernel in ("cpu_amx_float", "cpu_amx_scaled"):
            assert not row.chosen
    chosen = next(r for r in qk.explain("w4a16", n=N, k=K, fields=("offsets",)) if r.chosen)
    assert chosen.kernel in {"reference", *(row.name for row in FLOAT_ROWS)}


def test_they_are_saved_and_loaded():
    weight, _ = quantized("w4a16-g32")
    layer = qk.WQLinear.from_weight(weight)
    assert "offsets" in layer.state_dict()
    other = qk.WQLinear.from_weight(weight.replace(offsets=weight.offsets * 0))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dequantize(), layer.dequantize())


def test_what_takes_none_is_named():
    for text in ("w4a16-g32-sym", "nf4-g32", "w4a8-g32", "fp8e4m3-a16"):
        weight = rounding.quantize(torch.randn(8, 64), text)
        with pytest.raises(WeightError, match="takes no offsets"):
            weight.replace(offsets=torch.zeros_like(weight.scales, dtype=torch.float16))
    weight, _ = quantized("w4a16-g32")
    with pytest.raises(WeightError, match="must have shape"):
        weight.replace(offsets=torch.zeros(3, 3))
    with pytest.raises(WeightError, match="NaN"):
        weight.replace(offsets=weight.offsets * float("nan"))
