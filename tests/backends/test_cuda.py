"""Why the CUDA kernels cannot run, told beforehand: no GPU, too old a one, code for other ones."""

from dataclasses import replace

import pytest
import torch

from qkernels import explain
from qkernels.backends import cuda
from qkernels.scheme import QuantScheme
from qkernels.select import make_problem, select

MMA, DENSE, FLOAT, BESIDE, INT8, GROUPED, POSITIONS, INT4, INT8_BESIDE, OUTLIERS = cuda.KERNELS


def question(text="w4a16-g128", m=1, x_dtype=torch.float16, layout="fragment", **changes):
    scheme = QuantScheme.parse(text)
    problem = make_problem(
        scheme, n=4096, k=4096, m=m, device="cpu", layout=layout, x_dtype=x_dtype
    )
    return replace(problem, **{"device": "cuda", "capability": (9, 0), **changes})


@pytest.fixture
def built(monkeypatch):
    monkeypatch.setattr(cuda, "build_problem", lambda: None)
    monkeypatch.setattr(cuda, "built_architectures", lambda: ("8.0", "9.0a"))


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 0), ("8.0",), True),
        ((8, 6), ("8.0",), True),
        ((8, 0), ("8.6",), False),
        ((9, 0), ("8.0", "8.6"), False),
        ((9, 0), ("9.0a",), True),
        ((9, 1), ("9.0a",), False),
        ((12, 0), ("9.0+PTX",), True),
        ((12, 1), ("12.0",), True),
        ((12, 0), ("9.0a+PTX",), False),
        ((8, 0), ("9.0+PTX",), False),
    ],
)
def test_architectures_of_the_build(capability, built, runs):
    reason = cuda.missing_architecture(capability, built)
    assert (reason is None) == runs
    if reason is not None:
        assert f"TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]}" in reason


@pytest.mark.usefixtures("built")
def test_what_the_kernels_take():
    assert MMA.refusal(question()) is None
    assert MMA.refusal(question(capability=(8, 9))) is None
    assert MMA.refusal(question(n=1 << 30, k=1024)) is None
    assert DENSE.refusal(question(n=1024, k=1 << 30)) is None
    for changes, message in (
        ({"device": "cpu"}, "needs a CUDA GPU"),
        ({"capability": (7, 5)}, "compute capability 8.0 or more"),
        ({"capability": (12, 0)}, "TORCH_CUDA_ARCH_LIST=12.0"),
        ({"x_dtype": torch.float32}, "fp16 or bf16"),
        ({"m": 257}, "256 rows of x at most, got 257"),
        ({"text": "log3-g64"}, "codebooks of 4 bits, not of 3"),
        ({"text": "w8a8"}, "16-bit activations"),
        ({"text": "nf4-g64-dq"}, "one level of scales"),
        ({"layout": "planar"}, "reads the fragment layout"),
        ({"n": (1 << 30) + 1}, "up to 2^30 rows and columns and 2^40 numbers"),
        ({"k": (1 << 30) + 1}, "this one is [4096, 1073741825]"),
        ({"n": 1 << 30, "k": 1025}, "2^40 numbers"),
        # Columns that fill groups up count.
        ({"text": "w4a16-g24", "n": 1024, "k": 1 << 30}, "2^30 rows and columns"),
    ):
        assert message in MMA.refusal(question(**changes)), changes


