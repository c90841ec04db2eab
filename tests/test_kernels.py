"""Every kernel row over every scheme it takes: the seven points that each kernel must pass.

The kernels run on the GPU where there is one, else in Triton's interpreter, and the CUDA kernels in
their emulator where it is loaded (`make emulated`).
"""

import contextlib

import pytest
import torch

from qkernels import WQLinear, activations, ops, preparation, reference, rounding
from qkernels.errors import NoKernelError, WeightError
from qkernels.layouts import LAYOUTS, pack
from qkernels.scheme import QuantScheme
from qkernels.select import KERNELS, make_problem
from qkernels.weight import apply_by_group, code_values
from tests import schemes, truth
from tests.bounds import DENSE_FACTOR, FROBENIUS_BOUND

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
N, K = 49, 200
DTYPES_BY_ROWS = {
    1: (torch.float16,),
    3: (torch.bfloat16,),
    17: (torch.float16, torch.float32),
    97: (torch.bfloat16,),
}  # every dtype and every number of rows, but not their product: the interpreter is slow
MODEL_SHAPE = (24, 576)  # SmolLM2's hidden size: groups of 128 do not divide it


def runnable(kernel, scheme, m, dtype=torch.float16, **kwargs):
    problem = make_problem(
        scheme, n=N, k=K, m=m, device=DEVICE, layout=kernel.layout, x_dtype=dtype, **kwargs
    )
    return kernel.refusal(problem) is None


# So few that each kernel takes one of them.
ROWS = (2, 3, 17, 97)


def type_for(kernel, scheme, m, **kwargs):
    """The first of two types of x that a kernel takes; None for neither."""
    for dtype in (torch.float16, torch.bfloat16):
        if runnable(kernel, scheme, m, dtype, **kwargs):
            return dtype
    return None


def runnable_in_some_type(kernel, scheme, m):
    return type_for(kernel, scheme, m) is not None


CASES = [
    pytest.param(kernel, text, id=f"{kernel.name}-{text[:16]}")
    for kernel in KERNELS
    for text in schemes.ALL
    if any(runnable_in_some_type(kernel, QuantScheme.parse(text), m) for m in ROWS)
]
NO_GRADIENTS = pytest.mark.skip(reason="no kernel that gives gradients runs here")
GRADIENT_CASES = [case for case in CASES if case.values[0].grad_input is not None]
GRADIENT_CASES = GRADIENT_CASES or [pytest.param(None, None, marks=NO_GRADIENTS)]
FLOAT_CASES = [case for case in CASES if QuantScheme.parse(case.values[1]).weight_only]


def make(text, n=N, k=K, x=None, perm=False, bias=True):
    weight = torch.randn(n, k, device=DEVICE)
    scale = schemes.activation_scale(text, x) if x is not None else None
    return rounding.quantize(
        weight,
        text,
        perm=torch.randperm(k, device=DEVICE) if perm else None,
        activation_scale=scale if scale is not None else _static(text),
        bias=torch.randn(n, device=DEVICE) if bias else None,
    )


def _static(text):
    return 0.05 if QuantScheme.parse(text).activation.is_static else None


def seen_by(kernel, quantized, dtype):
    """The weight as a kernel multiplies it, in `dtype`: dequantized, and rounded once.

    Where codebooks are held in bf16 they are one number where x is bf16, two where it is fp16.
    """
    in_terms = kernel.weight_rounding == "bf16_terms" and dtype != torch.float32
    if kernel.weight_rounding != "x_dtype" and not in_terms:
        return quantized.dequantize().to(dtype)
    scheme, length = quantized.scheme, quantized.scheme.group_length(quantized.k)
    values = code_values(scheme, quantized.codes)
    if in_terms:
        first = values.bfloat16().float()
        rest = (values - first).bfloat16().float()
        values = first + rest if dtype == torch.float16 else first
    else:
        values = values.to(dtype).float()
    zeros = quantized.group_zeros()
    if zeros is not None:
        apply_by_group(values, zeros, length, torch.Tensor.sub_)
    scales = quantized.group_scales()
    if not in_terms:
        scales = scales.to(dtype).float()
    apply_by_group(values, scales, length, torch.Tensor.mul_)
    return quantized.to_column_order(values).to(dtype)


def may_refuse(kernel, scheme, dtype, m, n=N, k=K):
    """Whether a kernel that takes a scheme may still refuse this M or this type of x."""
    if dtype not in kernel.x_dtypes:
        return True
    problem = make_problem(
        scheme, n=n, k=k, m=m, device=DEVICE, layout=kernel.layout, x_dtype=dtype
    )
    least, most = kernel.rows(problem)
    return m < least or (most is not None and m > most)


