"""What a weight has in 16 bits beside its codes, added by the kernel in the emulator."""

import pytest
import torch

from qkernels import sparse
from tests.bounds import FROBENIUS_BOUND
from tests.emulated.emulator import counted, last_blocks_alone, needs_emulator
from tests.emulated.test_limits import promised

pytestmark = needs_emulator

K = 70
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def add(y, x, columns=None, values=None, entries=None, scale=None, zero=None, dtype=None):
    held = (None, None, None) if entries is None else (entries[name] for name in sparse.NAMES)
    return torch.ops.qkernels_emulated.add_beside(
        *(y, x, columns, values, *held, scale, zero, dtype or y.dtype)
    )


def entries_of(n, k=K, dtype=torch.float16, integers=False):
    """Some numbers of each row; the first has all, and the second none."""
    numbers = torch.randint(-3, 4, (n, k)).float() if integers else torch.randn(n, k)
    mask = torch.rand(n, k) < 0.2
    mask[0] = True
    mask[1:2] = False
    return sparse.fields_of(numbers, mask, dtype)


def dense(n, k=K, columns=None, values=None, entries=None):
    """The same as a matrix, float64 [N, K]."""
    rows = torch.zeros(n, k)
    if columns is not None:
        rows[:, columns] += values.float()
    if entries is not None:
        sparse.add_to_rows(rows, 0, 0, entries)
    return rows.double()


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("m", [0, 1, 7, 8, 9, 20])
def test_it_is_added_and_rounded_once(m, n, x_dtype):
    """Integers, whose sums are exact in any order."""
    x = torch.randint(-4, 5, (m, K)).to(x_dtype)
    columns, values = torch.tensor([K - 1, 0, 31]), torch.randint(-3, 4, (n, 3)).half()
    for has_columns, has_entries in ((True, False), (False, True), (True, True)):
        what = {}
        if has_columns:
            what |= {"columns": columns, "values": values}
        if has_entries:
            what |= {"entries": entries_of(n, integers=True)}
        for y_dtype, dtype in zip(FLOATS, FLOATS[::-1], strict=True):
            y = (torch.randint(-9, 10, (m, n)) / 8).to(y_dtype)
            exact = y.double() + x.double() @ dense(n, **what).t()
            got = add(y, x, **what, dtype=dtype)
            assert got.dtype == dtype and torch.equal(got, exact.to(dtype)), what.keys()


@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("m", [1, 13])
def test_rows_of_int8_have_scales_and_zero_points(m, with_zeros):
    x = torch.randint(-128, 128, (m, K), dtype=torch.int8)
    scale = torch.rand(m) + 0.1
    zero = torch.randint(-128, 128, (m,), dtype=torch.int32) if with_zeros else None
    what = {"entries": entries_of(40), "columns": torch.tensor([5]), "values": torch.randn(40, 1)}
    what["values"] = what["values"].bfloat16()
    left = x.double() if zero is None else x.double() - zero[:, None]
    y = torch.randn(m, 40)
    exact = y + scale[:, None].double() * (left @ dense(40, **what).t())
    got = add(y, x, **what, scale=scale, zero=zero)
    assert (got - exact).norm() <= FROBENIUS_BOUND[torch.float32] * exact.norm()
    # A row that could not be quantized shows it, also where nothing is beside its codes.
    scale[0] = float("nan")
    assert add(y, x, **what, scale=scale, zero=zero)[0].isnan().all()


@pytest.mark.parametrize("k", [K, 40_000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_of_columns_and_values(k, dtype):
    x, y = torch.randn(3, k), torch.randn(3, 5)
    entries = entries_of(5, k, dtype)
    assert entries["sparse_columns"].dtype == (torch.int16 if k == K else torch.int32)
    exact = y + x.double() @ dense(5, k, entries=entries).t()
    got = add(y, x, entries=entries)
    assert (got - exact).norm() <= FROBENIUS_BOUND[torch.float32] * exact.norm()


def test_a_row_depends_on_no_other():
    x, y, entries = torch.randn(20, K).half(), torch.randn(20, 50).half(), entries_of(50)
    together = add(y, x, entries=entries)
    for rows in (slice(0, 1), slice(3, 12), slice(19, 20)):
        assert torch.equal(add(y[rows], x[rows], entries=entries), together[rows])


def test_strided_rows():
    x, y, entries = torch.randn(9, 2 * K).half(), torch.randn(9, 33).half(), entries_of(33)
    part = x[:, 3 : 3 + K]
    assert torch.equal(add(y, part, entries=entries), add(y, part.contiguous(), entries=entries))


def test_one_launch_reads_and_writes_y_once():
    m, n = 9, 64
    x, y, entries = torch.randn(m, K).half(), torch.randn(m, n), entries_of(n)
    with counted(y=y, values=entries["sparse_values"]) as counters:
        got = add(y, x, entries=entries, dtype=torch.float16)
    assert counters["launches"] == 1
    read = counters["regions"]["y"]["read"]
    assert read["least"] == read["most"] == 1 and read["bytes"] == y.nbytes
    assert counters["global_store"]["bytes"] == got.nbytes
    # Each number of the weight once for eight rows of x.
    assert counters["regions"]["values"]["read"]["bytes"] == 2 * entries["sparse_values"].nbytes
    for side in ("shared_load", "shared_store"):
        assert counters[side]["wavefronts"] == counters[side]["ideal_wavefronts"]


def test_the_last_numbers_of_the_largest_product():
    """More blocks than 2^16, and more bytes of y than 2^32."""
    m, n = 70_001, 32_001
    x, y = promised(m, 8, dtype=torch.float16), promised(m, n, dtype=torch.float16)
    ends = promised(n, dtype=torch.int32)
    x[-1, 3], y[-1, -1], ends[-1] = 2, 0.5, 1
    entries = (ends, torch.tensor([3], dtype=torch.int16), torch.tensor([7.0]).half())
    with last_blocks_alone():
        got = add(y, x, entries=dict(zip(sparse.NAMES, entries, strict=True)))
    assert got[-1, -1] == 14.5


def test_what_is_wrong_is_named():
    x, y, entries = torch.randn(3, K), torch.randn(3, 5), entries_of(5)
    columns, values = torch.tensor([1, 2]), torch.randn(5, 2).half()
    for message, arguments, more in (
        ("with the same M", (y[:2], x), {}),
        ("y must be contiguous", (torch.randn(5, 3).t(), x), {}),
        ("adjacent columns", (y, torch.randn(K, 3).t()), {}),
        ("columns go with column_values", (y, x, columns), {}),
        (r"column_values must have shape \[5, 2\]", (y, x, columns, values[:4]), {}),
        ("column_values must be fp16 or bf16", (y, x, columns, values.float()), {}),
        ("row_scales go with int8 x", (y, x), {"scale": torch.ones(3)}),
        ("row_scales go with int8 x", (y, x.to(torch.int8)), {}),
        (r"ends must have shape \[4\]", (y[:, :4].contiguous(), x), {"entries": entries}),
        ("dtype must be fp16, bf16 or fp32", (y, x), {"dtype": torch.float64}),
    ):
        with pytest.raises(ValueError, match=message):
            add(*arguments, **more)
