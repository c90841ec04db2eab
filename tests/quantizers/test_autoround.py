"""AutoRound: what a step moves, what a block becomes, and that the model is left as it was."""

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels import rounding
from qkernels.errors import LayerError, RecipeError, SchemeError
from qkernels.quantizers import autoround, descent
from qkernels.quantizers.autoround import LearnedRounding
from qkernels.quantizers.descent import Descent
from qkernels.quantizers.recipe import Recipe
from qkernels.scheme import QuantScheme
from tests.plain_model import TOKENS, Model, no_forward_is_left, snapshot, unchanged
from tests.quantizers.test_gptq import weight_of
from tests.quantizers.test_quantize_model import RARE, Experts
from tests.quantizers.test_resume import fresh, interrupt_at, quantized, same
from tests.tiny_model import tiny_model

FEW = "autoround(steps=6, batch=2)"
BATCHES = list(torch.randint(0, 50, (2, 2, 20), generator=torch.Generator().manual_seed(0)))
SCHEMES = (
    "w3a16-g24",
    "w3a16-g32-sym",
    "w4a16",
    "w4a16-gtensor",
    "w4a8",
    "w4a8-g48",
    "w4a16-g24-dq",
)


def through(values, like):
    """`values`, with the gradient of `like`."""
    return like + (values - like).detach()


def fake_quantized(weight, fitted, v, factors):
    """W' by autograd, with gradients that pass rounding."""
    scheme, k = fitted.scheme, weight.shape[1]
    length, largest = scheme.group_length(k), (1 << scheme.bits) - 1
    spread = torch.arange(k) // length
    scale = fitted.group_scales()
    if scheme.symmetric:
        scale = scale * factors[0]
        scale = through(scale.to(fitted.scales.dtype).float(), scale)
        zero = torch.full_like(scale, scheme.implied_zero)
    else:
        zero = fitted.group_zeros()
        low, high = scale * zero * factors[0], scale * (largest - zero) * factors[1]
        scale = (low + high) / largest
        scale = through(scale.to(fitted.scales.dtype).float(), scale)
        zero = low / scale
        zero = through(zero.round(), zero)
    scale, zero = scale[:, spread], zero[:, spread]
    scaled = weight / scale + v
    codes = (through(scaled.round(), scaled) + zero).clamp(0, largest)
    return scale * (codes - zero)


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w2a16-g24", "w3a16-g32-sym", "w4a16", "w4a8"])
def test_a_step_follows_the_gradient_through_rounding(scheme):
    torch.manual_seed(0)
    weight, rate = weight_of(16, 80), 0.125
    fitted = rounding.fit(weight, QuantScheme.parse(scheme))
    learned = LearnedRounding(weight, fitted, minmax=True)
    assert torch.equal(learned.quantized().codes, rounding.encode_rows(weight, fitted, 0))
    groups = fitted.scales.shape[1]
    v = torch.zeros_like(weight)
    factors = [torch.ones(16, groups) for _ in range(1 if fitted.zeros is None else 2)]
    for _ in range(3):
        leaves = [part.requires_grad_() for part in (v, *factors)]
        made = fake_quantized(weight, fitted, v, factors)
        assert torch.allclose(learned.weight(torch.float32), made, atol=1e-6)
        gradient = torch.randn(16, 80)
        found = torch.autograd.grad((made * gradient).sum(), leaves)
        learned.step(gradient, rate)
        bounds = [(-0.5, 0.5), *([(0, 1)] * len(factors))]
        v, *factors = (
            (leaf - rate * by.sign()).detach().clamp(*bound)
            for leaf, by, bound in zip(leaves, found, bounds, strict=True)
        )
        assert torch.equal(learned.learned[0].flatten(1)[:, :80], v)
        for factor, wanted in zip(learned.learned[1:], factors, strict=True):
            assert torch.equal(factor.squeeze(2), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [*SCHEMES, "w2a16-g32", "w8a8"])
def test_what_is_stored_is_what_was_trained(scheme, dtype):
    torch.manual_seed(0)
    weight = weight_of(16, 80)
    learned = LearnedRounding(weight, rounding.fit(weight, QuantScheme.parse(scheme)), minmax=True)
    for _ in range(4):
        learned.step(torch.randn(16, 80), 0.1)
    made = learned.quantized()
    assert not torch.equal(made.codes, rounding.quantize(weight, made.scheme).codes)
    assert torch.equal(made.dequantize().to(dtype), learned.weight(dtype))


def errors(method, scheme="w3a16-g24", **options):
    """|difference| of a model's outputs, of which its last block alone is quantized; the report."""
    model = fresh()
    with torch.no_grad():
        wanted = [model(batch) for batch in BATCHES]
        options = {"calibration": BATCHES, "include": ["blocks.2.*"], **options}
        report = qk.quantize_model(model, method, scheme, **options)
    return distance(model, wanted), report


