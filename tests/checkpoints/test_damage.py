"""Whatever is wrong with a folder, it loads or there is a CheckpointError; nothing else."""

import json
import re
import shutil

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import qkernels as qk
from qkernels.checkpoints import read_weights
from qkernels.errors import CheckpointError
from tests.checkpoints.folders import WRITTEN, holding, metadata_of
from tests.checkpoints.test_golden import GOLDEN
from tests.tiny_model import tiny_model

pytest.importorskip("transformers", reason="models come from transformers")

FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
VALUES = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 3, 31, 65, 2**31, 2**63, 10**9, 10**100),
        *(32.0, -0.5, float("nan"), float("inf"), "32", "", "x", "Linear", "re:(", "re:(a+)+$"),
        *([], [1], ["x"], [[]], [None], [2**70], {}, {"a": 1}, {"x": {}}, "../x", "float16"),
    ]
)


OF_OTHERS = ("awq-autoawq-gemv-g64", "gptq-4bit-g32-asym-desc-act")
LAYERS = (
    *("words-awq-gemv_fast-g64", "words-awq-marlin-channel", "words-gptq-3bit"),
    *("words-auto_round-4bit", "words-auto_round-auto_awq-sym", "words-gptq_v2-2bit-desc-act"),
    *("ct-micro", "ct-widths-0.17", "bnb-fp4-blocks", "hqq-bits", "torchao-classes"),
)
READ = ("bnb-nf4-dq-model", "bnb-int8-model", "hqq-model", "torchao-model")
"""Whole models in formats that are only read."""

UNREAD = r"\.(offload_meta|optimize|round_zero|unpack_view_dtype|compute_dtype|weight_format|" + (
    r"encoded_state_dict|stores_quant_config|channel_wise|packing|view_as_float|quant_\w+)$"
)
"""What says nothing, or no more than the default, of these folders."""


@pytest.fixture(scope="module", params=[*WRITTEN, *OF_OTHERS, *READ])
def saved(request, tmp_path_factory):
    if request.param in READ:
        return GOLDEN / request.param
    if request.param in OF_OTHERS:
        folder = tmp_path_factory.mktemp("saved") / request.param
        shutil.copytree(GOLDEN / request.param, folder)
        (folder / "oracle.safetensors").unlink()
        (folder / "generation_config.json").write_text('{"max_new_tokens": 7, "do_sample": true}')
        return folder
    model = tiny_model()
    others = [text for text in ("w8a8", "w8a16") if request.param in holding("w4a16-g32", text)]
    overrides = {"*.0.mlp.*": others[0]} if others else None
    qk.quantize_model(model, scheme="w4a16-g32", overrides=overrides)
    folder = tmp_path_factory.mktemp("saved") / request.param
    qk.save_model(model, folder, format=request.param)
    return folder


def load_damaged(saved, tmp_path, damage, load=qk.load_model):
    """Whether a copy still loads after `damage(folder)`."""
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    damage(folder)
    try:
        load(folder)
    except CheckpointError:
        return False
    return True


