import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkernels.errors import SchemeError
from qkernels.scheme import (
    FP4_E2M1_VALUES,
    GRANULARITIES,
    NF4_VALUES,
    WEIGHT_TYPES,
    Activation,
    QuantScheme,
    table_type,
)
from tests import schemes


@pytest.mark.parametrize("text", schemes.ALL)
def test_spelling_is_canonical(text):
    scheme = QuantScheme.parse(text)
    assert str(scheme) == text
    assert QuantScheme.parse(str(scheme)) == scheme
    assert hash(scheme) == hash(QuantScheme.parse(text))


@given(
    weight=st.sampled_from([*WEIGHT_TYPES.values(), table_type(tuple(range(16)))]),
    group_size=st.one_of(st.none(), st.integers(16, 4096)),
    per_tensor=st.booleans(),
    symmetric=st.booleans(),
    activation=st.builds(
        Activation,
        st.sampled_from(["none", "int8", "int4", "fp8"]),
        st.sampled_from(GRANULARITIES),
    ),
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    scale_levels=st.sampled_from(["one", "two", "double"]),
)
def test_every_valid_scheme_parses_back(**parts):
    try:
        scheme = QuantScheme(**parts)
    except SchemeError:
        return
    if scheme.weight_only:
        scheme = dataclasses.replace(scheme, activation=Activation())
    assert QuantScheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "''"),
        ("w5a16", "5-bit"),
        ("w4a16-g0", "group size 0"),
        ("w4a16-g2147483648", "group size 2147483648 is too large"),
        ("w8a8-tokenasym-static", "activation granularity a second time"),
        ("fp8-a8-tokenasym", "zero points of activations (tokenasym) are for int8"),
        ("w4afp8-staticasym", "zero points of activations (staticasym) are for int8"),
        ("w4a16-tokenasym", "'tokenasym' is about quantized activations"),
        ("w4a16-g", "'g'"),
        ("w4a16-g64-g32", "g32"),
        ("w4a16-static", "static"),
        ("w8a8-asym", "zero points"),
        ("w8a4-asym", "zero points"),
        ("nf4-a4", "int4 activations need linear integer weights, not nf4"),
        ("fp8-a4", "int4 activations need linear integer weights, not fp8e4m3"),
        ("w4a3", "'w4a3' is not a weight type"),
        ("w4a4-a8", "'a8' is not known"),
        ("w4a4-dq", "double-quantized scales are for 16-bit activations"),
        ("w4a4-static-outliers6", "int8 or int4 activations per token"),
        ("nf4-a8", "int8 activations"),
        ("fp8-a8-dq", "double"),
        ("table(1,2)-g16", "16 values"),
        ("table(x)-g16", "x"),
        (None, "not a string"),
    ],
)
def test_what_does_not_parse_is_named(text, named):
    with pytest.raises(SchemeError, match="does not parse") as caught:
        QuantScheme.parse(text)
    assert named in str(caught.value)
    assert "w4a16-g128" in str(caught.value)


def test_groups_need_not_divide_k():
    scheme = QuantScheme.parse("w4a16-g128")
    assert (scheme.groups(576), scheme.groups(128), scheme.groups(1)) == (5, 1, 1)
    assert QuantScheme.parse("w4a16").groups(576) == 1


def test_codebooks():
    assert sorted(NF4_VALUES) == list(NF4_VALUES)
    assert len(NF4_VALUES) == len(FP4_E2M1_VALUES) == 16
    # NF4 codes are the normal quantiles of equal areas on each side of 0, scaled to [-1, 1]; 0 is
    # exact. In the types that the table was published with: fp32 but for the quantiles.
    lower, upper = (torch.linspace(0.9677083, 0.5, n)[:-1].double() for n in (8, 9))
    quantiles = torch.special.ndtri(torch.cat((lower, upper.new_tensor([0.5]), upper)))
    quantiles[:7].neg_()
    table = quantiles.float().sort().values
    assert torch.equal(table / table.max(), torch.tensor(NF4_VALUES))
    # FP4 E2M1: sign, 2 exponent bits with bias 1, 1 mantissa bit.
    for code, value in enumerate(FP4_E2M1_VALUES):
        exponent, mantissa = code >> 1 & 3, code & 1
        size = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
        assert value == (-size if code & 8 else size)
