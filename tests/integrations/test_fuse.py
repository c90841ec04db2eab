"""Fused layers give the same bits, and are what they were to everybody else."""

import copy

import pytest
import torch
import transformers
from torch import nn

import qkernels as qk
from qkernels.errors import LayerError
from qkernels.modules.fused import FusedPart
from tests import schemes
from tests.calibration.test_architectures import LLAMA_LIKE, batches_for
from tests.tiny_model import tiny_model

TOKENS = torch.arange(96).view(4, 24) % 60
GROUPED = {**LLAMA_LIKE, "num_key_value_heads": 2}
QKV = ("q_proj", "k_proj", "v_proj")
FAMILIES = {
    "LlamaForCausalLM": ("LlamaConfig", GROUPED, (3, 2)),
    "MistralForCausalLM": ("MistralConfig", GROUPED, (3, 2)),
    "Qwen2ForCausalLM": ("Qwen2Config", GROUPED, (3, 2)),
    "Qwen3ForCausalLM": ("Qwen3Config", {**GROUPED, "head_dim": 16}, (3, 2)),
    "GemmaForCausalLM": ("GemmaConfig", {**GROUPED, "head_dim": 16}, (3, 2)),
    # Its MLP is beside the attention, and reads the same norm.
    "PhiForCausalLM": ("PhiConfig", LLAMA_LIKE, (4,)),
    "BertModel": ("BertConfig", LLAMA_LIKE, (3,)),
}
FUSABLE = [
    text
    for text in schemes.ALL
    if "dq" not in text
    and "static" not in text
    and text not in (*schemes.ZERO_POINT_ACTIVATION, *schemes.POSITIONS)
]


def make(name):
    config, options, _ = FAMILIES[name]
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**options)).eval()


@torch.no_grad()
def logits(model, ids=TOKENS):
    return model(ids).logits


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8"])
def test_families(name, scheme):
    model = make(name)
    qk.quantize_model(model, "rtn", scheme)
    batch = batches_for(model)[0]
    with torch.no_grad():
        wanted = model(**batch)[0]
        report = qk.fuse(model)
        assert torch.equal(model(**batch)[0], wanted)
    sizes = [len(group) for group in report.fused]
    assert sizes == list(FAMILIES[name][2]) * LLAMA_LIKE["num_hidden_layers"]
    assert not report.left


@pytest.mark.parametrize("text", FUSABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_the_same_bits_whatever_the_rows(text, dtype):
    generator = torch.Generator().manual_seed(0)

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(200, 48, bias=False), nn.Linear(200, 41, bias=False)

        def forward(self, x):
            return torch.cat((self.q(x), self.k(x)), dim=-1)

    torch.manual_seed(0)
    model = Reader().to(dtype)
    qk.quantize_model(model, "rtn", text)
    rows = [1, 2, 5, 17, 40, 128]
    inputs = [torch.randn(m, 200, generator=generator).to(dtype) for m in rows]
    with torch.no_grad():
        wanted = [model(x) for x in inputs]
        report = qk.fuse(model, example=inputs[1])
        assert report.fused == [("q", "k")]
        assert all(torch.equal(model(x), y) for x, y in zip(inputs, wanted, strict=True))


def test_layers_are_what_they_were_to_everybody_else(tmp_path):
    model = tiny_model()
    qk.quantize_model(model, "rtn", "w4a16-g32")
    wanted, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    qk.save_model(model, tmp_path / "before")
    seen = []
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *call: seen.append(1))
    report = qk.fuse(model)
    assert report.fused[0] == tuple(f"model.layers.0.self_attn.{name}" for name in QKV)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, qk.WQLinear) and "fused=" in repr(layer)
    seen.clear()
    logits(model)
    assert seen == [1]
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    qk.save_model(model, tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert (tmp_path / "after" / file.name).read_bytes() == file.read_bytes()
    assert torch.equal(logits(copy.deepcopy(model)), wanted)
    assert torch.equal(logits(model), wanted)


def test_the_memory_is_one():
    model = tiny_model()
    qk.quantize_model(model, "rtn", "w4a16-g32")
    qk.fuse(model)
    attention = model.model.layers[0].self_attn
    starts = [getattr(attention, name)._words.untyped_storage().data_ptr() for name in QKV]
    assert len(set(starts)) == 1
    group, _ = attention.q_proj._fused
    assert group.layer._words.untyped_storage().data_ptr() == starts[0]


@pytest.mark.parametrize("how", ["unfuse", "to", "load"])
def test_taken_back(how):
    model = tiny_model()
    qk.quantize_model(model, "rtn", "w4a16-g32")
    wanted, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    qk.fuse(model)
    if how == "unfuse":
        qk.unfuse(model)
    elif how == "to":
        model.to(torch.float32)
    else:
        model.load_state_dict(state)
    assert not any(isinstance(module, FusedPart) for module in model.modules())
    assert torch.equal(logits(model), wanted)
    attention = model.model.layers[0].self_attn
    starts = {getattr(attention, name)._words.untyped_storage().data_ptr() for name in QKV}
    assert len(starts) == 3
    assert len(qk.fuse(model).fused) == 4


def test_generation_is_the_same():
    model = tiny_model()
    qk.quantize_model(model, "rtn", "w8a8")
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(TOKENS[:2, :6], **settings)
    qk.fuse(model)
    assert torch.equal(model.generate(TOKENS[:2, :6], **settings), wanted)


def test_gradients_go_through():
    grads = []
    for fused in (False, True):
        model = tiny_model()
        qk.quantize_model(model, "rtn", "w4a16-g32")
        if fused:
            qk.fuse(model)
        embedded = model.model.embed_tokens(TOKENS).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().mean().backward()
        grads.append(embedded.grad)
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-8)


