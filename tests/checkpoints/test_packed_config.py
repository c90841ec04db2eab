"""What is said of AWQ, GPTQ, Marlin and AutoRound words: where it stands and what it means."""

import json
import shutil

import pytest
import torch

from qkernels.checkpoints import is_quantized, open_checkpoint, read_weights
from qkernels.errors import CheckpointError
from tests.checkpoints.folders import edit_config, edit_tensors, same_weight, write_layers
from tests.checkpoints.test_formats import quantized
from tests.checkpoints.test_golden import GOLDEN


def copied(tmp_path, folder):
    shutil.copytree(GOLDEN / folder, tmp_path / folder)
    return tmp_path / folder


def say(folder, **values):
    """Changes the quantization_config; a value of ... takes its key away."""

    def change(config):
        section = config["quantization_config"]
        section.update(values)
        for key in [key for key, value in section.items() if value is ...]:
            del section[key]

    edit_config(folder, change)


@pytest.fixture
def gptq(tmp_path):
    weights = {
        "blocks.0.up": quantized("w4a16-g32", 64, 128),
        "blocks.1.up": quantized("w4a16-g32", 64, 128, bias=False),
    }
    return write_layers(tmp_path / "gptq", "gptq", weights), weights


@pytest.fixture
def awq(tmp_path):
    weights = {"up": quantized("w4a16-g32", 64, 128)}
    return write_layers(tmp_path / "awq", "awq", weights), weights


def same(folder, weights):
    read = read_weights(folder)
    return read.keys() == weights.keys() and all(same_weight(read[n], weights[n]) for n in weights)


@pytest.mark.parametrize(
    ("file", "section"),
    [
        (
            "quant_config.json",
            {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"},
        ),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True}),
    ],
)
def test_old_awq_says_it_beside_the_config(awq, file, section):
    folder, weights = awq
    (folder / "config.json").write_text("{}")
    (folder / file).write_text(json.dumps(section))
    assert is_quantized(folder) and same(folder, weights)
    (folder / "model.safetensors").unlink()
    assert not is_quantized(folder)


