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
    from qkernels.modules.packed import moved

    # That of integer products holds no other schemes.
    scheme = "w4a8-g32" if layout == "fragment_int8" else "w4a16-g32"
    layer = WQLinear.from_linear(nn.Linear(64, 48), scheme)
    other = copy.deepcopy(layer)
    other._install(moved(layer.packed, LAYOUTS[layout], torch.device("cpu")))
    state = other.state_dict()
    names = {name for name in state if name.startswith("words")}
    assert names == {"words" if layout == "plain" else f"words_{layout}"}
    target = WQLinear.from_linear(nn.Linear(64, 48), scheme)
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


def test_hooks_see_what_is_loaded():
    layer = WQLinear.from_linear(nn.Linear(64, 48), "w4a16-g32")
    state = {f"old.{name}": tensor for name, tensor in layer.state_dict().items()}

    def rename(module, state, prefix, *rest):
        for name in list(state):
            state[name.removeprefix("old.")] = state.pop(name)

    other = WQLinear.from_linear(nn.Linear(64, 48), "w4a16-g32")
    other.register_load_state_dict_pre_hook(rename)
    other.load_state_dict(state)
    x = torch.randn(3, 64)
    assert torch.equal(other(x), layer(x))


def test_what_is_missing_is_reported():
    model = quantized()
    state = model.state_dict()
    layer = "model.layers.0.mlp.up_proj."
    missing = {name for name in state if name.startswith(layer)}
    found = {name: tensor for name, tensor in state.items() if name not in missing}
    result = model.load_state_dict({**found, layer + "other": torch.zeros(1)}, strict=False)
    assert set(result.missing_keys) == missing
    assert result.unexpected_keys == [layer + "other"]


def test_a_module_without_values_gets_them():
    model = quantized()
    want, buffers = logits(model), dict(model.named_buffers())
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    for name in buffers.keys() - model.state_dict().keys():
        owner, _, part = name.rpartition(".")
        empty.get_submodule(owner)._buffers[part] = buffers[name]
    assert torch.equal(logits(empty), want)


@pytest.mark.parametrize("way", ["swap_module_params", "overwrite_module_params"])
def test_casting_in_any_of_torchs_ways(way):
    change = getattr(torch.__future__, f"set_{way}_on_conversion")
    layer, x = WQLinear.from_linear(nn.Linear(64, 48), "w4a16-g32"), torch.randn(3, 64)
    want = layer(x)
    change(True)
    try:
        layer.to(torch.bfloat16).load_state_dict(layer.state_dict())
    finally:
        change(False)
    assert layer.dtype == torch.bfloat16 and torch.allclose(layer(x), want, atol=2e-2)


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


def with_biases(model):
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def test_drawing_new_weights_leaves_quantized_layers_alone():
    transformers = pytest.importorskip("transformers", reason="models come from transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    config = transformers.Qwen2Config(num_attention_heads=4, num_key_value_heads=2, **sizes)
    model = with_biases(transformers.Qwen2Model(config)).eval()
    qk.quantize_model(model, scheme="w8a16")

    class Classifier(transformers.PreTrainedModel):
        config_class, _supports_sdpa = transformers.Qwen2Config, True

        def __init__(self, config, model):
            super().__init__(config)
            self.model, self.score = model, nn.Linear(32, 2)
            self.post_init()

    with torch.no_grad():
        want = model(IDS)[0]
        model.init_weights()
        assert torch.equal(model(IDS)[0], want)
        assert torch.equal(Classifier(config, model).model(IDS)[0], want)


def test_drawing_new_weights_leaves_experts_alone():
    transformers = pytest.importorskip("transformers", reason="models come from transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    config = transformers.MixtralConfig(
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=3, **sizes
    )
    model = transformers.MixtralModel(config).eval()
    # One of them is left as it was.
    qk.quantize_model(model, scheme="w8a16", exclude=["*gate_up_proj.expert_1"])
    with torch.no_grad():
        want = model(IDS)[0]
        model.init_weights()
        assert torch.equal(model(IDS)[0], want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_gradients_changes_none(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = quantized().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_freezing_all_but_norms_trains_norms():
    model = quantized().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.requires_grad = False
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert len(trained) == 5 and losses[0] > losses[1] > losses[2]
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_adapters_of_transformers_are_saved_and_loaded(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = quantized()
    want = logits(model)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model.add_adapter(lora)
    adapted = logits(model)
    model.disable_adapters()
    assert torch.equal(logits(model), want) and not torch.equal(adapted, want)
    model.save_pretrained(tmp_path)
    other = quantized()
    other.load_adapter(str(tmp_path))
    assert torch.equal(logits(other), adapted)


def test_adapters_that_freeze_what_is_below_them():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = quantized()
    want = logits(model)
    adapted = peft.get_peft_model(
        model, peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10)
    )
    assert torch.equal(logits(adapted), want)


def test_parallel_training_in_one_process(tmp_path):
    distributed = torch.distributed
    if not distributed.is_gloo_available():
        pytest.skip("torch has no gloo")
    address = f"file://{tmp_path / 'group'}"
    distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        model = quantized().train()
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            parallel(input_ids=IDS, labels=IDS).loss.backward()
        assert torch.equal(logits(parallel), logits(quantized()))
    finally:
        distributed.destroy_process_group()
