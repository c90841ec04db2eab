"""Training of weights as the last step of a recipe: what it gains, and what it leaves alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk
from qkernels import rounding
from qkernels.errors import LayerError, RecipeError, SchemeError
from qkernels.modules import FakeQuantLinear
from qkernels.quantizers.end_to_end import EndToEnd
from qkernels.quantizers.finetune import _Trained
from qkernels.quantizers.gradients import divergence
from tests.bounds import SUM_BOUND, TRAINED_LOSS
from tests.plain_model import snapshot, unchanged
from tests.tiny_model import VOCABULARY, tiny_model


def calibration(batches=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (4, 24), generator=generator) for _ in range(batches)]


@torch.no_grad()
def divergence_of(model, ids):
    return float(divergence(model(ids).logits, tiny_model()(ids).logits))


FAST, SLOW = "finetune(steps=40, lr=0.02)", "finetune(steps=40, lr=0.002, lr_scale=1e-05)"
"""From far away, and from where a method has been."""


@pytest.mark.parametrize(
    ("before", "finetune", "scheme"),
    [
        ("rtn", FAST, "w2a16-g16"),
        ("gptq(damp_percent=0.1)", SLOW, "w3a16-g16-sym"),
        ("rtn", FAST, "log3-g16"),
        ("smoothquant", FAST, "w4a8"),
        ("gptq(act_order=full)", SLOW, "w2a16-g16"),
    ],
)
def test_the_model_comes_nearer_to_the_dense_one(before, finetune, scheme):
    plain, trained, ids = tiny_model(), tiny_model(), calibration(3)
    qk.quantize_model(plain, before, scheme, calibration=ids)
    report = qk.quantize_model(trained, f"{before}+{finetune}", scheme, calibration=ids)
    assert report.layers[0].method.endswith(finetune)
    first, last = (sum(divergence_of(model, x) for x in ids) for model in (plain, trained))
    assert last < TRAINED_LOSS * first
    # Codes have changed, not scales alone.
    one, other = (m.model.layers[0].mlp.up_proj.to_weight() for m in (plain, trained))
    assert (one.codes != other.codes).any() and not torch.equal(one.scales, other.scales)
    assert one.scheme == other.scheme and one.fields.keys() == other.fields.keys()


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_in_training_computes_what_the_quantized_one_does(bias):
    torch.manual_seed(0)
    dense = nn.Linear(80, 24, bias=bias)
    perm, factor = torch.randperm(80), torch.rand(80) + 0.5
    weight = dense.weight.detach()[:, perm]
    hub = rounding.quantize(weight, "w3a16-g16").replace(
        perm=perm, input_factor=factor, bias=None if dense.bias is None else dense.bias.detach()
    )
    layer = qk.WQLinear.from_weight(hub, dtype=torch.float32)
    trained = _Trained(layer, dense)
    x = torch.randn(2, 5, 80)
    trained.begin()
    assert (trained.forward(x) - layer(x)).norm() <= SUM_BOUND * layer(x).norm()
    # The dense weights, in the order of the codes, have these codes.
    assert torch.allclose(trained.fake.weight, weight, atol=1e-6)
    # Gradients through one weight for all forwards are those of the fake quantized layer.
    upstream = torch.randn(2, 5, 24)
    for part in (0, 1):
        (trained.forward(x[part]) * upstream[part]).sum().backward()
    trained.learn()
    other = FakeQuantLinear.from_quantized(
        qk.WQLinear.from_weight(hub.replace(perm=None, input_factor=None)), weight
    )
    rows = (x * factor)[..., perm]
    (F.linear(rows, other.fake_weight()) * upstream).sum().backward()
    for mine, wanted in ((trained.fake.weight, other.weight), (trained.fake.scales, other.scales)):
        assert torch.allclose(mine.grad, wanted.grad, rtol=1e-4, atol=1e-5)
    trained.end()
    result = trained.result()
    assert result.fields.keys() == hub.fields.keys()
    assert all(torch.equal(result.fields[name], hub.fields[name]) for name in hub.fields)
    assert torch.equal(result.codes, hub.codes) and (result.bias is None) == (not bias)


def test_a_model_that_comes_no_nearer_stays_as_it_was(monkeypatch):
    plain, trained = tiny_model(), tiny_model()
    reached = iter([1.0, 1.0])
    monkeypatch.setattr(EndToEnd, "divergence", lambda self: next(reached))
    qk.quantize_model(plain, "rtn", "w4a16-g32")
    recipe = "rtn+finetune(steps=1)"
    report = qk.quantize_model(trained, recipe, "w4a16-g32", calibration=calibration())
    assert report.layers[0].method == "rtn"
    ids = calibration()[0]
    assert torch.equal(plain(ids).logits, trained(ids).logits)
    assert all(parameter.requires_grad for parameter in trained.parameters())


def test_what_it_does_not_train_is_named():
    model, ids = tiny_model(), calibration()
    with pytest.warns(
        UserWarning, match="finetune leaves .*q_proj and its like as they are: .*outlier_columns"
    ):
        report = qk.quantize_model(
            model, "awq(keep=0.05)+finetune(steps=1)", "w4a16-g32", calibration=ids
        )
    assert "finetune" not in report.layers[0].method
    before = snapshot(tiny_model())
    for scheme, what in (
        ("nf4-g32-dq", "scales that are quantized themselves"),
        ("w8a8-static", "static scales of activations are learned by qk.prepare_qat"),
    ):
        model = tiny_model()
        with pytest.raises(SchemeError, match=what):
            qk.quantize_model(model, "finetune", scheme, calibration=ids)
        unchanged(model, before)
    for recipe in ("finetune(steps=0)", "finetune(lr=0)", "finetune(lr_scale=1)"):
        with pytest.raises(RecipeError, match="must be"):
            qk.quantize_model(tiny_model(), recipe, "w4a16-g32", calibration=ids)
    with pytest.raises(LayerError, match="finetune"):
        qk.quantize_model(tiny_model(), "finetune", "w4a16-g32")


def test_twice_is_the_same_and_in_inference_mode():
    made = []
    for inference in (False, False, True):
        model = tiny_model(torch.bfloat16)
        with torch.inference_mode(inference):
            qk.quantize_model(
                model,
                "gptq(damp_percent=0.1)+finetune(steps=2)",
                "w2a16-g16",
                calibration=calibration(),
            )
        made.append(model.model.layers[1].mlp.down_proj.to_weight())
    for other in made[1:]:
        assert torch.equal(made[0].codes, other.codes)
        assert torch.equal(made[0].scales, other.scales)
