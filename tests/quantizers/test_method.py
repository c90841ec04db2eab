"""Methods that a test alone adds: through quantize_model, save, load and the command line."""

import re
from dataclasses import dataclass

import pytest
import torch

import qkernels as qk
from qkernels import rounding
from qkernels.calibration.statistics import STATISTICS, Needs
from qkernels.errors import LayerError, SchemeError
from qkernels.quantizers.method import Method
from qkernels.quantizers.methods import METHODS
from tests.cli.conftest import model_folder, run, text_file  # noqa: F401
from tests.plain_model import TOKENS, Model, snapshot, unchanged
from tests.tiny_model import tiny_model

FLIPPED = TOKENS.flip(1)


@dataclass(frozen=True)
class Clipping:
    ratio: float = 0.75


def clip(task, parameters):
    """Rounds to nearest with a narrower range, and holds the codes whole."""
    weight = task.weight.float()
    largest = parameters.ratio * weight.abs().amax(dim=1, keepdim=True)
    return rounding.quantize(weight.clamp(-largest, largest).to(task.weight.dtype), task.scheme)


def refuse_floats(scheme, parameters):
    return "it clips integers" if scheme.weight.kind != "linear" else None


TOY = Method(
    name="toy", title="a toy that clips", parameters=Clipping, quantize=clip, why_not=refuse_floats
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(METHODS, "toy", TOY)
    return TOY


def test_a_toy_method_quantizes_a_model_that_is_saved_and_loaded(toy, tmp_path):
    model = tiny_model()
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    report = qk.quantize_model(model, "toy(ratio=0.5)", "w4a16-g32-sym")
    assert report.method == "toy(ratio=0.5)"
    assert {layer.method for layer in report.layers} == {"toy(ratio=0.5)"}
    largest = weight.abs().amax(dim=1) / 2
    made = model.model.layers[0].mlp.up_proj.dequantize()
    # Symmetric codes reach from -8 to 7 of scales that are fitted to 7.5.
    assert (made.abs().amax(dim=1) <= largest * 8 / 7.5 * 1.001).all()
    assert (made - weight).norm() / weight.norm() == pytest.approx(
        report.layers[5].weight_error, rel=1e-4
    )
    qk.save_model(model, tmp_path / "out")
    loaded, ids = qk.load_model(tmp_path / "out"), torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_command_line_lists_and_takes_it(toy, run, model_folder, tmp_path):  # noqa: F811
    code, out, _ = run("list", "methods")
    assert code == 0
    assert re.search(r"│ toy +│ a toy that clips +│ quantizes layers +│ ratio=0.75, a number", out)
    assert re.search(r"│ rtn +│ round to nearest", out)
    arguments = ("quantize", model_folder, "--scheme", "w8a16-sym", "-o", tmp_path / "out")
    code, _, err = run(*arguments, "--method", "magic")
    assert code == 1 and re.search(
        "method 'magic' is not one of autoround, awq, .*rtn, .*, toy", err
    )
    code, _, err = run(*arguments, "--method", "toy(share=1)")
    assert code == 1 and "method toy has no parameter 'share': it takes ratio" in err
    code, out, _ = run(*arguments, "--method", "toy(ratio=0.9)")
    assert code == 0 and "toy(ratio=0.9)" in out


def test_a_scheme_that_a_method_cannot_make_is_named_before_the_work(toy):
    model, calls = Model(), []
    before = snapshot(model)
    with pytest.raises(SchemeError, match=r"blocks\.1\.down: toy does not make nf4-g64: it clips"):
        qk.quantize_model(
            model,
            "toy",
            "w8a16",
            overrides={"blocks.1.down": "nf4-g64"},
            calibration=[TOKENS],
            progress=lambda *a: calls.append(a),
        )
    assert not calls
    unchanged(model, before)


def test_errors_of_a_method_name_the_layer(monkeypatch):
    def overflow(task, parameters):
        return rounding.fit(task.weight * 1e9, task.scheme)

    monkeypatch.setitem(METHODS, "toy", Method(name="toy", title="", quantize=overflow))
    model = Model()
    before = snapshot(model)
    with pytest.raises(qk.QuantizationError, match=r"blocks\.0\.up: a scale of .* overflows"):
        qk.quantize_model(model, "toy", "w8a16")
    unchanged(model, before)


class Products:
    """Sum of x^T x, or of x^T dense where there is a pair."""

    def __init__(self, columns):
        self.value = torch.zeros(columns, columns, dtype=torch.float64)

    def add(self, x, *, batch, dense=None):
        self.value += x.double().T @ (x if dense is None else dense).double()

    def merge(self, other):
        self.value += other.value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def inputs_of(model, layer, batches):
    """What reaches a layer in a model as it is: [rows, K]."""
    seen = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    hook.remove()
    return [x.flatten(0, -2) for x in seen]


def test_statistics_come_from_quantized_and_dense_inputs(monkeypatch):
    monkeypatch.setitem(STATISTICS, "products", Products)
    needs, kept = ("products",), {}

    def look(task, parameters):
        kept[task.name] = task.inputs
        return rounding.fit(task.weight, task.scheme)

    method = Method(
        name="toy",
        title="",
        quantize=look,
        statistics=lambda scheme, parameters: Needs(quantized=needs, dense=needs, paired=needs),
    )
    monkeypatch.setitem(METHODS, "toy", method)
    model, batches = Model(), [TOKENS, FLIPPED[:1, :7]]
    names = [f"blocks.{i}.up" for i in range(3)]
    dense = {name: inputs_of(model, name, batches) for name in names}
    with pytest.raises(LayerError, match="toy learns from inputs: pass calibration"):
        qk.quantize_model(model, "toy", "w4a16-g24")
    report = qk.quantize_model(model, "toy", "w4a16-g24", calibration=batches)
    assert report.whole_model is None
    for name in names:
        # The first layer of a block sees what it sees in the finished model.
        quantized = inputs_of(model, name, batches)
        pairs = list(zip(quantized, dense[name], strict=True))
        assert kept[name].rows == sum(len(x) for x in quantized) == 47
        for statistics, expected in (
            (kept[name].quantized, sum(x.double().T @ x.double() for x in quantized)),
            (kept[name].dense, sum(x.double().T @ x.double() for x in dense[name])),
            (kept[name].paired, sum(x.double().T @ y.double() for x, y in pairs)),
        ):
            assert torch.allclose(statistics["products"].value, expected, rtol=1e-6)
    first, last = kept[names[0]], kept[names[2]]
    assert torch.equal(first.dense["products"].value, first.quantized["products"].value)
    assert not torch.allclose(last.dense["products"].value, last.quantized["products"].value)


@dataclass(frozen=True)
class Sequential:
    true_sequential: bool = True


@pytest.mark.parametrize("whole", [False, True])
def test_layers_are_quantized_in_stages_where_a_method_asks(monkeypatch, whole):
    monkeypatch.setitem(STATISTICS, "products", Products)
    kept = {}

    def look(task, parameters):
        kept[task.name] = task.inputs
        return rounding.fit(task.weight, task.scheme, activation_scale=task.activation_scale)

    method = Method(
        name="toy",
        title="",
        parameters=Sequential,
        quantize=look,
        statistics=lambda scheme, parameters: Needs(dense=("products",), paired=("products",)),
        in_stages=lambda parameters: parameters.true_sequential,
    )
    monkeypatch.setitem(METHODS, "toy", method)
    kind = CalledAgain if whole else Model
    model, other, batches = kind(), kind(), [TOKENS, FLIPPED[:1, :7]]
    other.load_state_dict(model.state_dict())
    names = [f"blocks.{i}.{part}" for i in (1, 2) for part in ("up", "down")]
    dense = {name: inputs_of(model, name, batches) for name in names}
    options = {"scheme": "w4a8-g24-flat-static", "calibration": batches}
    report = qk.quantize_model(model, "toy", **options)
    assert (report.whole_model is not None) == whole
    for name in names:
        quantized = inputs_of(model, name, batches)
        # Every layer, not the first of its block alone, sees what the finished model gives it.
        largest = max(float(x.abs().max()) for x in quantized)
        scale = float(model.get_submodule(name).activation_scale)
        assert scale == pytest.approx(largest / 127, rel=1e-6)
        for statistics, expected in (
            (kept[name].dense, sum(x.double().T @ x.double() for x in dense[name])),
            (
                kept[name].paired,
                sum(x.double().T @ y.double() for x, y in zip(quantized, dense[name], strict=True)),
            ),
        ):
            assert torch.allclose(statistics["products"].value, expected, rtol=1e-6)
    qk.quantize_model(other, "toy(true_sequential=false)", **options)
    up, down = (
        torch.equal(
            getattr(model.blocks[0], part).activation_scale,
            getattr(other.blocks[0], part).activation_scale,
        )
        for part in ("up", "down")
    )
    assert up and not down


class CalledAgain(Model):
    """Calls its first block again at the end, which its other blocks do not see."""

    def forward(self, tokens):
        super().forward(tokens)
        return self.blocks[0](self.embed(tokens))


def smooth(task, parameters):
    """Moves a factor of each column from `down` into the rows of `up` before it."""
    assert sorted(task.schemes) == sorted(task.layers)
    up, down = task.module.up, task.module.down
    name = f"{task.name}.down"
    factor = 1 + task.inputs[name].quantized["rows"].rows.abs().amax(dim=0)
    task.rewrite("up.weight", up.weight / factor[:, None])
    task.rewrite("up.bias", up.bias / factor)
    task.rewrite("down.weight", down.weight * factor)


@pytest.fixture
def smoothing(monkeypatch):
    method = Method(
        name="smooth",
        title="",
        prepare_block=smooth,
        statistics=lambda scheme, parameters: Needs(quantized=("rows",)),
    )
    monkeypatch.setitem(METHODS, "smooth", method)


def test_a_block_is_rewritten_and_looked_at_again(smoothing):
    model = Model()
    want, before = model(TOKENS), snapshot(model)
    report = qk.quantize_model(model, "smooth", "w8a8-static", calibration=[TOKENS])
    assert report.method == "smooth+rtn"
    # relu(x / factor) * factor is relu(x): the model computes what it did.
    assert (model(TOKENS) - want).norm() / want.norm() < 0.02
    down = inputs_of(model, "blocks.0.down", [TOKENS])[0].abs().max()
    # The scale is that of the rewritten input; up is quantized in the finished model.
    assert float(model.blocks[0].down.activation_scale * 127 / down) == pytest.approx(1, rel=0.02)
    assert down < 1
    assert not torch.equal(model.blocks[0].up.bias, before[1]["blocks.0.up.bias"])


def test_what_was_rewritten_is_put_back(smoothing):
    def interrupt(done, total, name):
        if done == 5:
            raise KeyboardInterrupt

    model = Model()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        qk.quantize_model(model, "smooth", "w8a16", calibration=[TOKENS], progress=interrupt)
    unchanged(model, before)


def test_a_prepared_block_can_be_run(monkeypatch):
    ran = {}

    def look(task, parameters):
        ran[task.name] = [
            (task.run(batch), task.run(batch, dense=True)) for batch in task.batches()
        ]
        assert task.batches() == task.batches(dense=True) == [0, 1]

    method = Method(
        name="look",
        title="",
        prepare_block=look,
        statistics=lambda scheme, parameters: Needs(dense=("rows",)),
    )
    monkeypatch.setitem(METHODS, "look", method)
    model = Model()
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, y: outputs.append(y))
    for batch in (TOKENS, FLIPPED):
        model(batch)
    qk.quantize_model(model, "look", "w4a16-g24", calibration=[TOKENS, FLIPPED])
    for i in range(3):
        for batch in (0, 1):
            quantized, dense = ran[f"blocks.{i}"][batch]
            assert torch.equal(dense, outputs[3 * batch + i])
            assert torch.equal(quantized, dense) == (i == 0)
