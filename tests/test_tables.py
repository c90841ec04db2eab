"""Every table takes a row that only this file knows, and all that reads it goes along.

Each toy row goes through quantize_model, save_model, load_model, WQLinear, explain and the command
line's listing.
"""

from dataclasses import dataclass

import pytest
import torch

import qkernels as qk
from qkernels import rounding, select
from qkernels.backends.kernel import Kernel
from qkernels.backends.rows import QuantizedRows, RowKernel
from qkernels.calibration.extremes import MinMax
from qkernels.calibration.observers import OBSERVERS, Observer
from qkernels.checkpoints.format import Format, StoredLayer, says_method
from qkernels.checkpoints.table import FORMATS
from qkernels.errors import CheckpointError, QuantizationError
from qkernels.fields import FIELDS, Field
from qkernels.quantizers.method import Method
from qkernels.quantizers.methods import METHODS
from qkernels.scheme import WEIGHT_TYPES, QuantScheme, WeightType
from qkernels.weight import QuantizedWeight

pytest.importorskip("transformers", reason="models come from transformers")

from tests.tiny_model import LINEAR_LAYERS, tiny_model

TOKENS = torch.arange(24).view(1, 24)


def journey(folder, scheme, method="rtn", format="qkernels"):
    """Quantizes a model, saves it and loads it again; both, and the report."""
    model = tiny_model()
    report = qk.quantize_model(model, method, scheme)
    assert len(report.layers) == LINEAR_LAYERS
    want = model(TOKENS).logits
    qk.save_model(model, folder, format=format)
    loaded = qk.load_model(folder)
    assert torch.equal(loaded(TOKENS).logits, want)
    return model, loaded, report


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, qk.WQLinear)]


def listed(what):
    from typer.testing import CliRunner

    from qkernels.cli.app import app

    result = CliRunner().invoke(app, ["list", what])
    assert result.exit_code == 0, result.output
    return result.output


# --- A weight type: signed powers of two in 4 bits

POW2 = WeightType(
    "pow2", 4, "codebook", values=tuple(s * 2.0**-e for s in (1, -1) for e in range(8))
)


@pytest.fixture
def pow2(monkeypatch):
    monkeypatch.setitem(WEIGHT_TYPES, "pow2", POW2)


@pytest.mark.usefixtures("pow2")
def test_a_weight_type(tmp_path):
    _, loaded, report = journey(tmp_path / "out", "pow2-g32")
    assert {layer.scheme for layer in report.layers} == {"pow2-g32"}
    assert all(layer.weight_error < 0.2 for layer in report.layers)
    (layer, *_), x = layers_of(loaded), torch.randn(5, 64)
    weight = layer.dequantize()
    exponents = weight.abs() / layer.packed.parameters().group_scales().repeat_interleave(32, 1)
    assert torch.equal(exponents.log2(), exponents.log2().round())
    assert torch.allclose(layer(x), x @ weight.t(), atol=1e-4)
    rows = qk.explain("pow2-g32-dq", n=64, k=64, m=3)
    assert next(row for row in rows if row.chosen).backend == "cpu"
    assert "pow2" in listed("weights")
    with pytest.raises(QuantizationError, match=r"binary, .*pow2 or table"):
        QuantScheme.parse("pow3-g32")


# --- A hub field: a row that is added to every row of the weight


def _add_ridge(rows, start, group, values):
    rows += values["ridge"]


RIDGE = Field(
    name="ridge",
    axes=("k",),
    dtypes=lambda scheme: (torch.float32,),
    wanted=lambda scheme: None,
    add_to_rows=_add_ridge,
)


def _without_mean_row(task, parameters):
    mean = task.weight.float().mean(dim=0)
    return rounding.quantize(task.weight - mean, task.scheme).replace(ridge=mean)


CENTRED = Method(name="centred", title="the mean row apart", quantize=_without_mean_row)


