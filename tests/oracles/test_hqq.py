"""Layers and models that HQQ quantized."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import qkernels as qk
from qkernels.errors import CheckpointError
from tests.bounds import FOREIGN_LOGITS
from tests.checkpoints.models import TOKENS
from tests.oracles.models import llama
from tests.oracles.packages import package, read_folder, write_folder

package("hqq")

from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

BITS = (8, 6, 5, 4, 3, 2, 1.58, 1)


@st.composite
def layers(draw):
    """A shape, bits, a group size that the package takes with them, and what else it has."""
    size = draw(st.sampled_from([8, 16, 24, 64, 128, None]))
    # Groups are of flat weights; they may cross the ends of rows.
    n, k = draw(st.integers(1, 20)), draw(st.integers(1, 150))
    # The package packs numbers of groups that are multiples of 8.
    each = 8 * (size or k)
    n *= each // math.gcd(each, n * k)
    bits = draw(st.sampled_from(BITS))
    return n, k, bits, size, draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))


def quantized(linear, config, dtype):
    return HQQLinear(linear, config, compute_dtype=dtype, device="cpu")


@settings(max_examples=80, deadline=None)
@given(layers(), st.booleans(), st.booleans())
def test_a_layer(tmp_path_factory, drawn, bias, viewed):
    n, k, bits, size, dtype = drawn
    # Rows of bytes are viewed as rows of a larger type.
    viewed = viewed and (size or k) % 4 == 0
    config = BaseQuantizeConfig(nbits=bits, group_size=size, axis=1, view_as_float=viewed)
    old = quantized(nn.Linear(k, n, bias=bias), config, dtype)
    # In fp32, whatever the layer computes in, it rounds once.
    parts = {name: old.meta[name].float() for name in ("scale", "zero")}
    meta = {**old.meta, **parts, "compute_dtype": torch.float32}
    want = Quantizer.dequantize(old.W_q.data, meta)
    tensors = {f"layer.{name}": tensor for name, tensor in old.state_dict().items()}
    read = read_folder(write_folder(tmp_path_factory.mktemp("folder"), tensors, None))["layer"]
    assert torch.equal(read.dequantize(), want)
    assert (read.bias is not None) == bias


def test_groups_along_the_outputs_are_refused(tmp_path):
    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=0)
    old = quantized(nn.Linear(64, 64), config, torch.float32)
    tensors = {f"layer.{name}": tensor for name, tensor in old.state_dict().items()}
    with pytest.raises(CheckpointError, match="axis is 0"):
        read_folder(write_folder(tmp_path, tensors, None))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model(tmp_path, dtype, tied):
    theirs = llama(dtype, tied)
    for bits, name in zip((4, 8, 3, 2, 4, 4, 1), dict(linears(theirs)), strict=True):
        config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
        theirs.set_submodule(name, quantized(theirs.get_submodule(name), config, dtype))
    theirs.config.architectures = [type(theirs).__name__]
    theirs.config.save_pretrained(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    if tied:
        del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = qk.load_model(tmp_path)
    for name, module in theirs.named_modules():
        if isinstance(module, HQQLinear) and dtype == torch.float32:
            assert torch.equal(ours.get_submodule(name).dequantize(), module.dequantize()), name
    with torch.no_grad():
        got, want = ours(TOKENS).logits.float(), theirs(TOKENS).logits.float()
    assert (got - want).norm() / want.norm() < FOREIGN_LOGITS


def linears(model):
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
