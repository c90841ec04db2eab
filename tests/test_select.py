"""The choice of a kernel: by the rows' own data, the same for a whole range of m."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels import select
from qkernels.backends.kernel import WEIGHT_ROUNDINGS
from qkernels.errors import NoKernelError
from qkernels.scheme import QuantScheme
from tests import schemes

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def problems():
    return st.builds(
        select.make_problem,
        st.sampled_from([QuantScheme.parse(text) for text in schemes.ALL]),
        n=st.sampled_from([1, 49, 4096]),
        k=st.sampled_from([16, 200, 4096]),
        m=st.sampled_from([0, 1, 2, 3, 8, 9, 16, 39, 40, 95, 96, 128, 129, 256, 257, 5000]),
        device=st.just("cpu"),
        layout=st.sampled_from(["vnni", "plain", "planar", "fragment", None]),
        x_dtype=st.sampled_from(DTYPES),
        batch_invariant=st.booleans(),
        fields=st.sampled_from([(), ("perm",), ("perm", "outlier_values")]),
    )


@given(problem=problems(), other=st.integers(0, 600))
@settings(deadline=None)
def test_the_choice_holds_for_its_range_and_for_no_more(problem, other):
    choice = select.choose(problem)
    assert choice.kernel is select.select(problem)
    least, most = choice.least_rows, choice.most_rows
    assert least <= problem.m and (most is None or problem.m <= most)
    inside = least <= other and (most is None or other <= most)
    if inside:
        assert select.select(replace(problem, m=other)) is choice.kernel


@given(problem=problems(), other=st.integers(0, 600))
@settings(deadline=None)
def test_kernels_refuse_by_m_through_their_limits_alone(problem, other):
    for kernel in select.KERNELS:
        moved = replace(problem, m=other)
        assert kernel.refusal_of_any_rows(problem) == kernel.refusal_of_any_rows(moved)
        assert kernel.rows(problem) == kernel.rows(moved)


@pytest.mark.parametrize("kernel", select.KERNELS, ids=lambda kernel: kernel.name)
def test_rows_are_complete(kernel):
    assert kernel.name.startswith(kernel.backend)
    assert kernel.weight_rounding in WEIGHT_ROUNDINGS
    takes_int8 = "int8" in kernel.activations
    rounds = kernel.activation_outliers or kernel.activation_positions
    assert takes_int8 <= (kernel.run_quantized is not None or rounds)
    assert kernel.proves_itself != (kernel.is_simulator or kernel.backend == "reference")


def test_names_are_unique_and_found_by_searching_for_them():
    from pathlib import Path

    import qkernels.backends

    sources = "".join(path.read_text() for path in Path(qkernels.backends.__path__[0]).glob("*.py"))
    names = [kernel.name for kernel in (*select.KERNELS, *select.ROW_KERNELS)]
    assert len(set(names)) == len(names)
    assert all(f'name="{name}"' in sources for name in names)


def test_the_reference_is_the_last_that_is_no_simulator():
    kinds = [kernel.is_simulator for kernel in select.KERNELS]
    assert kinds == sorted(kinds)
    assert select.KERNELS[kinds.index(True) - 1].name == "reference"


def test_no_kernel_names_every_reason():
    problem = select.make_problem(
        QuantScheme.parse("w4a16-g64"), n=8, k=64, m=1, device="cpu", layout="plain"
    )
    with pytest.raises(NoKernelError, match=r"cuda_weight_only_mma: needs a CUDA GPU.*\n.*matmul"):
        select.select(problem, "cuda")