def distance(model, wanted):
    with torch.no_grad():
        pairs = [(model(batch), output) for batch, output in zip(BATCHES, wanted, strict=True)]
    return sum(float((got - output).square().sum()) for got, output in pairs) ** 0.5


@pytest.mark.parametrize("scheme", [*SCHEMES, "w4a8-g24-flat-static", "w4a8-staticasym"])
def test_a_block_is_nearer_than_by_rounding_to_nearest(scheme):
    nearest, _ = errors("rtn", scheme)
    learned, report = errors("autoround(steps=40, batch=2)", scheme)
    assert learned < 0.9 * nearest
    assert {layer.method for layer in report.layers} == {"autoround(steps=40, batch=2)"}


def test_ranges_are_learned_beside_rounding():
    fixed, _ = errors("autoround(steps=40, batch=2, minmax=false)", "w2a16-g24")
    both, _ = errors("autoround(steps=40, batch=2)", "w2a16-g24")
    assert both < fixed
    # Scales that are searched beforehand are a better place to begin than ranges.
    ranges, _ = errors("autoround(steps=40, batch=2, grid=minmax)", "w2a16-g24")
    assert both < ranges


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_language_model(dtype):
    tokens = torch.arange(96).view(4, 24) % 60

    def error(method):
        model = tiny_model(dtype)
        with torch.no_grad():
            wanted = model(tokens).logits.float()
            calibration = [tokens[:3], {"input_ids": tokens[3:]}]
            qk.quantize_model(model, method, "w3a16-g32", calibration=calibration)
            return float((model(tokens).logits.float() - wanted).norm())

    assert error("autoround(steps=30)") < 0.8 * error("rtn")


def test_a_block_makes_up_for_those_in_front_of_it():
    method, scheme = "autoround(steps=60, batch=2)", "w2a16-g24"
    model, other = fresh(), fresh()
    with torch.no_grad():
        wanted = [model(batch) for batch in BATCHES]
    qk.quantize_model(model, method, scheme, calibration=BATCHES)
    for name in ("blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"):
        other.get_submodule(name).weight.data = model.get_submodule(name).dequantize()
    options = {"calibration": BATCHES, "include": ["blocks.2.*"]}
    qk.quantize_model(other, method, scheme, **options)
    assert distance(model, wanted) < 0.98 * distance(other, wanted)


def test_the_same_again_and_nothing_left_behind():
    model = fresh()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 2)
    norm = nn.Parameter(torch.ones(72))
    model.blocks[0].norm = norm
    _, first = quantized(model=model, method=FEW, scheme="w4a16-g24")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert norm.requires_grad and not any("forward" in vars(m) for m in model.modules())
    assert torch.is_grad_enabled() and no_forward_is_left()
    for ambient in (torch.enable_grad, torch.inference_mode):
        torch.manual_seed(99)
        other = fresh()
        with ambient():
            _, again = quantized(model=other, method=FEW, scheme="w4a16-g24")
        assert all(
            torch.equal(again[name], values) for name, values in first.items() if "norm" not in name
        )


@pytest.mark.parametrize("last", range(0, 6, 2))
def test_an_interrupt_leaves_the_model_alone_and_a_run_goes_on(tmp_path, last):
    options = {"method": FEW, "scheme": "w4a16-g24"}
    model, expected = fresh(), quantized(**options)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        quantized(tmp_path / "run", model, progress=interrupt_at(last), **options)
    unchanged(model, before)
    same(quantized(tmp_path / "run", model, **options), expected)


def test_an_interrupt_within_a_step(monkeypatch):
    model, calls = fresh(), []
    before = snapshot(model)

    def step(self, gradient, rate):
        calls.append(rate)
        if len(calls) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(LearnedRounding, "step", step)
    with pytest.raises(KeyboardInterrupt):
        quantized(model=model, method=FEW, scheme="w4a16-g24")
    unchanged(model, before)
    assert not any("forward" in vars(module) for module in model.modules())
    assert no_forward_is_left()
    # Linearly to 0, for both layers of a block.
    assert calls[::2] == pytest.approx([(6 - step) / 36 for step in range(5)])


def test_outputs_that_are_not_held_are_made_again(monkeypatch):
    expected = quantized(method=FEW, scheme="w4a16-g24")
    monkeypatch.setattr(descent, "_HELD_BYTES", 2 * 20 * 72 * 4)
    same(quantized(method=FEW, scheme="w4a16-g24"), expected)


def test_larger_batches_are_cut():
    expected = quantized(method=FEW, scheme="w4a16-g24", calibration=BATCHES)
    cut = quantized(method=FEW, scheme="w4a16-g24", calibration=[{"tokens": torch.cat(BATCHES)}])
    same(cut, expected)


