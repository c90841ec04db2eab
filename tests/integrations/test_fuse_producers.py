"""Norms and gated MLPs that quantize what they give: the same bits, and taken back."""

import copy
import io
import pickle

import pytest
import torch
import transformers
from torch import nn

import qkernels as qk
from qkernels.modules import producers
from qkernels.modules.producers import Producer, ReadingLinear
from tests.bounds import FOREIGN_LOGITS, FROBENIUS_BOUND
from tests.calibration.test_architectures import GEMMA, LLAMA_LIKE, OPT, batches_for
from tests.tiny_model import tiny_model

GROUPED = {**LLAMA_LIKE, "num_key_value_heads": 2, "tie_word_embeddings": False}
FAMILIES = {
    "LlamaForCausalLM": ("LlamaConfig", GROUPED),
    "MistralForCausalLM": ("MistralConfig", GROUPED),
    "Qwen2ForCausalLM": ("Qwen2Config", GROUPED),
    "Qwen3ForCausalLM": ("Qwen3Config", {**GROUPED, "head_dim": 16}),
    "GemmaForCausalLM": ("GemmaConfig", {**GROUPED, "head_dim": 16}),
    "Gemma2ForCausalLM": ("Gemma2Config", GEMMA),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", GEMMA),
    "Phi3ForCausalLM": ("Phi3Config", {**GROUPED, "pad_token_id": 0}),
}
BLOCKS = LLAMA_LIKE["num_hidden_layers"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantized(name="LlamaForCausalLM", dtype=torch.bfloat16, scheme="w8a8"):
    config, options = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**options)).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            # Norms as they are made, of ones, would not tell one formula from another.
            nn.init.normal_(parameter, 0.5, 0.5)
    qk.quantize_model(model, "rtn", scheme)
    return model


@pytest.fixture(autouse=True)
def small_products_count(monkeypatch):
    monkeypatch.setattr(producers, "LEAST_GATED", 1)


@pytest.fixture
def made(monkeypatch):
    """How many rows were quantized where they are made, by kind, and how often layers took them."""
    counts = {"norms": 0, "products": 0, "read": 0}

    def counted(name, key):
        run = getattr(producers, name)

        def call(*args):
            result = run(*args)
            counts[key] += result is not None
            return result

        monkeypatch.setattr(producers, name, call)

    counted("norm_rows", "norms")
    counted("product_rows", "products")
    find = Producer.quantized

    def quantized(self, x):
        found = find(self, x)
        counts["read"] += isinstance(found, qk.QuantizedActivation)
        return found

    monkeypatch.setattr(Producer, "quantized", quantized)
    return counts


def is_fused(model):
    return any("forward" in vars(module) for module in model.modules()) or any(
        isinstance(module, ReadingLinear) for module in model.modules()
    )


@torch.no_grad()
def outputs(model, ids=None):
    ids = torch.arange(40).view(2, 20) if ids is None else ids
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_families_give_the_same_bits(name, dtype, made):
    model = quantized(name, dtype)
    batches = [*batches_for(model), {"input_ids": torch.arange(1)[None]}]
    with torch.no_grad():
        wanted = [model(**batch).logits for batch in batches]
        report = qk.fuse(model)
        assert len(report.norms) == 2 * BLOCKS and len(report.gates) == BLOCKS
        assert not report.unchanged
        made.update(norms=0, products=0, read=0)
        assert all(torch.equal(model(**b).logits, y) for b, y in zip(batches, wanted, strict=True))
        calls = BLOCKS * len(batches)
        assert made == {"norms": 2 * calls, "products": calls, "read": 3 * calls}
        qk.unfuse(model)
        assert not is_fused(model)
        assert all(torch.equal(model(**b).logits, y) for b, y in zip(batches, wanted, strict=True))


