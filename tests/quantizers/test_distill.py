"""Distillation: gradients against plain autograd, and what it gains on a tiny model."""

import pytest
import torch
import torch.nn.functional as F

import qkernels as qk
from qkernels import rounding
from qkernels.errors import LayerError, RecipeError
from qkernels.quantizers import distill
from qkernels.quantizers.distill import _set_aside, _Trained
from qkernels.quantizers.gradients import counted, divergence, pieces
from tests.bounds import SUM_BOUND
from tests.plain_model import snapshot, unchanged
from tests.tiny_model import VOCABULARY, tiny_model


def calibration(batches=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (4, 24), generator=generator) for _ in range(batches)]


@torch.no_grad()
def divergence_of(model, ids):
    return float(divergence(model(ids).logits, tiny_model()(ids).logits))


def quantized_weight(scheme, n=24, k=80):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    return weight, rounding.quantize(weight, qk.QuantScheme.parse(scheme))


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g32-sym", "nf4-g32", "w8a16", "fp8"])
def test_scales_get_the_gradients_of_the_dequantized_product(scheme):
    _, hub = quantized_weight(scheme)
    x = torch.randn(5, 80, generator=torch.Generator().manual_seed(1), requires_grad=True)
    wanted = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    layer = _Trained(hub, torch.float32)
    layer.begin()
    # Two halves of a step, whose gradients add up.
    for half in (slice(0, 2), slice(2, 5)):
        (layer.forward(x[half]) * wanted[half]).sum().backward()
    layer.end()
    got, got_x = layer.factors.grad, x.grad.clone()
    x.grad = None

    # The same by autograd through the formula.
    length, groups = hub.scheme.group_length(80), hub.scheme.groups(80)
    factors = torch.ones(24, groups, requires_grad=True)
    weight = hub.dequantize() * factors.repeat_interleave(length, dim=1)[:, :80]
    (F.linear(x, weight) * wanted).sum().backward()
    assert (got - factors.grad).norm() <= SUM_BOUND * factors.grad.norm() * 80
    assert (got_x - x.grad).norm() <= SUM_BOUND * x.grad.norm() * 80


def test_the_divergence_and_its_gradient():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 17, generator=generator, requires_grad=True)
    target = torch.randn(300, 17, generator=generator)
    loss = divergence(logits, target)
    (gradient,) = torch.autograd.grad(3 * loss, logits)
    exact = F.kl_div(
        logits.double().log_softmax(1), target.double().log_softmax(1), log_target=True,
        reduction="batchmean",
    )  # fmt: skip
    (wanted,) = torch.autograd.grad(3 * exact, logits)
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=SUM_BOUND * 16)
    assert (gradient - wanted).norm() <= SUM_BOUND * wanted.norm() * 16
    assert float(divergence(target, target)) == 0.0


def test_the_model_comes_nearer_to_the_dense_one():
    ids = calibration()[0]
    plain, taught = tiny_model(), tiny_model()
    qk.quantize_model(plain, "rtn", "w3a16-g32", calibration=calibration())
    report = qk.quantize_model(
        taught, "distill(steps=48, lr=0.005)", "w3a16-g32", calibration=calibration()
    )
    assert divergence_of(taught, ids) < 0.95 * divergence_of(plain, ids)
    assert report.method.startswith("rtn+distill") and report.layers[0].method == report.method
    assert all(parameter.requires_grad for parameter in taught.parameters())


def test_a_model_that_comes_no_nearer_stays_as_it_was():
    plain, taught = tiny_model(), tiny_model()
    many = calibration(batches=5)
    qk.quantize_model(plain, "rtn", "w8a16-g32", calibration=many)
    report = qk.quantize_model(taught, "distill(steps=3, lr=0.9)", "w8a16-g32", calibration=many)
    assert report.layers[0].method == "rtn"
    ids = calibration()[0]
    assert torch.equal(plain(ids).logits, taught(ids).logits)


