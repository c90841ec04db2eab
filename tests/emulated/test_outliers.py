"""Columns of x with outliers, found on the device and left out of what is quantized."""

import pytest
import torch

from qkernels import WQLinear, reference, rounding
from qkernels.errors import NoKernelError
from qkernels.layouts import FRAGMENT_INT8, fragment_int8, pack
from qkernels.weight import QuantizedWeight
from tests.bounds import FROBENIUS_BOUND
from tests.emulated.emulator import counted, needs_emulator, set_seed
from tests.test_row_kernels import COLUMNS, DTYPES, FORMS

pytestmark = needs_emulator


def find(x, threshold=6.0, **more):
    """The columns, and the flags of all as bools [K]."""
    flags, columns, count = torch.ops.qkernels_emulated.find_outliers(x, threshold, **more)
    bits = flags[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return columns[: int(count)].tolist(), bits.flatten().bool()


def rows(x, left_out=None, largest=127.0, scale=None):
    given = "token" if scale is None else "static"
    return torch.ops.qkernels_emulated.quantize_rows(
        *(x, "plain", None, None, None, 0.0, given, scale, torch.int8),
        left_out=left_out,
        largest=largest,
    )[:2]


def outlying(m, k, dtype):
    """Some columns with one, also the first and the last, NaN and infinity in two more."""
    x = torch.randn(m, k).clamp(-5, 5)
    if m:
        for column in (0, k // 3, k // 2, k - 1):
            x[column % m, column] = -9 if column % 2 else 6
        x[m // 2, k // 4], x[m - 1, k // 5] = float("nan"), -float("inf")
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", COLUMNS)
@pytest.mark.parametrize("m", [0, 1, 8, 9, 40])
def test_the_columns_of_the_reference_in_order(m, k, dtype):
    x = outlying(m, k, dtype)
    want = reference.outlier_columns(x, 6.0)
    for parts in (0, 1, 2, 5):
        columns, flags = find(x, parts=parts)
        assert columns == want.tolist()
        assert flags.nonzero()[:, 0].tolist() == columns


@pytest.mark.parametrize("form", FORMS)
def test_any_strides(form):
    x = FORMS[form](outlying(11, 300, torch.float16))
    if x.shape[1] > 1 and x.stride(1) != 1:
        with pytest.raises(ValueError, match="adjacent columns"):
            find(x)
        return
    assert find(x)[0] == reference.outlier_columns(x, 6.0).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [6.05, 0.1, 1e-9, 5.999])
def test_thresholds_that_are_no_numbers_of_a_type(dtype, threshold):
    near = torch.tensor(threshold).to(dtype)
    x = torch.stack([near, near.nextafter(near * 0), near.nextafter(near * 2), -near])[None]
    assert find(x, threshold)[0] == reference.outlier_columns(x, threshold).tolist()


@pytest.mark.parametrize("k", [7, 4099])
def test_all_columns(k):
    x = torch.full((3, k), 7.0)
    assert find(x)[0] == list(range(k))


@pytest.mark.parametrize("largest", [127.0, 7.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", COLUMNS)
def test_rows_without_them_are_those_of_the_reference(k, dtype, largest):
    x = outlying(9, k, dtype)
    flags, _, _ = torch.ops.qkernels_emulated.find_outliers(x, 6.0)
    left = reference.without_columns(x, reference.outlier_columns(x, 6.0))
    codes, scales = rows(x, flags, largest)
    want, want_scales = reference.quantize_rows(left, torch.int8, largest=largest)
    assert torch.equal(codes, want) and torch.equal(scales, want_scales)
    # Pieces that shared memory has no room for are read again, and left out again.
    again = torch.ops.qkernels_emulated.quantize_rows(
        *(x, "plain", None, None, None, 0.0, "token", None, torch.int8, False, 256),
        left_out=flags,
        largest=largest,
    )
    assert torch.equal(again[0], want) and torch.equal(again[1], want_scales)


@pytest.mark.parametrize("largest", [7.0, 100.0])
def test_fewer_bits_under_a_given_scale_saturate(largest):
    x, scale = torch.randn(5, 70) * 3, torch.tensor(0.2)
    want, _ = reference.quantize_rows(x, torch.int8, scale, largest=largest)
    assert torch.equal(rows(x, largest=largest, scale=scale)[0], want)


def test_one_launch_reads_x_once():
    x = outlying(40, 4096, torch.float16)
    with counted(x=x) as counters:
        find(x)
    assert counters["launches"] == 1
    read = counters["regions"]["x"]["read"]
    assert read["least"] == read["most"] == 1 and read["bytes"] == x.nbytes
    for side in ("shared_load", "shared_store"):
        assert counters[side]["wavefronts"] == counters[side]["ideal_wavefronts"]


def test_whichever_block_is_the_last():
    x = outlying(40, 1000, torch.bfloat16)
    want = find(x)[0]
    for seed in range(20):
        set_seed(seed)
        assert find(x, parts=4)[0] == want


WEIGHTS = ("w8a8", "w8a8-gtensor", "w8a8-g64", "w4a8", "w4a8-asym", "w4a8-g64", "w4a8-g64-asym")
GROUPS_APART = ("w4a8-g24-flat", "w4a8-g40-asym-flat", "w4a8-g24")
"""Weights whose groups are filled up."""


def product(x, packed, columns):
    """multiply_outliers, of x in the order of the codes."""
    scheme, k, held = packed.scheme, packed.k, packed.buffers
    order = fragment_int8.column_order(scheme, k, x.device)
    places = columns if order is None else order[1][columns]
    width = fragment_int8.kernel_columns(scheme, k)
    wide = torch.full((len(x), width), float("nan"), dtype=x.dtype)
    wide[:, places] = x[:, columns]
    listed = torch.zeros(width, dtype=torch.int32)
    listed[: len(places)] = places
    return torch.ops.qkernels_emulated.multiply_outliers(
        *(wide, listed, torch.tensor([len(places)], dtype=torch.int32), held["words"]),
        *(held["scales"], held.get("zeros"), held.get("channel_scales"), packed.n, width),
        *(fragment_int8.kernel_group(scheme, k), scheme.bits),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", [*WEIGHTS, *GROUPS_APART])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (9, 49)])
def test_columns_of_the_weight_as_they_dequantize(text, m, n, dtype):
    """Of x alone one number of a row, the weight itself comes out, bit for bit."""
    k = 200
    packed = pack(rounding.quantize(torch.randn(n, k), text), FRAGMENT_INT8)
    columns = torch.randperm(k)[:70]
    x = torch.zeros(m, k, dtype=dtype)
    own = columns[torch.arange(m)]
    x[torch.arange(m), own] = 1
    assert torch.equal(product(x, packed, columns), packed.columns(own).t())
    x = torch.randn(m, k).to(dtype)
    exact = x[:, columns].double() @ packed.columns(columns).double().t()
    got = product(x, packed, columns)
    assert (got - exact).norm() <= FROBENIUS_BOUND[torch.float32] * exact.norm()
    assert torch.equal(product(x, packed, columns[:0]), torch.zeros(m, n))
    assert torch.equal(product(x[-1:], packed, columns)[0], got[-1])


@pytest.mark.parametrize("n", [49, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_added_is_rounded_with_the_rest(dtype, n):
    """Numbers that are exact in fp32 and not in 16 bits: half of them would round otherwise."""
    k = 64
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8)
    weight = rounding.quantize(torch.randn(n, k), "w8a8", bias=torch.randint(-9, 9, (n,)).float())
    weight = weight.replace(codes=codes, scales=torch.ones_like(weight.scales))
    packed = pack(weight, FRAGMENT_INT8)
    x = torch.randint(-128, 128, (5, k), dtype=torch.int8)
    addend = torch.randint(-(2**18), 2**18, (5, n)) / 8
    got = torch.ops.qkernels_emulated.int8_mma(
        *(x, torch.ones(5), None, packed.buffers["words"], packed.buffers["scales"], None, None),
        *(weight.bias, n, k, k, 8, dtype),
        addend=addend,
    )
    exact = x.double() @ weight.dequantize().double().t() + weight.bias + addend
    assert torch.equal(got, exact.to(dtype))


def layers_of(weight: QuantizedWeight, **options):
    fast, slow = (
        WQLinear.from_weight(weight, backend=backend, **options)
        for backend in ("emulated", "reference")
    )
    assert fast.packed.layout is FRAGMENT_INT8
    return fast, slow


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [0, 1, 9, 70])
@pytest.mark.parametrize("text", [*WEIGHTS, *GROUPS_APART, "w4a4-g64", "w8a4"])
def test_a_layer_gives_what_the_reference_does(text, m, dtype):
    weight = rounding.quantize(
        torch.randn(49, 200) * 0.05,
        f"{text}-outliers6",
        bias=torch.randn(49),
        perm=torch.randperm(200),
    )
    fast, slow = layers_of(weight.replace(input_factor=torch.rand(200) + 0.5), dtype=dtype)
    x = torch.randn(m, 200)
    x[:, 5] *= 30
    x[m // 2 : m // 2 + 1, 77] = -20
    x = x.to(dtype)
    got, want = fast(x), slow(x).double()
    assert got.dtype == dtype and got.shape == (m, 49)
    assert (got - want).norm() <= FROBENIUS_BOUND[dtype] * want.norm()
    # With none it is the integers alone, whose sums are exact where they are of all of K.
    quiet = x.clamp(-2, 2) / 2
    fast, slow = layers_of(weight, dtype=dtype)
    got, want = fast(quiet), slow(quiet)
    if "flat" in text or text == "w8a8-g64":
        assert (got - want.double()).norm() <= FROBENIUS_BOUND[dtype] * want.double().norm()
    else:
        assert torch.equal(got, want)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_row(value):
    fast, _ = layers_of(rounding.quantize(torch.randn(49, 200), "w4a8-g64-outliers6"))
    x = torch.randn(5, 200)
    x[2, 3] = value
    y = fast(x)
    assert not y[2].isfinite().any() and y[[0, 1, 3, 4]].isfinite().all()


def test_integers_that_another_layer_reads():
    weight = rounding.quantize(torch.randn(64, 200), "w8a8-outliers3")
    fast, slow = layers_of(weight, dtype=torch.float16)
    reader = WQLinear.from_weight(
        rounding.quantize(torch.randn(8, 64), "w8a8-static", activation_scale=0.5)
    )
    x = torch.randn(9, 200).half()
    got, want = (layer.quantized_for(x, reader, relu=True) for layer in (fast, slow))
    # Where sums of columns round otherwise, a number on an edge goes to the next integer.
    assert (got.values.int() - want.values.int()).abs().max() <= 1
    assert torch.equal(got.scale, want.scale)


def test_four_launches_and_nothing_read_on_the_host():
    fast, _ = layers_of(rounding.quantize(torch.randn(64, 256), "w8a8-outliers3"))
    x = torch.randn(3, 256).half()
    with counted() as counters:
        fast(x)
    assert counters["launches"] == 4
    with torch.autograd.profiler.profile() as profile:
        fast(x)
    names = {event.name for event in profile.function_events}
    assert names == {"qkernels::linear", "aten::empty"}


def test_rows_that_must_not_see_each_other_are_refused_by_name():
    weight = rounding.quantize(torch.randn(49, 200), "w8a8-outliers6")
    layer = WQLinear.from_weight(weight, backend="emulated", batch_invariant=True)
    with pytest.raises(NoKernelError, match="finds columns with outliers in all rows of x"):
        layer(torch.randn(3, 200))


def test_what_is_wrong_is_named():
    x = torch.randn(3, 20)
    flags = torch.zeros(3, dtype=torch.uint8)
    for message, call in (
        ("threshold must be above 0, got 0", lambda: find(x, 0.0)),
        ("x must have columns", lambda: find(x[:, :0])),
        (r"left_out must have shape \[3\]", lambda: rows(x, flags[:2])),
        ("largest must be above 0, and 127 at most, got 128", lambda: rows(x, largest=128.0)),
        (
            "left out of plain rows to int8 without zero points alone",
            lambda: torch.ops.qkernels_emulated.quantize_rows(
                *(x, "silu_mul", x, None, None, 0.0, "token", None, torch.int8), left_out=flags
            ),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
