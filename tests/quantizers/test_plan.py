"""What is quantized, and what is said of the rest."""

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels import WQLinear
from qkernels.errors import LayerError
from qkernels.quantizers.plan import MENTIONED_SHARE, plan_layers
from qkernels.scheme import QuantScheme

transformers = pytest.importorskip("transformers", reason="models come from transformers")

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
BART = {
    **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    "vocab_size": 100,
    "d_model": 32,
    "max_position_embeddings": 64,
}
WHISPER = {**BART, "num_mel_bins": 16, "max_source_positions": 8, "max_target_positions": 8}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
T5 = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}

HEADS = {
    "LlamaForCausalLM": ("LlamaConfig", SMALL, "lm_head"),
    "BertForMaskedLM": ("BertConfig", SMALL, "cls.predictions.decoder"),
    "RobertaForMaskedLM": ("RobertaConfig", SMALL, "lm_head.decoder"),
    "DistilBertForMaskedLM": (
        "DistilBertConfig",
        {"vocab_size": 100, "dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4},
        "vocab_projector",
    ),
    "BartForConditionalGeneration": ("BartConfig", BART, "lm_head"),
    "WhisperForConditionalGeneration": ("WhisperConfig", WHISPER, "proj_out"),
    "T5ForConditionalGeneration": ("T5Config", T5, "lm_head"),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SMALL, "lm_head"),
}


def plan(model, include=None, exclude=None, **overrides):
    return plan_layers(model, QuantScheme.parse("w8a16"), include, exclude, overrides)


def make(name):
    config, options, head = HEADS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**options)).eval()
    return model, head


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_left_alone_by_whatever_name(name):
    model, head = make(name)
    found = plan(model)
    assert head in found.skipped and head not in found.schemes and found.schemes
    # What else is skipped is no linear layer.
    others = [model.get_submodule(n) for n in found.skipped if n != head]
    assert not any(isinstance(module, nn.Linear) for module in others)
    assert head in plan(model, include=[head]).schemes
    assert head in plan(model, **{head: QuantScheme.parse("w4a16-g32")}).schemes


def test_a_layer_that_shares_its_weight_with_an_embedding_is_left_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.up = nn.Embedding(16, 8), nn.Linear(8, 8)
            self.out = nn.Linear(8, 16)
            self.out.weight = self.table.weight

    found = plan(Model())
    assert list(found.schemes) == ["up"]
    assert "that of the embedding table" in found.skipped["out"]
    total = 16 * 8 + 8 * 8 + 8 + 16
    assert found.shares["out"] == pytest.approx((16 * 8 + 16) / total)
    assert found.skipped["table"].startswith("an embedding")


@pytest.mark.parametrize("name", HEADS)
def test_embeddings_are_taken_where_their_own_name_is_in_a_pattern(name):
    model, head = make(name)
    embedding = model.get_input_embeddings()
    names = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Embedding) and m.weight is embedding.weight
    ]
    if not names:
        pytest.skip(f"the input of {name} is no embedding of tokens")
    around = f"{names[0].rpartition('.')[0]}.*" if "." in names[0] else "*"
    for include in (["*"], ["*", around]):
        found = plan(model, include=include)
        assert not found.embeddings and head in found.schemes
        assert found.skipped[names[0]].startswith("an embedding, which stays in 16 bits")
    for pattern in (names[-1], f"*{names[-1].rpartition('.')[2]}"):
        (shared,) = (s for s in plan(model, include=[pattern]).embeddings if names[0] in s.names)
        # All that have this weight, and no head, which is not named.
        assert shared.names == tuple(names) and shared.head is None
        assert str(shared.scheme) == "w8a16"
    tied = model.get_submodule(head).weight is embedding.weight
    (shared,) = plan(model, include=[names[0], head]).embeddings
    assert shared.head == (head if tied else None)
    other = {head: QuantScheme.parse("w4a16-g32"), names[0]: QuantScheme.parse("w8a16")}
    if tied:
        with pytest.raises(LayerError, match="they share one weight"):
            plan(model, **other)
    else:
        assert plan(model, **other).schemes[head] == other[head]
    left = plan(model, **{names[0]: None})
    assert not left.embeddings and "left alone by the override" in left.skipped[names[0]]


