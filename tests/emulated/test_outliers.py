"""Columns of x with outliers, found on the device and left out of what is quantized."""

import pytest
import torch

from qkernels import reference
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