def test_x_that_is_written_to_between_is_another():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(32, 16), nn.Linear(32, 16)

        def forward(self, x):
            y = self.first(x)
            if self.step:
                x += self.step
            return y, self.second(x)

    model = Writes()
    model.step = 1.0
    qk.quantize_model(model, "rtn", "w8a16")
    x = torch.randn(3, 32)
    report = qk.fuse(model, example=x.clone())
    assert report.left == {("first", "second"): "x is written to between them"}
    assert not report.fused
    model.step = 0.0
    assert qk.fuse(model, example=x.clone()).fused == [("first", "second")]
    model.step = 1.0
    with torch.no_grad():
        got = model(x.clone())
        qk.unfuse(model)
        wanted = model(x.clone())
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8"])
def test_compiled_they_are_one_product_too(scheme):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(64, 32), nn.Linear(64, 16)
            self.out = nn.Linear(48, 64)

        def forward(self, x):
            return x + self.out(torch.cat((self.q(x), self.k(x)), dim=-1))

    found = []

    def count(graph, inputs):
        found.append(sum("qkernels.linear" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    model = nn.Sequential(Block(), Block())
    qk.quantize_model(model, "rtn", scheme)
    x = torch.randn(3, 64)
    with torch.no_grad():
        wanted = model(x)
        assert qk.fuse(model, example=x).fused == [("0.q", "0.k"), ("1.q", "1.k")]
        compiled = torch.compile(model, fullgraph=True, backend=count)
        assert torch.equal(compiled(x), wanted) and torch.equal(compiled(x), wanted)
    # Of both layers, and of the one that reads what they give.
    assert found == [2 * 2]
    # Nothing waits for somebody in what is not compiled.
    assert model[0].q._fused[0]._held is None
    assert torch.equal(model(x), wanted)


def test_layers_that_are_given_copies_compute_their_own_alone():
    model = tiny_model()
    qk.quantize_model(model, "rtn", "w4a16-g32")
    wanted = logits(model)
    qk.fuse(model)
    for module in list(model.modules()):
        if isinstance(module, FusedPart):
            module.register_forward_pre_hook(lambda _, args: (args[0].clone(),))
    for _ in range(4):
        assert torch.equal(logits(model), wanted)
    group, _ = model.model.layers[0].self_attn.q_proj._fused
    ran = []
    group.layer.register_forward_hook(lambda *call: ran.append(1))
    assert torch.equal(logits(model), wanted) and not ran


def test_what_cannot_be_fused_is_said():
    model = tiny_model()
    qk.quantize_model(model, "rtn", "w4a16-g32", overrides={"*.0.*k_proj": "w8a16"})
    report = qk.fuse(model)
    assert list(report.left.values()) == ["they differ in scheme"] and len(report.fused) == 3
    with pytest.raises(LayerError, match="no WQLinear that is not fused already: quantize it"):
        qk.fuse(tiny_model())
    plain = nn.Sequential(nn.Linear(32, 32))
    qk.quantize_model(plain, "rtn", "w4a16-g32")
    with pytest.raises(LayerError, match="give an example batch"):
        qk.fuse(plain)
    double = tiny_model()
    qk.quantize_model(double, "rtn", "nf4-g32-dq")
    assert {*qk.fuse(double).left.values()} == {
        "scales that are quantized twice come in blocks over all rows"
    }
