"""Models that are readied for decoding write what they wrote, in fewer products."""

import copy

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

import qkernels as qk
from qkernels.errors import LayerError
from qkernels.integrations import decoding
from qkernels.integrations.decoding import ATTENTION, attention, prepare_decoding
from tests.bounds import FROBENIUS_BOUND
from tests.checkpoints.experts import mixture
from tests.tiny_model import BLOCKS, tiny_config, tiny_model

PROMPT = torch.arange(12).view(2, 6) + 5
SETTINGS = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


class Module(torch.nn.Module):
    """What Transformers' own function asks of a layer."""

    is_causal = True

    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups = groups


def both(query, key, value, mask, **options):
    module = Module(query.shape[1] // key.shape[1])
    ours, weights = attention(module, query, key, value, mask, **options)
    assert weights is None
    theirs, _ = decoding._functions()["sdpa"](module, query, key, value, mask, **options)
    return ours, theirs


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_attention_of_one_token_is_that_of_torch(heads, shared, dtype, mask, scaling):
    query = torch.randn(3, heads, 1, 16).to(dtype)
    key, value = torch.randn(2, 3, shared, 40, 16).to(dtype)
    seen = torch.rand(3, 1, 1, 40) < 0.7
    seen[..., 0] = True
    given = {
        None: None,
        "bool": seen,
        "float": torch.zeros(seen.shape).masked_fill(~seen, -torch.inf).to(dtype),
    }[mask]
    ours, theirs = both(query, key, value, given, scaling=scaling)
    assert ours.shape == theirs.shape == (3, 1, heads, 16) and ours.dtype == dtype
    error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    # Probabilities are rounded to the type, once more than there.
    assert error <= 2 * FROBENIUS_BOUND[dtype]


@pytest.mark.parametrize("case", ["tokens", "mask of each head", "position_bias"])
def test_all_else_is_done_by_torch(case, monkeypatch):
    tokens = 3 if case == "tokens" else 1
    query, key, value = torch.randn(3, 2, 4, tokens, 16)
    mask = torch.ones(2, 4, 1, tokens, dtype=torch.bool) if case == "mask of each head" else None
    options = {"position_bias": torch.randn(1, 4, 1, 1)} if case == "position_bias" else {}
    ours, theirs = both(query, key, value, mask, **options)
    assert torch.equal(ours, theirs)


def test_a_readied_model_writes_the_same_in_fewer_products():
    torch._dynamo.reset()  # which counts what other tests compiled
    model = tiny_model()
    qk.quantize_model(model, "rtn", "w4a16-g32", overrides={"lm_head": "w8a16"})
    wanted = model.generate(PROMPT, **SETTINGS)
    options = prepare_decoding(model)
    assert model.config._attn_implementation == ATTENTION
    assert torch.equal(model.generate(PROMPT, **SETTINGS, **options), wanted)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        assert torch.equal(model.generate(PROMPT, **SETTINGS, **options), wanted)
    products = [event.count for event in seen.key_averages() if event.key == "qkernels::linear"]
    # q/k/v and gate/up are one each, beside what follows them; and the head.
    assert products == [12 * (4 * BLOCKS + 1)]
    names = {event.key for event in seen.key_averages()}
    assert any("CompiledFxGraph" in name for name in names)
    # Another batch and another length are compiled anew, not taken for what they were.
    other = model.generate(PROMPT[:1], **(SETTINGS | {"max_new_tokens": 20}), **options)
    assert torch.equal(other[:, : wanted.shape[1]], wanted[:1])
    assert other.shape == (1, 26)


def test_models_of_one_class_do_not_take_each_others_code():
    torch._dynamo.reset()
    for scheme in ("w4a16-g32", "w8a8"):
        model = tiny_model()
        qk.quantize_model(model, "rtn", scheme)
        wanted = model.generate(PROMPT, **SETTINGS)
        assert torch.equal(model.generate(PROMPT, **SETTINGS, **prepare_decoding(model)), wanted)


def test_a_dense_model_is_readied_too():
    model = tiny_model()
    options = prepare_decoding(model)
    assert options["cache_implementation"] == "static"
    assert model.config._attn_implementation == ATTENTION
    again = copy.deepcopy(model)
    again.set_attn_implementation("sdpa")
    assert torch.equal(again.generate(PROMPT, **SETTINGS), model.generate(PROMPT, **SETTINGS))


def test_an_attention_that_somebody_chose_stays():
    model = tiny_model()
    model.set_attn_implementation("eager")
    prepare_decoding(model)
    assert model.config._attn_implementation == "eager"


def test_models_that_have_no_such_step_are_refused(monkeypatch):
    with pytest.raises(LayerError, match="a BertModel has no step that can be compiled"):
        prepare_decoding(
            transformers.BertModel(
                transformers.BertConfig(
                    vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
                )
            )
        )
    with pytest.raises(LayerError, match="a Linear has no step that can be compiled"):
        prepare_decoding(torch.nn.Linear(8, 8))
    with pytest.raises(LayerError, match="a LlamaModel has no step"):
        prepare_decoding(transformers.LlamaModel(tiny_config()))
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = tiny_model()
    with pytest.raises(LayerError, match="with no-such-compiler, which is not there: install it"):
        prepare_decoding(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_of_experts_is_one_graph(dtype):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = mixture("Olmoe").to(dtype)
    qk.quantize_model(model, scheme="w4a16-g16")
    wanted = model.generate(PROMPT, **SETTINGS)
    options = prepare_decoding(model)
    assert set(model.get_experts_implementation().values()) == {"batched_mm"}
    assert torch.equal(model.generate(PROMPT, **SETTINGS, **options), wanted)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_dense_experts_are_run_as_they_were():
    for options in ({}, {"exclude": ["*.down_proj"]}):
        model = mixture("Olmoe")
        model.set_experts_implementation("eager")
        qk.quantize_model(model, scheme="w4a16-g16", **options)
        prepare_decoding(model)
        want = "eager" if options else "batched_mm"
        assert set(model.get_experts_implementation().values()) == {want}
