"""What a compressed-tensors config says, whatever the order in which it says it."""

import copy

import pytest
import torch

from qkernels import rounding
from qkernels.checkpoints import FORMATS, open_checkpoint, read_weights
from qkernels.checkpoints.format import WeightKind
from qkernels.errors import CheckpointError
from tests.checkpoints.folders import edit_config, edit_tensors, same_weight, write_layers

LAYERS = {"a.up": "w4a16-g32-sym", "a.down": "w8a8", "a.gate": "w8a8-static", "b.up": "fp8-a8"}


@pytest.fixture
def weights():
    scale = {"w8a8-static": 0.05}
    return {
        name: rounding.quantize(torch.randn(40, 64), text, activation_scale=scale.get(text))
        for name, text in LAYERS.items()
    }


@pytest.fixture
def folder(weights, tmp_path):
    return write_layers(tmp_path / "out", "compressed-tensors", weights)


def edit(folder, change):
    edit_config(folder, lambda config: change(config["quantization_config"]))


def retarget(folder, targets, order):
    """Names the groups' targets anew, and puts the groups into another order."""

    def change(section):
        groups = section["config_groups"]
        names = list(groups)
        for name, new in zip(names, targets, strict=True):
            groups[name]["targets"] = new
        section["config_groups"] = {names[i]: groups[names[i]] for i in order}

    edit(folder, change)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_a_name_counts_before_a_pattern_and_a_pattern_before_a_class(folder, weights, order):
    # "Linear" and the pattern name every layer; what is more exact takes its own away.
    retarget(folder, (["Linear"], ["a.down"], ["a.gate"], ["re:b.*"]), order)
    read = read_weights(folder)
    assert {name: str(weight.scheme) for name, weight in read.items()} == LAYERS
    assert all(same_weight(read[name], weights[name]) for name in weights)


@pytest.mark.parametrize("first", ["fp8e4m3-a16", "fp8-a8"])
def test_what_inputs_are_quantized_to_is_that_of_the_named_group(first, tmp_path):
    weight = rounding.quantize(torch.randn(40, 64), "fp8e4m3-a16-sfp32")
    other = rounding.quantize(torch.randn(40, 64), "fp8-a8")
    folder = write_layers(tmp_path / "out", "compressed-tensors", {"a": weight, "b": other})
    targets = (["Linear"], ["b"]) if first == "fp8e4m3-a16" else (["a"], ["Linear"])
    retarget(folder, targets, (0, 1) if first == "fp8e4m3-a16" else (1, 0))
    read = read_weights(folder)
    assert same_weight(read["a"], weight) and same_weight(read["b"], other)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 1, 0, 3)])
@pytest.mark.parametrize("last", ["re:a.gate", "re:.*gate"])
def test_of_two_patterns_the_first_of_the_alphabet_counts(folder, last, order):
    retarget(folder, (["a.up"], ["re:a.*"], [last], ["b.up"]), order)
    if last < "re:a.*":
        assert str(read_weights(folder)["a.gate"].scheme) == "w8a8-static"
        return
    with pytest.raises(CheckpointError, match=r"a\.gate has an input_scale, and its config no"):
        read_weights(folder)


def test_a_pattern_begins_where_the_name_begins(folder):
    retarget(folder, (["a.up"], ["re:.*down"], ["re:gate"], ["b.up"]), (0, 1, 2, 3))
    with pytest.raises(CheckpointError, match=r"a\.gate is quantized, but no config group"):
        read_weights(folder)


@pytest.mark.parametrize("text", ["w4a8-g32-flat", "w4a8", "w3a8-g32-flat", "w4afp8-g32"])
def test_weights_with_quantized_activations_are_not_packed(text, tmp_path):
    weight = rounding.quantize(torch.randn(40, 64), text)
    folder = write_layers(tmp_path / "out", "compressed-tensors", {"up": weight})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.store.dtype("up.weight") == torch.int8
    assert checkpoint.config["quantization_config"]["format"] == "int-quantized"
    assert same_weight(checkpoint.read("up"), weight)


