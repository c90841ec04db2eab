"""What is said of a damaged folder of our own format."""

import pytest
import torch

from qkernels import rounding
from qkernels.checkpoints import read_weights
from qkernels.errors import CheckpointError
from tests.checkpoints.folders import edit_config, edit_tensors, write_layers


@pytest.fixture
def folder(tmp_path):
    weights = {name: rounding.quantize(torch.randn(40, 64), "w4a16-g32") for name in ("up", "down")}
    return write_layers(tmp_path / "out", "qkernels", weights)


def change(**values):
    return lambda section: section.update(values)


def change_group(**values):
    return lambda section: section["groups"][0].update(values)


CONFIGS = {
    "version": (
        change(version=2),
        "is in version 2 of the qkernels format, and this",
    ),
    "no version": (lambda s: s.pop("version"), "is in version None"),
    "version true": (change(version=True), "is in version True"),
    "version a string": (change(version="1"), "is in version '1'"),
    "key": (change(rotations=[1]), r"quantization_config has rotations=\[1\], which is not known"),
    "no groups": (lambda s: s.pop("groups"), "groups must be a list, got None"),
    "no layers": (change(groups=[]), "holds no quantized layer"),
    "group": (change(groups=["w4a16"]), r"groups\[0\] must be an object, got 'w4a16'"),
    "group key": (change_group(bits=4), r"groups\[0\] has bits=4"),
    "scheme": (change_group(scheme="w5a16"), r"groups\[0\]: scheme 'w5a16' does not parse"),
    "scheme a number": (change_group(scheme=4), r"groups\[0\].scheme must be a string, got 4"),
    "another scheme": (change_group(scheme="w8a16"), r"words must be int32 \[40, 16\], got int32"),
    "another grouping": (change_group(scheme="w4a16-g16"), r"up: scales .* shape \[40, 4\]"),
    "symmetric": (change_group(scheme="w4a16-g32-sym"), "takes no zeros"),
    "shape": (change_group(shape=[40]), r"shape must be \[N, K\], got \[40\]"),
    "shape a string": (change_group(shape="40x64"), "shape must be a list"),
    "shape of floats": (change_group(shape=[40.0, 64]), "shape must be an integer, got 40.0"),
    "more rows": (change_group(shape=[41, 64]), r"up.words must be int32 \[41, 8\], got"),
    "negative": (change_group(shape=[40, -64]), r"up.words must be int32 \[40, -8\], got"),
    "huge": (change_group(shape=[40, 10**30]), r"up.words must be int32 \[40, 1250"),
    "layers": (change_group(layers="up"), r"groups\[0\].layers must be a list"),
    "twice": (change_group(layers=["up", "up"]), "names the layer up a second time"),
    "missing layer": (change_group(layers=["up", "side"]), "side.words is missing"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_a_config_must_not_say_is_named(folder, case):
    edit, named = CONFIGS[case]
    edit_config(folder, lambda config: edit(config["quantization_config"]))
    with pytest.raises(CheckpointError, match=named):
        read_weights(folder)


def poison(tensors):
    tensors["up.scales"][0, 0] = float("inf")


TENSORS = {
    "words": (lambda t: t.pop("up.words"), "up.words is missing"),
    "words of bytes": (
        lambda t: t.update({"up.words": t["up.words"].view(torch.uint8)}),
        r"up.words must be int32 \[40, 8\], got uint8 \[40, 32\]",
    ),
    "no scales": (lambda t: t.pop("up.scales"), "up: scheme w4a16-g32 takes scales"),
    "no zeros": (lambda t: t.pop("up.zeros"), "up: scheme w4a16-g32 takes zeros"),
    "zeros": (
        lambda t: t.update({"up.zeros": t["up.zeros"][:3].clone()}),
        r"up: zeros of a w4a16-g32 weight \[40, 64\] must have shape \[40, 2\], got \[3, 2\]",
    ),
    "perm": (lambda t: t.update({"up.perm": torch.zeros(64, dtype=torch.int64)}), "up: perm must"),
    "scales of doubles": (
        lambda t: t.update({"up.scales": t["up.scales"].double()}),
        "up: scales .* must be float16, got torch.float64",
    ),
    "infinity": (poison, "up: scales .* holds NaN or infinity"),
    "bias": (
        lambda t: t.update({"up.bias": torch.ones(7)}),
        r"up: bias .* shape \[40\], got",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_damaged_tensors_are_named(folder, case):
    edit, named = TENSORS[case]
    edit_tensors(folder, edit)
    with pytest.raises(CheckpointError, match=named):
        read_weights(folder)