def test_a_field(tmp_path, monkeypatch):
    monkeypatch.setitem(FIELDS, "ridge", RIDGE)
    monkeypatch.setitem(METHODS, "centred", CENTRED)
    model, loaded, report = journey(tmp_path / "out", "w8a16-g32-sym", "centred")
    assert all(layer.weight_error < 0.01 for layer in report.layers)
    for before, layer in zip(layers_of(model), layers_of(loaded), strict=True):
        assert torch.equal(layer.ridge, before.ridge) and layer.ridge.abs().max() > 0
        without = qk.WQLinear.from_weight(layer.to_weight().replace(ridge=None))
        x = torch.randn(3, layer.in_features)
        gap = layer(x) - without(x)
        assert torch.allclose(gap, (x @ layer.ridge)[:, None].expand_as(gap), atol=1e-4)
    layer = layers_of(loaded)[0]
    assert torch.equal(layer.to_weight().columns(32, 64).ridge, layer.ridge[32:64])
    state = layer.state_dict()
    assert "ridge" in state and torch.equal(state["ridge"], layer.ridge)
    rows = qk.explain("w8a16-g32-sym", n=64, k=64, fields=("ridge",))
    assert next(row for row in rows if row.chosen).kernel == "reference"
    assert any(row.reason == "does not know ridge" for row in rows)
    assert "ridge" in listed("fields")
    with pytest.raises(CheckpointError, match=r"ridge.*formats that hold it: qkernels"):
        qk.save_model(model, tmp_path / "other", format="compressed-tensors")


# --- A method: round to nearest with shrunken ranges


@dataclass(frozen=True)
class Shrink:
    factor: float = 1.0


def _shrunk(task, parameters):
    weight = task.weight.float()
    limit = weight.abs().amax(dim=1, keepdim=True) * parameters.factor
    return rounding.quantize(weight.clamp(-limit, limit), task.scheme)


SHRUNK = Method(name="shrunk", title="ranges made smaller", parameters=Shrink, quantize=_shrunk)


def test_a_method(tmp_path, monkeypatch):
    with pytest.raises(QuantizationError, match="'shrunk' is not one of autoround, awq, "):
        qk.quantize_model(tiny_model(), "shrunk")
    monkeypatch.setitem(METHODS, "shrunk", SHRUNK)
    model, _, report = journey(
        tmp_path / "out", "w4a16-g32-sym", "shrunk(factor=0.5)", "compressed-tensors"
    )
    assert report.method == "shrunk(factor=0.5)"
    plain = tiny_model()
    for layer in report.layers:
        original = plain.get_submodule(layer.name).weight.detach()
        got = model.get_submodule(layer.name).dequantize()
        assert got.abs().max() <= original.abs().max() * 0.6 and layer.weight_error > 0.05
    assert "shrunk" in listed("methods")


# --- An observer: a part of the range


@dataclass(frozen=True)
class Part:
    part: float = 0.5


class PartOfRange(MinMax):
    def __init__(self, cells, parameters):
        super().__init__(cells)
        self.part = parameters.part

    def range(self, numbers):
        return self.low * self.part, self.high * self.part


PART = Observer(name="part", title="a part of all values", parameters=Part, make=PartOfRange)


def test_an_observer(tmp_path, monkeypatch):
    monkeypatch.setitem(OBSERVERS, "part", PART)
    scales = {}
    for observer in ("minmax", "part(part=0.25)"):
        model = tiny_model()
        qk.quantize_model(
            model, scheme="w8a8-static", calibration=[TOKENS], observer=observer, include=["*.0.*"]
        )
        want = model(TOKENS).logits
        qk.save_model(model, tmp_path / observer)
        assert torch.equal(qk.load_model(tmp_path / observer)(TOKENS).logits, want)
        scales[observer] = model.model.layers[0].self_attn.q_proj.activation_scale
    assert torch.equal(scales["part(part=0.25)"], scales["minmax"] / 4)
    assert "part=0.5, a number" in listed("observers")


# --- A format: codes one a byte


def _read_plan(config, store):
    layers = config["quantization_config"]["layers"]
    return {
        name: StoredLayer(
            QuantScheme.parse(scheme),
            tuple(key for key in store if key.startswith(f"{name}.")),
        )
        for name, scheme in layers.items()
    }