def test_the_format_of_a_group_counts_before_that_of_the_file(folder, weights):
    edit(folder, lambda section: section.update(format="pack-quantized"))
    read = read_weights(folder)
    assert all(same_weight(read[name], weights[name]) for name in weights)

    def swap(section):
        for group in section["config_groups"].values():
            if group["format"] == "pack-quantized":
                group["format"] = "int-quantized"

    edit(folder, swap)
    with pytest.raises(CheckpointError, match=r"a\.up\.weight is missing"):
        read_weights(folder)


@pytest.mark.parametrize("form", ["naive-quantized", None])
def test_formats_that_say_no_more_than_the_scheme_does(folder, weights, form):
    def change(section):
        section["format"] = None
        for group in section["config_groups"].values():
            if group["format"] != "pack-quantized" or form is None:
                group["format"] = form

    edit(folder, change)
    read = read_weights(folder)
    assert all(same_weight(read[name], weights[name]) for name in weights)


def test_zero_points_per_tensor_are_signed_and_not_packed(tmp_path):
    weight = rounding.quantize(torch.randn(40, 64) + 0.5, "w4a16-gtensor")
    tensors = FORMATS["compressed-tensors"].write_layer(weight)
    zero = tensors["weight_zero_point"]
    assert (zero.dtype, zero.tolist()) == (torch.int8, [int(weight.zeros) - 8])
    folder = write_layers(tmp_path / "out", "compressed-tensors", {"up": weight})
    assert same_weight(read_weights(folder)["up"], weight)
    # qkernels 0.1.0 packed it.
    packed = {"up.weight_zero_point": weight.zeros.int()}
    edit_tensors(folder, lambda stored: stored.update(packed))
    assert same_weight(read_weights(folder)["up"], weight)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_scale_per_tensor_may_have_any_number_of_dimensions(tmp_path, shape):
    weight = rounding.quantize(torch.randn(40, 64), "w8a8-static", activation_scale=0.05)
    folder = write_layers(tmp_path / "out", "compressed-tensors", {"up": weight})
    scale = {"up.input_scale": torch.tensor(0.05).reshape(shape)}
    edit_tensors(folder, lambda stored: stored.update(scale))
    assert same_weight(read_weights(folder)["up"], weight)


