"""Every kernel that quantizes rows against its reference: the CPU's, Triton's, CUDA's on a GPU and
in its emulator where it is loaded (`make emulated`)."""

import itertools

import pytest
import torch

from qkernels import reference, rounding, select
from qkernels.backends import rows
from qkernels.backends.reference import row_values
from qkernels.backends.rows import CODES, KINDS, SCALES, RowInputs, make_row_problem
from qkernels.layouts import PLAIN, pack
from tests.bounds import FROBENIUS_BOUND, GATE_BOUND, GATE_NEAR_BOUND

KERNELS = [kernel for kernel in select.ROW_KERNELS if kernel.backend != "reference"]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
COLUMNS = (1, 7, 64, 576, 4099, 11008)
NORMS = ("rms_norm", "layer_norm")
ACTIVATIONS = (
    *("w8a8", "w8a8-tensor", "w8a8-static"),
    *("fp8-a8", "fp8-a8-tensor", "fp8-a8-static"),
)
"""Schemes with each granularity of 8-bit activations that rows are asked for."""
NAN, INF = float("nan"), float("inf")
REFERENCE = next(kernel for kernel in select.ROW_KERNELS if kernel.backend == "reference")

SLOW = "the interpreter is slow: bf16 rows of two lengths"


def is_slow(kernel, dtype, k):
    """Whether a case is left out in Triton's interpreter; 11008 columns are more than one block."""
    return kernel.backend == "interpreted" and (dtype != torch.bfloat16 or k not in (7, 11008))


FORMS = {
    "dense": lambda x: x,
    "odd_stride": lambda x: torch.nn.functional.pad(x, (0, 3))[:, : x.shape[1]],
    "unaligned": lambda x: torch.nn.functional.pad(x, (1, 7))[:, 1:-7],
    "one_row": lambda x: x[1:2].expand(3, -1),
    "columns_apart": lambda x: torch.stack([x, x], dim=-1)[..., 0],
}


def rows_of(dtype, k, device):
    """Rows of zeros, of every size, with ties of the rounding, with NaN and with infinity."""
    x = torch.randn(11, k, device=device)
    x[0] = 0
    x[1] *= 300
    x[2] *= 1e-4
    x[3] = 127
    x[3, ::2] = 0.5
    x[4] = torch.finfo(dtype).tiny
    x[5] = x[5].abs()
    x[6] = torch.finfo(dtype).max
    x[6, ::3] *= -1
    x[7, k // 2], x[8, k - 1], x[9, 0] = NAN, -INF, INF
    x[10, 0], x[10, k - 1] = INF, NAN
    return x.to(dtype)


def same_codes(got, want):
    """Whether codes have the same bits, but for which NaN a float8 is."""
    if got.dtype == torch.int8:
        return torch.equal(got, want)
    nan = want.float().isnan()
    bits = (codes.view(torch.uint8).masked_fill(nan, 0) for codes in (got, want))
    return torch.equal(got.float().isnan(), nan) and torch.equal(*bits)


def same(got, want):
    """Whether quantized rows are the same, bit for bit, but for which NaN a scale is."""
    return (
        got.values.dtype == want.values.dtype
        and same_codes(got.values, want.values)
        and got.scale.shape == want.scale.shape
        and torch.equal(got.scale.nan_to_num(-1.0), want.scale.nan_to_num(-1.0))
        and (got.zero is None) == (want.zero is None)
        and (got.zero is None or torch.equal(got.zero, want.zero))
    )


def close(got, want):
    """Whether they are what other orders of sums and another exponential may leave of each other:
    a unit of the rounding here and there."""
    whole = want.scale.isfinite()
    assert torch.equal(got.scale.isfinite(), whole)
    torch.testing.assert_close(got.scale[whole], want.scale[whole], rtol=1e-5, atol=0)
    if want.zero is not None:
        assert (got.zero - want.zero).abs().max() <= 1
    apart = (got.values.int() - want.values.int()).abs()
    assert apart.max() <= (1 if want.zero is None else 2)
    if want.zero is None:
        assert (apart == 0).float().mean() > 0.99


def ask(kernel, kind, scale_of, x, rounds=False, codes=torch.int8, **more):
    """Skips where the kernel does not run the problem."""
    problem = make_row_problem(kind, scale_of, x, rounds, codes)
    reason = kernel.refusal(problem)
    if reason is not None:
        pytest.skip(reason)
    inputs = RowInputs(x=x, **more)
    return kernel.run(problem, inputs), REFERENCE.run(problem, inputs), row_values(problem, inputs)


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.name)
def kernel(request):
    return request.param


