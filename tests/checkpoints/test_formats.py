"""The table of formats: every row over every scheme, and rows, types and fields added by a test."""

import json
import math
from dataclasses import replace

import pytest
import torch

import qkernels as qk
from qkernels import fields, rounding, scheme
from qkernels.checkpoints import FORMATS, Format, StoredLayer, read_weights, says_method
from qkernels.checkpoints.exact import by_channel
from qkernels.checkpoints.format import WeightKind
from qkernels.checkpoints.table import check_holds, check_scheme, weight_types
from qkernels.errors import CheckpointError
from qkernels.fields import FIELDS, Field
from qkernels.scheme import WEIGHT_TYPES, QuantScheme, WeightType
from qkernels.weight import QuantizedWeight
from tests.checkpoints.folders import WRITTEN, same_weight, write_layers
from tests.schemes import ALL, activation_scale
from tests.tiny_model import tiny_model, tiny_tokenizer


def quantized(text: str, n: int = 40, k: int = 72, bias: bool = True) -> QuantizedWeight:
    x = torch.randn(4, k)
    return rounding.quantize(
        torch.randn(n, k),
        text,
        activation_scale=activation_scale(text, x),
        bias=torch.randn(n) if bias else None,
    )


EITHER = ("compressed-tensors", "qkernels")
"""Formats that hold any numbers of rows and columns."""


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize("format", WRITTEN)
def test_each_scheme_comes_back_exactly_or_is_refused(format, text, tmp_path):
    size = math.lcm(QuantScheme.parse(text).group_size or 16, 1 if format in EITHER else 32)
    rows = (40, 33) if format in EITHER else (32, 64)
    weights = {
        "a.up": quantized(text, rows[0], 3 * size),
        "a.down": quantized(text, rows[1], 5 * size, bias=False),
    }
    reason = FORMATS[format].why_not(WeightKind.of(weights["a.up"]))
    assert reason == FORMATS[format].why_not(WeightKind.of_scheme(weights["a.up"].scheme))
    if reason is not None:
        with pytest.raises(CheckpointError, match=r"formats that hold it: .*qkernels"):
            check_scheme(format, weights["a.up"].scheme)
        return
    read = read_weights(write_layers(tmp_path / "out", format, weights))
    assert read.keys() == weights.keys()
    # One scale of a whole weight is one a channel where a format has no other.
    wanted = weights if format in EITHER else {n: by_channel(w) for n, w in weights.items()}
    assert all(same_weight(read[name], wanted[name]) for name in weights)


GROUPED = [text for text in ALL if QuantScheme.parse(text).group_size]


@pytest.mark.parametrize("text", GROUPED)
@pytest.mark.parametrize("format", WRITTEN)
def test_groups_that_do_not_divide_k_are_refused_where_they_cannot_be_read(format, text, tmp_path):
    size = QuantScheme.parse(text).group_size
    weights = {"up": quantized(text, k=2 * size + 5)}
    kinds = {"up": WeightKind.of(weights["up"])}
    if format != "qkernels":
        with pytest.raises(CheckpointError, match=r"up is .*; formats that hold it: qkernels"):
            check_holds(format, kinds)
        planned = replace(WeightKind.of_scheme(weights["up"].scheme), shape=weights["up"].shape)
        with pytest.raises(CheckpointError, match=r"up is .*; formats that hold it: qkernels"):
            check_holds(format, {"up": planned})
        return
    read = read_weights(write_layers(tmp_path / "out", format, weights))
    assert same_weight(read["up"], weights["up"])


def test_groups_that_are_refused_name_the_layer_the_sizes_and_the_remedy():
    weight = quantized("w4a16-g24", k=64)
    named = (
        r"up is w4a16-g24, and compressed-tensors reads no groups of 24 where K is 64: use a group "
        r"size that divides K; formats that hold it: qkernels"
    )
    with pytest.raises(CheckpointError, match=named):
        check_holds("compressed-tensors", {"up": WeightKind.of(weight)})


def held_by_compressed_tensors(text: str) -> bool:
    kind = WeightKind.of_scheme(QuantScheme.parse(text))
    return FORMATS["compressed-tensors"].why_not(kind) is None


