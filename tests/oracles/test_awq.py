"""Words of AutoAWQ's own classes, read; and ours, in the places of theirs."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qkernels as qk
from qkernels.checkpoints import open_checkpoint
from tests.bounds import FOREIGN_LOGITS
from tests.checkpoints.models import TOKENS, tiny_model
from tests.oracles.packages import package, random_parts, read_folder, weight_of, write_folder

package("awq")

from awq.models._config import AwqConfig
from awq.modules.linear import (
    WQLinear_GEMM,
    WQLinear_GEMV,
    WQLinear_GEMVFast,
    WQLinear_Marlin,
    gemm,
)
from awq.utils.packing_utils import dequantize_gemm


def dense(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    layer.weight.data = weight
    return layer


def written(path, old, version, group, zero_point=True):
    """A folder of one layer, as `save_quantized` of AutoAWQ writes it."""
    config = AwqConfig(version=version, q_group_size=group, zero_point=zero_point)
    tensors = {f"layer.{name}": tensor for name, tensor in old.state_dict().items()}
    return write_folder(path, tensors, config.to_transformers_dict())


def check(path, weight, bias):
    read = read_folder(path)["layer"]
    assert torch.equal(read.dequantize(), weight)
    assert (read.bias is None) == (bias is None)
    assert bias is None or torch.equal(read.bias, bias.half())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("shape", [(64, 128), (32, 256), (160, 192)])
def test_gemm(tmp_path, shape, group, bias):
    codes, zeros, scales = random_parts(*shape, group, 4)
    layer = dense(weight_of(codes, zeros, scales, group), bias)
    along = (scales.float().t().contiguous(), zeros.t().contiguous())
    size = shape[1] if group == -1 else group
    old = WQLinear_GEMM.from_linear(layer, 4, size, scales=along[0], zeros=along[1])
    path = written(tmp_path, old, "GEMM", group)
    check(path, layer.weight.data, layer.bias)
    theirs = dequantize_gemm(old.qweight, old.qzeros, old.scales, 4, size)
    assert torch.equal(read_folder(path)["layer"].dequantize().half(), theirs.t())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", [(64, 128), (8, 384), (24, 2304)])
def test_gemv(tmp_path, shape, group, bias):
    codes, zeros, scales = random_parts(*shape, group, 4)
    layer = dense(weight_of(codes, zeros, scales, group), bias)
    old = WQLinear_GEMV.from_linear(layer, 4, group, scales=scales.float(), zeros=zeros)
    check(written(tmp_path, old, "GEMV", group), layer.weight.data, layer.bias)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", [(64, 128), (8, 384), (24, 2304)])
def test_gemv_fast(tmp_path, shape, group):
    codes, zeros, scales = random_parts(*shape, group, 4)
    layer = dense(weight_of(codes, zeros, scales, group), True)
    old = WQLinear_GEMVFast.from_linear(layer, 4, group, scales=scales.float(), zeros=zeros.float())
    path = written(tmp_path, old, "GEMV_FAST", group)
    # What is stored is s * z, rounded to fp16.
    index = torch.arange(shape[1]) // group
    products = (scales.float() * zeros).half().float()
    want = codes * scales.float()[:, index] - products[:, index]
    read = read_folder(path)["layer"]
    assert torch.equal(read.dequantize(), want)


@pytest.mark.parametrize("group", [128, -1])
@pytest.mark.parametrize("shape", [(64, 128), (256, 384)])
def test_marlin(tmp_path, shape, group):
    codes, _, scales = random_parts(*shape, group, 4)
    zeros = torch.full_like(scales, 8).int()
    layer = dense(weight_of(codes, zeros, scales, group), True)
    size = shape[1] if group == -1 else group
    old = WQLinear_Marlin.from_linear(layer, 4, size, scales=scales.float(), zeros=None)
    check(written(tmp_path, old, "Marlin", group, False), layer.weight.data, layer.bias)


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16", "w4a16-g32-sym"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ours_fill_their_modules(tmp_path, monkeypatch, scheme, dtype):
    # Its Triton kernels need a GPU.
    monkeypatch.setattr(gemm, "TRITON_AVAILABLE", False)
    model = tiny_model(tied=False).to(dtype)
    qk.quantize_model(model, scheme=scheme)
    qk.save_model(model, tmp_path / "out", format="awq")
    config = AwqConfig.from_pretrained(str(tmp_path / "out"))
    assert (config.version, config.w_bit) == ("gemm", 4)
    size = config.q_group_size
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    theirs = tiny_model(tied=False).to(dtype)
    theirs.load_state_dict(
        {name: t for name, t in tensors.items() if name in theirs.state_dict()}, strict=False
    )
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.layers
    for name in checkpoint.layers:
        old = theirs.get_submodule(name)
        layer = WQLinear_GEMM.from_linear(old, 4, size, init_only=True)
        parts = {key: tensors[f"{name}.{key}"] for key in layer.state_dict()}
        assert {part.rpartition(".")[2] for part in checkpoint.layers[name].tensors} == set(parts)
        layer.load_state_dict(parts)
        weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, layer.group_size)
        assert torch.equal(weight.t(), model.get_submodule(name).dequantize().half()), name
        theirs.set_submodule(name, layer)
    with torch.no_grad():
        got, want = theirs(TOKENS).logits.float(), model(TOKENS).logits.float()
    assert (got - want).norm() / want.norm() < FOREIGN_LOGITS
