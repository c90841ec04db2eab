"""Every golden folder into every format that is written: exact, or refused for a reason."""

import re
import shutil

import pytest
import torch

import qkernels as qk
from qkernels.checkpoints import FORMATS, open_checkpoint, read_weights
from qkernels.checkpoints.format import WeightKind
from qkernels.checkpoints.table import check_holds
from qkernels.errors import CheckpointError
from tests.checkpoints.folders import WRITTEN, write_layers
from tests.checkpoints.test_golden import GOLDEN

HOLDING = {
    "awq-autoawq-gemm-g128": "compressed-tensors awq gptq gptq_v2",
    "awq-autoawq-gemv-g64": "compressed-tensors awq gptq gptq_v2",
    "bnb-fp4-blocks": "",
    "bnb-int8": "compressed-tensors gptq gptq_v2",
    "bnb-int8-model": "compressed-tensors gptq gptq_v2",
    "bnb-nf4": "",
    "bnb-nf4-blocks": "",
    "bnb-nf4-dq": "",
    "bnb-nf4-dq-blocks": "",
    "bnb-nf4-dq-model": "",
    "ct-float-fp8-block": "compressed-tensors",
    "ct-float-fp8-dynamic": "compressed-tensors",
    "ct-int-w4a8": "compressed-tensors",
    "ct-int-w8a8-asym-token-act": "compressed-tensors",
    "ct-int-w8a8-dynamic": "compressed-tensors",
    "ct-kv-cache-fp8": "compressed-tensors",
    "ct-micro": "",
    "ct-mixed-w4a16-w8a8": "compressed-tensors",
    "ct-nvfp4a16": "",
    "ct-pack-w4a16-asym-g128": "compressed-tensors awq gptq gptq_v2",
    "ct-pack-w4a16-sym-g128": "compressed-tensors awq gptq gptq_v2",
    "ct-pack-w4a16-sym-g32-gptq-static": "compressed-tensors awq gptq gptq_v2",
    "ct-sharded-w4a16": "compressed-tensors awq gptq gptq_v2",
    "ct-widths-0.17": "",
    "ct-widths-0.20": "compressed-tensors",
    "gguf-q4_k": "",
    "gptq-2bit-g32-asym": "compressed-tensors gptq gptq_v2",
    "gptq-3bit-g64-asym": "compressed-tensors gptq gptq_v2",
    "gptq-4bit-g128-sym": "compressed-tensors awq gptq gptq_v2",
    "gptq-4bit-g32-asym-desc-act": "gptq gptq_v2",
    "gptq-v2-4bit-g64-asym": "compressed-tensors awq gptq gptq_v2",
    "hqq-4bit-g64-axis1": "",
    "hqq-bits": "",
    "hqq-model": "",
    "qkernels-4ba1d62": "compressed-tensors",
    "torchao-bits": "compressed-tensors",
    "torchao-classes": "",
    "torchao-int8wo": "compressed-tensors gptq gptq_v2",
    "torchao-intx4-g32": "compressed-tensors awq gptq gptq_v2",
    "torchao-model": "compressed-tensors awq gptq gptq_v2",
    "words-auto_round-4bit": "compressed-tensors awq gptq gptq_v2",
    "words-auto_round-auto_awq-sym": "compressed-tensors awq gptq gptq_v2",
    "words-auto_round-auto_gptq-2bit": "compressed-tensors gptq gptq_v2",
    "words-auto_round-auto_gptq-3bit": "compressed-tensors gptq gptq_v2",
    "words-auto_round-auto_gptq-4bit": "compressed-tensors awq gptq gptq_v2",
    "words-auto_round-gptqmodel-8bit": "compressed-tensors gptq gptq_v2",
    "words-awq-gemm-g32": "compressed-tensors awq gptq gptq_v2",
    "words-awq-gemv-g32": "compressed-tensors awq gptq gptq_v2",
    "words-awq-gemv_fast-g64": "",
    "words-awq-marlin-channel": "compressed-tensors awq gptq gptq_v2",
    "words-awq-marlin-g128": "compressed-tensors awq gptq gptq_v2",
    "words-gptq-3bit": "compressed-tensors gptq gptq_v2",
    "words-gptq-4bit-desc-act": "gptq gptq_v2",
    "words-gptq-8bit": "compressed-tensors gptq gptq_v2",
    "words-gptq_v2-2bit-desc-act": "gptq gptq_v2",
    "words-gptq_v2-8bit-sym": "compressed-tensors gptq gptq_v2",
}
"""The formats that hold all layers of a folder, beside our own."""

REASONS = (
    r"has no (nf4|fp4|table) codebooks",
    r"is not written with fp4 weights, .*",
    r"has no (float8|float8 E5M2) weights",
    r"has no quantized activations",
    r"has no tensor for (input_factor|input_factor, offsets|offsets|perm)",
    r"has integer zero points alone, .*",
    r"has 4 bits alone",
    r"fills words of (8 channels|32 bits), and N is \d+",
    r"reads no groups of 64 where K is 96: use a group size that divides K",
    r"quantizes all layers alike, and these are .*",
)
"""Each was looked at: the format has no place for such numbers."""