def test_old_gptq_says_it_beside_the_config(gptq):
    folder, weights = gptq
    (folder / "config.json").write_text("{}")
    section = {
        "bits": 4,
        "group_size": 32,
        "damp_percent": 0.01,
        "desc_act": False,
        "sym": False,
        "true_sequential": True,
        "static_groups": False,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "meta": {"quantizer": ["gptqmodel:1.0.0"]},
    }
    (folder / "quantize_config.json").write_text(json.dumps(section))
    assert same(folder, weights)
    (folder / "quantize_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"quantize_config.json is not valid JSON"):
        open_checkpoint(folder)


def test_a_dense_model_beside_such_a_file_is_dense(awq):
    folder, _ = awq
    (folder / "config.json").write_text("{}")
    (folder / "quant_config.json").write_text("{}")
    edit_tensors(folder, lambda tensors: (tensors.clear(), tensors.update(w=torch.ones(1))))
    assert not is_quantized(folder)


UNSAID = [
    ("words-awq-gemm-g32", "awq"),
    ("words-awq-marlin-g128", "marlin"),
    ("words-gptq_v2-2bit-desc-act", "gptq"),
    ("words-gptq-3bit", "gptq"),
]


@pytest.mark.parametrize(("name", "format"), UNSAID)
def test_what_is_not_said_is_found_in_types_and_shapes(name, format, tmp_path):
    folder = copied(tmp_path, name)
    said = read_weights(folder)["layer"]
    edit_config(folder, lambda config: config.clear())
    checkpoint = open_checkpoint(folder)
    assert is_quantized(folder) and checkpoint.format.name == format
    read = checkpoint.read("layer")
    assert read.scheme.bits == said.scheme.bits and torch.equal(read.codes, said.codes)
    assert read.scheme.groups(read.k) == said.scheme.groups(said.k)
    assert torch.equal(read.scales, said.scales)
    # The version of GPTQ is not found: the first is meant where nothing is said.
    if name.startswith("words-gptq_v2"):
        assert torch.equal(read.zeros, (said.zeros + 1) & 3)


@pytest.mark.parametrize("name", ["words-awq-gemv-g32", "words-awq-gemv_fast-g64"])
def test_a_group_size_that_no_shape_says_is_asked_for(name, tmp_path):
    folder = copied(tmp_path, name)
    edit_config(folder, lambda config: config.clear())
    assert is_quantized(folder)
    with pytest.raises(CheckpointError, match=r"group size of layer.*add a quant_config.json"):
        read_weights(folder)


def test_symmetric_words_of_version_2_are_not_taken_for_version_1(tmp_path):
    folder = copied(tmp_path, "words-gptq_v2-8bit-sym")
    edit_config(folder, lambda config: config.clear())
    with pytest.raises(CheckpointError, match=r"layer.qzeros are those of symmetric.*gptq_v2"):
        read_weights(folder)


def test_marlin_as_autogptq_names_it(tmp_path):
    folder = copied(tmp_path, "words-awq-marlin-g128")
    want = read_weights(folder)["layer"]

    def rename(tensors):
        tensors["layer.B"] = tensors.pop("layer.qweight")
        tensors["layer.s"] = tensors.pop("layer.scales")
        tensors["layer.workspace"] = torch.zeros(16, dtype=torch.int32)

    edit_tensors(folder, rename)
    common = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    for section in (
        {"quant_method": "gptq", "checkpoint_format": "marlin", **common},
        {"quant_method": "gptq", "is_marlin_format": True, **common},
        {"quant_method": "marlin", "group_size": 128},
    ):
        edit_config(folder, lambda config, s=section: config.update(quantization_config=s))
        checkpoint = open_checkpoint(folder)
        assert checkpoint.format.name == "marlin" and checkpoint.dense == ()
        assert same_weight(checkpoint.read("layer"), want)


def test_llm_awq_has_its_own_name_for_zero_points(tmp_path):
    folder = copied(tmp_path, "words-awq-gemv_fast-g64")
    want = read_weights(folder)["layer"]
    edit_tensors(
        folder, lambda tensors: tensors.update({"layer.scaled_zeros": tensors.pop("layer.qzeros")})
    )
    say(folder, version="gemm", backend="llm-awq")
    assert same_weight(read_weights(folder)["layer"], want)


def test_transformers_writes_more_keys_than_it_means(awq, tmp_path):
    transformers = pytest.importorskip("transformers", reason="its configs are read")
    folder, weights = awq
    section = transformers.AwqConfig(bits=4, group_size=32).to_dict()
    edit_config(folder, lambda config: config.update(quantization_config=section))
    assert same(folder, weights)
    section = transformers.GPTQConfig(bits=3, group_size=32, sym=False).to_dict()
    folder = copied(tmp_path, "words-gptq-3bit")
    want = read_weights(folder)
    edit_config(folder, lambda config: config.update(quantization_config=section))
    assert same(folder, want)


def test_layers_that_differ_are_found_by_patterns_of_which_the_first_counts(tmp_path):
    weights = {
        "blocks.0.up": quantized("w4a16-g32", 64, 128),
        "blocks.1.up": quantized("w8a16-g64-sym", 64, 128),
        "lm_head": quantized("w8a16-g32", 64, 128),
    }
    folder = write_layers(tmp_path / "out", "gptq", weights)
    assert same(folder, weights)
    dynamic = {
        r"+:.*\.1\.up": {"bits": 8, "group_size": 64, "sym": True},
        "-:.*down": {},
        "lm_head": {"bits": 8},
        ".*up": {"bits": 4},
    }
    say(folder, bits=2, group_size=32, sym=False, dynamic=dynamic)
    assert same(folder, weights)
    say(folder, dynamic={"-:.*up": {}, **dynamic})
    with pytest.raises(CheckpointError, match=r"blocks.0.up is quantized.*leaves '\.\*up' dense"):
        read_weights(folder)


def test_auto_round_names_layers_and_parts_of_names(tmp_path):
    weights = {
        "blocks.0.up": quantized("w4a16-g32", 64, 128),
        "blocks.1.up": quantized("w8a16-g64", 64, 128),
        "blocks.11.up": quantized("w8a16-g32", 64, 128),
        "blocks.2.down": quantized("w2a16-g32", 64, 128),
    }
    folder = write_layers(tmp_path / "out", "gptq_v2", weights)
    extra = {
        "blocks.1.up": {"bits": 8, "group_size": 64, "data_type": "int"},
        r".*\.11.*": {"bits": 8},
        "own$": {"bits": 2},
        "lm_head": {"bits": 16, "data_type": "float"},
    }
    section = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:gptqmodel",
        "bits": 4,
        "group_size": 32,
        "sym": False,
        "extra_config": extra,
    }
    edit_config(folder, lambda config: config.update(quantization_config=section))
    assert same(folder, weights)
    extra["blocks.0.up"] = {"data_type": "float"}
    edit_config(folder, lambda config: config.update(quantization_config=section))
    with pytest.raises(CheckpointError, match="data_type 'float' is not supported, 'int' is"):
        read_weights(folder)
    extra["blocks.0.up"] = {"bits": 16}
    edit_config(folder, lambda config: config.update(quantization_config=section))
    with pytest.raises(CheckpointError, match=r"blocks.0.up is quantized.*'blocks.0.up' dense"):
        read_weights(folder)