def test_what_was_best_is_kept(monkeypatch):
    """Steps that only do harm leave the weight that they began with."""
    expected = quantized(method="rtn", scheme="w4a16-g24")
    real = LearnedRounding.step
    monkeypatch.setattr(LearnedRounding, "step", lambda self, g, rate: real(self, -g, rate))
    got = quantized(method="autoround(steps=6, batch=2, lr=0.3, grid=minmax)", scheme="w4a16-g24")
    assert all(torch.equal(got[1][key], expected[1][key]) for key in expected[1])


def test_shared_layers_and_experts_without_tokens():
    model = fresh()
    model.blocks[0].again = model.blocks[0].down
    model.blocks[2].up = model.blocks[0].up
    report = qk.quantize_model(model, FEW, "w4a16-g24", calibration=BATCHES)
    assert report.whole_model is not None
    assert model.blocks[0].again is model.blocks[0].down
    assert model.blocks[2].up is model.blocks[0].up
    torch.manual_seed(3)
    report = qk.quantize_model(Experts(), FEW, "w4a16-g24", calibration=[TOKENS % 30])
    assert list(report.unreached) == RARE
    assert {r.name for r in report.layers if r.method == "rtn"} == set(RARE)


def test_a_layer_outside_of_blocks():
    error, report = errors("autoround(steps=40, batch=2)", include=["lm_head"])
    assert [layer.name for layer in report.layers] == ["lm_head"]
    assert error < 0.9 * errors("rtn", include=["lm_head"])[0]


def test_what_it_does_not_make_is_named_beforehand():
    for scheme in ("nf4-g64", "fp8e4m3-a16", "binary-g32"):
        with pytest.raises(SchemeError, match=r"does not make .* it learns which of"):
            qk.quantize_model(Model(), FEW, scheme, calibration=BATCHES)
    with pytest.raises(LayerError, match="learns from inputs: pass calibration"):
        qk.quantize_model(Model(), FEW, "w4a16-g24")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("autoround(steps=0)", "steps and batch must be 1 or more, got 0 and 4"),
        ("autoround(batch=0)", "steps and batch must be 1 or more, got 200 and 0"),
        ("autoround(lr=2)", r"lr must be in \[0, 1\], got 2"),
        ("autoround(lr=-1)", r"lr must be in \[0, 1\], got -1"),
        ("autoround(grid=best)", "parameter grid is one of"),
    ],
)
def test_parameters_out_of_range_are_named(text, what):
    with pytest.raises(RecipeError, match=what):
        Recipe.parse(text)


@pytest.mark.parametrize("sequences", [1, 5, 6, 10, 16])
def test_a_step_draws_no_batch_twice_and_all_as_often(sequences):
    drawing = object.__new__(Descent)
    drawing._parameters = autoround.AutoRoundParameters(batch=4)
    drawing._first = dict.fromkeys(range(sequences), 1.0)
    drawing._sequences = dict.fromkeys(range(sequences), 1)
    steps = [step for step, _ in zip(drawing._drawn(), range(40), strict=False)]
    assert all(len(step) == len(set(step)) == min(4, sequences) for step in steps)
    often = [sum(number in step for step in steps) for number in range(sequences)]
    assert max(often) - min(often) <= 2


def test_a_layer_of_zeros_stops_no_other():
    losses = {}
    for zeroed in (False, True):
        model = fresh()
        if zeroed:
            model.blocks[0].down.weight.data.zero_()
        report = qk.quantize_model(model, FEW, "w4a16-g24-dq", calibration=BATCHES)
        losses[zeroed] = {layer.name: layer.output_error for layer in report.layers}
    plain = fresh()
    plain.blocks[0].down.weight.data.zero_()
    report = qk.quantize_model(plain, "rtn", "w4a16-g24-dq", calibration=BATCHES)
    nearest = {layer.name: layer.output_error for layer in report.layers}
    assert losses[True]["blocks.0.down"] == 0
    assert losses[True]["blocks.1.up"] != nearest["blocks.1.up"]


def test_padding_is_not_learned_from():
    tokens = torch.arange(96).view(4, 24) % 60
    mask = torch.ones_like(tokens)
    mask[:2, :15] = 0

    def learned(padding):
        model = tiny_model()
        ids = torch.where(mask.bool(), tokens, padding)
        batch = {"input_ids": ids, "attention_mask": mask}
        qk.quantize_model(model, "autoround(steps=20)", "w3a16-g32", calibration=[batch])
        return {
            name: layer.to_weight()
            for name, layer in model.named_modules()
            if hasattr(layer, "to_weight")
        }

    first, second = learned(3), learned(50)
    assert first
    for name, weight in first.items():
        assert torch.equal(weight.codes, second[name].codes), name
        assert torch.equal(weight.scales, second[name].scales), name
