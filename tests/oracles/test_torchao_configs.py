"""Weights under torchao's configs, and under the schemes that say the same."""

import copy

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.errors import SchemeError
from qkernels.integrations.torchao import scheme_of
from tests.oracles.packages import package

package("torchao")

from torchao import quantization as torchao
from torchao.quantization.granularity import PerAxis, PerGroup, PerRow, PerTensor
from torchao.quantization.quant_primitives import MappingType

CONFIGS = [
    torchao.Int8WeightOnlyConfig(),
    torchao.Int8WeightOnlyConfig(granularity=PerTensor()),
    torchao.Int8WeightOnlyConfig(granularity=PerGroup(32)),
    torchao.Int8DynamicActivationInt8WeightConfig(),
    torchao.Int8DynamicActivationInt8WeightConfig(granularity=[PerTensor(), PerRow()]),
    torchao.Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC),
    torchao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4),
    torchao.Int8DynamicActivationIntxWeightConfig(weight_granularity=PerAxis(0)),
    torchao.IntxWeightOnlyConfig(),
    *(
        torchao.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(32), mapping_type=kind
        )
        for bits in (2, 3, 4, 8)
        for kind in (MappingType.SYMMETRIC, MappingType.ASYMMETRIC)
    ),
    torchao.Float8WeightOnlyConfig(),
    torchao.Float8WeightOnlyConfig(granularity=PerTensor()),
]
ALMOST_ALL = 0.99
"""Of the weights: the largest of a symmetric group lies between two codes, by the last bit of s."""


def name(config):
    return scheme_of(config)


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_the_same_weight(config):
    linear = nn.Linear(128, 96, bias=False)
    model = nn.Sequential(copy.deepcopy(linear))
    torchao.quantize_(model, config)
    theirs = model[0].weight.dequantize().float()
    scheme = scheme_of(config)
    if "-s" not in scheme.replace("-sym", "").replace("-static", ""):
        scheme += "-sfp32"
    ours = qk.WQLinear.from_linear(linear, scheme).dequantize()
    same = (ours - theirs).abs() <= 1e-5 * theirs.abs().max()
    assert same.float().mean() >= ALMOST_ALL
    x = torch.randn(5, 128)
    if "a16" not in scheme:
        wanted, got = model(x), qk.WQLinear.from_linear(linear, scheme)(x)
        assert (got - wanted).norm() / wanted.norm() < 0.02


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        (torchao.Int4WeightOnlyConfig(group_size=64), "w4a16-g64"),
        (torchao.Float8DynamicActivationInt4WeightConfig(), "w4afp8-g128-sym"),
        (torchao.Float8DynamicActivationFloat8WeightConfig(), "fp8-a8-gtensor-tensor"),
        (torchao.Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), "fp8-a8"),
    ],
)
def test_what_needs_a_gpu_there(config, scheme):
    assert scheme_of(config) == scheme


def test_what_has_no_equal_is_refused():
    for config in (
        torchao.IntxWeightOnlyConfig(weight_dtype=torch.int5),
        torchao.Int8DynamicActivationInt8WeightConfig(reduce_range=True),
        torchao.IntxWeightOnlyConfig(mapping_type=MappingType.SYMMETRIC_NO_CLIPPING_ERR),
    ):
        with pytest.raises(SchemeError, match="has no equal"):
            scheme_of(config)