@pytest.mark.parametrize("scheme", ["w4a8-g32", "w4a8-g32-flat", "w8a8-g32", "w4a8"])
def test_schemes_with_int8_per_token(scheme, made):
    model = quantized(scheme=scheme)
    wanted = outputs(model)
    report = qk.fuse(model)
    made["read"] = 0
    assert len(report.norms) == 2 * BLOCKS and len(report.gates) == BLOCKS
    assert torch.equal(outputs(model), wanted) and made["read"] == 3 * BLOCKS


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("w8a8-tensor", "x is quantized to 8 bits per token"),
        ("w8a8-tokenasym", "only weights in the vnni"),
    ],
)
def test_other_int8_is_left_alone(scheme, reason):
    model = quantized(scheme=scheme)
    report = qk.fuse(model)
    assert not report.norms and not report.gates and not is_fused(model)
    assert len(report.unchanged) == 3 * BLOCKS
    assert all(reason in said for said in report.unchanged.values())


def test_weights_alone_concern_no_norm():
    model = quantized(scheme="w4a16-g32")
    report = qk.fuse(model)
    assert report.fused and not report.norms and not report.gates and not report.unchanged


def test_what_changes_x_before_it_is_quantized_is_left_alone():
    model = quantized()
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = qk.rounding.quantize(
            torch.randn(getattr(attention, name).out_features, 64), "w8a8"
        )
        weight = weight.replace(input_factor=torch.rand(64) + 0.5)
        setattr(attention, name, qk.WQLinear.from_weight(weight, dtype=torch.bfloat16))
    wanted = outputs(model)
    report = qk.fuse(model)
    assert "input_factor comes before" in report.unchanged["model.layers.0.input_layernorm"]
    assert len(report.norms) == 2 * BLOCKS - 1 and torch.equal(outputs(model), wanted)


def test_layer_norms_are_left_alone():
    torch.manual_seed(0)
    model = transformers.PhiForCausalLM(transformers.PhiConfig(**LLAMA_LIKE)).eval()
    qk.quantize_model(model, "rtn", "w8a8")
    wanted = outputs(model)
    report = qk.fuse(model)
    assert not report.norms and not report.gates and not is_fused(model)
    assert set(report.unchanged.values()) == {"it has more than a weight"}
    assert torch.equal(outputs(model), wanted)


GPT2 = {"vocab_size": 100, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
LAYER_NORMED = {
    "GPT2LMHeadModel": ("GPT2Config", GPT2, 2),
    "OPTForCausalLM": ("OPTConfig", OPT, 2),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", LLAMA_LIKE, 2),
    # What a norm gives is the residual of what reads it, too. The first block reads embeddings'.
    "BertForMaskedLM": ("BertConfig", LLAMA_LIKE, 2),
}
"""With the number of norms in a block that int8 layers read."""


def relative_error(y, exact):
    return float((y.double() - exact.double()).norm() / exact.double().norm())


def producers_of(model, kind):
    found = (getattr(vars(m).get("forward"), "__self__", None) for m in model.modules())
    return [producer for producer in found if isinstance(producer, kind)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYER_NORMED)
def test_layer_norms_where_outputs_need_not_be_the_same(name, dtype, made):
    config, options, norms = LAYER_NORMED[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**options)).to(dtype).eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 0.5, 0.5)
            nn.init.normal_(module.bias, 0, 0.5)
    qk.quantize_model(model, "rtn", "w8a8")
    wanted = outputs(model)
    report = qk.fuse(model, exact=False)
    assert len(report.norms) >= norms * BLOCKS and not report.unchanged
    assert len(producers_of(model, producers.LayerNorm)) == len(report.norms)
    made["read"] = 0
    got = outputs(model)
    assert made["read"] >= norms * BLOCKS
    assert relative_error(got, wanted) <= FOREIGN_LOGITS
    for producer in producers_of(model, producers.LayerNorm):
        x = torch.randn(9, 64).to(dtype)
        with torch.no_grad():
            y, exact = producer.module(x), nn.LayerNorm.forward(producer.module, x)
        assert relative_error(y, exact) <= FROBENIUS_BOUND[dtype]
        rows = producer.quantized(y)
        values, scale = qk.quantize_per_token(y)
        assert torch.equal(rows.values, values) and torch.equal(rows.scale, scale)
    qk.unfuse(model)
    assert not is_fused(model) and torch.equal(outputs(model), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "kind"), [("LlamaForCausalLM", "silu_mul"), ("GemmaForCausalLM", "gelu_tanh_mul")]
)
def test_gates_are_opened_in_the_pass_of_their_product(name, kind, dtype, made):
    model = quantized(name, dtype)
    wanted = outputs(model)
    report = qk.fuse(model, exact=False)
    assert len(report.gates) == BLOCKS and len(report.norms) == 2 * BLOCKS
    gates = producers_of(model, producers.Gate)
    assert [gate.kind for gate in gates] == BLOCKS * [kind]
    made.update(norms=0, products=0, read=0)
    opened = []
    for gate in gates:
        act = gate.module._modules[gate._form.act]
        act.register_forward_hook(lambda module, args, y: opened.append(y))
    assert relative_error(outputs(model), wanted) <= FOREIGN_LOGITS
    assert made["products"] == BLOCKS and made["read"] == 3 * BLOCKS and not opened