def few_rows(kernel, scheme):
    """The least of some numbers of rows that a kernel takes, and a type of x that it takes."""
    return next(
        (m, dtype)
        for m in ROWS
        for dtype in (torch.float16, torch.bfloat16)
        if runnable(kernel, scheme, m, dtype)
    )


def run(kernel, quantized, x, **kwargs):
    layout = LAYOUTS[kernel.layout or "plain"]
    packed = pack(quantized, layout)
    rows = x if quantized.perm is None else x[:, quantized.perm]
    problem = make_problem(
        quantized.scheme,
        n=quantized.n,
        k=quantized.k,
        m=x.shape[0],
        device=DEVICE,
        layout=layout.name,
        x_dtype=x.dtype,
        **kwargs,
    )
    if kernel.refusal(problem) is not None:
        return None
    return kernel.run(rows, packed, quantized.bias, problem)


def expected(quantized, x):
    """float64 [M, N] of the scheme's formula, from the same codes and the reference's x_q."""
    weight = quantized.dequantize().double()
    if quantized.scheme.weight_only:
        left = x.double()
    else:
        packed = pack(quantized, LAYOUTS["plain"])
        rows = x if quantized.perm is None else x[:, quantized.perm]
        activation = quantized.scheme.activation
        if activation.has_zeros or activation.outliers:
            left = truth.rounded(quantized, rows)
        else:
            xq, scale = reference.quantize_activations(rows, packed)
            left = xq.double() * scale[:, None].double()
        if quantized.perm is not None:
            restored = torch.empty_like(left)
            restored[:, quantized.perm] = left
            left = restored
    y = left @ weight.t()
    return y if quantized.bias is None else y + quantized.bias.double()


