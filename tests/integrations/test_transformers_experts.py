"""Mixtures of experts of Transformers, by each way in which it runs them."""

import copy

import pytest
import torch

import qkernels as qk
from qkernels import ops
from qkernels.modules.experts import WQExperts
from tests.bounds import FOREIGN_LOGITS, SUM_BOUND
from tests.checkpoints.experts import TOKENS, mixture

WAYS = ("eager", "batched_mm", "grouped_mm")
SCHEMES = ("w4a16-g16", "w8a8", "nf4-g16")


def logits(model, way, tokens=TOKENS):
    model.set_experts_implementation(way)
    with torch.no_grad():
        return model(tokens).logits


def quantized(name, text="w4a16-g16", dtype=torch.float32):
    model = mixture(name).to(dtype)
    qk.quantize_model(model, scheme=text)
    return model


@pytest.fixture
def calls(monkeypatch):
    """How often the operator was called."""
    seen, operator = [], ops.linear_grouped_operator
    monkeypatch.setattr(
        ops, "linear_grouped_operator", lambda *args: seen.append(1) or operator(*args)
    )
    return seen


def stacks(model):
    return [module for module in model.modules() if isinstance(module, WQExperts)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "Olmoe"])
def test_all_ways_give_the_same(name, text, dtype, calls):
    model = quantized(name, text, dtype)
    want = logits(model, "eager")
    assert not calls
    # A last bit may tip the rounding of an activation to 8 bits.
    exact = dtype == torch.float32 and text != "w8a8"
    bound = SUM_BOUND if exact else FOREIGN_LOGITS
    for way in ("batched_mm", "grouped_mm"):
        for tokens in (TOKENS, TOKENS[:, :1]):
            del calls[:]
            got = logits(model, way, tokens)
            assert len(calls) == len(stacks(model)) == 4
        got = logits(model, way)
        assert (got - want).abs().max() <= bound * want.abs().max()


def test_hooks_on_one_expert_count_in_all_ways():
    model = quantized("Mixtral")
    before = {way: logits(model, way) for way in WAYS}
    layer = stacks(model)[0].layers[1]
    handle = layer.register_forward_hook(lambda module, args, y: y * 1.5)
    changed = {way: logits(model, way) for way in WAYS}
    for way in WAYS:
        assert not torch.allclose(changed[way], before[way], atol=1e-3)
        assert torch.allclose(changed[way], changed["eager"], atol=1e-4)
    handle.remove()
    assert all(torch.equal(logits(model, way), before[way]) for way in WAYS)


@pytest.mark.parametrize("format", ["qkernels", "compressed-tensors"])
def test_a_model_that_has_run_is_saved_and_copied(format, tmp_path):
    model = quantized("Mixtral", "w8a8")
    fresh = copy.deepcopy(model)
    want = logits(model, "grouped_mm")
    assert all(stack._stack is not None for stack in stacks(model))
    assert torch.equal(logits(copy.deepcopy(model), "grouped_mm"), want)
    for number, each in enumerate((model, fresh)):
        each.save_pretrained(tmp_path / f"pretrained{number}")
        qk.save_model(each, tmp_path / f"saved{number}", format)
    for kind in ("pretrained", "saved"):
        files = [sorted((tmp_path / f"{kind}{number}").iterdir()) for number in (0, 1)]
        for one, other in zip(*files, strict=True):
            assert one.read_bytes() == other.read_bytes()
        again = qk.load_model(tmp_path / f"{kind}0")
        assert torch.equal(logits(again, "grouped_mm"), want)


@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        ("batched_mm", torch.float32),
        ("batched_mm", torch.bfloat16),
        # Compilers are handed Transformers' own operator, and not torch's.
        ("grouped_mm", torch.float32),
    ],
)
def test_a_whole_mixture_is_one_graph(way, dtype):
    torch._dynamo.reset()
    model = quantized("Olmoe", dtype=dtype)
    want = logits(model, way)
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        got = whole(TOKENS).logits
    assert (got - want).abs().max() <= FOREIGN_LOGITS * want.abs().max()
    torch._dynamo.reset()


def test_generation(calls):
    model = quantized("Qwen3Moe")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    written = {}
    for way in WAYS:
        model.set_experts_implementation(way)
        written[way] = model.generate(TOKENS[:, :6], **options)
    assert len(calls) == 2 * 4 * 4
    assert all(torch.equal(written[way], written["eager"]) for way in WAYS)