def test_an_activation_of_another_kind_stays():
    class Squared(nn.Module):
        def forward(self, x):
            return x.relu().square()

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(64, 96), nn.Linear(64, 96)
            self.act, self.down = Squared(), nn.Linear(96, 64)

        def forward(self, x):
            return self.down(self.act(self.gate(x)) * self.up(x))

    torch.manual_seed(0)
    model = nn.Sequential(Mlp())
    qk.quantize_model(model, "rtn", "w8a8")
    x = torch.randn(3, 64)
    with torch.no_grad():
        wanted = model(x)
        assert qk.fuse(model, example=x, exact=False).gates == ["0"]
        (gate,) = producers_of(model, producers.Gate)
        assert gate.kind == "product" and torch.equal(model(x), wanted)


def test_what_only_looks_like_a_layer_norm_is_left_alone():
    class Clamped(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x).clamp(-2, 2)

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = Clamped(64), nn.Linear(64, 32)

        def forward(self, x):
            return self.layer(self.norm(x))

    model = Reader()
    qk.quantize_model(model, "rtn", "w8a8")
    # Nothing is clamped here: only a larger weight tells.
    nn.init.constant_(model.norm.weight, 0.1)
    report = qk.fuse(model, example=torch.randn(3, 64), exact=False)
    assert report.unchanged == {"norm": "it computes none of the known formulas"}


def test_the_norm_of_torch(made):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.RMSNorm(64, eps=1e-5), nn.Linear(64, 32)

        def forward(self, x):
            return self.layer(self.norm(x))

    torch.manual_seed(0)
    model = Reader().bfloat16()
    nn.init.normal_(model.norm.weight)
    qk.quantize_model(model, "rtn", "w8a8")
    x = torch.randn(5, 64).bfloat16()
    with torch.no_grad():
        wanted = model(x)
        report = qk.fuse(model, example=x)
        assert report.norms == ["norm"] and isinstance(model.layer, ReadingLinear)
        made["read"] = 0
        assert torch.equal(model(x), wanted) and made["read"] == 1


@pytest.mark.parametrize("how", ["unfuse", "to", "load"])
def test_taken_back(how):
    model = quantized()
    wanted, state = outputs(model), {k: v.clone() for k, v in model.state_dict().items()}
    qk.fuse(model)
    assert is_fused(model)
    assert model.state_dict().keys() == state.keys()
    if how == "unfuse":
        qk.unfuse(model)
    elif how == "to":
        model.to(torch.bfloat16)
    else:
        model.load_state_dict(state)
    # Who loads keeps the modules whose layers share no memory.
    assert is_fused(model) == (how == "load")
    assert torch.equal(outputs(model), wanted)
    qk.unfuse(model)
    assert not is_fused(model)
    again = qk.fuse(model)
    assert len(again.norms) == 2 * BLOCKS and len(again.gates) == BLOCKS