def test_scales_go_as_far_as_sequences_kept_aside_ask_for(monkeypatch):
    model, reached = tiny_model(), iter([5.0, 3.0, 4.0, 9.0])
    monkeypatch.setattr(
        "qkernels.quantizers.distill._Distillation.divergence", lambda self, batches: next(reached)
    )
    found = {}

    def results(self):
        found.update({name: each.factors.clone() for name, each in self._trained.items()})
        return {}

    def train(self, steps, parameters):
        for each in self._trained.values():
            each.factors.data.fill_(1.8)

    monkeypatch.setattr("qkernels.quantizers.distill._Distillation.train", train)
    monkeypatch.setattr("qkernels.quantizers.distill._Distillation.results", results)
    # 5 before, 3 after all of the way, 4 after half.
    qk.quantize_model(model, "distill", "w4a16-g32", calibration=calibration())
    assert all((factors == 1.8).all() for factors in found.values()) and found
    # 9 before, 7 after all of the way, 6 after half, 6.5 after a quarter.
    reached = iter([9.0, 7.0, 6.0, 6.5])
    qk.quantize_model(tiny_model(), "distill", "w4a16-g32", calibration=calibration())
    assert all(torch.allclose(factors, torch.tensor(1.4)) for factors in found.values())
    # 1 before, nothing nearer: as it was.
    found.clear()
    reached = iter([1.0, 8.0, 4.0, 2.0, 1.5])
    qk.quantize_model(tiny_model(), "distill", "w4a16-g32", calibration=calibration())
    assert not found


def test_scales_of_fewer_bits_move_further():
    reached = {}
    for scheme in ("w2a16-g32", "w3a16-g32", "w4a16-g32", "nf4-g32", "w8a16-g32", "fp8"):
        reached[scheme] = _Trained(quantized_weight(scheme)[1], torch.float32).reach
    assert list(reached.values()) == [4, 2, 1, 1, 1 / 16, 1]


def test_scales_that_are_quantized_themselves_stay():
    model = tiny_model()
    with pytest.warns(UserWarning, match="trains no scales that are quantized themselves"):
        report = qk.quantize_model(model, "distill", "nf4-g64-dq", calibration=calibration())
    assert report.layers[0].method == "rtn"


def test_what_is_kept_aside_is_not_trained_on():
    for count, kept in ((3, 3), (15, 15), (16, 1), (40, 3), (128, 8), (1000, 8)):
        cut = [object() for _ in range(count)]
        aside, rest = _set_aside(cut)
        assert len(aside) == kept
        assert len(rest) == (count if count < 16 else count - kept)
        assert count < 16 or not {*map(id, aside)} & {*map(id, rest)}


def test_twice_is_the_same():
    first, second = tiny_model(), tiny_model()
    for model in (first, second):
        qk.quantize_model(model, "distill(steps=5)", "w4a16-g32", calibration=calibration())
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_codes_stay_unless_they_are_asked_to_move():
    plain, taught = tiny_model(), tiny_model()
    qk.quantize_model(plain, "rtn", "w4a16-g32", calibration=calibration())
    qk.quantize_model(taught, "distill(steps=4)", "w4a16-g32", calibration=calibration())
    names = [n for n, m in plain.named_modules() if isinstance(m, qk.WQLinear)]
    differing = 0
    for name in names:
        before = plain.get_submodule(name).to_weight()
        after = taught.get_submodule(name).to_weight()
        assert torch.equal(before.codes, after.codes)
        differing += int((before.scales != after.scales).sum())
    assert differing