@pytest.mark.parametrize("k", [8, 16, 20])
@pytest.mark.parametrize(
    "text",
    [t for t in GROUPED if held_by_compressed_tensors(t) and QuantScheme.parse(t).group_size > 20],
)
def test_one_group_that_is_larger_than_k_is_written_as_its_readers_take_it(text, k, tmp_path):
    weight = quantized(text, k=k)
    assert weight.scheme.group_size > k
    folder = write_layers(tmp_path / "out", "compressed-tensors", {"up": weight})
    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    arguments = written["config_groups"]["group_0"]["weights"]
    assert (arguments["strategy"], arguments["group_size"]) == ("group", k)
    read = read_weights(folder)["up"]
    assert torch.equal(read.dequantize(), weight.dequantize())
    for m, dtype in ((1, torch.float32), (5, torch.bfloat16), (40, torch.float16)):
        x = torch.randn(m, k).to(dtype)
        layers = (qk.WQLinear.from_weight(w) for w in (weight, read))
        assert torch.equal(*(layer(x) for layer in layers))


def test_our_own_format_holds_every_weight_type_and_others_those_of_their_words():
    held = {name: weight_types(row) for name, row in FORMATS.items()}
    assert held["qkernels"] == list(WEIGHT_TYPES)
    assert held["compressed-tensors"] == ["int2", "int3", "int4", "int8", "fp8e4m3"]
    for name in ("gptq", "gptq_v2"):
        assert held[name] == ["int2", "int3", "int4", "int8"]
    assert held["gguf"] == ["int2", "int3", "int4", "int8"]
    for name in ("awq", "awq-gemv", "awq-gemv-fast", "marlin"):
        assert held[name] == ["int4"]


EXTRAS = {
    "perm": lambda w: {"perm": torch.randperm(w.k)},
    "input_factor": lambda w: {"input_factor": torch.rand(w.k) + 0.5},
    "outlier_columns, outlier_values": lambda w: {
        "outlier_columns": torch.tensor([3, 50]),
        "outlier_values": torch.randn(w.n, 2, dtype=torch.bfloat16),
    },
}


@pytest.mark.parametrize("names", EXTRAS)
def test_optional_fields_come_back_in_our_own_format_and_are_refused_by_others(names, tmp_path):
    weight = quantized("w4a16-g24")
    weight = weight.replace(**EXTRAS[names](weight))
    read = read_weights(write_layers(tmp_path / "out", "qkernels", {"up": weight}))
    assert same_weight(read["up"], weight)
    with pytest.raises(CheckpointError, match=f"compressed-tensors has no tensor for {names}"):
        check_holds("compressed-tensors", {"up": WeightKind.of(weight)})


def test_real_zero_points_come_back_in_our_own_format_and_are_refused_by_others(tmp_path):
    weight = quantized("w4a16-g24")
    weight = weight.replace(zeros=weight.zeros.float() + 0.25)
    read = read_weights(write_layers(tmp_path / "out", "qkernels", {"up": weight}))
    assert same_weight(read["up"], weight)
    with pytest.raises(CheckpointError, match="compressed-tensors has integer zero points alone"):
        check_holds("compressed-tensors", {"up": WeightKind.of(weight)})


def saved_model(folder, text, format, **options):
    """A tiny model quantized, saved with its tokenizer; the model and its logits."""
    model = tiny_model()
    qk.quantize_model(model, scheme=text, **options)
    qk.save_model(model, folder, format=format)
    tiny_tokenizer().save_pretrained(folder)
    return model


TOKENS = torch.arange(24).view(1, 24)


def toy_row() -> Format:
    """A format that stores codes as they are, as fp32, and its scheme in the config."""

    def read_plan(config, store):
        return {
            name: StoredLayer(QuantScheme.parse(text), (f"{name}.codes", f"{name}.steps"))
            for name, text in config["quantization_config"]["schemes"].items()
        }

    def read_layer(store, name, layer):
        codes, steps = (store.get(tensor) for tensor in layer.tensors)
        return QuantizedWeight(scheme=layer.scheme, codes=codes.to(torch.uint8), scales=steps)

    return Format(
        name="toy",
        title="of a test",
        why_not=lambda kind: None if kind.scheme.symmetric else "has no zero points",
        detect=says_method("toy"),
        read_plan=read_plan,
        read_layer=read_layer,
        write_layer=lambda weight: {"codes": weight.codes.float(), "steps": weight.scales},
        write_config=lambda layers, dense: {
            "quant_method": "toy",
            "schemes": {name: str(kind.scheme) for name, kind in layers.items()},
        },
    )