def test_another_type_does_what_it_did():
    model, dense = quantized(), quantized()
    qk.fuse(model)
    assert torch.equal(outputs(model.float()), outputs(dense.float()))


def test_saved_files_are_the_same(tmp_path):
    model = quantized()
    qk.save_model(model, tmp_path / "before")
    qk.fuse(model)
    outputs(model)
    qk.save_model(model, tmp_path / "after")
    files = sorted((tmp_path / "before").iterdir())
    assert [file.name for file in files] == sorted(f.name for f in (tmp_path / "after").iterdir())
    assert all((tmp_path / "after" / file.name).read_bytes() == file.read_bytes() for file in files)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch])
def test_copies_are_models_of_their_own(copied, made):
    model = quantized()
    wanted = outputs(model)
    qk.fuse(model)
    other = copied(model)
    made.update(norms=0, products=0, read=0)
    assert torch.equal(outputs(other), wanted)
    assert made == {"norms": 2 * BLOCKS, "products": BLOCKS, "read": 3 * BLOCKS}
    with torch.no_grad():
        for module in other.modules():
            if isinstance(vars(module).get("forward"), type(model.forward)):
                assert module.forward.__self__.module is module
        other.model.layers[0].input_layernorm.weight.zero_()
    qk.unfuse(other)
    assert not is_fused(other) and is_fused(model)
    assert not torch.equal(outputs(other), wanted) and torch.equal(outputs(model), wanted)


def test_generation_is_the_same(made):
    model = quantized()
    ids = torch.arange(12).view(2, 6)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, **settings)
    qk.fuse(model)
    made["read"] = 0
    assert torch.equal(model.generate(ids, **settings), wanted) and made["read"] == 6 * 3 * BLOCKS


def test_an_output_that_is_written_to_is_quantized_anew(made):
    model = quantized()
    norm = model.model.layers[1].input_layernorm
    wanted = outputs(model)
    qk.fuse(model)
    norm.register_forward_hook(lambda module, args, y: y.mul_(2))
    made["read"] = 0
    got = outputs(model)
    assert made["read"] == 3 * BLOCKS - 1 and not torch.equal(got, wanted)
    qk.unfuse(model)
    assert torch.equal(outputs(model), got)


def test_a_norm_whose_output_the_model_writes_to_is_left_alone():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.RMSNorm(64, eps=1e-5)
            self.layer = nn.Linear(64, 32)

        def forward(self, x):
            y = self.norm(x)
            y += 1
            return self.layer(y)

    model = Writes()
    qk.quantize_model(model, "rtn", "w8a8")
    report = qk.fuse(model, example=torch.randn(3, 64))
    assert report.unchanged == {"norm": "its output is written to before it is read"}


def test_a_forward_that_only_looks_like_a_norm_is_left_alone():
    class Clamped(nn.RMSNorm):
        def forward(self, x):
            return super().forward(x).clamp(-3, 3)

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = Clamped(64, eps=1e-5), nn.Linear(64, 32)

        def forward(self, x):
            return self.layer(self.norm(x))

    model = Reader()
    qk.quantize_model(model, "rtn", "w8a8")
    # Nothing is clamped here: only larger numbers tell.
    report = qk.fuse(model, example=torch.rand(3, 64) * 1e-3)
    assert not report.norms and "none of the known formulas" in report.unchanged["norm"]