def test_columns_that_are_no_groups_are_refused(tmp_path):
    weight = rounding.quantize(torch.randn(40, 64), "w4a16-g32")
    folder = write_layers(tmp_path / "out", "compressed-tensors", {"up": weight})
    for index in (torch.full((64,), -1), torch.arange(64) // 32):
        edit_tensors(folder, lambda stored, index=index: stored.update({"up.weight_g_idx": index}))
        assert same_weight(read_weights(folder)["up"], weight)
    for index, named in (
        (torch.arange(64) // 31, r"must name each group of 0..1 for 32 columns, got 0..2"),
        (torch.arange(64) // 32 - 5, r"must name each group of 0..1 for 32 columns, got -5..-4"),
        (torch.zeros(64, dtype=torch.int32), "must name each group of 0..1 for 32 columns"),
        (torch.zeros(0, dtype=torch.int64), r"must be int32 or int64 \[64\], got int64 \[0\]"),
        (torch.full((64,), float("nan")), "must be int32 or int64"),
    ):
        edit_tensors(folder, lambda stored, index=index: stored.update({"up.weight_g_idx": index}))
        with pytest.raises(CheckpointError, match=f"up.weight_g_idx.* {named}"):
            read_weights(folder)


def test_codes_beyond_their_bits_are_refused(tmp_path):
    weight = rounding.quantize(torch.randn(40, 64), "w4a8")
    folder = write_layers(tmp_path / "out", "compressed-tensors", {"up": weight})
    for value in (8, -9, 127, -128):
        edit_tensors(folder, lambda stored, v=value: stored["up.weight"][3, 5].fill_(v))
        with pytest.raises(CheckpointError, match="up: codes of scheme w4a8 must be below 16"):
            read_weights(folder)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("W4A16", "w4a16-g128-sym-sbf16"),
        ("w4a16_asym", "w4a16-g128-sbf16"),
        ("W8A8", "w8a8"),
        ("W4A8", "w4a8-g128-flat"),
        ("FP8_DYNAMIC", "fp8-a8"),
        ("W4AFP8", "w4afp8-g128-sym"),
    ],
)
def test_a_group_may_be_a_preset_with_its_targets(tmp_path, name, scheme):
    weight = rounding.quantize(torch.randn(40, 256), scheme)
    folder = write_layers(tmp_path / "out", "compressed-tensors", {"up": weight})
    edit(folder, lambda section: section.update(config_groups={name: ["Linear"]}))
    assert same_weight(read_weights(folder)["up"], weight)


def test_a_preset_that_quantizes_nothing_leaves_no_group(folder):
    edit(folder, lambda section: section.update(config_groups={"UNQUANTIZED": ["Linear"]}))
    with pytest.raises(CheckpointError, match=r"a\.\w+ is quantized, but no config group names it"):
        read_weights(folder)


@pytest.mark.parametrize("text", ["w8a8-tokenasym", "w4a8-g64-flat-tokenasym"])
def test_activations_with_zero_points_come_back(tmp_path, text):
    weight = rounding.quantize(torch.randn(40, 64), text)
    folder = write_layers(tmp_path / "out", "compressed-tensors", {"up": weight})
    assert same_weight(read_weights(folder)["up"], weight)


def test_the_scales_stand_in_their_own_type(tmp_path):
    weight = rounding.quantize(torch.randn(40, 64), "w4a16-g32-sbf16")
    folder = write_layers(tmp_path / "out", "compressed-tensors", {"up": weight})
    assert str(read_weights(folder)["up"].scheme) == "w4a16-g32-sbf16"
    double = {"up.weight_scale": weight.scales.double()}
    edit_tensors(folder, lambda stored: stored.update(double))
    with pytest.raises(CheckpointError, match=r"up.weight_scale: scale type .*float64 is not one"):
        read_weights(folder)


def group(section):
    return section["config_groups"]["group_0"]


WRONG = {
    "unknown key": (lambda s: s.update(rotation="R1"), "has rotation='R1', which is not known"),
    "rotations": (
        lambda s: s.update(transform_config={"config_groups": {"u": {}}}),
        "transform_config is not supported",
    ),
    "sparsity": (
        lambda s: s.update(sparsity_config={"format": "sparse-24-bitmask"}),
        "sparsity_config is not supported",
    ),
    "fewer experts": (
        lambda s: s.update(moe_sparsity_config={"method": "prune", "num_experts": [None, 129]}),
        "moe_sparsity_config is not supported",
    ),
    "status": (lambda s: s.update(quantization_status="frozen"), "quantization_status 'frozen'"),
    "no groups": (lambda s: s.update(config_groups={}), "no config_groups"),
    "groups a list": (lambda s: s.update(config_groups=[1]), "no config_groups"),
    "group a number": (lambda s: s["config_groups"].update(group_0=3), "group_0 must be an object"),
    "preset": (
        lambda s: s["config_groups"].update(W9A16=["Linear"]),
        "group W9A16 is no preset that is known; they are UNQUANTIZED, W8A8",
    ),
    "group key": (
        lambda s: group(s).update(rank=8),
        "group group_0 has rank=8, which is not",
    ),
    "outputs": (
        lambda s: group(s).update(output_activations={"num_bits": 8}),
        "group_0 quantizes output activations",
    ),
    "no weights": (
        lambda s: group(s).update(weights=None, input_activations={"num_bits": 8}),
        "group_0 has no weights entry",
    ),
    "targets a string": (lambda s: group(s).update(targets="Linear"), "targets of .* a list"),
    "target a number": (lambda s: group(s).update(targets=[1]), r"group_0\[0\] must be a string"),
    "pattern": (lambda s: group(s).update(targets=["re:("]), r"'\(' is no regular expression"),
    "pattern with a memory": (
        lambda s: group(s).update(targets=[r"re:(a)\1"]),
        r"has \\1, which is not supported in a pattern",
    ),
    "pattern that never ends": (
        lambda s: group(s).update(targets=["re:(([a-z]+)+)+!"]),
        r"a\.up is quantized, but no config group names it",
    ),
    "ignore a string": (lambda s: s.update(ignore="lm_head"), "ignore must be a list"),
    "ignored": (lambda s: s.update(ignore=["re:a.*"]), "a.up is quantized in the file, and the"),
    "format": (lambda s: group(s).update(format="marlin-24"), "the format 'marlin-24'; supported"),
    "format a list": (lambda s: group(s).update(format=["x"]), r"the format \['x'\]; supported"),
    "weights a list": (lambda s: group(s).update(weights=[1]), "weights of .* must be an object"),
}

WRONG_ARGUMENTS = {
    "key": ({"power": 2}, "weights of config group group_0 has power=2"),
    "bits": ({"num_bits": 9}, "weights of 9 bits, type int, group are not supported"),
    "fewer bits": ({"num_bits": 3}, r"a.up.weight_packed must be int32 \[40, 6\], got"),
    "bits a string": ({"num_bits": "4"}, "num_bits must be an integer, got '4'"),
    "bits true": ({"num_bits": True}, "num_bits must be an integer, got True"),
    "type": ({"type": "posit"}, "weights of 4 bits, type posit"),
    "type a list": ({"type": ["int"]}, "are not supported"),
    "strategy": ({"strategy": "block"}, "type int, block are not supported"),
    "group size": ({"group_size": 32.0}, "group_size must be an integer, got 32.0"),
    "group size a string": ({"group_size": "32"}, "group_size must be an integer, got '32'"),
    "group size 0": ({"group_size": 0}, "group size 0 is too small"),
    "group size less": ({"group_size": 16}, r"a.up.weight_scale must be .*\[40, 4\], got"),
    "group size none": ({"group_size": None}, "group_size must be an integer, got None"),
    "group size huge": ({"group_size": 10**30}, r"is too large: use less than 2\^31"),
    "symmetric": ({"symmetric": "yes"}, "symmetric must be a bool, got 'yes'"),
    "asymmetric": ({"symmetric": False}, "a.up.weight_zero_point is missing"),
    "order": ({"actorder": "sideways"}, "actorder 'sideways' is not supported"),
    "dynamic": ({"dynamic": True}, "quantized dynamically"),
    "more bits": ({"num_bits": 8}, r"a.up.weight_packed must be int32 \[40, 16\], got"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_config_must_not_say_is_named(folder, case):
    change, named = WRONG[case]
    edit(folder, change)
    with pytest.raises(CheckpointError, match=named):
        read_weights(folder)


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_what_weights_cannot_be_is_named(folder, case):
    changes, named = WRONG_ARGUMENTS[case]
    edit(folder, lambda section: group(section)["weights"].update(changes))
    with pytest.raises(CheckpointError, match=named):
        read_weights(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_bits": 4},
        {"type": "complex"},
        {"strategy": "group"},
        {"dynamic": "local"},
        {"symmetric": False, "type": "float"},
        {"symmetric": False, "strategy": "tensor"},
        {"strategy": ["token"]},
    ],
)
def test_what_activations_cannot_be_is_named(folder, changes):
    edit(
        folder,
        lambda section: section["config_groups"]["group_1"]["input_activations"].update(changes),
    )
    with pytest.raises(CheckpointError, match=r"group_1: input activations of .* not supported"):
        read_weights(folder)


def test_what_says_how_scales_were_found_changes_nothing(folder, weights):
    def change(section):
        for entry in section["config_groups"].values():
            for part in (entry["weights"], entry["input_activations"]):
                if part is not None:
                    part.update(
                        observer="mse", observer_kwargs={"a": 1}, actorder=None, zp_dtype="int8"
                    )
        section.update(version="9", global_compression_ratio=1.5, run_compressed=True)
        # Groups that quantize nothing.
        section["config_groups"]["none"] = {"targets": ["Linear"], "weights": None}

    edit(folder, change)
    read = read_weights(folder)
    assert all(same_weight(read[name], weights[name]) for name in weights)


def test_reading_a_config_leaves_it_as_it_is(folder):
    checkpoint = open_checkpoint(folder)
    before = copy.deepcopy(checkpoint.config)
    checkpoint.format.read_plan(checkpoint.config, checkpoint.store)
    assert checkpoint.config == before
    kinds = {name: WeightKind.of(checkpoint.read(name)) for name in checkpoint.layers}
    assert checkpoint.format.write_config(kinds, []) == before["quantization_config"]