@pytest.fixture
def device(kernel, device):
    """Simulators run on the CPU."""
    return torch.device("cpu") if kernel.backend in ("emulated", "interpreted") else device


@pytest.mark.parametrize(
    ("scale_of", "codes"),
    [pair for pair in itertools.product(SCALES, CODES) if pair != ("asymmetric", CODES[1])],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", COLUMNS)
def test_plain_rows_are_the_reference_bit_for_bit(kernel, scale_of, codes, dtype, k, device):
    if is_slow(kernel, dtype, k):
        pytest.skip(SLOW)
    scale = torch.tensor(0.02, device=device) if scale_of == "static" else None
    for name, form in FORMS.items():
        x = form(rows_of(dtype, k, device))
        if scale_of == "tensor":
            x = x[:7]
        got, want, _ = ask(kernel, "plain", scale_of, x, codes=codes, scale=scale)
        assert same(got, want), name


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("scale_of", SCALES[:3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", COLUMNS)
def test_fused_rows_are_close_to_the_reference(kernel, kind, scale_of, dtype, k, device):
    if is_slow(kernel, dtype, k):
        pytest.skip(SLOW)
    scale = torch.tensor(0.02, device=device) if scale_of == "static" else None
    gains = [torch.rand(k, device=device).to(of) for of in (dtype, torch.float32)]
    forms = ("dense", "odd_stride", "unaligned")
    for name in forms[:1] if kernel.backend == "interpreted" else forms:
        x, other = (FORMS[name](torch.randn(5, k, device=device).to(dtype)) for _ in range(2))
        for more in ({}, {"other": other}, *({"gain": gain} for gain in gains)):
            more |= {"epsilon": 1e-5, "scale": scale}
            if kind == "layer_norm" and "gain" in more:
                more |= {"bias": gains[0]}
            elif kind not in NORMS:
                more = {"other": other, "scale": scale}
            got, want, (_, total) = ask(kernel, kind, scale_of, x, **more)
            close(got, want)
            assert (got.total is None) == (total is None)
            assert total is None or torch.equal(got.total, total)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [7, 64, 4099])
def test_rounded_rows_are_what_is_quantized(kernel, kind, dtype, k, device):
    x, other = torch.randn(2, 5, k, device=device).to(dtype)
    gain = torch.rand(k, device=device) if kind in NORMS else None
    bias = gain if kind == "layer_norm" else None
    more = {"other": other, "gain": gain, "bias": bias, "epsilon": 1e-5}
    got, want, _ = ask(kernel, kind, "token", x, rounds=True, **more)
    assert got.rounded.dtype == dtype
    error = (got.rounded.double() - want.rounded.double()).norm() / want.rounded.double().norm()
    assert error <= FROBENIUS_BOUND[dtype]
    values, scale = reference.quantize_rows(got.rounded, torch.int8)
    assert torch.equal(got.values, values) and torch.equal(got.scale, scale)


@pytest.mark.parametrize("kind", ["layer_norm", "gelu_mul"])
def test_float8_rows_behind_norms_and_gates(kernel, kind, device):
    x, other = torch.randn(2, 5, 300, device=device).bfloat16()
    got, want, _ = ask(kernel, kind, "token", x, codes=torch.float8_e4m3fn, other=other)
    torch.testing.assert_close(got.scale, want.scale, rtol=1e-5, atol=0)
    # A place of the last of three bits, here and there.
    apart = got.values.view(torch.uint8).int() - want.values.view(torch.uint8).int()
    assert apart.abs().max() <= 1 and (apart == 0).float().mean() > 0.99


def test_gates_over_their_whole_range(kernel, device):
    def gate_of(kind, x):
        """From its rounded rows."""
        one = torch.ones_like(x)[None]
        return ask(kernel, kind, "token", x[None], rounds=True, other=one)[0].rounded[0].cpu()

    def error(got, exact):
        return ((got.double() - exact) / exact).abs()

    x = torch.linspace(-13, 20, 20_001)
    exact = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    found = error(gate_of("gelu_mul", x.to(device)), exact)
    assert found[x > 4].max() <= 2**-23  # that of a rounding
    assert found[(x > -4) & (x != 0)].max() <= GATE_NEAR_BOUND
    assert found[x != 0].max() <= GATE_BOUND
    inner = 2 * (2 / torch.pi) ** 0.5 * (x.double() + 0.044715 * x.double() ** 3)
    exact = x.double() * torch.sigmoid(inner)
    found = error(gate_of("gelu_tanh_mul", x.to(device)), exact)
    assert found[exact.abs() > 1e-30].max() <= GATE_BOUND
    for kind in ("silu_mul", "gelu_mul", "gelu_tanh_mul"):
        ends = gate_of(kind, torch.tensor([0.0, -0.0, INF, 3e38, -3e38, NAN], device=device))
        assert torch.equal(ends[:5], torch.tensor([0, 0, INF, 3e38, 0])), kind
        assert ends[5].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nan_and_infinity_stay_visible(kernel, dtype, bad, device):
    for kind, scale_of in itertools.product(KINDS, SCALES):
        x = torch.randn(3, 300, device=device).to(dtype)
        x[1, 299] = bad
        problem = make_row_problem(kind, scale_of, x)
        if scale_of == "static" or kernel.refusal(problem) is not None:
            continue
        other = torch.ones_like(x) if kind != "plain" else None
        scale = kernel.run(problem, RowInputs(x=x, other=other)).scale
        if scale_of == "tensor":
            assert not scale.isfinite()
        else:
            assert not scale[1].isfinite() and scale[[0, 2]].isfinite().all()


def test_a_static_scale_tells_of_rows_that_are_not_finite(kernel, device):
    x = torch.randn(4, 300, device=device)
    x[1, 7], x[3, 299] = NAN, INF
    scale = torch.tensor(0.02, device=device)
    for codes in CODES:
        got = ask(kernel, "plain", "static", x, codes=codes, scale=scale)[0]
        assert got.scale[[1, 3]].isnan().all() and (got.scale[[0, 2]] == scale).all()


@pytest.mark.parametrize("text", ACTIVATIONS)
def test_a_scheme_is_served_by_the_table(kernel, text, device, monkeypatch):
    asked = []

    def select_this(problem):
        asked.append(problem.codes)
        reason = kernel.refusal(problem)
        return REFERENCE if reason is not None else kernel

    monkeypatch.setattr(rows, "select_rows", select_this)
    scale = torch.tensor(0.02, device=device) if "static" in text else None
    w = torch.randn(8, 320, device=device)
    packed = pack(rounding.quantize(w, text, activation_scale=scale), PLAIN)
    x = rows_of(torch.bfloat16, 320, device)[:7]
    quantized, scales = rows.quantize_activations(x, packed)
    assert asked == [quantized.dtype] == [torch.int8 if "w8a8" in text else torch.float8_e4m3fn]
    want, want_scales = reference.quantize_activations(x, packed)
    assert torch.equal(scales, want_scales) and same_codes(quantized, want)


def test_no_rows(kernel, device):
    for k in (0, 64):
        x = torch.randn(0, k, device=device)
        for scale_of in ("token", "tensor"):
            got, want, _ = ask(kernel, "plain", scale_of, x)
            assert same(got, want)
    got, want, _ = ask(kernel, "plain", "token", torch.randn(3, 0, device=device))
    assert same(got, want)


def test_rows_do_not_depend_on_each_other(kernel, device):
    x, other = torch.randn(2, 40, 999, device=device).bfloat16()
    for kind in KINDS[1:]:
        if kernel.refusal(make_row_problem(kind, "token", x)) is not None:
            continue
        together = ask(kernel, kind, "token", x, other=other)[0]
        for row in (0, 17, 39):
            alone = ask(kernel, kind, "token", x[row : row + 1], other=other[row : row + 1])[0]
            assert torch.equal(alone.values[0], together.values[row])
            assert torch.equal(alone.scale[0], together.scale[row])