def places(value, path=()):
    """The path of each value within a JSON object."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:2])
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@FUZZ
@given(
    data=st.data(), file=st.sampled_from(["config.json", "config.json", "generation_config.json"])
)
def test_values_of_a_config(saved, tmp_path, data, file):
    content = changed_config(saved / file, data)
    load_damaged(saved, tmp_path, lambda folder: (folder / file).write_text(json.dumps(content)))


def changed_config(file, data):
    """What a JSON file says, with one value changed, removed or added."""
    return changed(json.loads(file.read_text()), data)


def changed(content, data):
    """A JSON object with one value changed, removed or added."""
    # A folder that says nothing is told something.
    found = list(places(content)) or [("quantization_config",)]
    path = data.draw(st.sampled_from(found), label="path")
    value = data.draw(st.one_of(VALUES, st.sampled_from([20, 900]).map(nested)), label="value")
    owner = content
    for key in path[:-1]:
        owner = owner[key]
    action = data.draw(st.sampled_from(["change", "change", "remove", "add"]), label="action")
    if action == "remove":
        owner.pop(path[-1], None) if isinstance(owner, dict) else owner.pop(path[-1])
    elif action == "add" and isinstance(owner, dict):
        owner["more"] = value
    else:
        owner[path[-1]] = value
    return content


@FUZZ
@given(
    cut=st.none() | st.integers(0, 3000),
    flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 7)), max_size=3),
    file=st.sampled_from(["model.safetensors", "model.safetensors", "config.json"]),
)
@example(cut=None, flips=[(7, 6)], file="model.safetensors")
def test_bytes_of_a_file(saved, tmp_path, cut, flips, file):
    content = bytearray((saved / file).read_bytes())
    for place, bit in flips:
        content[place % len(content)] ^= 1 << bit
    content = content[:cut]
    load_damaged(saved, tmp_path, lambda folder: (folder / file).write_bytes(content))


TENSORS = {
    "gone": lambda x: None,
    "flat": lambda x: x.reshape(-1),
    "shorter": lambda x: x.reshape(-1)[:-1],
    "empty": lambda x: x.reshape(-1)[:0],
    "scalar": lambda x: x.reshape(-1)[:1].reshape(()),
    "deeper": lambda x: x[None],
    "doubles": lambda x: x.double(),
    "integers": lambda x: x.to(torch.int32),
    "bytes": lambda x: x.to(torch.uint8),
    "fp8": lambda x: x.float().to(torch.float8_e4m3fn),
    "largest": lambda x: torch.full_like(x, 127),
    "negative": lambda x: torch.full_like(x, -1),
    "NaN": lambda x: torch.full_like(x, float("nan")) if x.is_floating_point() else x.view(-1)[:0],
}


@FUZZ
@given(data=st.data(), damage=st.sampled_from(sorted(TENSORS)))
def test_tensors(saved, tmp_path, data, damage):
    name, tensor, tensors, other, more = changed_tensors(saved, data, damage)

    def write(folder):
        save_file(tensors, folder / "model.safetensors", metadata=metadata_of(saved))

    loads = load_damaged(saved, tmp_path, write)
    same = other is not None and other.shape == tensor.shape and other.dtype == tensor.dtype
    same = same or tensor.numel() == 1 or re.search(UNREAD, name) is not None
    if damage in ("gone", "flat", "shorter", "empty", "deeper", "fp8") and not more and not same:
        # Columns that are in order need no index.
        assert not loads or (damage == "gone" and name.endswith("g_idx"))


def changed_tensors(saved, data, damage):
    """The tensors of a folder with one of them damaged, and put under another name at times."""
    tensors = load_file(saved / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(tensors)), label="tensor")
    tensor = tensors.pop(name)
    other = TENSORS[damage](tensor)
    more = data.draw(
        st.sampled_from(["", "", "perm", "weight_g_idx", "g_idx", "bias", "input_scale"])
    )
    target = f"{name.rpartition('.')[0]}.{more}" if more else name
    if other is not None:
        tensors[target] = other.contiguous()
    return name, tensor, tensors, other, more


@pytest.fixture(scope="module", params=LAYERS)
def words(request):
    return GOLDEN / request.param


@FUZZ
@given(data=st.data())
def test_values_of_a_config_of_layers(words, tmp_path, data):
    content = changed_config(words / "config.json", data)

    def write(folder):
        (folder / "config.json").write_text(json.dumps(content))

    load_damaged(words, tmp_path, write, read_weights)


@FUZZ
@given(data=st.data(), damage=st.sampled_from(sorted(TENSORS)))
def test_tensors_of_layers(words, tmp_path, data, damage):
    *_, tensors, _, _ = changed_tensors(words, data, damage)

    def write(folder):
        save_file(tensors, folder / "model.safetensors", metadata=metadata_of(words))

    load_damaged(words, tmp_path, write, read_weights)


@FUZZ
@given(data=st.data())
def test_values_of_a_header(words, tmp_path, data):
    """Types, shapes and places of tensors, and what torchao says of them."""
    raw = (words / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    about = header.get("__metadata__", {})
    key = data.draw(st.sampled_from(["", *sorted(k for k in about if about[k][0] == "{")]))
    if key:
        about[key] = json.dumps(changed(json.loads(about[key]), data))
    else:
        header = changed(header, data)
    text = json.dumps(header).encode()

    def write(folder):
        content = len(text).to_bytes(8, "little") + text + raw[8 + length :]
        (folder / "model.safetensors").write_bytes(content)

    load_damaged(words, tmp_path, write, read_weights)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "generation_config.json"])
@pytest.mark.parametrize("what", ["gone", "a folder", "a link to nothing", "empty"])
def test_files(saved, tmp_path, file, what):
    def damage(folder):
        (folder / file).unlink()
        if what == "a folder":
            (folder / file).mkdir()
        elif what == "a link to nothing":
            (folder / file).symlink_to(folder / "nothing")
        elif what == "empty":
            (folder / file).write_bytes(b"")

    loads = load_damaged(saved, tmp_path, damage)
    # A model needs no settings for generation.
    assert loads == (file == "generation_config.json" and what != "empty")
