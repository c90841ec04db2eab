"""`replace_linears` against the packages themselves, where they are installed."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import qkernels as qk

N, K = 32, 128
SECONDS = 300


def linear(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Linear(K, N, bias=bias, dtype=dtype)


def package(name):
    """The package, whose import may fail on another version of torch or of its peers."""
    return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


def replaced(module):
    """The new layer."""
    model = nn.Sequential(module)
    report = qk.replace_linears(model)
    assert len(report.replaced) == 1 and not report.left
    assert isinstance(model[0], qk.WQLinear)
    return model[0]


def test_autoawq():
    package("awq")
    from awq.modules.linear import WQLinear_GEMM, WQLinear_GEMV
    from awq.utils.packing_utils import dequantize_gemm

    for kind, along_rows in ((WQLinear_GEMM, True), (WQLinear_GEMV, False)):
        dense = linear()
        groups = dense.weight.data.view(N, K // 64, 64)
        scales = ((groups.amax(-1) - groups.amin(-1)) / 15).half().float()
        zeros = (-groups.amin(-1) / scales).round().clamp(0, 15)
        codes = (groups / scales[..., None]).round() + zeros[..., None]
        weight = (codes.clamp(0, 15) - zeros[..., None]) * scales[..., None]
        dense.weight.data = weight.view(N, K)
        given = (scales.t(), zeros.t()) if along_rows else (scales, zeros)
        given = tuple(tensor.contiguous() for tensor in given)
        old = kind.from_linear(dense, 4, 64, scales=given[0], zeros=given[1])
        layer = replaced(old)
        assert torch.equal(layer.dequantize(), weight.view(N, K))
        if along_rows:
            theirs = dequantize_gemm(old.qweight, old.qzeros, old.scales, 4, 64)
            assert torch.equal(layer.dequantize().half(), theirs.t())


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors(symmetric):
    package("compressed_tensors")
    from compressed_tensors.compressors import compress_module
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationScheme,
        initialize_module_for_quantization,
    )
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    args = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=symmetric)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    module = linear(torch.bfloat16)
    initialize_module_for_quantization(module, scheme)
    module.weight_scale.data.uniform_(0.01, 0.02)
    if not symmetric:
        module.weight_zero_point.data.copy_(torch.randint(-8, 8, module.weight_zero_point.shape))
    zeros = None if symmetric else module.weight_zero_point
    want = fake_quantize(module.weight.data, module.weight_scale, zeros, args)
    compress_module(module)
    layer = replaced(module)
    assert torch.equal(layer.dequantize().to(torch.bfloat16), want)
    assert layer.scheme.symmetric == symmetric and layer.dtype == torch.bfloat16


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_of_bitsandbytes(kind, double):
    bnb = package("bitsandbytes")
    dense = linear()
    old = bnb.nn.Linear4bit(K, N, quant_type=kind, compress_statistics=double)
    old.load_state_dict(dense.state_dict())
    old.to("cpu")
    want = bnb.functional.dequantize_4bit(old.weight.data, old.weight.quant_state)
    layer = replaced(old)
    assert torch.equal(layer.dequantize(), want)
    assert torch.equal(layer.bias, dense.bias) and layer.dtype == torch.float32


def test_eight_bits_of_bitsandbytes():
    bnb = package("bitsandbytes")
    dense = linear(torch.float16)
    old = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)
    old.load_state_dict(dense.state_dict())
    old.to("cpu")
    layer = replaced(old)
    largest = dense.weight.data.float().abs().amax(1, keepdim=True)
    want = (dense.weight.data.float() * (127 / largest)).round() * (largest / 127)
    assert (layer.dequantize() - want).abs().max() <= 2**-20 * largest.max()
    assert layer.dtype == old.bias.dtype


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_hqq(bits):
    package("hqq")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    old = HQQLinear(linear(), config, compute_dtype=torch.float32, device="cpu")
    want, bias = old.dequantize().clone(), old.bias.clone()
    layer = replaced(old)
    assert torch.equal(layer.dequantize(), want)
    assert torch.equal(layer.bias, bias) and layer.dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        ("Int8WeightOnlyConfig", {}),
        ("Int8DynamicActivationInt8WeightConfig", {}),
        ("Float8WeightOnlyConfig", {}),
        ("IntxWeightOnlyConfig", {"weight_dtype": torch.int4}),
    ],
)
def test_torchao(config, arguments):
    package("torchao")
    from torchao import quantization

    model = nn.Sequential(linear())
    quantization.quantize_(model, getattr(quantization, config)(**arguments))
    want = model[0].weight.dequantize()
    layer = replaced(model[0])
    assert torch.equal(layer.dequantize(), want.float()), config
    assert layer.dtype == torch.float32


def test_gptqmodel():
    package("gptqmodel")
    # It starts threads that may keep a process from ending.
    run = subprocess.run(
        [sys.executable, "-c", _GPTQMODEL], capture_output=True, text=True, timeout=SECONDS
    )
    assert "the same" in run.stdout, run.stderr[-2000:]


_GPTQMODEL = """
import os
import torch
from torch import nn
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
import qkernels as qk

torch.manual_seed(0)
for bits in (2, 3, 4, 8):
    n, k, size = 32, 128, 32
    codes = torch.randint(0, 2**bits, (n, k))
    zeros = torch.randint(0, 2**bits, (n, k // size))
    scales = (torch.rand(n, k // size) + 0.5).half().float()
    index = torch.arange(k).div(size, rounding_mode="floor")[torch.randperm(k)]
    weight = (codes - zeros[:, index]) * scales[:, index]
    dense = nn.Linear(k, n, bias=False)
    dense.weight.data = weight
    old = TorchLinear(bits=bits, group_size=size, sym=False, desc_act=True, in_features=k,
                      out_features=n, bias=False, register_buffers=True)
    old.pack(dense, scales, zeros, index.int())
    model = nn.Sequential(old)
    want = old.dequantize_weight().t()
    qk.replace_linears(model)
    assert torch.equal(model[0].dequantize(), weight), bits
    assert torch.equal(model[0].dequantize().half(), want.half()), bits
print("the same", flush=True)
os._exit(0)
"""