@pytest.mark.usefixtures("built")
def test_what_the_integer_kernels_take():
    def ask(text="w8a8", **changes):
        return question(text, **{"layout": "fragment_int8", **changes})

    for text in ("w8a8", "w8a8-gtensor-static", "w4a8-g64-tokenasym", "w4a8-staticasym"):
        for m, dtype in ((1, torch.float16), (4096, torch.bfloat16), (64, torch.float32)):
            assert INT8.refusal(ask(text, m=m, x_dtype=dtype)) is None
    assert GROUPED.refusal(ask("w8a8-g128")) is None
    for text in ("w8a8-outliers6", "w4a4-g64-flat-outliers2", "w4a8-g64-outliers6"):
        assert OUTLIERS.refusal(ask(text, m=300)) is None
    assert GROUPED.refusal(ask("w8a8-g64", n=1024, k=1 << 30)) is None
    assert INT8.refusal(ask(n=1 << 30, k=1024)) is None
    assert INT8.refusal(ask(k=131_071)) is None
    for kernel, changes, message in (
        (INT8, {"device": "cpu"}, "needs a CUDA GPU"),
        (INT8, {"capability": (7, 5)}, "compute capability 8.0 or more"),
        (INT8, {"text": "w4a8-g64-flat"}, "one scale a row, or two levels of them"),
        (GROUPED, {"text": "w4a8-g64"}, "is for groups with floating scales"),
        (INT8, {"text": "w3a8-g64"}, "4 and 8 bits, not of 3"),
        (INT8, {"text": "w8a16"}, "int8 activations, and the scheme has 16-bit ones"),
        (INT8, {"text": "w8a8-position"}, "no scales of activations per position"),
        (INT8, {"layout": "planar"}, "reads the fragment_int8 layout"),
        (INT8, {"k": 131_072}, "up to 131071 products of integers"),
        (INT8, {"text": "w8a8-tokenasym", "k": 65_794}, "up to 65793 products of integers"),
        (GROUPED, {"text": "w8a8-g131072", "k": 1 << 20}, "and not 131072"),
        (INT8, {"n": (1 << 30) + 1}, "up to 2^30 rows and columns and 2^40 numbers"),
        (INT8, {"n": 1 << 30, "k": 1025}, "2^40 numbers"),
        # Columns that fill groups up count.
        (INT8, {"text": "w4a8-g24", "k": 131_064}, "and not 174744"),
        (GROUPED, {"text": "w8a8-g24", "n": 1024, "k": 1 << 30}, "2^30 rows and columns"),
        (POSITIONS, {}, "is for schemes with scales of activations per position"),
        (INT4, {"text": "w4a4-tokenasym"}, "knows no zero points of activations"),
        (INT8, {"text": "w8a8-outliers6"}, "keeps no columns with outliers apart"),
        (OUTLIERS, {}, "is for schemes that keep columns with outliers apart"),
        (OUTLIERS, {"text": "w8a8-outliers6", "batch_invariant": True}, "wants each alone"),
        (OUTLIERS, {"text": "w8a8-outliers6", "k": 131_072}, "up to 131071 products"),
        (OUTLIERS, {"text": "w3a8-g64-outliers6"}, "4 and 8 bits, not of 3"),
    ):
        assert message in kernel.refusal(ask(**changes)), changes


@pytest.mark.usefixtures("built")
def test_they_come_first_on_a_gpu():
    select.cache_clear()
    try:
        for text in (
            *("w4a16-g128", "w8a16", "nf4-g64", "fp8e4m3-a16", "w4a16-g24"),
            *("w2a16-g64", "w3a16-g64"),
        ):
            assert select(replace(question(text), layout=None)) is MMA
            assert select(replace(question(text, m=257), layout=None)) is DENSE
        assert select(replace(question("log3-g64"), layout=None)).backend != "cuda"
        for text, kernel in (
            *(("w8a8", INT8), ("w4a8-g128", INT8), ("w8a8-staticasym", INT8)),
            *(("w8a8-g128", GROUPED), ("w8a8-position", POSITIONS), ("w4a4-g128", INT4)),
        ):
            assert select(replace(question(text), layout=None)) is kernel
        assert select(replace(question("w3a8-g128"), layout=None)).backend != "cuda"
        columns = frozenset({"outlier_columns", "outlier_values"})
        for text, kernel in (("w4a16-g128", BESIDE), ("w8a8", INT8_BESIDE), ("w4a4", INT8_BESIDE)):
            assert select(replace(question(text), layout=None, fields=columns)) is kernel
        floats = {"x_dtype": torch.float32}
        assert select(replace(question("w3a16-g64", **floats), layout=None)) is FLOAT
        assert select(replace(question("nf4-g64", **floats), layout=None)).backend != "cuda"
    finally:
        select.cache_clear()


@pytest.mark.usefixtures("built")
def test_many_rows_go_to_a_dense_product():
    assert DENSE.refusal(question(m=4096)) is None
    invariant = question(m=4096, batch_invariant=True)
    assert "cuBLAS" in DENSE.refusal(invariant)
    assert MMA.refusal(invariant) is None


@pytest.mark.usefixtures("built")
def test_floats_meet_weights_that_bf16_holds():
    for text in ("w2a16-g64", "w8a16", "fp4-g32", "fp8e5m2-a16"):
        for m in (1, 4096):
            assert FLOAT.refusal(question(text, m=m, x_dtype=torch.float32)) is None
    assert "takes x of fp32" in FLOAT.refusal(question())
    refusal = FLOAT.refusal(question("nf4-g64", x_dtype=torch.float32))
    assert "which those of nf4-g64 are not" in refusal


def test_explain_says_why_not():
    rows = {row.kernel: row for row in explain("w4a16-g128", n=64, k=64, m=1)}
    assert rows["cuda_weight_only_mma"].reason.startswith("needs a CUDA GPU")
    assert "emulated_weight_only_mma" in rows


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA, and so may the build")
def test_a_build_without_cuda_says_what_to_do():
    assert "built without CUDA" in cuda.build_problem()