REFUSED = {
    "two formats": ({"checkpoint_format": "gptq_v2"}, "names two formats: format='gptq', check"),
    "unknown": ({"format": "exl9", "checkpoint_format": ...}, "the gptq format 'exl9' is not sup"),
    "marlin_24": (
        {"format": "marlin_24", "checkpoint_format": ...},
        "the gptq format 'marlin_24' is not supported: it keeps two of four weights",
    ),
    "planar": ({"format": "gptq_p", "checkpoint_format": "gptq_p"}, "hold bits in planes"),
    "bitblas": ({"format": ..., "checkpoint_format": "bitblas"}, "for one GPU's kernel"),
    "number": ({"format": 7, "checkpoint_format": ...}, "the gptq format '7' is not supported"),
    "unknown key": ({"foo": 1}, "quantization_config has foo=1, which is not known here"),
    "pack_dtype": ({"pack_dtype": "int16"}, "pack_dtype 'int16' is not supported, 'int32' is"),
    "adapter": ({"adapter": {"rank": 8}}, "adapter is not supported: {'rank': 8} changes"),
    "rotation": ({"rotation": "hadamard"}, "rotation is not supported: 'hadamard'"),
    "activations": ({"act_bits": 8}, "activations of 8 bits are not supported"),
    "bits": ({"bits": 5}, "blocks.0.up has 5 bits; 2, 3, 4 and 8 are supported"),
    "bits a string": ({"bits": "4"}, "bits must be an integer, got '4'"),
    "bits true": ({"bits": True}, "bits must be an integer, got True"),
    "other bits": ({"bits": 8}, r"groups, and 64 columns make 2; the config says bits=8, group"),
    "group size": ({"group_size": 64}, "has scales for 4 groups, and 128 columns make 2; the con"),
    "one group": ({"group_size": -1}, "has scales for 4 groups, and 128 columns make 1; the con"),
    "no group": ({"group_size": 0}, "group_size must be -1 or a number of columns, got 0"),
    "huge group": ({"group_size": 10**40}, "group_size must be -1 or a number of columns, got 1"),
    "group a float": ({"group_size": 32.0}, "group_size must be an integer, got 32.0"),
    "symmetric": ({"sym": True}, r"blocks.0.up.qzeros holds zero points other than 8, such as"),
    "dynamic a list": ({"dynamic": [1]}, "dynamic must be an object"),
    "dynamic of numbers": ({"dynamic": {"x": 1}}, r"dynamic\['x'\] must be an object, got 1"),
    "dynamic key": ({"dynamic": {"x": {"foo": 1}}}, r"dynamic\['x'\] has foo=1, which is not"),
    "dynamic pack_dtype": (
        {"dynamic": {"x": {"pack_dtype": "int8"}}},
        r"dynamic\['x'\]: pack_dtype must be 'int32'",
    ),
    "bad pattern": ({"dynamic": {"(": {}}}, "is no regular expression"),
    "meta": ({"meta": []}, None),
    "meta a string": ({"meta": "x"}, "meta must be an object, got 'x'"),
    "dense": ({"modules_to_not_convert": ["up"]}, r"modules_to_not_convert has 'up'"),
    "dense a string": ({"modules_to_not_convert": "up"}, "modules_to_not_convert must be a list"),
    "fp8": (
        {"quant_method": "auto-round", "packing_format": "auto_round:fp8_static"},
        "the gptq format 'auto_round:fp8_static' is not supported; known are",
    ),
    "another method": ({"quant_method": "vptq"}, "is in the format 'vptq'; known are"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_is_wrong_is_named(gptq, case):
    folder, _ = gptq
    values, named = REFUSED[case]
    say(folder, **values)
    if named is None:
        read_weights(folder)
        return
    with pytest.raises(CheckpointError, match=named):
        read_weights(folder)


def test_version_2_that_is_called_version_1_shows_in_symmetric_weights(tmp_path):
    weights = {"up": quantized("w4a16-g32-sym", 64, 128)}
    folder = write_layers(tmp_path / "out", "gptq_v2", weights)
    assert same(folder, weights)
    say(folder, format="gptq", checkpoint_format="gptq")
    with pytest.raises(CheckpointError, match=r"up.qzeros holds.*than 8, such as 9.*the version"):
        read_weights(folder)


def test_awq_that_says_something_else_is_named(awq):
    folder, _ = awq
    for values, named in (
        ({"bits": 8}, "up has 8 bits, and 4 are supported"),
        ({"version": "fast"}, "the awq format 'fast' is not supported; known are gemm"),
        ({"group_size": 128}, "has scales for 4 groups, and 128 columns make 1"),
        ({"zero_point": False}, "up.qzeros holds zero points other than 8"),
        ({"zero_point": "yes"}, "zero_point must be a bool, got 'yes'"),
        ({"version": "gemv"}, r"up.qzeros must be int32 \[128, 4\], got"),
        ({"version": "gemv_fast"}, "up has 8 columns, which are no groups of 32"),
        ({"version": "marlin"}, "up has no zero points, and the config says"),
    ):
        say(folder, bits=4, version="gemm", group_size=32, zero_point=True)
        say(folder, **values)
        with pytest.raises(CheckpointError, match=named):
            read_weights(folder)
