"""Observers of ranges: their formulas against plain numpy, and that what merged is one pass."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.ao.quantization import HistogramObserver, MovingAverageMinMaxObserver

from qkernels import reference
from qkernels.calibration.histogram import Histogram
from qkernels.calibration.observers import OBSERVERS, ObserverChoice, range_of
from qkernels.calibration.ranges import Cells, Numbers, scale_and_zero
from qkernels.calibration.thresholds import UNIFORM_BINS, kl_threshold
from qkernels.errors import RecipeError, SchemeError
from qkernels.scheme import Activation
from tests.bounds import BIN_BOUND

INT8, INT8_ZEROS = Numbers.integers(), Numbers.integers(symmetric=False)
CELLS = [Cells(), Cells("channel"), Cells("token"), Cells("group", 3)]
COLUMNS = 8


def seen(observer, *batches, cells=CELLS[0]):
    made = ObserverChoice.parse(observer).make(cells)
    for number, x in enumerate(batches):
        made.add(torch.as_tensor(x), batch=number)
    return made


def limits(observer, *batches, numbers=INT8_ZEROS, cells=CELLS[0]):
    low, high = seen(observer, *batches, cells=cells).range(numbers)
    assert low.dtype == high.dtype == torch.float32
    return low, high


def cells_of(x, cells):
    """The values of each cell of x [..., S, K], by plain numpy."""
    x = np.asarray(x).reshape(-1, *x.shape[-2:])
    if cells.granularity == "tensor":
        return [x.ravel()]
    if cells.granularity == "channel":
        return [x[:, :, k].ravel() for k in range(x.shape[2])]
    if cells.granularity == "token":
        return [x[:, s].ravel() for s in range(x.shape[1])]
    size = cells.group_size
    return [x[:, :, k : k + size].ravel() for k in range(0, x.shape[2], size)]


# --- Formulas


@pytest.mark.parametrize("cells", CELLS, ids=lambda cells: cells.granularity)
def test_minmax_is_the_range_with_zero(cells):
    x = torch.randn(2, 5, COLUMNS) + torch.arange(COLUMNS) - 3
    low, high = limits("minmax", x, cells=cells)
    wanted = cells_of(x, cells)
    assert low.tolist() == [min(0, each.min()) for each in wanted]
    assert high.tolist() == [max(0, each.max()) for each in wanted]


def test_a_moving_average_takes_batches_in_their_order():
    batches = [[[-1.0, 4.0]], [[-3.0, 8.0]], [[1.0, 16.0]]]
    low, high = limits("moving_average(momentum=0.75)", *batches)
    # 4, 0.75 * 4 + 0.25 * 8 = 5, 0.75 * 5 + 0.25 * 16; the third batch's range begins at 0.
    assert float(high) == 7.75
    assert float(low) == 0.75 * (0.75 * -1 + 0.25 * -3)
    made = ObserverChoice.parse("moving_average(momentum=0.75)").make()
    for number in (2, 0, 1):
        made.add(torch.tensor(batches[number]), batch=number)
    assert made.range(INT8) == (low, high)


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
def test_a_moving_average_is_that_of_torch(momentum):
    theirs = MovingAverageMinMaxObserver(averaging_constant=1 - momentum)
    batches = [torch.randn(30, COLUMNS) * (i + 1) for i in range(12)]
    for x in batches:
        theirs(x)
    low, high = limits(f"moving_average(momentum={momentum})", *batches)
    assert torch.allclose(low, theirs.min_val) and torch.allclose(high, theirs.max_val)


def test_a_moving_average_of_positions_leaves_out_batches_that_end_before():
    long, short = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[3.0]])
    for batches, first in (((long, short), 2.0), ((short, long), 2.0)):
        _, high = limits("moving_average(momentum=0.5)", *batches, cells=Cells("token"))
        assert high.tolist() == [first, 2.0, 4.0]


@pytest.mark.parametrize("percent", [50.01, 90.01, 99.01, 99.99])
@pytest.mark.parametrize("cells", CELLS, ids=lambda cells: cells.granularity)
def test_percentiles_are_those_of_numpy_up_to_a_bin(percent, cells):
    x = torch.randn(30, 40, COLUMNS) ** 3 + 0.1
    observer, wanted = f"percentile(percent={percent})", cells_of(x, cells)

    def near(found, part, of):
        for value, values in zip(found.tolist(), wanted, strict=True):
            exact = np.quantile(of(values), part, method="inverted_cdf")
            assert abs(value - exact) <= BIN_BOUND * abs(exact)

    low, high = limits(observer, x, numbers=INT8, cells=cells)
    assert torch.equal(torch.maximum(-low, high), high.maximum(-low))
    ends = torch.maximum(-low, high)
    near(ends, percent / 100, np.abs)
    low, high = limits(observer, x, cells=cells)
    out = (1 - percent / 100) / 2
    near(high, 1 - out, lambda values: values)
    near(low, out, lambda values: values)


def test_percentiles_of_tokens_by_hand():
    """Of the largest values 0.5, 2, 4 and 90 three are not above 4, of the least -0.5, -1, -2 and
    -3 three not below -2. Of all twelve magnitudes nine are not above 2."""
    x = torch.tensor([[0.5, 0.5, -3.0], [2.0, -1.0, 0.5], [4.0, 0.5, -2.0], [90.0, 1.0, -0.5]])
    low, high = limits("tokenwise(percent=75)", x)
    assert 4 <= float(high) <= 4 * (1 + BIN_BOUND) and -2 * (1 + BIN_BOUND) <= float(low) <= -2
    assert limits("tokenwise(percent=100)", x) == limits("minmax", x)
    _, high = limits("percentile(percent=75)", x, numbers=INT8)
    assert 2 <= float(high) <= 2 * (1 + BIN_BOUND)


def test_all_percent_is_the_range():
    x = torch.randn(50, COLUMNS)
    assert limits("percentile(percent=100)", x) == limits("minmax", x)


def plain_kl(counts, levels):
    """The threshold of the slides, bin by bin."""
    counts = np.asarray(counts, dtype=np.float64)
    used = np.flatnonzero(counts).max() + 1
    divergences = {}
    for i in range(levels, used + 1):
        outliers = counts[i:].sum()
        p = counts[:i].copy()
        p[i - 1] += outliers
        part_of = [j * levels // i for j in range(i)]
        q = np.zeros(i)
        for part in range(levels):
            own = [j for j in range(i) if part_of[j] == part]
            filled = [j for j in own if p[j] > 0]
            held = counts[own].sum()
            if part == levels - 1 and held == 0 and outliers:
                held = 1
            q[filled] = held / max(1, len(filled))
        p, q = p / p.sum(), q / q.sum()
        divergences[i] = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    least = min(divergences.values())
    return {i + 0.5 for i, value in divergences.items() if value <= least + 1e-12}


def test_kl_by_hand():
    """Four bins and two levels. i = 2: P = 6, 2 + 1 of 9, Q = 6, 2 of 8, so 2/3 log 8/9 + 1/3 log
    4/3 = 0.017. i = 3: P = 6, 2, 1 of 9, Q = 4, 4, 1 of 9, where what is clipped counts as one
    value: 2/3 log 3/2 + 2/9 log 1/2 = 0.116. i = 4: P = 6, 2, 0, 1 of 9, Q = 4, 4, 0, 1 of 9, the
    same."""
    counts = torch.zeros(UNIFORM_BINS, dtype=torch.int64)
    counts[:4] = torch.tensor([6, 2, 0, 1])
    assert kl_threshold(counts, 2) == 2.5
    # Q is P for i = 4 then, and nothing is clipped.
    counts[:4] = torch.tensor([3, 3, 1, 1])
    assert kl_threshold(counts, 2) == 4.5


@pytest.mark.parametrize("levels", [4, 16])
@pytest.mark.parametrize("used", [3, 40, 120])
@pytest.mark.parametrize("seed", range(6))
def test_kl_is_that_of_the_slides(levels, used, seed):
    random = np.random.default_rng(seed)
    counts = random.poisson(100 * np.exp(-np.arange(used) / 12), used)
    counts[random.random(used) < 0.2] = 0
    counts[0], counts[-1] = 90, 1
    whole = torch.zeros(UNIFORM_BINS, dtype=torch.int64)
    whole[:used] = torch.from_numpy(counts)
    found = kl_threshold(whole, levels)
    if used <= levels:
        assert found == used + 0.5
    else:
        assert found in plain_kl(counts, levels)


def test_kl_counts_2048_bins_and_cuts_off_a_tail():
    x = torch.randn(100_000).clamp(-4, 4)
    x[:20] = torch.linspace(12, 15.9, 20)
    counts = np.histogram(x.abs().numpy(), bins=UNIFORM_BINS, range=(0, 16))[0]
    whole = kl_threshold(torch.from_numpy(counts), 128)
    _, high = limits("kl", x.view(100, 1000), numbers=INT8)
    assert float(high) == whole * 16 / UNIFORM_BINS
    assert 3 < float(high) < 6
    # A range with zero points has the same limit, and its own lower end.
    above = x.abs().view(100, 1000)
    above[0, 50] *= -1
    assert limits("kl", above) == (above.min(), high)


def error_of(x, low, high, numbers):
    scale, zero = scale_and_zero(torch.tensor(low), torch.tensor(high), numbers)
    rounded = (x / scale + zero).round().clamp(numbers.least, numbers.most) - zero
    return float(((rounded * scale - x).double() ** 2).sum())


def test_mse_by_hand():
    """The numbers -1, 0, 1. Under the range of all values 99 ones become 0, an error of 99; the
    scale s has 99 (1 - s)^2 + (3 - s)^2, which is least at 102 / 100."""
    x, numbers = torch.tensor([[1.0] * 99 + [3.0]]), Numbers.integers(2)
    low, high = (float(end) for end in limits("mse", x, numbers=numbers))
    assert error_of(x, -3.0, 3.0, numbers) == 99
    least = 99 * 0.02**2 + 1.98**2
    assert low == 0 and error_of(x, low, high, numbers) <= 1.03 * least


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_leaves_no_more_than_the_histogram_of_torch(symmetric):
    """Which merges bins of equal width, and narrows a range from its ends by the error of those."""
    kind = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    theirs = HistogramObserver(dtype=torch.qint8, qscheme=kind)
    batches = [torch.randn(100, 50) ** 3 + 0.3 for _ in range(4)]
    for x in batches:
        theirs(x)
    scale, zero = theirs.calculate_qparams()
    every = torch.cat(batches)
    rounded = torch.fake_quantize_per_tensor_affine(every, scale, zero.int(), -128, 127)
    numbers = INT8 if symmetric else INT8_ZEROS
    low, high = (float(end) for end in limits("mse", *batches, numbers=numbers))
    assert error_of(every, low, high, numbers) <= float((rounded - every).double().square().sum())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_is_near_the_best_of_all_ranges(bits, symmetric):
    numbers = Numbers.integers(bits, symmetric=symmetric)
    x = torch.randn(20_000) ** 3 + 0.3
    low, high = (float(end) for end in limits("mse", x.view(20, 1000), numbers=numbers))
    found = error_of(x, low, high, numbers)
    bottom, top = float(x.min()), float(x.max())
    parts = np.geomspace(1, 2**-6, 60)
    pairs = zip(parts, parts, strict=True) if symmetric else itertools.product(parts, parts)
    best = min(error_of(x, bottom * a, top * b, numbers) for a, b in pairs)
    assert found <= 1.03 * best
    assert found < 0.9 * error_of(x, bottom, top, numbers)


# --- What merged is one pass


@st.composite
def collections(draw):
    """Batches of several lengths and sizes, over two processes."""
    shapes = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=5)
    lengths = draw(shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batches = []
    for rows, length in lengths:
        exponents = torch.randint(-60, 60, (rows, length, COLUMNS), generator=generator)
        x = torch.randn(rows, length, COLUMNS, generator=generator) * torch.exp2(exponents.float())
        x[torch.rand(x.shape, generator=generator) < 0.2] = 0
        batches.append(x)
    owners = draw(st.lists(st.integers(0, 1), min_size=len(batches), max_size=len(batches)))
    return batches, owners


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("cells", CELLS, ids=lambda cells: cells.granularity)
@settings(max_examples=25, deadline=None)
@given(collected=collections(), backwards=st.booleans())
def test_two_that_merge_are_one_that_saw_all(name, cells, collected, backwards):
    batches, owners = collected
    choice = ObserverChoice.parse(name)
    whole, parts = choice.make(cells), [choice.make(cells), choice.make(cells)]
    for number, (x, owner) in enumerate(zip(batches, owners, strict=True)):
        whole.add(x, batch=number)
        parts[owner].add(x, batch=number)
    a, b = reversed(parts) if backwards else parts
    sent = choice.make(cells)
    sent.load_state_dict(b.state_dict())
    a.merge(sent)
    state, wanted = a.state_dict(), whole.state_dict()
    assert state.keys() == wanted.keys()
    for key in wanted:
        assert state[key].dtype == wanted[key].dtype and torch.equal(state[key], wanted[key]), key


def test_bins_do_not_depend_on_what_came_first():
    values = torch.tensor([[1e-30, -3.0, 0.0, 2.0**20, 5.5, -1e-3, 3.0, 1e38]])
    whole = Histogram(4, 6)
    whole.add(0, values)
    for order in itertools.islice(itertools.permutations(range(8)), 0, 40320, 1999):
        one = Histogram(4, 6)
        for i in order:
            one.add(0, values[:, i : i + 1])
        assert torch.equal(one.counts, whole.counts) and torch.equal(one.top, whole.top)
    assert int(whole.counts.sum()) == 8
    edges = whole.edges()[0]
    assert edges[0] == 0 and (edges.diff()[1:] <= edges[1:-1] * 2**-4).all()
    assert edges[-1] > 1e38 >= edges[-2] / 2


# --- Odd values


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("numbers", [INT8, INT8_ZEROS], ids=["symmetric", "asymmetric"])
class TestOddValues:
    def test_nothing_and_zeros_have_the_scale_1(self, name, numbers):
        for x in ([], [torch.zeros(3, COLUMNS)], [torch.zeros(0, COLUMNS)]):
            low, high = limits(name, *x, numbers=numbers)
            assert low.tolist() == high.tolist() == [0]
            scale, zero = scale_and_zero(low, high, numbers)
            assert float(scale) == 1 and int(zero) in (0, -128)

    @pytest.mark.parametrize("value", [0.3, -0.3, 1e-41, 3e38])
    def test_a_constant_is_held(self, name, numbers, value):
        x = torch.full((40, COLUMNS), value)
        low, high = limits(name, x, numbers=numbers)
        scale, zero = scale_and_zero(low, high, numbers)
        held = float(((x / scale + zero).round().clamp(numbers.least, numbers.most) - zero)[0, 0])
        assert abs(held * float(scale) - value) <= max(2 * BIN_BOUND * abs(value), 2e-43 * 127)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_what_is_not_finite_is_not_hidden(self, name, numbers, value):
        x = torch.randn(10, COLUMNS)
        x[3, 2] = value
        made = seen(name, torch.randn(4, COLUMNS), x, torch.randn(4, COLUMNS))
        assert not all(part.isfinite().all() for part in made.state_dict().values())
        low, high = made.range(numbers)
        assert not (low.isfinite().all() and high.isfinite().all())
        assert scale_and_zero(low, high, numbers)[0].isnan().all()
        # Other cells are as they would be.
        low, high = limits(name, x, numbers=numbers, cells=Cells("channel"))
        clean = limits(name, x[:, :2], numbers=numbers, cells=Cells("channel"))
        assert torch.equal(low[:2], clean[0]) and torch.equal(high[:2], clean[1])
        assert not (low[2].isfinite() and high[2].isfinite())

    def test_one_huge_value(self, name, numbers):
        x = torch.randn(1000, 100)
        x[5, 5] = 1e6
        low, high = limits(name, x, numbers=numbers)
        assert -5 < float(low) <= 0
        if name in ("minmax", "moving_average"):
            assert float(high) == 1e6
        elif name == "percentile":
            exact = torch.quantile(x.abs().flatten().double(), 0.9999)
            assert abs(float(high) - float(exact)) < 0.1 * float(exact)
        elif name == "kl":
            # Its least range is 128 of 2048 bins below 2^20.
            assert float(high) == (128 + 0.5) * 2**20 / UNIFORM_BINS
        else:
            # Beyond it is clipped what costs less than coarse steps for all others.
            whole = error_of(x, 0.0, 1e6, numbers)
            assert error_of(x, float(low), float(high), numbers) <= 1.01 * whole


# --- Scales, zero points and names


@pytest.mark.parametrize("shift", [-3.0, 0.0, 0.4, 3.0])
def test_scales_and_zero_points_are_those_of_dynamic_activations(shift):
    x = torch.randn(30, 64) + shift
    x[4] = 0
    low, high = range_of(x, INT8_ZEROS, cells=Cells("token"))
    scale, zero = scale_and_zero(low, high, INT8_ZEROS)
    _, wanted, zeros = reference.quantize_rows_asymmetric(x)
    assert torch.equal(scale, wanted) and torch.equal(zero, zeros)
    low, high = range_of(x, INT8, cells=Cells("token"))
    scale, zero = scale_and_zero(low, high, INT8)
    assert torch.equal(scale, reference.quantize_rows(x, torch.int8)[1]) and not zero.any()


def test_numbers_by_hand():
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([3.0, 5.1])
    scale, zero = scale_and_zero(low, high, Numbers.integers(8, symmetric=False, signed=False))
    assert torch.allclose(scale, torch.tensor([4 / 255, 0.02])) and zero.tolist() == [64, 0]
    scale, zero = scale_and_zero(low, high, Numbers.integers(4))
    assert torch.allclose(scale, torch.tensor([3 / 7, 5.1 / 7])) and zero.tolist() == [0, 0]
    assert Numbers.of(Activation("int8", "static")) == INT8
    assert Numbers.of(Activation("int8", "staticasym")) == INT8_ZEROS
    assert Numbers.of(Activation("int4", "static")) == Numbers(-7, 7)
    assert Numbers.of(Activation("int4", "staticasym")) == Numbers(-8, 7, symmetric=False)
    floats = Numbers.of(Activation("fp8", "static"))
    assert floats.most == 448 and not floats.whole
    assert INT8.levels == INT8_ZEROS.levels == 128
    with pytest.raises(SchemeError, match="got 8 bits, symmetric=True, signed=False"):
        Numbers.integers(8, signed=False)
    with pytest.raises(SchemeError, match="got 'group' with group_size=None"):
        Cells("group")


@pytest.mark.parametrize("name", OBSERVERS)
def test_ranges_of_one_tensor_are_those_of_its_parts(name):
    x = torch.randn(2, 3, 7)
    each = {
        cells.granularity: range_of(x, INT8_ZEROS, name, cells)
        for cells in (*CELLS[:3], Cells("group", 4))
    }
    shapes = {"tensor": (), "channel": (7,), "token": (2, 3), "group": (2, 3, 2)}
    for granularity, (low, high) in each.items():
        assert low.shape == high.shape == shapes[granularity]
    for i, j in itertools.product(range(2), range(3)):
        row = range_of(x[i, j], INT8_ZEROS, name)
        assert (each["token"][0][i, j], each["token"][1][i, j]) == row
        group = range_of(x[i, j, 4:], INT8_ZEROS, name)
        assert (each["group"][0][i, j, 1], each["group"][1][i, j, 1]) == group


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "median",
            "observer 'median' is not one of minmax, moving_average, percentile, tokenwise, kl",
        ),
        ("minmax+kl", r"observer 'minmax\+kl' does not parse"),
        (3, "observer 3 does not parse"),
        ("kl(bins=3)", "observer kl has no parameter 'bins': it takes none"),
        ("percentile(percent=101)", r"observer percentile: percent must be in \(0, 100\], got 101"),
        ("percentile(percent=x)", "observer percentile: parameter percent is a number, got 'x'"),
        ("moving_average(momentum=1)", r"momentum must be in \[0, 1\), got 1"),
    ],
)
def test_a_mistake_in_a_choice_is_named(text, message):
    with pytest.raises(RecipeError, match=message):
        ObserverChoice.parse(text)


def test_the_canonical_spelling_parses_back():
    for text in ("minmax", "percentile(percent=99.9)", "moving_average(momentum=0.5)"):
        assert str(ObserverChoice.parse(text)) == text
    assert str(ObserverChoice.parse(" percentile( percent = 99.99 ) ")) == "percentile"
