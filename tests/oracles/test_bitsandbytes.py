"""Models and layers that bitsandbytes quantized, as Transformers saves them."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qkernels as qk
from qkernels import rounding
from tests.bounds import FOREIGN_LOGITS
from tests.checkpoints.models import TOKENS
from tests.oracles.models import llama
from tests.oracles.packages import package, read_folder, write_folder

bnb = package("bitsandbytes")

from transformers import AutoModelForCausalLM, BitsAndBytesConfig

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fp32_weight(layer, n, k):
    """What the package dequantizes a Linear4bit to, by its code for all devices, in fp32."""
    weight, state = layer.weight, layer.weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    return _dequantize_4bit_compute(
        weight.data.view(torch.uint8).flatten(),
        absmax.float(),
        state.code,
        state.blocksize,
        (n, k),
        torch.float32,
    )


@st.composite
def four_bit_layers(draw):
    n, k = draw(st.integers(1, 40)), draw(st.integers(1, 200))
    kind, block = draw(st.sampled_from(["nf4", "fp4"])), draw(st.sampled_from(BLOCKS))
    storage = draw(st.sampled_from([torch.uint8, torch.float16, torch.bfloat16, torch.float32]))
    # The bytes must fill whole numbers of the type that they are stored as.
    if (n * k + 1) // 2 % storage.itemsize:
        storage = torch.uint8
    return n, k, kind, block, storage, draw(st.booleans()), draw(st.sampled_from(DTYPES))


@settings(max_examples=100, deadline=None)
@given(four_bit_layers(), st.booleans())
def test_four_bits(tmp_path_factory, drawn, bias):
    n, k, kind, block, storage, nested, dtype = drawn
    layer = bnb.nn.Linear4bit(k, n, bias=bias, quant_type=kind, quant_storage=storage)
    weight = (torch.randn(n, k) * torch.rand(n, 1)).to(dtype)
    data, state = bnb.functional.quantize_4bit(
        weight, blocksize=block, quant_type=kind, compress_statistics=nested, quant_storage=storage
    )
    layer.weight = bnb.nn.Params4bit(
        data, requires_grad=False, quant_state=state, bnb_quantized=True, quant_storage=storage
    )
    if bias:
        layer.bias = nn.Parameter(torch.randn(n, dtype=dtype))
    section = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    tensors = {f"layer.{name}": tensor for name, tensor in layer.state_dict().items()}
    folder = write_folder(tmp_path_factory.mktemp("folder"), tensors, section)
    read = read_folder(folder)["layer"]
    assert torch.equal(read.dequantize(), fp32_weight(layer, n, k))
    assert torch.equal(read.bias, layer.bias) if bias else read.bias is None


def quantized_by_both(kind, block, nested):
    weight = torch.randn(48, 512) * torch.rand(48, 1)
    data, state = bnb.functional.quantize_4bit(
        weight, blocksize=block, quant_type=kind, compress_statistics=nested
    )
    codes = torch.stack((data >> 4, data & 15), dim=-1).view(weight.shape)
    # Its FP4 is a table of its own.
    name = kind if kind == "nf4" else f"table({','.join(map(repr, state.code.tolist()))})"
    levels = "dq" if nested else "sfp32"
    return weight, state, codes, rounding.quantize(weight, f"{name}-g{block}-{levels}")


@pytest.mark.parametrize("block", [32, 64, 256])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_and_scales_are_the_same(kind, block):
    _, state, codes, made = quantized_by_both(kind, block, nested=False)
    assert torch.equal(made.scales, state.absmax.view_as(made.scales))
    # FP4 has zero twice.
    assert torch.equal(state.code[made.codes.long()], state.code[codes.long()])


def test_scales_quantized_twice_are_the_same_and_codes_no_worse():
    """Ours are the nearest codes under the scales that are stored, theirs under those before."""
    weight, state, codes, made = quantized_by_both("nf4", 64, nested=True)
    assert torch.equal(made.nested_absmax, state.state2.absmax)
    assert torch.equal(made.nested_offset, state.offset)
    other = (made.scales.flatten().int() - state.absmax.int()).abs()
    # Of those half way between two, which fp32 has few of.
    assert other.max() <= 1 and other.sum() <= 2
    got = (made.dequantize() - weight).square().sum()
    assert got <= (made.replace(codes=codes).dequantize() - weight).square().sum()
    assert (made.codes != codes).float().mean() < 0.05


CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4 twice": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "nf4 in bf16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "skipped": {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "up_proj"]},
    "int8": {"load_in_8bit": True},
    "int8, skipped": {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "o_proj"]},
    "int8, threshold": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model(tmp_path, name, tied):
    llama(tied=tied).save_pretrained(tmp_path / "dense")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense",
        quantization_config=BitsAndBytesConfig(**CONFIGS[name]),
        dtype=torch.bfloat16,
        device_map="cpu",
    ).eval()
    theirs.save_pretrained(tmp_path / "out")
    ours = qk.load_model(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    four = tuple(
        name for name, module in theirs.named_modules() if isinstance(module, bnb.nn.Linear4bit)
    )
    eight = tuple(
        name for name, module in theirs.named_modules() if isinstance(module, bnb.nn.Linear8bitLt)
    )
    layers = {name for name, module in ours.named_modules() if isinstance(module, qk.WQLinear)}
    assert layers == {*four, *eight} and layers
    for layer in four:
        got = ours.get_submodule(layer)
        want = fp32_weight(theirs.get_submodule(layer), got.out_features, got.in_features)
        assert torch.equal(got.dequantize(), want), layer
    for layer in eight:
        weight = theirs.get_submodule(layer).weight
        want = weight.data.float() * weight.SCB[:, None] / 127
        error = (ours.get_submodule(layer).dequantize() - want).abs()
        assert (error <= 2**-22 * want.abs()).all(), layer
    with torch.no_grad():
        got, want = ours(TOKENS).logits.float(), theirs(TOKENS).logits.float()
    if not eight:
        # LLM.int8() quantizes inputs, which we leave in 16 bits.
        assert (got - want).norm() / want.norm() < FOREIGN_LOGITS
