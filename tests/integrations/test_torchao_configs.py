"""Schemes of torchao's configs, known by the names of their classes."""

import enum
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qkernels.errors import SchemeError
from qkernels.integrations.torchao import scheme_of
from qkernels.scheme import QuantScheme

Mapping = enum.Enum("MappingType", "SYMMETRIC SYMMETRIC_NO_CLIPPING_ERR ASYMMETRIC")


@dataclass
class PerRow:
    dim: int = -1


@dataclass
class PerTensor:
    pass


@dataclass
class PerAxis:
    axis: int


@dataclass
class PerGroup:
    group_size: int


@dataclass
class PerBlock:
    block_size: tuple


DEFAULTS: dict[str, dict[str, Any]] = {
    "Int4WeightOnlyConfig": {"group_size": 128, "int4_choose_qparams_algorithm": "tinygemm"},
    "Float8DynamicActivationInt4WeightConfig": {"int4_packing_format": "plain"},
    "Int8WeightOnlyConfig": {"group_size": None, "granularity": PerRow()},
    "Int8DynamicActivationInt8WeightConfig": {
        "act_mapping_type": Mapping.SYMMETRIC,
        "weight_only_decode": False,
        "granularity": PerRow(),
        "reduce_range": False,
    },
    "Int8StaticActivationInt8WeightConfig": {
        "act_mapping_type": Mapping.SYMMETRIC,
        "granularity": [PerTensor(), PerRow()],
        "reduce_range": False,
    },
    "IntxWeightOnlyConfig": {
        "weight_dtype": torch.int8,
        "granularity": PerAxis(0),
        "mapping_type": Mapping.SYMMETRIC,
        "scale_dtype": None,
        "intx_choose_qparams_algorithm": SimpleNamespace(name="AFFINE"),
    },
    "Int8DynamicActivationIntxWeightConfig": {
        "weight_dtype": torch.int8,
        "weight_granularity": PerGroup(32),
        "weight_mapping_type": Mapping.SYMMETRIC,
        "weight_scale_dtype": None,
        "act_mapping_type": Mapping.ASYMMETRIC,
        "intx_choose_qparams_algorithm": SimpleNamespace(name="AFFINE"),
    },
    "Float8WeightOnlyConfig": {"weight_dtype": torch.float8_e4m3fn, "granularity": PerRow()},
    "Float8DynamicActivationFloat8WeightConfig": {
        "activation_dtype": torch.float8_e4m3fn,
        "weight_dtype": torch.float8_e4m3fn,
        "granularity": [PerTensor(), PerTensor()],
        "packing_format": "plain",
        "activation_value_lb": None,
        "activation_value_ub": None,
    },
}


def config(name, **changes):
    made = type(name, (), {})()
    vars(made).update(DEFAULTS.get(name, {}), **changes)
    return made


INT4 = "Int4WeightOnlyConfig"
INT8 = "Int8WeightOnlyConfig"
BOTH8 = "Int8DynamicActivationInt8WeightConfig"
STATIC = "Int8StaticActivationInt8WeightConfig"
INTX = "IntxWeightOnlyConfig"
INT8_INTX = "Int8DynamicActivationIntxWeightConfig"
FLOAT8 = "Float8WeightOnlyConfig"
BOTH_FLOAT8 = "Float8DynamicActivationFloat8WeightConfig"


