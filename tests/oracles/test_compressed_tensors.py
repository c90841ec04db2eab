"""Weights that compressed-tensors compressed, against what it decompresses them to."""

import json

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import qkernels as qk
from qkernels.errors import CheckpointError
from tests.bounds import FOREIGN_LOGITS
from tests.checkpoints.models import TOKENS
from tests.oracles.models import llama
from tests.oracles.packages import package, read_folder, write_folder

package("compressed_tensors")

from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

REFUSED = {
    "MXFP6A16": "6 bits",
    "MXFP6A8": "6 bits",
    "W2A4": "input activations of 4 bits",
    "W3A4": "input activations of 4 bits",
    "W4A4": "input activations of 4 bits",
}
"""Presets that no scheme holds."""

SIXTEEN_BIT_INPUTS = ("FP8_BLOCK", "NVFP4", "MXFP4", "MXFP4XFP8", "MXFP8")
"""Presets whose inputs are read as 16-bit ones."""


def blocks_of(weight, args):
    """The weight as [scales..., numbers that share one]."""
    n, k = weight.shape
    if args.strategy == "tensor":
        return weight.reshape(1, n * k)
    if args.strategy == "channel":
        return weight.reshape(n, 1, k)
    if args.strategy == "block":
        rows, columns = args.block_structure
        padded = nn.functional.pad(weight, (0, -k % columns, 0, -n % rows))
        blocks = padded.reshape(-(-n // rows), rows, -(-k // columns), columns)
        return blocks.transpose(1, 2).flatten(2)
    return weight.reshape(n, -1, args.group_size)


def calibrate(model, sign=1):
    """Scales and zero points from the weights, and some for inputs, where they are stored."""
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or not isinstance(module, nn.Linear):
            continue
        blocks, more = blocks_of(module.weight.data, scheme.weights), {}
        if hasattr(module, "weight_global_scale"):
            weight = module.weight.data.float()
            module.weight_global_scale.data = generate_gparam(weight.min(), weight.max()).reshape(1)
            more["global_scale"] = module.weight_global_scale
        scales, zeros = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, **more)
        # Scales of floats in groups have types of their own; they are stored later.
        module.weight_scale.data = scales.reshape(module.weight_scale.shape).to(module.weight.dtype)
        module.weight_scale.data *= sign
        if not scheme.weights.symmetric:
            module.weight_zero_point.data = zeros.reshape(module.weight_zero_point.shape)
        for name, value in (("input_scale", 0.03), ("input_global_scale", 20.0)):
            if hasattr(module, name):
                getattr(module, name).data.fill_(value)
        if hasattr(module, "input_zero_point"):
            inputs = scheme.input_activations
            module.input_zero_point.data.fill_(0 if inputs.symmetric else -9)


def quantized(model, config, sign=1):
    apply_quantization_config(model, config, show_progress=False)
    calibrate(model, sign)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    return compressor


def decompressed(model, compressor):
    """The package's own numbers, by the names of the layers."""
    compressor.decompress_model(model)
    return {
        name: module.weight.data
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and hasattr(module, "quantization_scheme")
    }


def preset(name, **more):
    groups = {name: ["Linear"]}
    return QuantizationConfig(config_groups=groups, ignore=["lm_head"], **more)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("name", [name for name in PRESET_SCHEMES if name != "UNQUANTIZED"])
def test_a_preset(tmp_path, name, by_name):
    model = llama()
    compressor = quantized(model, preset(name))
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    if by_name:
        path = tmp_path / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"]["config_groups"] = {name: ["Linear"]}
        path.write_text(json.dumps(config))
    if name in REFUSED:
        with pytest.raises(CheckpointError, match=REFUSED[name]):
            qk.load_model(tmp_path)
        return
    ours = qk.load_model(tmp_path)
    theirs = decompressed(model, compressor)
    assert len(theirs) == 7
    for layer, weight in theirs.items():
        got = ours.get_submodule(layer)
        assert isinstance(got, qk.WQLinear)
        assert torch.equal(got.dequantize().to(weight.dtype), weight), layer
        bias = model.get_submodule(layer).bias
        assert got.bias is None if bias is None else torch.equal(got.bias, bias)
    if name in SIXTEEN_BIT_INPUTS:
        return
    with torch.no_grad():
        got, want = ours(TOKENS).logits.float(), model(TOKENS).logits.float()
    assert (got - want).norm() / want.norm() < FOREIGN_LOGITS


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INPUTS = {
    "none": None,
    "token": {"strategy": "token", "dynamic": True, "symmetric": True},
    "token, asymmetric": {"strategy": "token", "dynamic": True, "symmetric": False},
    "tensor": {"strategy": "tensor", "dynamic": True, "symmetric": True},
    "static": {"strategy": "tensor", "dynamic": False, "symmetric": True},
    "static, asymmetric": {"strategy": "tensor", "dynamic": False, "symmetric": False},
}


@st.composite
def schemes(draw):
    """What one layer is quantized to, its shape and its type."""
    bits = draw(st.integers(1, 8))
    strategy = draw(st.sampled_from(["tensor", "channel", "group"]))
    size = draw(st.sampled_from([4, 16, 20, 32])) if strategy == "group" else None
    weights = {
        "num_bits": bits,
        "strategy": strategy,
        "group_size": size,
        # One bit has one zero point, and the package's symmetric range of it is empty.
        "symmetric": draw(st.booleans()) and bits > 1,
    }
    inputs = draw(st.sampled_from(sorted(INPUTS)))
    k = size * draw(st.integers(1, 7)) if size else draw(st.integers(1, 150))
    return weights, inputs, (draw(st.integers(1, 70)), k), draw(st.sampled_from(DTYPES))


@settings(max_examples=150, deadline=None)
@given(schemes(), st.booleans(), st.booleans(), st.sampled_from([1, -1]))
def test_any_integers(tmp_path_factory, drawn, bias, naive, sign):
    weights, inputs, (n, k), dtype = drawn
    # compressed-tensors 0.20 does not read zero points of 4 bits that it has packed into one word
    # of each group: it views their transpose as bytes, which torch refuses.
    assume(weights["num_bits"] != 4 or weights["symmetric"] or n > 8)
    # Types of inputs beside weights of 8 bits and less; the package packs the weights of these.
    args = INPUTS[inputs] and QuantizationArgs(num_bits=8, **INPUTS[inputs])
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=args,
        format="naive-quantized" if naive else None,
    )
    model = nn.Sequential(nn.Linear(k, n, bias=bias, dtype=dtype))
    config = QuantizationConfig(config_groups={"group_0": scheme})
    # AutoRound takes the sign of a scale that rounds better.
    compressor = quantized(model, config, sign)
    folder = tmp_path_factory.mktemp("folder")
    write_folder(folder, model.state_dict(), None)
    compressor.update_config(folder)
    if weights["num_bits"] > 4 and not weights["symmetric"] and args is not None:
        with pytest.raises(CheckpointError, match="8-bit weights with zero points"):
            read_folder(folder)
        return
    weight = read_folder(folder)["0"]
    want = decompressed(model, compressor)["0"]
    assert torch.equal(weight.dequantize().to(dtype), want)
    assert (weight.bias is not None) == bias


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_float8(tmp_path, strategy, dtype):
    blocks = {"block_structure": [16, 32]} if strategy == "block" else {}
    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, **blocks)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    model = nn.Sequential(nn.Linear(96, 40, dtype=dtype))
    compressor = quantized(model, QuantizationConfig(config_groups={"group_0": scheme}))
    write_folder(tmp_path, model.state_dict(), None)
    compressor.update_config(tmp_path)
    got = read_folder(tmp_path)["0"].dequantize().to(dtype)
    assert torch.equal(got, decompressed(model, compressor)["0"])


def test_groups_count_as_the_package_counts_them(tmp_path):
    """A name before patterns before a class, and of patterns the first by the alphabet."""
    linear = {"strategy": "channel", "num_bits": 8}
    groups = {
        "group_0": ["Linear"],
        "group_1": ["re:.*proj"],
        "group_2": ["re:.*(k|v)_proj", "re:^never$"],
        "group_3": ["model.layers.0.self_attn.k_proj"],
    }
    model = llama()
    config = QuantizationConfig(
        config_groups={
            name: QuantizationScheme(
                targets=targets, weights=QuantizationArgs(**{**linear, "num_bits": 8 - i})
            )
            for i, (name, targets) in enumerate(groups.items())
        },
        ignore=["re:.*lm_head", "model.layers.0.mlp.up_proj"],
    )
    compressor = quantized(model, config)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    ours = qk.load_model(tmp_path)
    assert isinstance(ours.model.layers[0].mlp.up_proj, nn.Linear)
    assert not isinstance(ours.model.layers[0].mlp.up_proj, qk.WQLinear)
    for layer, weight in decompressed(model, compressor).items():
        assert torch.equal(ours.get_submodule(layer).dequantize().to(weight.dtype), weight), layer
