"""The same numbers give the same results wherever they lie in memory, in float64's opinion too."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qkernels as qk
from qkernels import reference, rounding
from qkernels.bits import dense, pack_awq, planar, unpack_awq
from tests import schemes, truth
from tests.bounds import FROBENIUS_BOUND
from tests.views import views

FEW = settings(deadline=None, max_examples=60)
SIZES = st.sampled_from((1, 2, 3, 5, 16, 33, 64))
ROWS = st.sampled_from((0, 1, 2, 3, 17))
BACKENDS = (None, "reference")


def integers(count):
    return torch.randint(-127, 128, (count,), dtype=torch.int8)


def codes_of(bits):
    return lambda count: torch.randint(0, 1 << bits, (count,), dtype=torch.uint8)


def same_rows(x):
    """`x` with the strides of a newly made tensor."""
    return x.clone(memory_format=torch.contiguous_format)


@given(data=st.data(), m=ROWS, n=SIZES, k=SIZES)
@FEW
def test_integer_products_are_exact(data, m, n, k):
    a, b = data.draw(views((m, k), integers)), data.draw(views((n, k), integers))
    exact = (a.double() @ b.double().t()).int()
    assert torch.equal(reference.integer_product(a, b), exact)
    assert torch.equal(reference.integer_product_in_floats(a, b), exact)


@pytest.mark.parametrize(
    "text", ["w8a8", "w8a8-g32", "w4a8-g64-flat", "w4a8-g64-asym", "w8a8-static"]
)
@pytest.mark.parametrize("k", [1, 33, 65])
@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_one_column(text, k, backend):
    scale = 0.03 if text.endswith(("static", "position")) else None
    linear = torch.nn.Linear(k, 24)
    layer = qk.WQLinear.from_linear(linear, text, backend=backend, activation_scale=scale)
    weight = layer.to_weight()
    for m in (1, 2, 20):
        x = torch.randn(m, k)
        for _ in range(3):  # what was freed before is found in memory that is left unwritten
            assert truth.error(layer(x), truth.product(weight, x)) <= FROBENIUS_BOUND[x.dtype]


@given(data=st.data(), m=ROWS, k=SIZES, backend=st.sampled_from(BACKENDS))
@FEW
def test_a_layer_takes_x_and_gradients_of_all_strides(data, m, k, backend):
    text = data.draw(st.sampled_from(schemes.NOT_STATIC))
    dtype = data.draw(st.sampled_from(list(FROBENIUS_BOUND)))
    n = data.draw(SIZES)
    weight = rounding.quantize(torch.randn(n, k), text, bias=torch.randn(n))
    layer = qk.WQLinear.from_weight(weight, backend=backend)
    x = data.draw(views((m, k), lambda count: torch.randn(count).to(dtype)))
    y = layer(x)
    assert y.shape == (m, n) and y.dtype == dtype
    if backend != "reference":  # the products of torch, whose sums depend on strides
        assert torch.equal(y, layer(same_rows(x)))
    # All of so few sums may cancel: their errors are as large as what is summed makes them.
    seen, weights = truth.rounded(weight, same_rows(x)) if m else x.double(), truth.dense(weight)
    terms = seen.abs() @ weights.abs().t() + weight.bias.double().abs()
    exact = truth.product(weight, same_rows(x)) if m else terms
    assert (y.double() - exact).norm() <= FROBENIUS_BOUND[dtype] * terms.norm()
    given_x = same_rows(x).requires_grad_()
    grad = data.draw(views((m, n), lambda count: torch.randn(count).to(dtype)))
    layer(given_x).backward(grad)
    exact = grad.double() @ weights
    terms = grad.double().abs() @ weights.abs()
    assert given_x.grad.shape == (m, k)
    assert (given_x.grad.double() - exact).norm() <= FROBENIUS_BOUND[dtype] * terms.norm()


@pytest.mark.parametrize("text", schemes.ALL)
@pytest.mark.parametrize("backend", [None, "reference", "interpreted"])
@pytest.mark.parametrize(("n", "k"), [(16, 64), (1, 1), (5, 1), (1, 96)])
def test_no_rows_of_any_strides(text, backend, n, k):
    scale = 0.03 if text.endswith(("static", "position")) else None
    weight = rounding.quantize(torch.randn(n, k), text, activation_scale=scale)
    if backend == "interpreted":
        pytest.importorskip("triton")
        if text in schemes.REFERENCE_OR_CPU:
            pytest.skip(f"Triton's kernels do not take {text}")
    layer = qk.WQLinear.from_weight(weight, backend=backend, check_kernels=False)
    for x in (
        torch.randn(0, k),
        torch.randn(0, 2 * k)[:, ::2],
        torch.randn(4, 2 * k)[:0, ::2],
        torch.randn(k, 0).t(),
        torch.randn(2, 0, k),
        torch.randn(0, 3, 2 * k)[..., ::2],
        torch.randn(k, 3, 0).permute(2, 1, 0),
        torch.randn(1).as_strided((0, k), (7, 3)),
        torch.randn(1, 1).expand(0, k),
    ):
        for dtype in FROBENIUS_BOUND:
            strided = x.to(dtype).as_strided(x.shape, x.stride())
            y = layer(strided)
            assert y.shape == (*x.shape[:-1], n) and y.dtype == dtype


def in_64_bits(x, largest=127.0):
    """Rows of x as int8 and their scales, in float64 but for the rounding of scales to fp32."""
    top = x.double().abs().amax(-1, keepdim=True)
    scale = torch.where(top == 0, 1.0, top / largest).float().double()
    return (x.double() / scale).round().clamp(-largest, largest), scale


def rows_are(got, values):
    """Whether quantized rows are float64 `values` within what fp32 leaves of a rounding to int8."""
    quantized, scale = in_64_bits(values)
    assert torch.allclose(got.scale.double(), scale, rtol=1e-5, atol=0)
    assert (got.values.double() - quantized).abs().max() <= 1 if values.numel() else True
    restored = got.values.double() * got.scale.double()
    assert ((restored - values).abs() <= 0.5001 * scale + 1e-5 * values.abs()).all()


@given(data=st.data(), m=ROWS, k=SIZES)
@FEW
def test_rows_of_all_strides_are_quantized(data, m, k):
    def floats(count):
        return torch.randn(count)

    shape = data.draw(st.sampled_from(((m, k), (1, m, k), (m, 2, k), (k,))))
    x, other = data.draw(views(shape, floats)), data.draw(views(shape, floats))
    gain = data.draw(views((k,), floats))
    rows_are(qk.quantize_activation(x), x.double())
    total = (x.double() + other.double()).float().double()
    for values, got in (
        (x.double(), qk.rms_norm_quantize(x, gain, 1e-6)),
        (total, qk.add_rms_norm_quantize(x, other, gain, 1e-6)[0]),
    ):
        norm = values / (values.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        rows_are(got, norm * gain.double())
    assert torch.equal(qk.add_rms_norm_quantize(x, other, gain, 1e-6)[1].double(), total)
    gated = x.double() * torch.sigmoid(x.double()) * other.double()
    rows_are(qk.silu_mul_quantize(x, other), gated)
    quantized, scale, zero = qk.quantize_per_token_asymmetric(x)
    restored = scale.double() * (quantized.double() - zero.double())
    assert ((restored - x.double()).abs() <= 1.0001 * scale.double()).all()
    quantized, scale = qk.quantize_per_tensor(x)
    assert ((scale.double() * quantized.double() - x.double()).abs() <= 0.5001 * scale).all()
    quantized, _ = qk.quantize_per_tensor(x, torch.tensor(0.25))
    assert torch.equal(quantized.double(), (x.double() / 0.25).round().clamp(-127, 127))


@given(data=st.data(), m=ROWS, k=SIZES)
@FEW
def test_the_references_of_rows(data, m, k):
    x = data.draw(views((m, k), torch.randn))
    quantized, scale = reference.quantize_rows(x, torch.int8)
    rows_are(qk.QuantizedActivation(quantized, scale[:, None], x.dtype), x.double())
    quantized, scale = reference.quantize_rows(x, torch.float8_e4m3fn)
    restored = quantized.double() * scale[:, None].double()
    assert (
        (restored - x.double()).abs() <= 2**-4 * x.double().abs() + 2**-9 * scale[:, None]
    ).all()
    quantized, scale, zero = reference.quantize_rows_asymmetric(x)
    restored = scale[:, None].double() * (quantized.double() - zero[:, None].double())
    assert ((restored - x.double()).abs() <= 1.0001 * scale[:, None].double()).all()


@pytest.mark.parametrize("k", [1, 64])
def test_quantized_rows_of_all_strides(k):
    for text in ("w8a8", "w4a8-g64", "w4a8-g64-asym-flat"):
        for backend in BACKENDS:
            weight = rounding.quantize(torch.randn(24, k), text)
            layer = qk.WQLinear.from_weight(weight, backend=backend)
            for m in (0, 1, 20):
                x = qk.quantize_activation(torch.randn(m, k))
                values = torch.stack([x.values, x.values], dim=-1)[..., 0]
                scale = torch.stack([x.scale, x.scale])[0].t().contiguous().t()
                apart = qk.QuantizedActivation(values, scale, x.dtype)
                assert torch.equal(layer(apart), layer(x))
                lined = qk.QuantizedActivation(values.t().contiguous().t(), scale, x.dtype)
                assert torch.equal(layer(lined), layer(x))
                strides = (7, 3) if m == 0 else x.values.stride()
                odd = x.values.as_strided(x.values.shape, strides)
                assert torch.equal(layer(qk.QuantizedActivation(odd, scale, x.dtype)), layer(x))


@given(data=st.data(), n=SIZES, k=SIZES, group=st.sampled_from((16, 24, 64)))
@FEW
def test_weights_of_all_strides_are_rounded_to_nearest(data, n, k, group):
    dtype = data.draw(st.sampled_from(list(FROBENIUS_BOUND)))
    w = data.draw(views((n, k), lambda count: torch.randn(count).to(dtype)))
    quantized = rounding.quantize(w, f"w4a16-g{group}-sfp32")
    values = w.double()
    for start in range(0, k, group):
        part = values[:, start : start + group]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scale, g = (high - low) / 15, start // group
        assert torch.allclose(quantized.scales[:, g].double(), scale, rtol=1e-6, atol=0)
        got = quantized.dequantize()[:, start : start + group].double()
        assert ((got - part).abs() <= scale[:, None] * 1.0001).all()
    for text in schemes.ALL:
        scale = 0.03 if qk.QuantScheme.parse(text).activation.is_static else None
        one = rounding.quantize(w, text, activation_scale=scale)
        other = rounding.quantize(same_rows(w), text, activation_scale=scale)
        assert torch.equal(one.codes, other.codes), text
        assert all(torch.equal(one.fields[name], other.fields[name]) for name in one.fields), text
        for backend in BACKENDS:
            layer = qk.WQLinear.from_weight(
                other.replace(codes=apart(other.codes)), backend=backend
            )
            assert torch.equal(layer.dequantize(), other.dequantize()), (text, backend)


def apart(codes):
    return torch.stack([codes, codes], dim=-1)[..., 0]


@given(data=st.data(), n=SIZES, k=SIZES, bits=st.sampled_from(dense.DENSE_BITS))
@FEW
def test_codes_of_all_strides_are_packed(data, n, k, bits):
    codes = data.draw(views((n, k), codes_of(bits)))
    rows = [sum(code << (bits * i) for i, code in enumerate(row)) for row in codes.tolist()]
    for pack in (dense.pack_dense, dense.pack_dense_torch):
        words = pack(codes, bits)
        for row, whole in zip(words.tolist(), rows, strict=True):
            assert sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(row)) == whole
        strided = apart(words)
        for unpack in (dense.unpack_dense, dense.unpack_dense_torch):
            assert torch.equal(unpack(strided, k, bits), codes)
    if bits < 8:
        words = planar.pack_planar_torch(same_rows(codes), bits, 16)
        for pack in (planar.pack_planar, planar.pack_planar_torch):
            assert torch.equal(pack(codes, bits, 16), words)
        for unpack in (planar.unpack_planar, planar.unpack_planar_torch):
            assert torch.equal(unpack(apart(words), k, bits, 16), codes)
    eight = data.draw(views((k, 8 * n), codes_of(4)))
    assert torch.equal(unpack_awq(apart(pack_awq(eight))), eight)