def test_what_is_no_linear_layer_is_named_from_a_share_on():
    class Own(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.values = nn.Parameter(torch.zeros(size))

    linear = nn.Linear(100, 100, bias=False)
    below, above = Own(90), Own(200)
    model = nn.ModuleDict({"a": linear, "small": below, "large": above, "conv": nn.Conv2d(4, 8, 5)})
    found = plan(model)
    assert set(found.skipped) == {"large", "conv"}
    assert "Own" in found.skipped["large"] and "Conv2d" in found.skipped["conv"]
    total = 10_000 + 90 + 200 + 808
    assert found.shares == pytest.approx({"large": 200 / total, "conv": 808 / total})
    assert 90 / total < MENTIONED_SHARE < 200 / total
    # In the order of the model.
    assert list(found.skipped) == ["large", "conv"]


def test_the_projection_that_attention_does_not_call_is_left_alone_unless_named():
    model = nn.Sequential(nn.MultiheadAttention(32, 4), nn.Linear(32, 32))
    found = plan(model)
    assert list(found.schemes) == ["1"]
    assert "without calling it" in found.skipped["0.out_proj"]
    assert "fused projections" in found.skipped["0"]
    assert "0.out_proj" in plan(model, include=["*out_proj"]).schemes


def test_layers_of_no_size_are_left_alone():
    found = plan(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 0), nn.Linear(0, 8)))
    assert list(found.schemes) == ["0"]
    assert found.skipped["1"] == found.skipped["2"] == "it has no weights"


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x).topk(2)


def test_layers_that_have_not_run_yet_are_left_alone():
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    assert plan(model).skipped == {"0": "its size is not known before its first forward"}
    model(torch.ones(1, 8))
    assert list(plan(model).schemes) == ["0", "1"]


def test_subclasses_are_left_alone_whatever_is_included():
    model = nn.Sequential(nn.Linear(8, 8), Router(8, 4))
    for include in (None, ["*"]):
        found = plan(model, include=include)
        assert list(found.schemes) == ["0"] and "Router" in found.skipped["1"]
    with pytest.raises(LayerError, match=r"out of 2: 0, for example, is left alone \(not included"):
        plan(model, include=["1"])
    # Their weight can be quantized by hand, which says that the product is all there is to it.
    assert isinstance(WQLinear.from_linear(model[1], "w8a16"), WQLinear)


def test_nothing_to_quantize_says_what_there_is():
    with pytest.raises(LayerError, match="no linear layer; its parameters are in Conv2d"):
        plan(nn.Sequential(nn.Conv2d(3, 3, 3)))
    model = nn.ModuleDict({"lm_head": nn.Linear(8, 8)})
    with pytest.raises(LayerError, match=r"lm_head, for example, is left alone .the output head"):
        plan(model)


def test_a_lora_layer_of_our_own_kind_still_gives_its_own_output():
    class Lora(nn.Linear):
        def __init__(self):
            super().__init__(16, 16)
            self.a, self.b = nn.Parameter(torch.randn(2, 16)), nn.Parameter(torch.randn(16, 2))

        def forward(self, x):
            return super().forward(x) + 100 * (x @ self.a.T) @ self.b.T

    model, x = nn.Sequential(nn.Linear(16, 16), Lora()), torch.randn(3, 16)
    want = model(x)
    report = qk.quantize_model(model, scheme="w8a16")
    assert (model(x) - want).norm() / want.norm() < 0.02
    assert "Lora" in report.skipped["1"] and report.as_dict()["shares"]["1"] > 0.5


def test_adapters_are_left_alone_and_trained_unless_named():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, _ = make("LlamaForCausalLM")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["v_proj"])
    model = peft.get_peft_model(model, lora)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    report = qk.quantize_model(model, scheme="w8a16")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    names = {layer.name for layer in report.layers}
    assert sum(name.endswith("q_proj.base_layer") for name in names) == 2
    layer = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default"
    assert "part of an adapter" in report.skipped[layer]
