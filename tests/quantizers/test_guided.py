"""Inputs counted by the gradient of the loss: against autograd, and what statistics make of it."""

import pytest
import torch
import transformers

import qkernels as qk
from qkernels.calibration.batches import Tokens
from qkernels.errors import LayerError, RecipeError
from qkernels.quantizers import guided
from qkernels.quantizers.changes import Changes
from qkernels.quantizers.guided import GUIDED, GuidedParameters
from qkernels.quantizers.method import LayerTask, ModelTask
from qkernels.quantizers.methods import METHODS
from tests.bounds import SUM_BOUND
from tests.calibration.test_architectures import MIXTRAL
from tests.tiny_model import VOCABULARY, tiny_model


def calibration(batches=3, sequences=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (sequences, 24), generator=generator) for _ in range(batches)]


def weights_of(model, batches, **parameters):
    layers = {
        n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "head" not in n
    }
    schemes = dict.fromkeys(layers, qk.QuantScheme.parse("w4a16-g32"))
    task = ModelTask(model, layers, schemes, batches, {}, Changes(model))
    GUIDED.prepare_model(task, GuidedParameters(**parameters))
    return task.row_weights


def test_weights_are_squared_gradients_of_the_outputs(monkeypatch):
    model, batches = tiny_model(), calibration()
    monkeypatch.setattr(guided, "_loss", lambda result, *_: result.logits.square().sum())
    found = weights_of(model, batches, most=1e9)
    name = "model.layers.1.mlp.up_proj"
    layer, squares = model.get_submodule(name), []
    for batch in batches:
        kept = []
        hook = layer.register_forward_hook(
            lambda *a, kept=kept: (a[2].retain_grad(), kept.append(a[2]))[0]
        )
        model(batch).logits.square().sum().backward()
        hook.remove()
        squares.append(kept[0].grad.square().mean(dim=-1).flatten())
    mean = torch.cat(squares).mean()
    for number, square in enumerate(squares):
        assert (found[name][number] - square / mean).norm() <= 256 * SUM_BOUND * (
            square / mean
        ).norm()
    assert len(found) == 14


def test_weights_are_bounded_and_have_mean_one():
    found = weights_of(tiny_model(), calibration(), most=2.0)
    for rows in found.values():
        every = torch.cat(list(rows.values()))
        assert float(every.mean()) == pytest.approx(1, rel=1e-4)
        assert float(every.max()) <= 2.0 * float(every.min() + every.max())
    plain = weights_of(tiny_model(), calibration(), strength=0.0)
    assert all((rows == 1).all() for own in plain.values() for rows in own.values())


def test_statistics_are_of_weighted_rows(monkeypatch):
    seen = {}

    def look(task: LayerTask, parameters):
        seen[task.name] = task.inputs.quantized["gram"].matrix.clone(), task.inputs.rows
        return original(task, parameters)

    original = METHODS["gptq"].quantize
    import dataclasses

    monkeypatch.setitem(METHODS, "gptq", dataclasses.replace(METHODS["gptq"], quantize=look))
    monkeypatch.setattr(
        guided._Squares,
        "weights",
        lambda self, p: {b: torch.full((96,), float(b)) for b in self._places},
    )
    model, batches = tiny_model(), calibration()
    inputs = []
    name = "model.layers.0.self_attn.q_proj"
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, a: inputs.append(a[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    hook.remove()
    qk.quantize_model(model, "guided+gptq", "w4a16-g32", calibration=batches)
    wanted = sum(b * x.flatten(0, 1).T @ x.flatten(0, 1) for b, x in enumerate(inputs))
    got, rows = seen[name]
    assert (got - wanted).norm() <= 64 * SUM_BOUND * wanted.norm()
    assert rows == 3 * 96


def test_the_model_is_left_as_it_was_asked_for():
    model = tiny_model()
    model.model.norm.weight.requires_grad_(False)
    report = qk.quantize_model(model, "guided+gptq", "w4a16-g32", calibration=calibration())
    assert report.method == "guided+gptq"
    assert not model.model.norm.weight.requires_grad
    assert model.model.embed_tokens.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_mistakes_are_named():
    with pytest.raises(LayerError, match="guided learns from inputs"):
        qk.quantize_model(tiny_model(), "guided+rtn", "w4a16-g32")
    with pytest.raises(RecipeError, match="most must be 1 or more"):
        qk.quantize_model(tiny_model(), "guided(most=0.5)+gptq", calibration=calibration())


def test_rows_are_kept_by_batch_in_the_order_of_calls():
    squares = guided._Squares(rows=3)
    # More than were foreseen.
    places = [squares.reserve(batch, rows) for batch, rows in ((0, 2), (1, 4), (0, 3))]
    for number, place in reversed(list(enumerate(places, 1))):
        squares.put(place, torch.full((place.stop - place.start,), float(number)))
    weights = squares.weights(guided.GuidedParameters())
    mean = (2 * 1 + 4 * 2 + 3 * 3) / 9
    torch.testing.assert_close(weights[0] * mean, torch.tensor([1.0, 1, 3, 3, 3]))
    torch.testing.assert_close(weights[1] * mean, torch.tensor([2.0] * 4))
    assert squares.are_of([Tokens(5), Tokens(4)])
    # Of layers that are given some of the tokens it is not known which they are.
    assert not squares.are_of([Tokens(6), Tokens(4)]) and not squares.are_of([Tokens(5)] * 3)
    assert not guided._Squares(5).are_of([])


def mixture():
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**MIXTRAL)).eval()


def test_experts_count_all_tokens_alike():
    """They are given other tokens behind quantized blocks, in another order."""
    ids = [
        torch.randint(5, 60, (4, 24), generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    ]
    report = qk.quantize_model(mixture(), "guided+gptq", "w3a16-g32", calibration=ids)
    assert report.method == "guided+gptq"
    model = mixture()
    found = weights_of(model, ids)
    assert any("q_proj" in name for name in found)
    assert not any("expert" in name for name in found)


def test_gradients_that_are_not_finite_are_named():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.inf
    with pytest.raises(LayerError, match=r"guided: gradients .* reach model\.layers"):
        qk.quantize_model(model, "guided+gptq", "w4a16-g32", calibration=calibration())


@pytest.mark.parametrize(
    "recipe", ["guided(seed=99999999999999999999)+gptq", "rtn+distill(seed=-1)"]
)
def test_seeds_that_no_generator_takes(recipe):
    with pytest.raises(RecipeError, match="fit 63 bits"):
        qk.quantize_model(tiny_model(), recipe, "w4a16-g32", calibration=calibration())


def test_in_inference_mode():
    model = tiny_model()
    with torch.inference_mode():
        qk.quantize_model(model, "guided+gptq", "w4a16-g32", calibration=calibration())