@contextlib.contextmanager
def filled_with_nan():
    """Uninitialized tensors hold NaN, those that C++ allocates too."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would refuse
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def error(y, exact):
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("kernel", "text"), FLOAT_CASES)
def test_identity_gives_the_dequantized_weight_bit_for_bit(kernel, text):
    quantized = make(text, n=20, k=104, perm=True, bias=False)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        if not any(runnable(kernel, quantized.scheme, m, dtype) for m in ROWS):
            assert may_refuse(kernel, quantized.scheme, dtype, 17, 20, 104)
            continue
        exact = seen_by(kernel, quantized, dtype).t()
        x = torch.eye(104, dtype=dtype, device=DEVICE)
        # Some kernels take few rows at a time: the first and last columns of K, and some between.
        parts = [slice(None)]
        if not runnable(kernel, quantized.scheme, 104, dtype):
            parts = [slice(0, 2), slice(51, 53), slice(102, 104)]
        for part in parts:
            y = run(kernel, quantized, x[part])
            assert torch.equal(y, exact[part]), (dtype, part)


@pytest.mark.parametrize(("kernel", "text"), CASES)
@pytest.mark.parametrize("m", list(DTYPES_BY_ROWS))
def test_close_to_float64(kernel, text, m):
    for dtype in DTYPES_BY_ROWS[m]:
        x = torch.randn(m, K, dtype=dtype, device=DEVICE)
        # Real activations have channels far larger than the rest.
        x[:, ::50] *= 100
        quantized = make(text, x=x, perm=m == 3)
        y = run(kernel, quantized, x)
        if y is None:
            assert may_refuse(kernel, quantized.scheme, dtype, m)
            continue
        assert y.dtype == dtype and y.shape == (m, N)
        exact = expected(quantized, x)
        assert error(y, exact) <= FROBENIUS_BOUND[dtype], dtype


@pytest.mark.parametrize(("kernel", "text"), CASES)
def test_model_shape_many_rows_and_none(kernel, text):
    n, k = MODEL_SHAPE
    quantized = make(text, n=n, k=k)
    nothing = run(kernel, quantized, torch.randn(0, k, dtype=torch.float16, device=DEVICE))
    assert nothing is None or nothing.shape == (0, n)
    for m in (16, 129):
        dtype = kernel.x_dtypes[0]
        x = torch.randn(m, k, dtype=dtype, device=DEVICE)
        y = run(kernel, quantized, x)
        if y is not None:
            assert error(y, expected(quantized, x)) <= FROBENIUS_BOUND[dtype]


@pytest.mark.parametrize(("kernel", "text"), FLOAT_CASES)
def test_within_twice_the_error_of_a_dense_product(kernel, text):
    quantized = make(text, bias=False)
    m, dtype = few_rows(kernel, quantized.scheme)
    x = torch.randn(m, K, dtype=dtype, device=DEVICE)
    exact = expected(quantized, x)
    dense = (x @ quantized.dequantize().to(dtype).t()).double()
    assert error(run(kernel, quantized, x), exact) <= DENSE_FACTOR * error(dense, exact)


@pytest.mark.parametrize(("kernel", "text"), CASES)
def test_twice_the_same_bits(kernel, text):
    m, dtype = few_rows(kernel, QuantScheme.parse(text))
    x = torch.randn(m, K, dtype=dtype, device=DEVICE)
    quantized = make(text, x=x)
    assert torch.equal(run(kernel, quantized, x), run(kernel, quantized, x))


@pytest.mark.parametrize(("kernel", "text"), CASES)
def test_every_output_is_written_and_nothing_else(kernel, text, monkeypatch):
    guard, taken, real = 64, [], torch.empty

    def guarded(*size, dtype=None, device=None, **kwargs):
        """torch.empty with NaN (or the smallest integer) inside and around."""
        shape = tuple(size[0]) if size and isinstance(size[0], tuple | list | torch.Size) else size
        count = torch.Size(shape).numel()
        dtype = dtype or torch.float32
        poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
        whole = torch.full((count + 2 * guard,), 0, dtype=torch.float32, device=device)
        whole = (
            torch.full_like(whole, poison, dtype=dtype) if dtype.itemsize > 1 else whole.to(dtype)
        )
        taken.append((whole, whole.clone(), count))
        return whole[guard : guard + count].view(shape)

    m, dtype = few_rows(kernel, QuantScheme.parse(text))
    x = torch.randn(m, K, dtype=dtype, device=DEVICE)
    quantized = make(text, x=x)
    want = run(kernel, quantized, x)
    assert want.isfinite().all()
    if kernel.backend in ("cuda", "emulated"):
        # C++ allocates: torch can fill that with NaN, and a sanitizer guards the zones around it.
        with filled_with_nan():
            assert torch.empty(3).isnan().all()
            assert torch.equal(run(kernel, quantized, x), want)
        return
    monkeypatch.setattr(torch, "empty", guarded)
    got = run(kernel, quantized, x)
    monkeypatch.setattr(torch, "empty", real)
    assert taken and torch.equal(got, want)
    for whole, before, count in taken:
        for edge in (slice(0, guard), slice(guard + count, None)):
            assert torch.equal(whole[edge].view(torch.uint8), before[edge].view(torch.uint8)), (
                "a guard zone was written"
            )


@pytest.mark.parametrize(("kernel", "text"), CASES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_visible(kernel, text, bad):
    m, dtype = few_rows(kernel, QuantScheme.parse(text))
    x = torch.randn(m, K, dtype=dtype, device=DEVICE)
    quantized = make(text, x=x)
    x[1, 7] = bad
    y = run(kernel, quantized, x)
    per_tensor = quantized.scheme.activation.granularity == "tensor"
    assert not y[1].isfinite().any()
    if not per_tensor:
        assert y[0].isfinite().all() and y[2:].isfinite().all()


@pytest.mark.parametrize(("kernel", "text"), CASES)
def test_strided_rows(kernel, text):
    m, dtype = few_rows(kernel, QuantScheme.parse(text))
    wide = torch.randn(m, 2 * K, dtype=dtype, device=DEVICE)
    x = wide[:, ::2]
    quantized = make(text, x=x)
    assert torch.equal(run(kernel, quantized, x), run(kernel, quantized, x.contiguous()))


def reference_rows(quantized, x):
    return reference.linear(x, pack(quantized, LAYOUTS["plain"]), quantized.bias)


EXACT_CASES = [case for case in CASES if case.values[0].exact]


@pytest.mark.parametrize(("kernel", "text"), EXACT_CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_exact_kernels_are_the_reference_bit_for_bit(kernel, text, dtype):
    m, _ = few_rows(kernel, QuantScheme.parse(text))
    x = torch.randn(m, K, dtype=dtype)
    x[:, ::50] *= 100
    quantized = make(text, x=x)
    assert torch.equal(run(kernel, quantized, x), reference_rows(quantized, x))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("text", ["w4a16-g64", "w8a8", "w4a8-g64-flat", "w4a4-g64-flat"])
def test_batch_invariance(kernel, text):
    scheme = QuantScheme.parse(text)
    dtype = type_for(kernel, scheme, 19, batch_invariant=True)
    if dtype is None:
        takes = any(runnable_in_some_type(kernel, scheme, m) for m in ROWS)
        assert not takes or kernel.varies or (kernel.exact and not runnable(kernel, scheme, 19))
        return
    x = torch.randn(19, K, dtype=dtype, device=DEVICE)
    quantized = make(text)
    together = run(kernel, quantized, x, batch_invariant=True)
    for rows in (slice(0, 1), slice(5, 8), slice(0, 18)):
        alone = run(kernel, quantized, x[rows], batch_invariant=True)
        if alone is None:
            # Another kernel of the same bits runs these: sums are integers, or added in order.
            assert kernel.exact and may_refuse(kernel, scheme, x.dtype, x[rows].shape[0])
            alone = reference_rows(quantized, x[rows])
        assert torch.equal(alone, together[rows])


@pytest.mark.parametrize("text", [*schemes.INT8_ACTIVATION, *schemes.INT4_ACTIVATION])
def test_integer_products_are_exact(text):
    """With scales of one, y is the integer product itself, in every kernel."""
    quantized = make(text, bias=False)
    quantized = quantized.replace(scales=torch.ones_like(quantized.scales))
    if quantized.channel_scales is not None:
        quantized.channel_scales.fill_(1)
    largest = 7 if text in schemes.INT4_ACTIVATION else 127
    x = torch.randint(-largest, largest + 1, (17, K), device=DEVICE).float()
    x[:, 0] = largest
    if quantized.activation_scale is not None:
        quantized.activation_scale.fill_(1)
    want = x.double() @ quantized.dequantize().double().t()
    seen = 0
    for kernel in KERNELS:
        for m in (2, 17):
            if runnable(kernel, quantized.scheme, m, torch.float32):
                assert torch.equal(run(kernel, quantized, x[:m]).double(), want[:m]), kernel.name
                seen += 1
    assert seen >= 4


def test_both_integer_products_are_exact_at_the_largest_sums():
    k = 3000
    a = torch.full((2, k), -128, dtype=torch.int8)
    b = torch.randint(-128, 128, (3, k), dtype=torch.int8)
    b[0] = -128
    want = (a.double() @ b.double().t()).to(torch.int32)
    assert want[0, 0] == 128 * 128 * k
    assert torch.equal(reference.integer_product_in_floats(a, b), want)
    assert torch.equal(reference.integer_product(a, b), want)
    empty = reference.integer_product(a[:, :0], b[:, :0])
    assert empty.shape == (2, 3) and not empty.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_per_token_quantization(dtype):
    x = torch.randn(6, 100, dtype=dtype) * torch.tensor([[1e-3], [1.0], [300], [0], [1], [7]]).to(
        dtype
    )
    xq, s = activations.quantize_per_token(x)
    assert xq.dtype == torch.int8 and s.dtype == torch.float32 and s.shape == (6, 1)
    rows = x.float()
    scale = rows.abs().amax(1, keepdim=True) / 127
    assert s[3] == 1 and not xq[3].any()
    scale[3] = 1
    assert torch.equal(s, scale)
    assert torch.equal(xq.float(), (rows / scale).round())
    assert xq.abs().amax(1)[[0, 1, 2, 4, 5]].eq(127).all()


def test_wrong_input_is_named():
    layer = WQLinear.from_linear(torch.nn.Linear(64, 8), "w4a16-g32")
    for x, message in (
        (torch.randn(2, 63), r"\[..., 64\], got \[2, 63\]"),
        (torch.randn(2, 64, dtype=torch.float64), "float64"),
        (torch.ones(2, 64, dtype=torch.int32), "int32"),
        (torch.tensor(1.0), r"\[..., 64\], got \[\]"),
        (torch.empty(2, 64, device="meta"), "meta"),
    ):
        with pytest.raises(WeightError, match=message):
            layer(x) if x.device.type != "meta" else ops._linear(
                x, list(layer.packed.buffers.values()), None, layer._spec
            )
    with pytest.raises(NoKernelError, match="nonesuch"):
        WQLinear.from_linear(torch.nn.Linear(64, 8), "w4a16", backend="nonesuch")


@pytest.mark.parametrize(("kernel", "text"), GRADIENT_CASES)
@pytest.mark.parametrize(("m", "dtype"), [(3, torch.float16), (97, torch.bfloat16)])
def test_the_gradient_of_x(kernel, text, m, dtype):
    quantized = make(text, perm=True)
    packed = pack(quantized, LAYOUTS[kernel.layout])
    problem = make_problem(
        quantized.scheme, n=N, k=K, m=m, device=DEVICE, layout=kernel.layout, x_dtype=dtype
    )
    dy = torch.randn(m, N, device=DEVICE).to(dtype)
    dx = kernel.grad_input(dy, packed, problem)
    assert torch.equal(kernel.grad_input(dy, packed, problem), dx)
    dx = preparation.restore_columns(dx, packed)
    assert dx.shape == (m, K) and dx.dtype == dtype
    exact = dy.cpu().double() @ truth.dense(quantized.to("cpu"))
    assert truth.error(dx.cpu(), exact) <= FROBENIUS_BOUND[dtype]