@pytest.mark.parametrize(
    ("name", "changes", "scheme"),
    [
        (INT4, {}, "w4a16-g128"),
        (INT4, {"group_size": 32}, "w4a16-g32"),
        ("Float8DynamicActivationInt4WeightConfig", {}, "w4afp8-g128-sym"),
        (INT8, {}, "w8a16-sym"),
        (INT8, {"granularity": PerTensor()}, "w8a16-gtensor-sym"),
        (INT8, {"granularity": PerGroup(64)}, "w8a16-g64-sym"),
        (INT8, {"group_size": 32}, "w8a16-g32-sym"),
        (BOTH8, {}, "w8a8"),
        (BOTH8, {"granularity": [PerTensor(), PerRow()]}, "w8a8-tensor"),
        (BOTH8, {"granularity": PerTensor()}, "w8a8-gtensor-tensor"),
        (BOTH8, {"act_mapping_type": Mapping.ASYMMETRIC}, "w8a8-tokenasym"),
        (STATIC, {}, "w8a8-static"),
        (STATIC, {"act_mapping_type": Mapping.ASYMMETRIC}, "w8a8-staticasym"),
        (INTX, {}, "w8a16-sym"),
        (INTX, {"weight_dtype": "torch.int4", "granularity": PerGroup(32)}, "w4a16-g32-sym"),
        (INTX, {"mapping_type": Mapping.ASYMMETRIC, "scale_dtype": torch.float32}, "w8a16-sfp32"),
        (INT8_INTX, {}, "w8a8-g32-tokenasym"),
        (INT8_INTX, {"weight_dtype": "torch.int4"}, "w4a8-g32-tokenasym-flat"),
        (
            INT8_INTX,
            {
                "weight_dtype": "torch.int4",
                "weight_granularity": PerAxis(0),
                "weight_mapping_type": Mapping.ASYMMETRIC,
                "act_mapping_type": Mapping.SYMMETRIC,
                "weight_scale_dtype": torch.bfloat16,
            },
            "w4a8-asym-sbf16",
        ),
        (FLOAT8, {}, "fp8e4m3-a16-sfp32"),
        (FLOAT8, {"weight_dtype": torch.float8_e5m2}, "fp8e5m2-a16-sfp32"),
        (FLOAT8, {"granularity": PerGroup(128)}, "fp8e4m3-a16-g128-sfp32"),
        (BOTH_FLOAT8, {}, "fp8-a8-gtensor-tensor"),
        (BOTH_FLOAT8, {"granularity": [PerRow(), PerRow()]}, "fp8-a8"),
    ],
)
def test_a_scheme_says_the_same(name, changes, scheme):
    assert scheme_of(config(name, **changes)) == scheme
    assert str(QuantScheme.parse(scheme)) == scheme


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("MXFPConfig", {}, "a MXFPConfig has no equal: known are Int4WeightOnlyConfig"),
        (INT4, {"int4_choose_qparams_algorithm": "hqq"}, "algorithm='hqq' is not supported"),
        (BOTH8, {"weight_only_decode": True}, "weight_only_decode=True"),
        (BOTH8, {"reduce_range": True}, "reduce_range=True"),
        (
            BOTH8,
            {"granularity": PerTensor(), "act_mapping_type": Mapping.ASYMMETRIC},
            r"inputs by PerTensor\(\) with zero points",
        ),
        (STATIC, {"granularity": PerRow()}, "static scales of inputs by PerRow"),
        (INTX, {"weight_dtype": "torch.int5"}, "5-bit weights are not supported"),
        (INTX, {"weight_dtype": torch.float16}, "weights of torch.float16 are not"),
        (INTX, {"granularity": PerAxis(1)}, r"weights by PerAxis\(axis=1\)"),
        (INTX, {"mapping_type": Mapping.SYMMETRIC_NO_CLIPPING_ERR}, "in a way of its own"),
        (INTX, {"scale_dtype": torch.float64}, "scales of torch.float64 are not"),
        (INT8_INTX, {"weight_mapping_type": Mapping.ASYMMETRIC}, "do not fit an int8 product"),
        (FLOAT8, {"weight_dtype": torch.bfloat16}, "weights of torch.bfloat16"),
        (BOTH_FLOAT8, {"granularity": [PerBlock((1, 128)), PerBlock((128, 128))]}, "PerBlock"),
        (BOTH_FLOAT8, {"activation_value_ub": 2.0}, "activation_value_ub=2.0"),
        (BOTH_FLOAT8, {"activation_dtype": torch.float8_e5m2}, "activation_dtype"),
        (BOTH_FLOAT8, {"packing_format": "sparse"}, "packing_format='sparse'"),
    ],
)
def test_what_has_no_equal_is_named(name, changes, said):
    with pytest.raises(SchemeError, match=said):
        scheme_of(config(name, **changes))