@pytest.mark.parametrize("what", ["scaled", "clamped", "in place"])
def test_a_forward_that_only_looks_like_a_gate_is_left_alone(what):
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(64, 96), nn.Linear(64, 96)
            self.act, self.down = nn.SiLU(), nn.Linear(96, 64)

        def forward(self, x):
            y = self.act(self.gate(x)) * self.up(x)
            if what == "scaled":
                y = y * 2
            elif what == "clamped":
                y = y.clamp(-30, 30)
            else:
                x.mul_(2)
            return self.down(y)

    torch.manual_seed(0)
    model = nn.Sequential(Mlp())
    qk.quantize_model(model, "rtn", "w8a8")
    x = torch.randn(3, 64)
    with torch.no_grad():
        wanted = model(x.clone())
        report = qk.fuse(model, example=x.clone())
        assert not report.gates and not is_fused(model)
        assert "down(act(gate(x)) * up(x))" in report.unchanged["0"]
        assert torch.equal(model(x.clone()), wanted)


def test_copies_of_outputs_end_the_work_for_nobody(made):
    model = quantized()
    wanted = outputs(model)
    qk.fuse(model)
    norm = model.model.layers[0].input_layernorm
    norm.register_forward_hook(lambda module, args, y: y.clone())
    made.update(norms=0)
    for _ in range(8):
        assert torch.equal(outputs(model), wanted)
    assert made["norms"] < 8 * 2 * BLOCKS and made["norms"] > 8 * (2 * BLOCKS - 1)


def test_gradients_go_through(made):
    grads = []
    for fused in (False, True):
        model = tiny_model()
        qk.quantize_model(model, "rtn", "w8a8")
        if fused:
            qk.fuse(model)
        made.update(norms=0, products=0, read=0)
        embedded = model.model.embed_tokens(torch.arange(20)[None]).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().mean().backward()
        grads += [embedded.grad, model.model.layers[0].input_layernorm.weight.grad]
    assert made == {"norms": 0, "products": 0, "read": 0}
    # Those of layers that are one product are added in another order.
    assert torch.allclose(grads[0], grads[2], rtol=1e-4, atol=1e-8)
    assert torch.allclose(grads[1], grads[3], rtol=1e-4, atol=1e-7)


def test_autocast_does_what_it_did(made):
    model = quantized(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = outputs(model)
        qk.unfuse(model)
    qk.fuse(model)
    made.update(norms=0, products=0, read=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outputs(model), wanted)
    assert made == {"norms": 0, "products": 0, "read": 0}


def test_torch_compile_does_what_it_did(made):
    model = quantized()
    qk.fuse(model)
    block = model.model.layers[0].mlp
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    x = torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        wanted = block(x)
        made.update(products=0, read=0)
        assert torch.equal(compiled(x), wanted) and made["products"] == made["read"] == 0


def test_small_products_are_quantized_by_the_layer_that_reads_them(made, monkeypatch):
    model = quantized()
    wanted = outputs(model)
    assert len(qk.fuse(model).gates) == BLOCKS
    # Of 40 tokens.
    for least, products in ((40 * 96, BLOCKS), (40 * 96 + 1, 0)):
        monkeypatch.setattr(producers, "LEAST_GATED", least)
        made["products"] = 0
        assert torch.equal(outputs(model), wanted) and made["products"] == products


def test_inference_mode(made):
    model = quantized()
    wanted = outputs(model)
    qk.fuse(model)
    made["read"] = 0
    with torch.inference_mode():
        assert torch.equal(outputs(model), wanted) and made["read"] == 3 * BLOCKS


def test_a_layer_that_lora_wraps_still_reads(made):
    class Wrapped(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

        def forward(self, x):
            return self.base_layer(x) + x.sum() * 0

    model = quantized()
    wanted = outputs(model)
    qk.fuse(model)
    mlp = model.model.layers[0].mlp
    mlp.down_proj = Wrapped(mlp.down_proj)
    made["read"] = 0
    assert torch.equal(outputs(model), wanted) and made["read"] == 3 * BLOCKS
