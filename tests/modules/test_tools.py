"""Tools that map state dicts, buffers and modules onto one another, on quantized models."""

import copy

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels import WQLinear
from qkernels.layouts import LAYOUTS
from tests.tiny_model import tiny_model

IDS = torch.arange(5, 17)[None]
SCHEMES = ["w4a16-g32", "w8a8", "nf4-g32-dq", "w4a8-g32"]


def quantized(text="w4a16-g32"):
    model = tiny_model()
    qk.quantize_model(model, scheme=text)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("text", SCHEMES)
def test_a_state_dict_is_the_buffers(text):
    layer = WQLinear.from_linear(nn.Linear(64, 48), text)
    state, buffers = layer.state_dict(), dict(layer.named_buffers())
    assert state.keys() == buffers.keys()
    assert all(state[name].data_ptr() == buffers[name].data_ptr() for name in state)
    x = torch.randn(3, 64)
    assert torch.equal(torch.func.functional_call(layer, layer.state_dict(), (x,)), layer(x))


@pytest.mark.parametrize("text", SCHEMES)
def test_it_is_assigned_to_a_model_without_memory(text):
    model = quantized(text)
    want, empty = logits(model), copy.deepcopy(model).to("meta")
    empty.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():
        held = empty.get_buffer(name)
        if name in model.state_dict():
            assert held.data_ptr() == buffer.data_ptr()
        else:
            owner, _, part = name.rpartition(".")
            empty.get_submodule(owner)._buffers[part] = buffer
    assert torch.equal(logits(empty), want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_any_layout_loads(layout, assign):
    from qkernels.modules.linear import _moved

    layer = WQLinear.from_linear(nn.Linear(64, 48), "w4a16-g32")
    other = copy.deepcopy(layer)
    other._install(_moved(layer.packed, LAYOUTS[layout], torch.device("cpu")))
    state = other.state_dict()
    names = {name for name in state if name.startswith("words")}
    assert names == {"words" if layout == "plain" else f"words_{layout}"}
    target = WQLinear.from_linear(nn.Linear(64, 48), "w4a16-g32")
    before = target._words
    target.load_state_dict(state, assign=assign)
    x = torch.randn(3, 64)
    assert torch.equal(target(x), layer(x)) and target._layout == layer._layout
    # As with nn.Linear, whoever has the buffers sees what was copied, and not what was assigned.
    assert (target._words is before) is not assign


def test_a_state_dict_of_two_layouts_is_told_apart():
    layer = WQLinear.from_linear(nn.Linear(64, 48), "w4a16-g32")
    state = layer.state_dict() | {"words_planar": torch.zeros(3)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*words_planar"):
        layer.load_state_dict(state)


def test_memory_is_shared_in_place():
    layer = WQLinear.from_linear(nn.Linear(64, 48), "w4a16-g32")
    x = torch.randn(3, 64)
    want = layer(x)
    assert layer.share_memory() is layer
    assert all(buffer.is_shared() for buffer in layer.buffers())
    assert torch.equal(layer(x), want)


def test_input_may_be_named():
    layer, x = WQLinear.from_linear(nn.Linear(64, 48), "w8a16"), torch.randn(3, 64)
    assert torch.equal(layer(input=x), layer(x))


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_accelerate_offloads_it(way, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = quantized()
    want, options = (
        logits(model),
        {"execution_device": torch.device("cpu"), "offload_buffers": True},
    )
    if way == "cpu":
        accelerate.cpu_offload(model, **options)
    else:
        accelerate.disk_offload(model, tmp_path, **options)
    assert model.model.layers[0].mlp.up_proj._words.is_meta
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("text", ["nf4-g32", "w8a8"])
def test_peft_trains_adapters_on_it(text):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = quantized(text)
    want = logits(model)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(logits(adapted), want)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] > losses[1] > losses[2]
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), want)
    with pytest.raises(qk.QuantizationError, match="writes to the weight"):
        adapted.merge_and_unload()
    assert torch.equal(logits(adapted.unload()), want)


def test_peft_reaches_experts():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers", reason="models come from transformers")
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    qk.quantize_model(model, scheme="w8a16")
    want = logits(model)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    assert torch.equal(logits(adapted), want)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    trained = [n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.any()]
    assert any("experts" in name for name in trained)
