"""Weights of every class that torchao stores, read and replaced to the package's own numbers."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import qkernels as qk
from qkernels.checkpoints import read_weights
from tests.bounds import FOREIGN_LOGITS

pytest.importorskip("torchao", reason="torchao is not installed: make oracles installs it")

from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

from tests.oracles.torchao_layers import layers

WITH_INPUTS = ("int8_asym_inputs", "int8_static", "int8_static_asym", "intx_inputs", "int8_scaled")
"""Those whose product torchao computes on a CPU."""


@pytest.fixture(scope="module")
def made():
    return layers()


def test_what_the_package_stores_is_read_to_its_numbers(made, tmp_path):
    tensors, metadata = flatten_tensor_state_dict(
        {f"{name}.weight": weight for name, (weight, _) in made.items()}
    )
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        tmp_path / "model.safetensors",
        metadata,
    )
    config = {"quantization_config": {"quant_method": "torchao"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = read_weights(tmp_path)
    assert weights.keys() == made.keys()
    for name, (_, want) in made.items():
        assert torch.equal(weights[name].dequantize(), want), name


def test_modules_with_such_weights_are_replaced(made):
    model = nn.ModuleDict()
    for name, (weight, _) in made.items():
        layer = nn.Linear(1, 1, bias=False)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        model[name] = layer
    old = {name: model[name] for name in WITH_INPUTS}
    report = qk.replace_linears(model)
    assert not report.left and {layer.name for layer in report.replaced} == set(made)
    for name, (_, want) in made.items():
        assert torch.equal(model[name].dequantize(), want), name
    for name, layer in old.items():
        x = torch.randn(5, 96)
        want, got = layer(x), model[name](x)
        assert (got - want).norm() < FOREIGN_LOGITS * want.norm(), name
