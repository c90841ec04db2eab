"""Every kernel that quantizes rows against its reference: the CPU's, Triton's, CUDA's on a GPU and
in its emulator where it is loaded (`make emulated`)."""

import itertools

import pytest
import torch

from qkernels import reference, select
from qkernels.backends.reference import row_values
from qkernels.backends.rows import KINDS, SCALES, RowInputs
from qkernels.select import make_row_problem
from tests.bounds import FROBENIUS_BOUND

KERNELS = [kernel for kernel in select.ROW_KERNELS if kernel.backend != "reference"]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
COLUMNS = (1, 7, 64, 576, 4099, 11008)
NORMS = ("rms_norm", "layer_norm")
NAN, INF = float("nan"), float("inf")
REFERENCE = next(kernel for kernel in select.ROW_KERNELS if kernel.backend == "reference")

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


def same(got, want):
    """Whether quantized rows are the same, bit for bit, but for which NaN a scale is."""
    return (
        torch.equal(got.values, want.values)
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


def ask(kernel, kind, scale_of, x, rounds=False, **more):
    """Skips where the kernel does not run the problem."""
    problem = make_row_problem(kind, scale_of, x, rounds)
    reason = kernel.refusal(problem)
    if reason is not None:
        pytest.skip(reason)
    inputs = RowInputs(x=x, **more)
    return kernel.run(problem, inputs), REFERENCE.run(problem, inputs), row_values(problem, inputs)


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.name)
def kernel(request):
    return request.param


@pytest.mark.parametrize("scale_of", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", COLUMNS)
def test_plain_rows_are_the_reference_bit_for_bit(kernel, scale_of, dtype, k, device):
    if kernel.backend == "emulated":
        device = torch.device("cpu")
    scale = torch.tensor(0.02, device=device) if scale_of == "static" else None
    for name, form in FORMS.items():
        x = form(rows_of(dtype, k, device))
        if scale_of == "tensor":
            x = x[:7]
        if kernel.backend == "triton":
            # Infinity under a scale that knows nothing of it is 0 there.
            x = x.nan_to_num(1.0, posinf=2.0, neginf=-2.0) if scale_of == "static" else x
        got, want, _ = ask(kernel, "plain", scale_of, x, scale=scale)
        assert same(got, want), name


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("scale_of", SCALES[:3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", COLUMNS)
def test_fused_rows_are_close_to_the_reference(kernel, kind, scale_of, dtype, k, device):
    if kernel.backend == "emulated":
        device = torch.device("cpu")
    scale = torch.tensor(0.02, device=device) if scale_of == "static" else None
    gains = [torch.rand(k, device=device).to(of) for of in (dtype, torch.float32)]
    for name in ("dense", "odd_stride", "unaligned"):
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
    if kernel.backend == "emulated":
        device = torch.device("cpu")
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nan_and_infinity_stay_visible(kernel, dtype, bad, device):
    if kernel.backend == "emulated":
        device = torch.device("cpu")
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


def test_no_rows(kernel, device):
    if kernel.backend == "emulated":
        device = torch.device("cpu")
    for k in (0, 64):
        x = torch.randn(0, k, device=device)
        for scale_of in ("token", "tensor"):
            got, want, _ = ask(kernel, "plain", scale_of, x)
            assert same(got, want)
    got, want, _ = ask(kernel, "plain", "token", torch.randn(3, 0, device=device))
    assert same(got, want)


def test_rows_do_not_depend_on_each_other(kernel, device):
    if kernel.backend == "emulated":
        device = torch.device("cpu")
    x, other = torch.randn(2, 40, 999, device=device).bfloat16()
    for kind in KINDS[1:]:
        if kernel.refusal(make_row_problem(kind, "token", x)) is not None:
            continue
        together = ask(kernel, kind, "token", x, other=other)[0]
        for row in (0, 17, 39):
            alone = ask(kernel, kind, "token", x[row : row + 1], other=other[row : row + 1])[0]
            assert torch.equal(alone.values[0], together.values[row])
            assert torch.equal(alone.scale[0], together.scale[row])