def test_a_failure_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model()
    before = snapshot(model)

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("qkernels.quantizers.distill.divergence", stopped)
    with pytest.raises(KeyboardInterrupt):
        qk.quantize_model(model, "distill", "w4a16-g32", calibration=calibration())
    unchanged(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_mistakes_are_named():
    with pytest.raises(LayerError, match="distill learns from inputs"):
        qk.quantize_model(tiny_model(), "distill", "w4a16-g32")
    with pytest.raises(RecipeError, match="distill works on the quantized model"):
        qk.quantize_model(tiny_model(), "distill+gptq", calibration=calibration())
    with pytest.raises(RecipeError, match="lr must be in"):
        qk.quantize_model(tiny_model(), "distill(lr=2)", calibration=calibration())


def test_batches_are_cut_by_sequences():
    ids = torch.arange(10).view(5, 2)
    mask = torch.ones(5, 2)
    cut = pieces({"input_ids": ids, "mask": mask, "scale": torch.tensor(2.0)}, 2)
    assert [len(p["input_ids"]) for p in cut] == [2, 2, 1]
    assert torch.equal(torch.cat([p["input_ids"] for p in cut]), ids)
    assert all(p["scale"] == 2 and len(p["mask"]) == len(p["input_ids"]) for p in cut)
    assert pieces(ids, 5)[0] is ids


@pytest.mark.parametrize("scheme", ["w4a16-gtensor", "w4a16-gtensor-sym"])
def test_one_scale_of_a_whole_weight_is_trained(scheme):
    model, batches = tiny_model(), calibration()
    qk.quantize_model(model, "rtn+distill(steps=2)", scheme, calibration=batches)
    _, hub = quantized_weight(scheme)
    x = torch.randn(5, 80, generator=torch.Generator().manual_seed(1))
    layer = _Trained(hub, torch.float32)
    layer.begin()
    layer.forward(x).square().sum().backward()
    layer.end()
    wanted = 2 * F.linear(x, hub.dequantize()).square().sum()
    assert layer.factors.grad.shape == (1, 1)
    assert float(layer.factors.grad) == pytest.approx(float(wanted), rel=1e-4)


def test_one_batch_given_many_times():
    ids = torch.arange(24)[None] % 60
    model = tiny_model()
    qk.quantize_model(model, "rtn+distill(steps=2)", "w4a16-g32", calibration=[ids] * 20)
    aside, rest = _set_aside([ids] * 20)
    assert (len(aside), len(rest)) == (2, 18)


def test_gradients_of_half_precision_do_not_vanish():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(512, 4096, generator=generator)
    target = logits + 0.1 * torch.randn(512, 4096, generator=generator)
    found = {}
    for dtype in (torch.float16, torch.float32):
        x = logits.to(dtype).requires_grad_()
        (divergence(x, target.to(dtype)) * distill._HALF_SCALE / 4).backward()
        found[dtype] = x.grad.float()
    exact = found[torch.float32]
    assert (found[torch.float16] - exact).norm() <= 0.05 * exact.norm()
    model = tiny_model(torch.float16)
    qk.quantize_model(model, "rtn+distill(steps=2)", "w4a16-g32", calibration=calibration())


def test_padding_does_not_count():
    ids = torch.randint(VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 16:] = 0
    logits, target = torch.randn(4, 24, 8, requires_grad=True), torch.randn(4, 24, 8)
    kept = counted({"input_ids": ids, "attention_mask": mask}, logits)
    loss = divergence(logits, target, kept)
    assert torch.allclose(loss, divergence(logits[:, :16].contiguous(), target[:, :16]))
    loss.backward()
    assert not logits.grad[:, 16:].any() and logits.grad[:, :16].any()


@pytest.mark.parametrize("recipe", ["gptq(act_order=full)", "awq(keep=0.05)"])
def test_in_inference_mode(recipe):
    model = tiny_model()
    with torch.inference_mode():
        qk.quantize_model(
            model, f"{recipe}+distill(steps=2)", "w4a16-g32", calibration=calibration()
        )


def test_a_model_whose_outputs_are_not_finite_is_named():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.inf
    with pytest.raises(LayerError, match=r"distill: the model's outputs .* are not finite"):
        qk.quantize_model(model, "rtn+distill(steps=1)", "w4a16-g32", calibration=calibration())
