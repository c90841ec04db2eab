"""Rows and groups of zeros stay exactly zero: in the weight, and in y on every backend."""

import pytest
import torch

import qkernels as qk
from qkernels import rounding
from qkernels.backends import cpu
from qkernels.layouts import VNNI, pack
from tests import schemes, truth
from tests.bounds import FROBENIUS_BOUND

NESTED = ("nf4-g64-dq", "w4a16-g64-dq", "w4a16-g64-sym-dq")
DTYPES = tuple(FROBENIUS_BOUND)
ZERO_ROWS = [0, 5, 16, 17, 20]


def with_zeros(n, k):
    """Rows of zeros, and zeros at the beginning, in the middle and at the end of others."""
    w = torch.randn(n, k) * 0.02
    w[ZERO_ROWS] = 0
    w[1, : k // 2], w[2, k // 2 :], w[3, k // 4 : k // 2] = 0, 0, 0
    return w


def difficult(m, k):
    """x of which sums in fp32 keep little, but for those of zeros."""
    x = torch.randn(m, k)
    x[:, k // 3] = 1000
    return x


def quantized(w, text, **more):
    scale = 10.0 if text.endswith(("static", "position")) else None
    return rounding.quantize(w, text, activation_scale=scale, **more)


@pytest.mark.parametrize("text", [*schemes.ALL, "binary-g16"])
@pytest.mark.parametrize("n", [1, 21])
def test_zeros_are_quantized_to_zeros(text, n):
    w = with_zeros(21, 300)[:n]
    weight = quantized(w, text)
    assert (weight.dequantize()[w.abs().amax(1) == 0] == 0).all()
    length = weight.scheme.group_length(300)
    for start in range(0, 300, length):
        zero = (w[:, start : start + length] == 0).all(1)
        if not weight.scheme.per_tensor:
            assert (weight.dequantize()[zero, start : start + length] == 0).all()
    assert weight.dequantize().isfinite().all()


@pytest.mark.parametrize("text", [*schemes.ALL, *NESTED])
@pytest.mark.parametrize("backend", [None, "reference", "interpreted"])
def test_rows_of_zeros_give_the_bias(text, backend):
    if backend == "interpreted":
        pytest.importorskip("triton")
        if text in schemes.REFERENCE_OR_CPU:
            pytest.skip(f"Triton's kernels do not take {text}")
    n, k = 21, 330
    bias = torch.randn(n).bfloat16()
    weight = quantized(with_zeros(n, k), text, bias=bias)
    for given in (weight, weight.replace(bias=None)):
        layer = qk.WQLinear.from_weight(given, backend=backend, check_kernels=False)
        few = backend == "interpreted"
        for m in (5,) if few else (1, 5, 70):
            for dtype in DTYPES[:1] if few else DTYPES:
                y = layer(difficult(m, k).to(dtype))
                want = bias.to(dtype) if given is weight else torch.zeros(n, dtype=dtype)
                assert torch.equal(y[:, ZERO_ROWS], want[ZERO_ROWS].expand(m, -1))


def as_written(weight, how):
    """The same weight as others write it where rows are zero: earlier versions, GPTQ, HQQ."""
    scales, zeros, codes = weight.scales.clone(), weight.zeros.clone(), weight.codes.clone()
    zero, scale = {"earlier": (0, 1.0), "gptq": (8, 2 / 15), "odd": (13, 3.0)}[how.split()[0]]
    scales[ZERO_ROWS], zeros[ZERO_ROWS], codes[ZERO_ROWS] = scale, zero, zero
    if how.endswith("real"):
        zeros = zeros.half()
    return weight.replace(scales=scales, zeros=zeros, codes=codes)


@pytest.mark.parametrize("how", ["earlier", "gptq", "odd", "earlier real", "odd real"])
@pytest.mark.parametrize(
    "text", ["w4a16-g128", "w4a16", "w4a16-g24", "w3a16-g64", "w8a16-g64-asym"]
)
@pytest.mark.parametrize("isa", cpu.ISAS)
def test_rows_of_zeros_of_any_scale_give_the_bias(text, how, isa):
    if cpu.why_no_isa(isa) is not None:
        pytest.skip(cpu.why_no_isa(isa))
    if text.startswith("w3") and not how.startswith("earlier"):
        pytest.skip("3 bits have no code of 8 and more")
    n, k = 21, 4096
    bias = torch.randn(n)
    weight = as_written(rounding.quantize(with_zeros(n, k), text, bias=bias), how)
    assert (weight.dequantize()[ZERO_ROWS] == 0).all()
    buffers = pack(weight, VNNI).buffers
    x = torch.randn(3, k)
    y = cpu._made(weight.scheme, n, k, isa, False, False).run(x, buffers, bias, None, x.dtype)
    assert truth.error(y, truth.product(weight, x)) <= FROBENIUS_BOUND[x.dtype]
    for m, tiles in ((1, False), (5, False), (70, False), (70, True)):
        if tiles and (isa != "amx" or text == "w4a16-g24"):
            continue
        route = cpu._made(weight.scheme, n, k, isa, tiles, False)
        for dtype in DTYPES:
            x = difficult(m, k).to(dtype)
            y = route.run(x, buffers, bias, None, dtype)
            assert torch.equal(y[:, ZERO_ROWS], bias.to(dtype)[ZERO_ROWS].expand(m, -1))
            assert not route.run(x, buffers, None, None, dtype)[:, ZERO_ROWS].any()


@pytest.mark.parametrize("text", NESTED)
def test_groups_of_zeros_do_not_blur_the_scales_of_others(text):
    w = torch.randn(64, 512) * 0.02
    before = (rounding.quantize(w, text).dequantize() - w)[1:].norm()
    w[0] = 0
    after = rounding.quantize(w, text).dequantize() - w
    assert not after[0].any() and after[1:].norm() <= 1.05 * before


def test_nothing_but_zeros():
    for text in [*schemes.ALL, *NESTED]:
        weight = quantized(torch.zeros(20, 70), text)
        assert not weight.dequantize().any(), text
        assert not qk.WQLinear.from_weight(weight)(difficult(3, 70)).any(), text