def same_product(a, b):
    """Whether two weights compute the same, with the same inputs."""
    pairs = [(a.dequantize(), b.dequantize()), (a.bias, b.bias)]
    pairs += [(a.activation_scale, b.activation_scale), (a.activation_zero, b.activation_zero)]
    return a.scheme.activation == b.scheme.activation and all(
        (x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in pairs
    )


FOLDERS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir() and path.name != "refused")


@pytest.mark.parametrize("folder", FOLDERS)
def test_layers_are_the_same_numbers_or_refused(folder, tmp_path):
    if list((GOLDEN / folder).glob("*.gguf")):
        pytest.importorskip("gguf", reason="GGUF files are read with the gguf package")
    weights, held = read_weights(GOLDEN / folder), []
    kinds = {name: WeightKind.of(weight) for name, weight in weights.items()}
    for format in WRITTEN:
        if FORMATS[format].why_not_all(kinds) is None:
            held.append(format)
            again = read_weights(write_layers(tmp_path / format, format, weights))
            assert again.keys() == weights.keys()
            assert all(same_product(again[name], weights[name]) for name in weights), format
            continue
        with pytest.raises(CheckpointError) as caught:
            check_holds(format, kinds)
        said, remedy = str(caught.value).rsplit("; formats that hold ", 1)
        assert said.endswith(reason_of(format, kinds)) and "qkernels" in remedy
    assert "qkernels" in held
    if folder in HOLDING:
        assert set(held) == {"qkernels", *HOLDING[folder].split()}


def reason_of(format, kinds):
    """The first reason, which must be one that was looked at."""
    row = FORMATS[format]
    reasons = (row.why_not_all({name: kind}) for name, kind in kinds.items())
    reason = next((reason for reason in reasons if reason), None) or row.why_not_all(kinds)
    assert any(re.fullmatch(pattern, reason) for pattern in REASONS), reason
    return reason


def test_zero_points_that_are_integers_in_a_floating_type_are_held(tmp_path):
    """As HQQ has them where it rounds them."""
    weight = read_weights(GOLDEN / "hqq-bits")["four"]
    weight = weight.replace(zeros=weight.zeros.round().clamp(0, 15))
    for format in WRITTEN:
        again = read_weights(write_layers(tmp_path / format, format, {"up": weight}))["up"]
        assert same_product(again, weight)
    beyond = weight.replace(zeros=weight.zeros + 16)
    assert WeightKind.of(beyond).real_zeros and not WeightKind.of(weight).real_zeros


def test_one_scale_of_a_whole_weight_becomes_one_a_channel(tmp_path):
    for scheme in ("w4a16-gtensor", "w4a16-gtensor-sym"):
        linear = torch.nn.Sequential(torch.nn.Linear(64, 32))
        qk.quantize_model(linear, scheme=scheme)
        weight = linear[0].to_weight()
        for format in WRITTEN:
            out = tmp_path / f"{scheme}-{format}"
            assert same_product(
                read_weights(write_layers(out, format, {"up": weight}))["up"], weight
            )


MODELS = ("awq-autoawq-gemv-g64", "gptq-4bit-g32-asym-desc-act", "bnb-int8-model", "hqq-model")


@pytest.mark.parametrize("folder", MODELS)
@pytest.mark.parametrize("to", WRITTEN)
def test_convert(run, tmp_path, folder, to):
    pytest.importorskip("transformers", reason="models come from transformers")
    code, _, err = run("convert", GOLDEN / folder, "--to", to, "-o", tmp_path / "out")
    if to not in ("qkernels", *HOLDING[folder].split()):
        assert code == 1 and "formats that hold" in err and not list(tmp_path.iterdir())
        return
    assert code == 0
    before, after = open_checkpoint(GOLDEN / folder), open_checkpoint(tmp_path / "out")
    assert before.layers.keys() == after.layers.keys()
    for name in before.layers:
        assert torch.equal(before.read(name).dequantize(), after.read(name).dequantize())
    for name in before.dense:
        assert torch.equal(before.store.get(name), after.store.get(name)), name


@pytest.mark.parametrize("damage", ["cut", "renamed", "config"])
def test_converting_a_damaged_folder_leaves_nothing(run, tmp_path, damage):
    pytest.importorskip("transformers", reason="models come from transformers")
    shutil.copytree(GOLDEN / "torchao-model", tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "renamed":
        file.write_bytes(content.replace(b"down_proj._weight_scale", b"down_proj._weight_scalf"))
    else:
        (tmp_path / "in" / "config.json").write_text("{")
    for to in WRITTEN:
        code, text, err = run("convert", tmp_path / "in", "--to", to, "-o", tmp_path / "out")
        assert code == 1 and text == "" and err and "Traceback" not in err
        assert [path.name for path in tmp_path.iterdir()] == ["in"]