def _read_layer(store, name, layer):
    parts = {key.removeprefix(f"{name}."): store.get(key) for key in layer.tensors}
    return QuantizedWeight(scheme=layer.scheme, **parts)


def _write_config(layers, dense):
    return {
        "quant_method": "bytes",
        "layers": {name: str(kind.scheme) for name, kind in layers.items()},
    }


BYTES = Format(
    name="bytes",
    title="codes one a byte",
    why_not=lambda kind: "holds no binary weights" if kind.scheme.bits == 1 else None,
    detect=says_method("bytes"),
    read_plan=_read_plan,
    read_layer=_read_layer,
    write_layer=lambda weight: {"codes": weight.codes, **weight.fields},
    write_config=_write_config,
)


def test_a_format(tmp_path, monkeypatch):
    model = tiny_model()
    qk.quantize_model(model, scheme="binary-g32")
    with pytest.raises(CheckpointError, match="'bytes' is not one of compressed-tensors"):
        qk.save_model(model, tmp_path / "no", format="bytes")
    monkeypatch.setitem(FORMATS, "bytes", BYTES)
    journey(tmp_path / "out", "nf4-g32-dq", format="bytes")
    assert "bytes" in listed("formats")
    with pytest.raises(CheckpointError, match="bytes holds no binary weights"):
        qk.save_model(model, tmp_path / "no", format="bytes")
    assert not (tmp_path / "no").exists()


# --- A kernel, and a kernel that quantizes rows


@pytest.fixture
def kernels():
    """The tables of kernels, which the test may change."""
    before = list(select.KERNELS), list(select.ROW_KERNELS)
    yield
    select.KERNELS[:], select.ROW_KERNELS[:] = before
    select.forget_choices()


@pytest.mark.usefixtures("kernels")
def test_a_kernel(tmp_path):
    seen = []

    def run(x, packed, bias, problem):
        seen.append(x.shape[0])
        y = x.float() @ packed.unpack().replace(perm=None).dequantize().t()
        return (y if bias is None else y + bias.float()).to(x.dtype)

    toy = Kernel(
        name="toy_product",
        backend="toy",
        layout="plain",
        activations=("none",),
        most_rows=24,
        where=lambda problem: None if problem.device == "cpu" else "runs on the CPU",
        run=run,
    )
    select.KERNELS.insert(0, toy)
    select.forget_choices()
    _, loaded, _ = journey(tmp_path / "out", "w4a16-g32")
    assert 24 in seen and len(seen) >= 2 * LINEAR_LAYERS
    assert all(layer.packed.layout.name == "plain" for layer in layers_of(loaded))
    rows = {m: qk.explain("w4a16-g32", n=64, k=64, m=m) for m in (24, 25)}
    assert next(row for row in rows[24] if row.chosen).kernel == "toy_product"
    assert rows[25][0].reason == "is for 24 rows of x at most, got 25"
    assert rows[25][0].kernel == "toy_product" and not rows[25][0].chosen
    seen.clear()
    layer, x = layers_of(loaded)[0], torch.randn(25, 64)
    few, many = layer(x[:24]), layer(x)
    assert seen == [24] and torch.allclose(few, many[:24], atol=1e-5)
    named = qk.WQLinear.from_weight(layer.to_weight(), backend="toy")
    named(x[:3])
    assert seen == [24, 3]
    assert "toy_product" in listed("kernels")


@pytest.mark.usefixtures("kernels")
def test_a_row_kernel():
    seen = []

    def run(problem, inputs):
        seen.append(problem.kind)
        ones = torch.ones(inputs.x.shape[0])
        return QuantizedRows(values=inputs.x.round().to(torch.int8), scale=ones)

    toy = RowKernel(name="toy_rows", backend="toy", kinds=("plain",), scales=("token",), run=run)
    select.ROW_KERNELS.insert(0, toy)
    select.forget_choices()
    x = torch.randint(-9, 9, (3, 40)).float()
    values, scale = qk.quantize_per_token(x)
    assert torch.equal(values.float(), x) and torch.equal(scale, torch.ones(3, 1))
    qk.rms_norm_quantize(x, None)
    assert seen == ["plain"]
    assert "toy_rows" in listed("rows")
