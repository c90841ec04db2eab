"""`replace_linears` where weights are no plain buffers: bitsandbytes, HQQ and torchao."""

import dataclasses
import enum
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import nn

import qkernels as qk
from qkernels.checkpoints import open_checkpoint
from qkernels.errors import LayerError
from tests.checkpoints.folders import same_weight
from tests.integrations.modules import GOLDEN, golden, module_of

FOLDERS = (
    "bnb-nf4-blocks",
    "bnb-nf4-dq-blocks",
    "bnb-fp4-blocks",
    "bnb-int8",
    "hqq-bits",
    "hqq-4bit-g64-axis1",
    "torchao-bits",
    "torchao-int8wo",
    "torchao-intx4-g32",
)


class _Stores(nn.Module):
    """Has its state dict made by the package, beyond its parameters."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination.update({prefix + name: tensor for name, tensor in self.stored.items()})


def four_or_eight_bits(folder, name):
    tensors, _, _ = golden(folder, name)
    kind = "Linear8bitLt" if "SCB" in tensors else "Linear4bit"
    module = module_of(kind, {}, base=_Stores, stored=tensors)
    module.weight = nn.Parameter(tensors["weight"], requires_grad=False)
    module.weight.quant_state = SimpleNamespace(dtype=torch.bfloat16)
    module.register_buffer("bias", tensors.get("bias"))
    return module


def hqq(folder, name):
    tensors, _, _ = golden(folder, name)
    codes, bias = tensors.pop("W_q"), tensors.pop("bias", None)
    meta = {key: _decoded(key, tensor) for key, tensor in tensors.items()}
    module = module_of("HQQLinear", {}, meta=meta, bias=bias, compute_dtype=torch.bfloat16)
    module.W_q = nn.Parameter(codes, requires_grad=False)
    return module


def _decoded(key, tensor):
    if key in ("scale", "zero"):
        return tensor
    if key in ("packing", "compute_dtype", "unpack_view_dtype"):
        return bytes(tensor.tolist()).decode()
    return torch.Size(tensor.tolist()) if key == "shape" else tensor.item()


def torchao(folder, name):
    tensors, _, _ = golden(folder, name)
    with safe_open(GOLDEN / folder / "model.safetensors", "pt") as file:
        about = json.loads(file.metadata()[f"{name}.weight"])
    attributes = {key: _object(value) for key, value in about["_data"].items()}
    parts = {key: tensors[f"_weight_{key}"] for key in about["_tensor_data_names"]}
    weight = type(about["_type"], (), {})()
    vars(weight).update(
        {"dtype": torch.float32, "zero_point": None, **attributes, **parts},
        tensor_data_names=["qdata", "scale"],
        optional_tensor_data_names=["zero_point"],
        tensor_attribute_names=list(attributes)[:1],
        optional_tensor_attribute_names=list(attributes)[1:],
    )
    module = nn.Linear(1, 1, bias=False)
    module._parameters["weight"] = weight
    if "bias" in tensors:
        module.bias = nn.Parameter(tensors["bias"], requires_grad=False)
    return module


def _object(value):
    """A value of torchao's metadata as Python has it."""
    if isinstance(value, list):
        return [_object(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    kind, data = value["_type"], value["_data"]
    if kind == "torch.dtype":
        return getattr(torch, data)
    if isinstance(data, str):
        return enum.Enum(kind, {data: 1})[data]
    fields = {key: _object(entry) for key, entry in data.items()}
    return dataclasses.make_dataclass(kind, list(fields))(**fields)


MAKE = {"bitsandbytes": four_or_eight_bits, "hqq": hqq, "torchao": torchao}


@pytest.mark.parametrize("folder", FOLDERS)
def test_layers_become_what_their_files_are_read_as(folder):
    checkpoint = open_checkpoint(GOLDEN / folder)
    make = MAKE[checkpoint.format.name]
    model = nn.ModuleList([make(folder, name) for name in checkpoint.layers])
    report = qk.replace_linears(model)
    assert not report.left and len(report.replaced) == len(checkpoint.layers) > 0
    for layer, name in zip(model, checkpoint.layers, strict=True):
        stored = checkpoint.read(name)
        assert torch.equal(layer.dequantize(), stored.dequantize()), name
        if stored.zeros is None or stored.zeros.is_floating_point():
            assert same_weight(layer.to_weight(), stored), name


def test_eight_bits_stand_for_the_type_of_the_bias_or_fp16():
    with_bias, without = (
        four_or_eight_bits("bnb-int8", "model.layers.0.self_attn.k_proj") for _ in range(2)
    )
    with_bias.stored["bias"] = with_bias.bias = with_bias.bias.bfloat16()
    without.bias = None
    del without.stored["bias"]
    model = nn.Sequential(with_bias, without)
    qk.replace_linears(model)
    assert (model[0].dtype, model[1].dtype) == (torch.bfloat16, torch.float16)
    assert model[1].bias is None


def test_groups_along_the_outputs_are_left_alone():
    model = nn.ModuleDict({"across": hqq("hqq-bits", "four"), "along": hqq("hqq-bits", "four")})
    model["across"].meta["axis"] = 0
    report = qk.replace_linears(model)
    assert [layer.name for layer in report.replaced] == ["along"]
    assert "axis=1" in report.left["across"] and type(model["across"]).__name__ == "HQQLinear"
    assert model["along"].dtype == torch.bfloat16


def test_tensors_that_no_scheme_holds_are_left_alone():
    layer = torchao("torchao-int8wo", "model.layers.0.self_attn.k_proj")
    weight = layer._parameters["weight"]
    other = type("Int4PreshuffledTensor", (), {})()
    vars(other).update(vars(weight))
    layer._parameters["weight"] = other
    with pytest.raises(LayerError, match="Int4PreshuffledTensor is not supported"):
        qk.replace_linears(nn.Sequential(layer))


def test_an_embedding_with_such_a_weight_is_no_layer_of_ours():
    layer = torchao("torchao-int8wo", "model.layers.0.self_attn.k_proj")
    embedding = nn.Embedding(2, 2)
    embedding._parameters["weight"] = layer._parameters["weight"]
    model = nn.Sequential(embedding, layer)
    assert [made.name for made in qk.replace_linears(model).replaced] == ["1"]
    assert model[0] is embedding


def test_weights_that_are_not_quantized_yet_are_left_alone():
    four, eight = (module_of(kind, {}) for kind in ("Linear4bit", "Linear8bitLt"))
    for module in (four, eight):
        module.weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(LayerError, match=r"0: .*move it to a device first; 1: .*float32"):
        qk.replace_linears(nn.Sequential(four, eight))


def test_weights_that_a_forward_has_reordered_are_left_alone():
    name = "model.layers.0.self_attn.k_proj"
    old, other = (four_or_eight_bits("bnb-nf4", name) for _ in range(2))
    old.weight.quant_state.packing_format_for_cpu = True
    model = nn.ModuleDict({"old": old, "other": other})
    report = qk.replace_linears(model)
    assert "before the first forward" in report.left["old"] and model["old"] is old
    assert [layer.name for layer in report.replaced] == ["other"]
    assert model["other"].dtype == torch.bfloat16
