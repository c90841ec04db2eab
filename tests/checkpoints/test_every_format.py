"""Every tensor and every entry of every format, damaged in every way: the error names where.

A format without a line in `FOLDERS` fails the first test.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qkernels as qk
from qkernels.checkpoints import FORMATS, is_quantized, open_checkpoint, read_weights
from qkernels.checkpoints.checkpoint import understood
from qkernels.checkpoints.config import read_config
from qkernels.checkpoints.held import HeldStore
from qkernels.errors import CheckpointError
from tests.checkpoints.folders import edit_config, metadata_of, write_layers
from tests.checkpoints.test_golden import GOLDEN

FOLDERS = {
    "compressed-tensors": (
        *("ct-micro", "ct-widths-0.17", "ct-pack-w4a16-asym-g128", "ct-int-w4a8"),
        *("ct-int-w8a8-asym-token-act", "ct-float-fp8-dynamic", "ct-mixed-w4a16-w8a8"),
    ),
    "qkernels": ("native",),
    "awq": ("words-awq-gemm-g32", "words-auto_round-auto_awq-sym"),
    "awq-gemv": ("words-awq-gemv-g32",),
    "awq-gemv-fast": ("words-awq-gemv_fast-g64",),
    "gptq": ("words-gptq-4bit-desc-act", "words-gptq-3bit", "words-auto_round-auto_gptq-4bit"),
    "gptq_v2": ("words-gptq_v2-2bit-desc-act", "words-gptq_v2-8bit-sym", "words-auto_round-4bit"),
    "marlin": ("words-awq-marlin-channel", "words-awq-marlin-g128"),
    "bitsandbytes": ("bnb-nf4-blocks", "bnb-nf4-dq-blocks", "bnb-fp4-blocks", "bnb-int8"),
    "hqq": ("hqq-bits", "hqq-4bit-g64-axis1"),
    "torchao": ("torchao-bits", "torchao-classes"),
    "gguf": ("gguf-q4_k",),
}
IN_FOLDERS = [(name, folder) for name, all in FOLDERS.items() if name != "gguf" for folder in all]

ONLY = {"hqq-bits": ("five", "three", "viewed", "crossed")}
"""Where a folder has many layers, those that are damaged."""

OF_NATIVE = {
    "torchao-classes": ("tiles_scaled", "int8_static_asym", "plain_fp8", "nvfp4"),
    "words-gptq-4bit-desc-act": ("layer",),
    "bnb-nf4-dq-blocks": ("even",),
}
"""Layers that have every field, of other formats, to be written in our own."""


def test_every_format_has_a_folder():
    assert FOLDERS.keys() == FORMATS.keys()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a name: a golden one, or one in our own format."""
    made = tmp_path_factory.mktemp("native") / "native"
    weights = {
        f"{source}.{name}": read_weights(GOLDEN / source)[name]
        for source, names in OF_NATIVE.items()
        for name in names
    }
    write_layers(made, "qkernels", weights)
    return lambda name: made if name == "native" else GOLDEN / name


