import contextlib
import gc
import weakref

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels import WQLinear, rounding
from qkernels.calibration.observers import ObserverChoice
from qkernels.calibration.ranges import Numbers, scale_and_zero
from qkernels.calibration.statistics import Needs
from qkernels.errors import (
    LayerError,
    QuantizationError,
    RecipeError,
    SchemeError,
    WeightError,
)
from qkernels.quantizers.method import Method
from qkernels.quantizers.methods import METHODS
from qkernels.scheme import QuantScheme
from tests import schemes
from tests.plain_model import TOKENS, Block, Model, no_forward_is_left, snapshot, unchanged
from tests.tiny_model import tiny_model

TINY_TOKENS = torch.arange(96).view(4, 24) % 60


def test_report_and_replacement():
    model, seen = Model(), []
    before = model(TOKENS)
    report = qk.quantize_model(
        model, "rtn", "w8a16", calibration=[TOKENS], progress=lambda *a: seen.append(a)
    )
    assert [r.name for r in report.layers] == [
        f"blocks.{i}.{part}" for i in range(3) for part in ("up", "down")
    ]
    assert all(isinstance(model.get_submodule(r.name), qk.WQLinear) for r in report.layers)
    assert isinstance(model.lm_head, nn.Linear) and "lm_head" in report.skipped
    for r in report.layers:
        assert 0 < r.weight_error < 0.01 and 0 < r.output_error < 0.01
        assert r.scheme == "w8a16"
    weights = sum(r.n * r.k for r in report.layers)
    assert report.bits_per_weight == 8 * report.weight_bytes / weights
    # The kernels' layouts pad such small layers; the plain one does not.
    plain = qk.quantize_model(Model(), "rtn", "w8a16", backend="reference")
    assert 8 < plain.bits_per_weight < 8.6
    assert report.weight_bytes == sum(
        model.get_submodule(r.name).packed.nbytes for r in report.layers
    )
    assert (model(TOKENS) - before).norm() / before.norm() < 0.01
    assert [s[0] for s in seen] == list(range(7)) and seen[-1][:2] == (6, 6)


@pytest.mark.parametrize("scheme", schemes.NOT_STATIC)
def test_rounding_a_model_is_rounding_its_layers(scheme):
    model = Model()
    alone = {
        name: qk.WQLinear.from_linear(module, scheme, name=name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    qk.quantize_model(model, scheme=scheme, include=["*"])
    for name, expected in alone.items():
        got = model.get_submodule(name)
        assert got.extra_repr() == expected.extra_repr()
        state, wanted = got.state_dict(), expected.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[key], wanted[key]) for key in state)


def test_mixed_precision_include_and_exclude():
    model = Model()
    report = qk.quantize_model(
        model,
        scheme="w4a16-g24",
        exclude=["blocks.0.*"],
        overrides={"*.down": "w8a8", "blocks.1.up": None, "lm_head": "w8a16"},
    )
    assert {r.name: r.scheme for r in report.layers} == {
        "blocks.1.down": "w8a8",
        "blocks.2.up": "w4a16-g24",
        "blocks.2.down": "w8a8",
        "lm_head": "w8a16",
    }
    assert set(report.skipped) == {"blocks.0.up", "blocks.0.down", "blocks.1.up", "embed"}
    # The embedding shared its weight with the head and keeps it.
    assert isinstance(model.embed.weight, nn.Parameter)
    assert report.layers[0].output_error is None
    model = Model()
    report = qk.quantize_model(model, scheme="w8a16", include=["lm_head"])
    assert [r.name for r in report.layers] == ["lm_head"]


@pytest.mark.parametrize("chosen", [("w8a8", "w8a16"), ("w8a16", "w8a8"), (None, "w8a16")])
def test_the_first_pattern_that_matches_counts(chosen):
    patterns = "*.down", "blocks.1.*"
    for order in ((0, 1), (1, 0)):
        overrides = {patterns[i]: chosen[i] for i in order}
        report = qk.quantize_model(Model(), scheme="w4a16-g24", overrides=overrides)
        found = {r.name: r.scheme for r in report.layers}
        assert found.get("blocks.1.down") == chosen[order[0]]
        assert found.get("blocks.0.down") == found.get("blocks.2.down") == chosen[0]
        assert found["blocks.1.up"] == chosen[1]
        left_alone = "left alone by the override '*.down'"
        assert (report.skipped.get("blocks.1.down") == left_alone) == ("blocks.1.down" not in found)