def test_a_row_added_to_the_table_works_everywhere(tmp_path, monkeypatch, run, text_file):
    monkeypatch.setitem(FORMATS, "toy", toy_row())
    model = saved_model(tmp_path / "out", "w4a16-g32-sym", "toy")
    loaded = qk.load_model(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    code, text, _ = run("inspect", tmp_path / "out")
    assert code == 0 and text.count("w4a16-g32-sym") == 7
    code, text, _ = run(
        "eval", tmp_path / "out", "--text", text_file, "--window", 64, "--windows", 1
    )
    assert code == 0 and "w4a16-g32-sym" in text
    code, text, _ = run("list", "formats")
    assert code == 0 and "of a test" in text
    with pytest.raises(
        CheckpointError, match=r"'foo' is not one of compressed-tensors, qkernels, .*toy"
    ):
        qk.save_model(model, tmp_path / "foo", format="foo")
    asymmetric = tiny_model()
    qk.quantize_model(asymmetric, scheme="w4a16-g32")
    with pytest.raises(CheckpointError, match=r"toy has no zero points; .*: compressed-tensors, q"):
        qk.save_model(asymmetric, tmp_path / "asymmetric", format="toy")
    assert not (tmp_path / "asymmetric").exists()


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in WRITTEN])
def test_formats_that_are_only_read_say_so(format):
    with pytest.raises(CheckpointError, match=f"{format} is only read; .* are compressed-tensors"):
        check_scheme(format, QuantScheme.parse("nf4-g64"))


def test_a_format_that_is_only_read_says_so(monkeypatch):
    monkeypatch.setitem(FORMATS, "toy", replace(toy_row(), write_layer=None, write_config=None))
    with pytest.raises(CheckpointError, match=r"toy is only read; .* are compressed-tensors, q"):
        check_scheme("toy", QuantScheme.parse("w4a16"))


def test_a_weight_type_added_to_the_table_is_saved_and_loaded(tmp_path, monkeypatch):
    values = (-1.0, -0.25, 0.25, 1.0)
    monkeypatch.setitem(WEIGHT_TYPES, "toy2", WeightType("toy2", 2, "codebook", values=values))
    scheme._parse.cache_clear()
    model = saved_model(tmp_path / "out", "toy2-g32", "qkernels")
    loaded = qk.load_model(tmp_path / "out")
    layer = "model.layers.1.mlp.down_proj"
    assert str(loaded.get_submodule(layer).scheme) == "toy2-g32"
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_a_field_added_to_the_table_is_saved_and_loaded(tmp_path, monkeypatch):
    def add(rows, start, group, values):
        rows += values["toy_offset"][start : start + rows.shape[0], None]

    field = Field(
        name="toy_offset",
        axes=("n",),
        dtypes=lambda scheme: (torch.float32,),
        wanted=lambda scheme: None,
        add_to_rows=add,
    )
    monkeypatch.setitem(fields.FIELDS, "toy_offset", field)
    model = tiny_model()
    qk.quantize_model(model, scheme="w4a16-g32")
    name = "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(name).to_weight()
    weight = weight.replace(toy_offset=torch.randn(weight.n))
    model.set_submodule(name, qk.WQLinear.from_weight(weight))
    qk.save_model(model, tmp_path / "out", format="qkernels")
    loaded = qk.load_model(tmp_path / "out").get_submodule(name).to_weight()
    assert list(FIELDS)[-1] == "toy_offset" and same_weight(loaded, weight)
    with pytest.raises(CheckpointError, match="compressed-tensors has no tensor for toy_offset"):
        qk.save_model(model, tmp_path / "other")


def test_loading_and_saving_tell_how_far_they_are(tmp_path):
    told = []
    model = tiny_model()
    qk.quantize_model(model, "rtn", "w4a16-g32", check_kernels=False)
    names = [name for name, module in model.named_modules() if isinstance(module, qk.WQLinear)]
    qk.save_model(model, tmp_path / "out", progress=lambda *call: told.append(call))
    qk.load_model(tmp_path / "out", progress=lambda *call: told.append(call))
    expected = [(i, len(names), name) for i, name in enumerate([*names, ""])]
    half = len(told) // 2
    assert told[:half] == expected
    assert sorted(told[half:], key=lambda call: call[0]) == told[half:]
    assert {call[2] for call in told[half:]} == {*names, ""}