class Held:
    """A folder whose tensors are in memory, so that thousands of changes take no time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, read_config(folder)
        self.tensors = load_file(folder / "model.safetensors")
        self.metadata = metadata_of(folder)
        self.layers = open_checkpoint(folder).layers

    def read(self, changes, layer):
        """Reads a layer where tensors are others, or None for gone."""
        tensors = {**self.tensors, **changes}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        store = HeldStore(tensors, str(self.folder), self.metadata)
        checkpoint = understood(self.config, store)
        if layer not in checkpoint.layers:
            raise CheckpointError(f"{self.folder}: {layer} is no quantized layer")
        return checkpoint.read(layer)


def _shorter(x):
    return None if x.dim() == 0 or not x.numel() else x.narrow(-1, 0, x.shape[-1] - 1)


def _of_another_type(x):
    numbers = x.float() if x.dtype.itemsize == 1 else x
    return numbers.double()


DAMAGES = {
    "gone": lambda x: None,
    "shorter": lambda x: _shorter(x) if x.dim() and x.shape[-1] > 1 else x[None],
    "fewer rows": lambda x: x[:-1] if x.dim() and len(x) > 1 else x[None, None],
    "deeper": lambda x: x[None],
    "of another type": _of_another_type,
    "NaN": lambda x: torch.full_like(x, float("nan")) if x.is_floating_point() else x[None],
}

HARMLESS = r"bias (gone|of another type|NaN)|(weight|W_q) NaN|weight_packed shorter"
"""A model says whether its layers have biases, and in what type. Words that are stored as floats
may be NaN in them. Those of compressed-tensors before 0.18 less one are as many as those after."""


def same_numbers(a, b):
    """Whether two weights compute the same."""
    inputs = ("activation_scale", "activation_zero")
    same = (
        torch.equal(a.dequantize(), b.dequantize()) and a.scheme.activation == b.scheme.activation
    )
    return same and all(
        (a.fields.get(name) is None) == (b.fields.get(name) is None)
        and (name not in a.fields or torch.equal(a.fields[name], b.fields[name]))
        for name in inputs
    )


@pytest.mark.parametrize(("format", "folder"), IN_FOLDERS)
def test_tensors(folder_of, format, folder):
    held, wrong = Held(folder_of(folder)), []
    assert held.layers
    for layer, stored in held.layers.items():
        if layer not in ONLY.get(folder, (layer,)):
            continue
        before = held.read({}, layer)
        for name in stored.tensors:
            for damage, change in DAMAGES.items():
                part = f"{name.removeprefix(layer + '.')} {damage}"
                try:
                    after = held.read({name: change(held.tensors[name])}, layer)
                except CheckpointError as error:
                    text = str(error)
                    nothing = re.search("holds no quantized layer|no quantization_config", text)
                    if (
                        (layer not in text and not nothing)
                        or str(held.folder) not in text
                        or "\n" in text
                    ):
                        wrong.append(f"{layer}: {part}: {text}")
                else:
                    # Another shape is what the model's own config says otherwise.
                    harmless = after.shape != before.shape or same_numbers(before, after)
                    if not harmless and not re.fullmatch(HARMLESS, part):
                        wrong.append(f"{layer}: {part} is read")
    assert not wrong, "\n".join(wrong)


def section(**changes):
    """Changes the quantization_config, which is made where there is none."""
    return lambda config: config.setdefault("quantization_config", {}).update(changes)


def weights(**changes):
    """Changes what the first group of compressed-tensors says of its weights."""
    return lambda config: config["quantization_config"]["config_groups"]["group_0"][
        "weights"
    ].update(changes)


def group(**changes):
    """Changes the first group of our own format."""
    return lambda config: config["quantization_config"]["groups"][0].update(changes)


PACKED, ORDERED = "ct-pack-w4a16-asym-g128", "words-gptq-4bit-desc-act"
CONTRADICTIONS = {
    "compressed-tensors bits": (PACKED, weights(num_bits=8), "k_proj.weight_packed must be int32"),
    "compressed-tensors groups": (PACKED, weights(group_size=64), "k_proj.weight_scale must be"),
    "compressed-tensors sym": (PACKED, weights(symmetric=True), "weight_zero_point is not zero"),
    "compressed-tensors format": (
        PACKED,
        lambda config: config["quantization_config"]["config_groups"]["group_0"].update(
            format="int-quantized"
        ),
        "k_proj.weight is missing",
    ),
    "compressed-tensors status": (
        PACKED,
        section(quantization_status="frozen"),
        "quantization_status 'frozen' is not supported",
    ),
    "qkernels bits": ("native", group(scheme="w8a16-g32-sbf16"), "words must be int32"),
    "qkernels groups": ("native", group(scheme="w4a16-g16-sbf16"), "scales .* must have shape"),
    "qkernels shape": ("native", group(shape=[24, 128]), r"words must be int32 \[24, 16\]"),
    "qkernels fields": ("native", group(fields=["offsets"]), "input_factor is there, and the conf"),
    "qkernels version": ("native", section(version=2), "in version 2 .*: update it"),
    "awq bits": ("words-awq-gemm-g32", section(bits=8), "layer has 8 bits, and 4 are supported"),
    "awq groups": ("words-awq-gemm-g32", section(group_size=64), "make .*; the config says"),
    "awq zeros": ("words-awq-gemm-g32", section(zero_point=False), "zero points other than 8"),
    "awq version": ("words-awq-gemm-g32", section(version="gemv"), "layer.qzeros must be int32"),
    "awq unknown version": ("words-awq-gemm-g32", section(version="gem"), "'gem' is not supported"),
    "awq-gemv groups": ("words-awq-gemv-g32", section(q_group_size=64), "qzeros must be int32"),
    "awq-gemv version": ("words-awq-gemv-g32", section(version="gemm"), "the config says"),
    "awq-gemv-fast groups": (
        "words-awq-gemv_fast-g64",
        section(group_size=32),
        "layer.qzeros must be float16",
    ),
    "awq-gemv-fast version": (
        "words-awq-gemv_fast-g64",
        section(version="gemv"),
        r"must be int32 .*, got float16",
    ),
    "gptq bits": (ORDERED, section(bits=8), "layer has scales for|must be int32"),
    "gptq groups": (ORDERED, section(group_size=64), "layer has scales for .*; the config says"),
    "gptq sym": (ORDERED, section(sym=True), "zero points other than 8.*or the version"),
    "gptq order": (ORDERED, section(desc_act=False), "out of order, and the config says desc_act"),
    "gptq_v2 version": (
        "words-gptq_v2-8bit-sym",
        section(checkpoint_format="gptq", format="gptq"),
        "zero points other than 128, such as 129.*or the version of the format",
    ),
    "gptq unknown version": (
        ORDERED,
        section(checkpoint_format="gptq_v3", format="gptq_v3"),
        "the gptq format 'gptq_v3' is not supported; known are",
    ),
    "marlin bits": ("words-awq-marlin-g128", section(bits=8), "8 bits, and 4 are supported"),
    "marlin groups": ("words-awq-marlin-g128", section(group_size=64), "scales for .* groups"),
    "marlin zeros": ("words-awq-marlin-g128", section(zero_point=True), "has no zero points, and"),
    "bitsandbytes bits": ("bnb-nf4-blocks", section(load_in_8bit=True), "load_in_8bit=true"),
    "bitsandbytes type": ("bnb-nf4-blocks", section(bnb_4bit_quant_type="fp4"), "stored with 'nf4"),
    "hqq bits": (
        "hqq-4bit-g64-axis1",
        section(quant_method="hqq", quant_config={"weight_quant_params": {"nbits": 8}}),
        "says nbits=8, and .*k_proj.nbits is 4",
    ),
    "torchao class": (
        "torchao-bits",
        section(quant_type={"default": {"_type": "Int4WeightOnlyConfig"}}),
        "says Int4WeightOnlyConfig, and .* is of",
    ),
}


@pytest.fixture
def copied(folder_of, tmp_path):
    def copy(name):
        ignored = shutil.ignore_patterns("oracle.safetensors", "recipe.json")
        shutil.copytree(folder_of(name), tmp_path / "out", ignore=ignored)
        return tmp_path / "out"

    return copy


def refused(folder, named):
    """Reading a folder is an error that names it, in one line."""
    with pytest.raises(CheckpointError, match=named) as caught:
        read_weights(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_config_that_contradicts_the_tensors(copied, case):
    name, change, named = CONTRADICTIONS[case]
    folder = copied(name)
    edit_config(folder, change)
    refused(folder, named)


def test_every_format_is_contradicted():
    assert {case.split()[0] for case in CONTRADICTIONS} == FORMATS.keys() - {"gguf"}


FIRST = [(name, folders[0]) for name, folders in FOLDERS.items() if name != "gguf"]


@pytest.mark.parametrize(("format", "name"), FIRST)
def test_entries_and_formats_that_are_not_known(copied, format, name):
    folder = copied(name)
    if format not in ("hqq",):
        edit_config(folder, section(rank=[1] * 1000))
        refused(folder, r"rank=\[1, .*\.\.\., which is not known here.*: update qkernels")
    edit_config(folder, section(quant_method="x" * 1000, checkpoint_format=None))
    refused(folder, r"in the format 'xxx.*\.\.\.; known are ")
    edit_config(folder, lambda config: config.update(quantization_config=[1]))
    refused(folder, r"quantization_config must be an object, got \[1\]")


@pytest.mark.parametrize(("format", "name"), FIRST)
def test_files(copied, format, name):
    folder = copied(name)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    key = next(key for key in header if key != "__metadata__")
    for damaged in (
        content[:-1],
        content[:20],
        b"",
        content + b"\0",
        # Headers of petabytes, and of tensors of petabytes.
        (2**60).to_bytes(8, "little") + content[8:],
        _with(header, key, shape=[2**50, 2**10]),
        _with(header, key, shape=[2**63, 2**63]),
        _with(header, key, data_offsets=[0, 2**60]),
        _with(header, key, dtype="X99"),
        _with(header, key, shape=[-1]),
    ):
        file.write_bytes(damaged)
        refused(folder, r"model\.safetensors is damaged or truncated.*: copy it anew")
    file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    refused(folder, r"pytorch_model\.bin is a pickle.*never read: save the model anew")
    for target in ("../model.safetensors", "/etc/passwd", "C:\\model", "a/../../b"):
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {key: target}})
        )
        refused(folder, "names the file .*, outside of the folder")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {key: "x" * 5000}})
    )
    refused(folder, "does not exist|cannot be read")


def _with(header, key, **changes):
    """The bytes of a file without data, whose header says something else of a tensor."""
    text = json.dumps({**header, key: {**header[key], **changes}}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize("path", ["nothing", "empty", "file.txt"])
def test_paths_without_a_model(tmp_path, path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    assert not is_quantized(tmp_path / path)
    with pytest.raises(CheckpointError, match=r"does not exist|no .safetensors|cannot be read"):
        qk.load_model(tmp_path / path)
