"""The fields of a weight: carried everywhere, cut as the weight is, and multiplied with."""

import pytest
import torch

import qkernels as qk
from qkernels import rounding, sparse
from qkernels.backends.cuda import emulator_is_loaded
from qkernels.errors import WeightError
from qkernels.fields import FIELDS
from qkernels.layouts import LAYOUTS, pack
from tests import schemes
from tests.bounds import FROBENIUS_BOUND

N, K = 48, 192
COLUMNS = ("outlier_columns", "outlier_values")
NOTHING_BESIDE = dict.fromkeys((*COLUMNS, *sparse.NAMES))


def with_everything(text, n=N, k=K):
    """A weight that has every field which its scheme may have."""
    weight = torch.randn(n, k)
    plain = rounding.quantize(
        weight,
        text,
        perm=torch.randperm(k),
        activation_scale=schemes.activation_scale(text, weight),
        bias=torch.randn(n),
    )
    mask = torch.rand(n, k, generator=torch.Generator().manual_seed(0)) < 0.03
    # A row that has none, and one that has one in each column.
    mask[1], mask[n // 2] = False, True
    return plain.replace(
        input_factor=torch.rand(k) + 0.5,
        outlier_columns=torch.tensor([3, k - 1, 20]),
        outlier_values=torch.randn(n, 3).half(),
        **sparse.fields_of(torch.randn(n, k), mask),
    )


def error(y, exact):
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("text", ["w4a16-g64", "nf4-g64-dq", "w8a8", "w4a8-g64", "fp8-a8-static"])
def test_every_optional_field_is_multiplied_with(text):
    weight = with_everything(text)
    layer = qk.WQLinear.from_weight(weight)
    x = torch.randn(5, K)
    assert torch.equal(layer.dequantize(), weight.dequantize())
    got = layer(x).double() - weight.bias.double()
    exact = x.double() @ weight.dequantize().double().t()
    # Quantized activations leave an error of their own.
    bound = FROBENIUS_BOUND[torch.float32] if weight.scheme.weight_only else 0.03
    assert error(got, exact) <= bound
    for names in (["input_factor"], COLUMNS, sparse.NAMES):
        without = weight.replace(**dict.fromkeys(names))
        assert error(qk.WQLinear.from_weight(without)(x) - weight.bias, exact) > 0.1, names


def test_dequantizing_by_hand():
    weight = with_everything("w4a16-g64")
    codes, scales, zeros = (t.double() for t in (weight.codes, weight.scales, weight.zeros))
    rows = scales.repeat_interleave(64, 1) * (codes - zeros.repeat_interleave(64, 1))
    rows[:, weight.outlier_columns] += weight.outlier_values.double()
    first = 0
    for row, end in enumerate(weight.sparse_ends.tolist()):
        for entry in range(first, end):
            rows[row, int(weight.sparse_columns[entry])] += float(weight.sparse_values[entry])
        first = end
    want = torch.zeros_like(rows)
    want[:, weight.perm] = rows
    want *= weight.input_factor.double()
    assert error(weight.dequantize(), want) < 1e-6


@pytest.mark.parametrize("text", ["w4a16-g64", "w8a8"])
def test_an_input_factor_runs_on_the_kernels_and_again_when_they_are_known(text):
    weight = with_everything(text).replace(**NOTHING_BESIDE)
    layer = qk.WQLinear.from_weight(weight)
    reference = qk.WQLinear.from_weight(weight, backend="reference")
    names = {"input_factor", "perm"}
    rows = qk.explain(text, n=N, k=K, m=3, fields=names)
    assert next(row for row in rows if row.chosen).backend == "cpu"
    x = torch.randn(2, 3, K)
    for _ in range(3):
        assert error(layer(x), reference(x).double()) <= FROBENIUS_BOUND[torch.float32]


def test_kernels_that_do_not_know_a_field_say_so():
    rows = qk.explain("w4a16-g64", n=N, k=K, fields=("outlier_columns", "outlier_values", "perm"))
    chosen = next(row for row in rows if row.chosen)
    assert chosen.kernel == "cpu_float_beside"
    others = [row.reason for row in rows if row.backend == "cpu" and "float" in row.kernel]
    assert any("does not know outlier_columns, outlier_values" in reason for reason in others)


def needs(backend):
    if backend == "interpreted":
        pytest.importorskip("triton")
    if backend == "emulated" and not emulator_is_loaded():
        pytest.skip("the emulator is not loaded: run make emulated")


def chosen_for(weight, m, dtype, backend):
    options = {"x_dtype": dtype, "fields": NOTHING_BESIDE, "backend": backend}
    rows = qk.explain(weight.scheme, m=m, n=N, k=K, **options)
    return next(row.kernel for row in rows if row.chosen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("m", [1, 5, 20, 260])
@pytest.mark.parametrize(
    ("text", "backend"),
    [
        *(("w4a16-g64", "cpu"), ("nf4-g64-dq", "cpu"), ("w8a16-g20", "cpu")),
        *(("w4a16-g64", "interpreted"), ("nf4-g64-dq", "interpreted")),
        *(("w4a16-g64", "emulated"), ("w3a16-g20", "emulated"), ("fp8e4m3-a16", "emulated")),
    ],
)
def test_what_is_beside_the_codes_is_added_to_products(text, backend, m, dtype):
    needs(backend)
    if backend == "interpreted" and m > 20:
        pytest.skip("the interpreter takes a minute for it")
    weight = with_everything(text)
    layer = qk.WQLinear.from_weight(weight, dtype=dtype, backend=backend)
    assert chosen_for(weight, m, dtype, backend) == f"{backend}_float_beside"
    x = torch.randn(m, K).to(dtype)
    exact = x.double() @ weight.dequantize().double().t() + weight.bias.double()
    assert error(layer(x), exact) <= FROBENIUS_BOUND[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize("backend", ["cpu", "interpreted", "emulated"])
@pytest.mark.parametrize(
    "text", ["w8a8", "w4a8-g64-asym", "w4a8-g64-flat", "w8a8-static", "w8a8-tensor", "w4a4-g64"]
)
def test_what_is_beside_the_codes_meets_quantized_x(text, backend, m, dtype):
    needs(backend)
    weight = with_everything(text)
    assert chosen_for(weight, m, dtype, backend) == f"{backend}_int8_beside"
    x = torch.randn(m, K).to(dtype)
    # x that is quantized already takes no order of columns and no factor.
    inputs = {x: weight}
    if text == "w8a8":
        inputs[qk.quantize_activation(x)] = weight.replace(perm=None, input_factor=None)
    for given, part in inputs.items():
        layer, reference = (
            qk.WQLinear.from_weight(part, dtype=dtype, backend=name)
            for name in (backend, "reference")
        )
        assert error(layer(given), reference(given).double()) <= FROBENIUS_BOUND[dtype]


@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize("text", ["w8a8-outliers2", "w4a4-g64-outliers2"])
def test_what_is_beside_the_codes_meets_x_with_outliers(text, m):
    weight = with_everything(text)
    assert chosen_for(weight, m, torch.float32, None) == "cpu_int8_outliers_beside"
    x = torch.randn(m, K)
    want = qk.WQLinear.from_weight(weight, backend="reference")(x).double()
    assert error(qk.WQLinear.from_weight(weight)(x), want) <= FROBENIUS_BOUND[torch.float32]


@pytest.mark.parametrize("text", ["w8a8-position", "w4a4-g64-position"])
def test_what_is_beside_the_codes_meets_x_with_scales_per_position(text):
    weight = with_everything(text)
    assert chosen_for(weight, 5, torch.float32, None) == "cpu_int8_beside"
    x = torch.randn(2, 5, K)
    want = qk.WQLinear.from_weight(weight, backend="reference")(x).double()
    assert error(qk.WQLinear.from_weight(weight)(x), want) <= FROBENIUS_BOUND[torch.float32]


def test_gradients_pass_through_the_input_factor_and_the_column_order():
    weight = with_everything("w4a16-g64")
    for part in (weight, weight.replace(**NOTHING_BESIDE)):
        layer = qk.WQLinear.from_weight(part)
        x = torch.randn(3, K, requires_grad=True)
        grad = torch.randn(3, N)
        layer(x).backward(grad)
        assert error(x.grad, grad.double() @ part.dequantize().double()) < 1e-5


@pytest.mark.parametrize("text", ["w4a16-g64", "nf4-g64-dq", "w4a8-g64", "w4a16-gtensor"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_back_every_field(text, layout):
    weight = with_everything(text)
    if LAYOUTS[layout].why_not(weight.scheme) is not None:
        with pytest.raises(WeightError, match=f"the {layout} layout"):
            pack(weight, LAYOUTS[layout])
        return
    again = pack(weight, LAYOUTS[layout]).unpack(weight.bias)
    assert list(again.fields) == list(weight.fields)
    assert all(torch.equal(again.fields[name], value) for name, value in weight.fields.items())
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_a_state_dict_holds_every_field():
    weight = with_everything("w4a16-g64")
    layer = qk.WQLinear.from_weight(weight)
    held = {"words" if name.startswith("words") else name for name in layer.state_dict()}
    assert held == {"words", "bias", *weight.fields}
    other = qk.WQLinear.from_weight(with_everything("w4a16-g64"))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, K)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.dequantize(), layer.dequantize())


@pytest.mark.parametrize("text", [*schemes.WEIGHT_ONLY, "w8a8-static", "w4a8-g64-asym"])
def test_rows_and_columns_are_cut_with_all_that_goes_with_them(text):
    # 256 nested scales are 64 rows of 4 groups, or 256 rows of one.
    n, k = (512, 256) if text.endswith("-dq") else (N, K)
    weight = with_everything(text, n, k)
    whole = weight.dequantize()
    step = 16 if text.endswith(("-spqr", "-spqr-sfp32")) else 1
    if step > 1:
        with pytest.raises(WeightError, match="the scales of 16 rows are quantized together"):
            weight.rows(3, 11)
    middle = n // 2 // step * step
    for start, stop in ((0, middle), (middle, n), (256, 257) if n > 256 else (3 * step % n, n - 1)):
        part = weight.rows(start, stop)
        assert torch.equal(part.dequantize(), whole[start:stop])
        assert torch.equal(part.bias, weight.bias[start:stop])
    plain = weight.replace(perm=None)
    if text.endswith("-dq"):
        with pytest.raises(WeightError, match="doubly quantized"):
            plain.columns(0, 64)
        return
    whole, length = plain.dequantize(), weight.scheme.group_length(k)
    step = length if weight.scheme.groups(k) > 1 else 10
    for start, stop in ((0, step), (step, k)):
        part = plain.columns(start, stop)
        assert torch.equal(part.dequantize(), whole[:, start:stop])
        assert part.bias is None


def test_what_cannot_be_cut_is_named():
    weight = with_everything("w4a16-g64")
    for cut, message in (
        (lambda: weight.rows(0, N + 1), "rows 0 to 49 are not in 0 to 48"),
        (lambda: weight.rows(5, 5), "rows 5 to 5"),
        (lambda: weight.columns(0, 64), "in activation order cannot be cut"),
        (lambda: weight.replace(perm=None).columns(0, 60), "groups of 64"),
        (lambda: with_everything("nf4-g64-dq").rows(1, 9), "blocks of 256, and 3 of them"),
    ):
        with pytest.raises(WeightError, match=message):
            cut()


def entries(ends, columns):
    return {
        "sparse_ends": ends.int(),
        "sparse_columns": torch.tensor(columns, dtype=torch.int16),
        "sparse_values": torch.ones(len(columns)).half(),
    }


def test_wrong_fields_are_named():
    good = rounding.quantize(torch.randn(8, 64), "w4a16-g32")
    values = torch.zeros(8, 2).half()
    for changes, message in (
        ({"outlier_values": values}, "goes with the other one"),
        (
            {"outlier_values": values, "outlier_columns": torch.tensor([1, 64])},
            r"must be in 0..63, got 1 to 64",
        ),
        (
            {"outlier_values": values, "outlier_columns": torch.tensor([1, 1])},
            "must name no column twice",
        ),
        (
            {"outlier_values": values, "outlier_columns": torch.tensor([1])},
            r"outlier_values .* must have shape \[8, 1\], got \[8, 2\]",
        ),
        ({"input_factor": torch.ones(63)}, r"shape \[64\], got \[63\]"),
        ({"sparse_ends": torch.zeros(8).int()}, "goes with sparse_columns, sparse_values"),
        (entries(torch.arange(7), [1, 2]), r"sparse_ends .* must have shape \[8\], got \[7\]"),
        (entries(torch.arange(8), [1, 2]), "must end with 2, the number of entries, got 7"),
        (entries(torch.tensor([2, 1] + [2] * 6), [1, 2]), "must not fall"),
        (entries(torch.full((8,), 2), [1, 64]), r"must be in 0..63, got 1 to 64"),
        ({"nested_offset": torch.tensor(0.0)}, "takes no nested_offset"),
    ):
        with pytest.raises(WeightError, match=message):
            good.replace(**changes)
    with pytest.raises(TypeError, match="no field 'scale': they are scales"):
        good.replace(scale=torch.ones(8, 2))


def test_the_table_names_each_field_once_and_in_words():
    assert list(FIELDS) == [row.name for row in FIELDS.values()]
    assert all(name.isidentifier() and name not in ("words", "bias", "codes") for name in FIELDS)
