"""A kernel that is wrong on this machine is caught, warned of once, and passed over."""

import warnings
from dataclasses import replace

import pytest
import torch

import qkernels as qk
from qkernels import proving, rounding, select
from qkernels.backends import failures
from qkernels.scheme import QuantScheme
from tests import schemes
from tests.bounds import FROBENIUS_BOUND

N, K = 64, 256


@pytest.fixture(autouse=True)
def proofs():
    """Every kernel is checked anew, and none is distrusted afterwards."""
    proving.forget_proofs()
    before = list(select.KERNELS)
    yield
    select.KERNELS[:] = before
    proving.forget_proofs()


def put_first(name="cpu_toy", **changes):
    """A kernel like the reference before all others, with some things changed."""
    reference = next(row for row in select.KERNELS if row.name == "reference")
    toy = replace(reference, name=name, backend="cpu", proves_itself=True, **changes)
    select.KERNELS.insert(0, toy)
    select.forget_choices()
    return toy


def breaking(change):
    """The reference's `run`, with its result changed."""
    reference = next(row for row in select.KERNELS if row.name == "reference")

    def run(*arguments):
        return change(reference.run(*arguments))

    return run


def raising(error):
    def run(*arguments):
        raise error

    return run


def without_last_column(y):
    y = y.clone()
    y[:, -1] = 0
    return y


def weight(text="w4a16-g64"):
    source = torch.randn(N, K)
    scale = schemes.activation_scale(text, source)
    return rounding.quantize(source, text, bias=torch.randn(N), activation_scale=scale)


def chosen(text, m=1):
    rows = qk.explain(text, n=N, k=K, m=m)
    return next(row.kernel for row in rows if row.chosen)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (breaking(without_last_column), "is off by"),
        (breaking(lambda y: y * 1.05), "is off by"),
        (breaking(lambda y: torch.full_like(y, float("nan"))), "is off by inf"),
        (breaking(lambda y: y[:, :-1]), "is off by inf"),
        (raising(RuntimeError("no kernel image\nis available")), "RuntimeError: no kernel image"),
        (raising(OSError("the driver is gone")), "OSError: the driver is gone"),
    ],
)
@pytest.mark.parametrize("text", ["w4a16-g64", "w8a8", "fp8-a8-static"])
def test_a_broken_kernel_is_caught_and_passed_over(run, said, text):
    put_first(run=run)
    assert chosen(text) == "cpu_toy"
    with pytest.warns(RuntimeWarning, match=rf"cpu_toy .*{said}") as caught:
        layer = qk.WQLinear.from_weight(weight(text))
    assert len(caught) == 1 and "qkernels doctor --check" in str(caught[0].message)
    reason = next(row.reason for row in qk.explain(text, n=N, k=K) if row.kernel == "cpu_toy")
    assert said in reason
    # The next one in order runs, and is right; nobody warns again.
    assert chosen(text) not in ("cpu_toy", "reference")
    x = torch.randn(3, K)
    reference = qk.WQLinear.from_weight(layer.to_weight(), backend="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qk.WQLinear.from_weight(weight(text))
        y, want = layer(x), reference(x).double()
    assert (y.double() - want).norm() <= FROBENIUS_BOUND[torch.float32] * want.norm()


def test_a_layer_that_was_there_before_goes_to_the_next_kernel_too():
    layer = qk.WQLinear.from_weight(weight())
    x = torch.randn(2, K)
    want = layer(x)
    put_first(run=breaking(lambda y: y * 2))
    with pytest.warns(RuntimeWarning, match="cpu_toy"):
        qk.WQLinear.from_weight(weight())
    assert torch.equal(layer(x), want)


def test_the_check_is_off_by_one_argument():
    put_first(run=breaking(lambda y: y * 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = qk.WQLinear.from_weight(weight(), check_kernels=False)
        linear = torch.nn.Linear(K, N)
        qk.WQLinear.from_linear(linear, "w4a16-g64", check_kernels=False)
    assert chosen("w4a16-g64") == "cpu_toy"
    right = qk.WQLinear.from_weight(layer.to_weight(), backend="reference")
    x = torch.randn(2, K)
    assert torch.allclose(layer(x), 2 * right(x), rtol=1e-4)


def test_each_kernel_is_checked_once_for_each_kind_of_weight_and_type_of_x():
    seen = []

    def run(x, packed, bias, problem):
        seen.append((str(packed.scheme), x.dtype))
        return reference.run(x, packed, bias, problem)

    reference = next(row for row in select.KERNELS if row.name == "reference")
    put_first(run=run, most_rows=5)
    for _ in range(2):
        for text in ("w4a16-g64", "w4a16-g32", "nf4-g64"):
            qk.WQLinear.from_weight(weight(text))
    assert len(seen) == len(set(seen)) == 9
    assert {dtype for _, dtype in seen} == set(FROBENIUS_BOUND)


def test_a_kernel_for_many_rows_is_checked_when_the_layer_is_made():
    put_first(run=breaking(lambda y: y * 2), least_rows=40)
    with pytest.warns(RuntimeWarning, match="cpu_toy"):
        qk.WQLinear.from_weight(weight())
    assert chosen("w4a16-g64", m=64) != "cpu_toy"


def test_nothing_is_checked_while_a_program_is_traced():
    put_first(run=raising(AssertionError("a kernel ran while tracing")))
    packed = qk.WQLinear.from_weight(weight(), check_kernels=False).packed
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        qk.WQLinear(packed)
    assert failures.reason("cpu_toy", "cpu") is None


def test_checking_leaves_random_numbers_and_default_types_alone():
    quantized = weight()
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            qk.WQLinear.from_weight(quantized)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.rand(4), want)


def test_the_kernels_of_this_machine_are_right():
    proofs = list(proving.prove_all(torch.device("cpu")))
    assert {proof.kernel for proof in proofs} >= {"cpu_portable_float", "cpu_portable_int8"}
    assert not [proof for proof in proofs if proof.reason is not None]


@pytest.mark.parametrize("text", proving.SCHEMES)
def test_the_small_problem_has_the_kind_of_groups_that_the_weight_has(text):
    scheme = QuantScheme.parse(text)
    large = scheme
    if scheme.group_size is not None:
        large = replace(scheme, group_size=scheme.group_size * 8)
    small = proving.small_scheme(large, 4096)
    assert replace(small, group_size=scheme.group_size) == scheme
    assert proving.small_scheme(scheme, 16).groups(proving.K) == 1
    assert small.groups(proving.K) > 1 or scheme.group_size is None
    if scheme.group_size is not None:
        assert small.group_size % 16 == (large.group_size % 16)