@pytest.mark.parametrize(
    ("scheme", "largest"), [("w8a8-static", 127), ("w8a4-static", 7), ("fp8-a8-static", 448)]
)
@pytest.mark.parametrize("position", range(3))
def test_static_activations_take_their_scale_from_all_batches(scheme, largest, position):
    model = Model()
    # Token 7 alone makes large inputs, and it is in one batch.
    model.embed.weight.data[7] *= 40
    batches = [torch.arange(10, 30).view(1, 20) for _ in range(3)]
    batches[position] = torch.tensor([[3, 7, 4]])
    expected = model.embed.weight[7].detach().abs().max() / largest
    qk.quantize_model(model, scheme=scheme, calibration=batches)
    assert torch.allclose(model.blocks[0].up.activation_scale, expected, rtol=1e-6)


def seen_by(model, name, batches):
    """All inputs of a layer of a dense model."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    for batch in batches:
        model(batch)
    hook.remove()
    return seen


@pytest.mark.parametrize(
    "observer", ["minmax", "percentile(percent=90)", "moving_average(momentum=0.5)", "kl", "mse"]
)
@pytest.mark.parametrize(
    "scheme", ["w8a8-static", "w8a8-staticasym", "w8a4-static", "w8a4-staticasym"]
)
def test_an_observer_finds_static_activations(observer, scheme):
    torch.manual_seed(3)
    model, batches = Model(), [TOKENS[:1], TOKENS[1:], TOKENS[:, :5]]
    seen = ObserverChoice.parse(observer).make()
    for number, x in enumerate(seen_by(model, "blocks.0.up", batches)):
        seen.add(x, batch=number)
    numbers = Numbers.of(QuantScheme.parse(scheme).activation)
    scale, zero = scale_and_zero(*seen.range(numbers), numbers)
    qk.quantize_model(
        model, "gptq(drift=0)", scheme, calibration=batches, observer=observer, exclude=["*.down"]
    )
    layer = model.blocks[0].up
    assert torch.equal(layer.activation_scale, scale[0])
    assert layer.scheme == QuantScheme.parse(scheme)
    if scheme.endswith("asym"):
        assert torch.equal(layer.activation_zero, zero[0])


def test_zero_points_of_inputs_use_all_codes_of_one_sign():
    torch.manual_seed(3)
    errors = {}
    for scheme in ("w8a8-static", "w8a8-staticasym"):
        torch.manual_seed(3)
        report = qk.quantize_model(Model(), scheme=scheme, calibration=[TOKENS])
        errors[scheme] = {layer.name: layer.output_error for layer in report.layers}
    # These are behind a ReLU.
    for name in ("blocks.0.down", "blocks.1.down", "blocks.2.down"):
        assert errors["w8a8-staticasym"][name] < 0.8 * errors["w8a8-static"][name]


class Experts(Model):
    """Each of three experts takes ten tokens of the vocabulary, the fourth none."""

    def __init__(self):
        super().__init__()
        self.blocks[1] = nn.ModuleList(Block() for _ in range(4))

    def forward(self, tokens):
        x = self.blocks[0](self.embed(tokens))
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.blocks[1]):
            taken = tokens // 10 == i if i < 3 else tokens < 0
            y[taken] = expert(x[taken])
        return self.blocks[2](x + y)


RARE = ["blocks.1.3.up", "blocks.1.3.down"]


@pytest.mark.parametrize(
    "scheme",
    ["w4a16-g24", "w8a8", "w8a8-static", "w8a8-staticasym", "w8a4-staticasym", "fp8-a8-static"],
)
def test_a_layer_without_inputs_is_rounded_and_reported(scheme):
    torch.manual_seed(3)
    model, twin = Experts(), Experts()
    twin.load_state_dict(model.state_dict())
    report = qk.quantize_model(model, scheme=scheme, calibration=[TOKENS[:1] % 30, TOKENS % 30])
    assert list(report.unreached) == RARE
    dynamic = scheme.removesuffix("asym").removesuffix("-static")
    by_name = {layer.name: layer for layer in report.layers}
    assert len(by_name) == 12
    for name in RARE:
        assert by_name[name].scheme == dynamic and by_name[name].method == "rtn"
        assert by_name[name].output_error is None
        said = report.unreached[name]
        assert said.startswith("rounded to nearest") and (dynamic in said) == (dynamic != scheme)
        alone = qk.WQLinear.from_linear(twin.get_submodule(name), dynamic)
        assert torch.equal(alone.dequantize(), model.get_submodule(name).dequantize())
    assert all(r.output_error is not None for r in report.layers if r.name not in RARE)
    assert report.as_dict()["unreached"] == report.unreached
    # All experts stay usable.
    assert model.blocks[1][3](torch.randn(2, 72)).isfinite().all()


def test_a_method_that_learns_leaves_unreached_layers_to_rounding(monkeypatch):
    learned = []

    def learn(task, parameters):
        learned.append(task.name)
        assert task.inputs.rows
        return rounding.fit(task.weight, task.scheme)

    method = Method(
        name="learn",
        title="",
        quantize=learn,
        statistics=lambda scheme, parameters: Needs(quantized=("rows",)),
    )
    monkeypatch.setitem(METHODS, "learn", method)
    report = qk.quantize_model(Experts(), "learn", "w8a16", calibration=[TOKENS % 30])
    assert [r.name for r in report.layers if r.method == "rtn"] == RARE == list(report.unreached)
    assert learned == [r.name for r in report.layers if r.method == "learn"]


def test_calibration_that_reaches_nothing_still_quantizes():
    class Idle(Model):
        def forward(self, tokens):
            return self.embed(tokens)

    report = qk.quantize_model(Idle(), scheme="w8a8-static", calibration=[TOKENS])
    assert len(report.unreached) == len(report.layers) == 6


@pytest.mark.parametrize("scheme", ["w4a16-g24", "w8a8", "nf4-g64-dq", "fp8-a8"])
def test_calibration_changes_no_weight_that_is_rounded(scheme):
    torch.manual_seed(2)
    model, twin = Model(), Model()
    twin.load_state_dict(model.state_dict())
    qk.quantize_model(model, scheme=scheme)
    qk.quantize_model(twin, scheme=scheme, calibration=[TOKENS])
    state, other = model.state_dict(), twin.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)


@pytest.mark.parametrize(
    ("kwargs", "error", "named"),
    [
        ({"method": "magic"}, QuantizationError, "magic"),
        ({"scheme": "w4a17"}, SchemeError, "w4a17"),
        ({"scheme": "w8a8-static"}, LayerError, "calibration"),
        ({"scheme": "w8a8-staticasym"}, LayerError, "calibration"),
        ({"observer": "median"}, RecipeError, "observer 'median' is not one of minmax"),
        (
            {"scheme": "fp8-a8-static", "observer": "kl", "calibration": [TOKENS]},
            SchemeError,
            "blocks.0.up: observer kl is not for fp8-a8-static: it looks for a step",
        ),
        ({"include": ["nothing.*"]}, LayerError, r"nothing\.\*"),
        ({"overrides": {"nope": "w8a16"}}, LayerError, "nope"),
        ({"exclude": ["*"]}, LayerError, "no linear layer is left"),
        ({"calibration": []}, LayerError, "no batch"),
        ({"backend": "nonesuch"}, QuantizationError, "nonesuch"),
    ],
)
def test_wrong_arguments_leave_the_model_alone(kwargs, error, named):
    model = Model()
    before = snapshot(model)
    with pytest.raises(error, match=named):
        qk.quantize_model(model, **kwargs)
    unchanged(model, before)


def test_a_bad_weight_leaves_the_model_alone():
    model = Model()
    model.blocks[2].down.weight.data[1, 2] = float("nan")
    before = snapshot(model)
    with pytest.raises(WeightError, match=r"blocks\.2\.down\.weight\[1, 2\] is nan"):
        qk.quantize_model(model, scheme="w8a16")
    unchanged(model, before)


@pytest.mark.parametrize("calibration", [None, [TOKENS]])
def test_an_interrupt_at_any_layer_leaves_the_model_alone(calibration):
    for last in range(7):

        def interrupt(done, total, name, last=last):
            if done == last:
                raise KeyboardInterrupt

        model = Model()
        before = snapshot(model)
        with pytest.raises(KeyboardInterrupt):
            qk.quantize_model(model, scheme="w8a16", calibration=calibration, progress=interrupt)
        unchanged(model, before)
        assert no_forward_is_left()


def test_a_model_that_is_a_linear_layer():
    model, x = nn.Linear(72, 72), torch.randn(3, 72)
    calls: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, args, y: calls.append(y))
    holder, want = (
        nn.Sequential(model),
        WQLinear.from_linear(model, "w8a8-static", activation_scale=x.abs().max() / 127),
    )
    report = qk.quantize_model(model, scheme="w8a8-static", calibration=[x])
    assert [layer.name for layer in report.layers] == ["layer"] and not report.unreached
    calls.clear()
    assert isinstance(holder[0], WQLinear) and torch.equal(holder(x), want(x))
    assert len(calls) == 1
    assert not model.state_dict().keys() ^ want.state_dict().keys()
    model = nn.Linear(72, 72)
    with pytest.raises(LayerError, match="pass calibration"):
        qk.quantize_model(model, scheme="w8a8-static")
    assert type(model) is nn.Linear and isinstance(model.weight, nn.Parameter)


def test_a_model_without_blocks():
    model = nn.Sequential(nn.Linear(72, 96), nn.ReLU(), nn.Linear(96, 72))
    x = torch.randn(5, 72)
    want, inner = model(x), model[1](model[0](x)).abs().max()
    report = qk.quantize_model(model, scheme="w8a8-static", calibration=[x])
    assert [r.name for r in report.layers] == ["0", "2"] and report.whole_model is None
    assert (model(x) - want).norm() / want.norm() < 0.02
    # All of it is one block, whose layers are calibrated together.
    assert torch.allclose(model[2].activation_scale, inner / 127)


def test_twice_is_an_error():
    model = Model()
    qk.quantize_model(model, scheme="w8a16")
    with pytest.raises(LayerError, match=r"blocks\.0\.up is quantized already"):
        qk.quantize_model(model, scheme="w8a16")
    model = nn.Sequential(nn.Embedding(40, 32), nn.Linear(32, 32))
    qk.quantize_model(model, scheme="w8a16", include=["0"])
    with pytest.raises(LayerError, match="0 is quantized already"):
        qk.quantize_model(model, scheme="w8a16")


def test_an_embedding_that_computes_its_weight_is_left_alone():
    model = nn.Sequential(nn.Embedding(40, 32), nn.Linear(32, 32))
    nn.utils.parametrizations.weight_norm(model[0])
    report = qk.quantize_model(model, scheme="w8a16", include=["*", "0"])
    assert [layer.name for layer in report.layers] == ["1"]


def test_a_shared_layer_stays_shared():
    model = Model()
    model.blocks[1].up = model.blocks[0].up
    qk.quantize_model(model, scheme="w8a16")
    assert model.blocks[1].up is model.blocks[0].up


@pytest.mark.parametrize(
    ("calibration", "what"),
    [
        (TOKENS, r"got one batch \(int64 \[2, 20\]\): give \[batch\]"),
        ({"tokens": TOKENS}, "got one batch"),
        ("some text", "got a text"),
        (["a text"], "batch 0 holds no tensor"),
        ([TOKENS, [[1, 2], [3, 4]]], "batch 1 holds no tensor"),
        ([TOKENS[:0]], r"batch 0 is empty: int64 \[0, 20\]"),
        ([TOKENS[:, :0]], r"batch 0 is empty: int64 \[2, 0\]"),
    ],
)
def test_what_is_no_calibration_is_named(calibration, what):
    model = Model()
    before = snapshot(model)
    with pytest.raises(LayerError, match=what):
        qk.quantize_model(model, "rtn", "w4a16-g24", calibration=calibration)
    unchanged(model, before)


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        (torch.full((1, 8), 5000), "batch 0 holds the token 5000, and the model knows 0 to 127"),
        (torch.full((1, 8), -1), "batch 0 holds the token -1"),
        ({"input_ids": torch.ones(1, 8)}, r"batch 0 holds float32 \[1, 8\] where the model takes"),
    ],
)
def test_tokens_that_the_model_does_not_know_are_named(batch, what):
    with pytest.raises(LayerError, match=what):
        qk.quantize_model(tiny_model(), "gptq", "w4a16-g32", calibration=[batch])


def test_something_else_as_process_group():
    with pytest.raises(LayerError, match="process_group is 'gloo': give a group"):
        qk.quantize_model(Model(), "rtn", "w4a16-g24", process_group="gloo")


@pytest.mark.parametrize("method", ["rtn", "gptq", "hqq", "obq", "awq", "rotate+gptq"])
def test_under_autocast_methods_compute_in_their_own_types(method):
    def quantized(*contexts):
        model = tiny_model()
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            report = qk.quantize_model(model, method, "w4a16-g32", calibration=[TINY_TOKENS])
        return max(layer.output_error for layer in report.layers)

    assert quantized(torch.autocast("cpu", torch.bfloat16)) < 1.3 * quantized()


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "gptq+distill(steps=1)"])
def test_the_dense_layers_are_let_go(method):
    model = tiny_model()
    batch = TINY_TOKENS.clone()
    held = [weakref.ref(m) for n, m in model.named_modules() if n.endswith("_proj")]
    held.append(weakref.ref(batch))
    gc.collect()
    gc.disable()
    try:
        qk.quantize_model(model, method, "w4a16-g32", calibration=[batch])
        del batch
        assert not any(each() is not None for each in held)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "recipe", ["awq", "smoothquant", "autoround", "gptq+distill", "guided+gptq"]
)
def test_a_model_that_was_made_in_inference_mode(recipe):
    with torch.inference_mode():
        model = Model()
    scheme = "w8a8" if recipe == "smoothquant" else "w4a16-g24"
    with pytest.raises(LayerError, match=r"was made in inference mode, .* build or load"):
        qk.quantize_model(model, recipe, scheme, calibration=[TOKENS])
    qk.quantize_model(model, "gptq", scheme, calibration=[TOKENS])
