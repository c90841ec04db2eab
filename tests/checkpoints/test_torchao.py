"""Classes of torchao's tensors, to its own numbers: tests/golden/README.md."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import qkernels as qk
from qkernels.bits import unpack_tinygemm
from qkernels.checkpoints import open_checkpoint, read_weights
from qkernels.errors import CheckpointError
from tests import truth
from tests.bounds import FROBENIUS_BOUND
from tests.checkpoints.folders import edit_metadata, edit_tensors, same_weight
from tests.checkpoints.test_golden import GOLDEN

FOLDER = GOLDEN / "torchao-classes"
SCHEMES = {
    "tiles": "w4a16-g32-sbf16",
    "tiles_ragged": "w4a16-g128-sbf16",
    "tiles_scaled": "w4a16-g32-sbf16",
    "plain": "w4a16-g32-sbf16",
    "plain_half": "w4a16-g32",
    "plain_fp8": "w4afp8-g32-sym-sbf16",
    "words": "w4a16-g32",
    "intx_inputs": "w4a8-g32-tokenasym-flat",
    "intx_real_zeros": "w4a16-g32-sfp32",
    "int8_asym_inputs": "w8a8-tokenasym",
    "int8_static": "w8a8-gtensor-static",
    "int8_static_asym": "w8a8-gtensor-staticasym",
    "int8_scaled": "w8a16-sym-sfp32",
    "fp8_blocks": "fp8e4m3-a16-g128-sfp32",
    "fp8_e5m2": "fp8e5m2-a16-sfp32",
    "mxfp4": "fp4-g32-sfp32",
    "mxfp4_swizzled": "fp4-g32-sfp32",
    "mxfp8": "fp8e4m3-a16-g32-sfp32",
    "mxfp8_swizzled": "fp8e4m3-a16-g32-sfp32",
    "nvfp4": "fp4-g16-sfp32",
    "nvfp4_alone": "fp4-g16-sfp32",
    "nvfp4_swizzled": "fp4-g16-sfp32",
}


def test_the_numbers_are_those_of_the_package():
    oracle, weights = load_file(FOLDER / "oracle.safetensors"), read_weights(FOLDER)
    assert {name: str(weight.scheme) for name, weight in weights.items()} == SCHEMES
    for name, weight in weights.items():
        want = oracle[f"{name}.weight"]
        # Of MX types, bf16 holds every number.
        got = weight.dequantize()[: len(want)]
        assert torch.equal(got, want.float()), name


def test_words_of_tinygemm_follow_their_formula():
    torch.manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (3, 2, 32, 4), dtype=torch.int32)
    codes = unpack_tinygemm(words)
    assert codes.shape == (24, 256) and codes.dtype == torch.uint8
    for tile, outer, lane, word in ((0, 0, 0, 0), (2, 1, 31, 3), (1, 0, 13, 2), (0, 1, 6, 1)):
        value = int(words[tile, outer, lane, word]) & 0xFFFFFFFF
        row, first = 8 * tile + lane // 4, 16 * (8 * outer + 2 * word) + 2 * (lane % 4)
        for i in range(4):
            assert codes[row, first + 8 * i] == value >> 4 * i & 15
            assert codes[row, first + 8 * i + 1] == value >> 4 * (i + 4) & 15


@pytest.mark.parametrize("name", ["tiles_scaled", "plain_half", "int8_static_asym", "intx_inputs"])
def test_layers_compute_with_what_was_read(name):
    weight = open_checkpoint(FOLDER).read(name)
    x = torch.randn(7, weight.k)
    inputs = x.double() if weight.scheme.weight_only else truth.rounded(weight, x)
    y, want = qk.WQLinear.from_weight(weight)(x), inputs @ weight.dequantize().double().t()
    assert truth.error(y, want) < FROBENIUS_BOUND[torch.float32]


def test_static_inputs_have_the_scale_and_the_zero_point_of_the_file():
    weight = open_checkpoint(FOLDER).read("int8_static_asym")
    scale, zero = weight.activation_scale, weight.activation_zero
    assert scale is not None and zero is not None
    assert float(scale) == torch.tensor(0.02).item() and int(zero) == -17


def test_inputs_are_multiplied_by_the_scale_of_the_file():
    checkpoint = open_checkpoint(FOLDER)
    for name, part in (("int8_scaled", "int8_asym_inputs"), ("tiles_scaled", "tiles")):
        scaled, plain = checkpoint.read(name), checkpoint.read(part)
        factor = checkpoint.store.get(f"{name}._weight_act_pre_scale")
        assert torch.equal(scaled.input_factor, factor)
        assert torch.equal(scaled.codes, plain.codes) and torch.equal(scaled.scales, plain.scales)


def damaged(tmp_path, tensors=None, metadata=None):
    shutil.copytree(FOLDER, tmp_path / "out")
    if tensors is not None:
        edit_tensors(tmp_path / "out", tensors)
    if metadata is not None:
        edit_metadata(tmp_path / "out", metadata)
    return tmp_path / "out"


def tells(name, **changes):
    def change(metadata):
        content = json.loads(metadata[f"{name}.weight"])
        content["_data"].update(changes)
        metadata[f"{name}.weight"] = json.dumps(content)

    return change


def hides(part):
    """The metadata names no longer a part that is stored."""
    layer, name = part.split(".")

    def change(metadata):
        content = json.loads(metadata[f"{layer}.weight"])
        content["_tensor_data_names"].remove(name.removeprefix("_weight_"))
        metadata[f"{layer}.weight"] = json.dumps(content)

    return change


def put(name, make):
    return lambda tensors: tensors.update({name: make(tensors[name]).contiguous()})


def moved(tensors):
    tensors["words._weight_zero_point"] = tensors["words._weight_zero_point"].half()


@pytest.mark.parametrize(
    ("tensors", "metadata", "named"),
    [
        (moved, None, "class Int4PlainInt32Tensor that are no int8 are those of Ascend NPUs"),
        (
            put("words._weight_zero_point", lambda x: x.fill_(16)),
            None,
            r"words._weight_zero_point must be in 0..15, got 16 to 16",
        ),
        (
            put("words._weight_qdata", lambda x: x[:, :-1]),
            None,
            r"words._weight_qdata must be int32",
        ),
        (
            None,
            tells("words", shape=[24, 84], block_size=[1, 12]),
            "shape says 84 columns, .* no multiple of the 8",
        ),
        (None, tells("tiles", shape=[24, 2048]), r"holds \[24, 1024\] codes, .* is \[24, 2048\]"),
        (None, tells("tiles", shape=[2**40, 96]), r"holds \[24, 1024\] codes"),
        (None, tells("tiles", shape=[24]), r"shape must be \[N, K\], got \[24\]"),
        (None, tells("tiles", shape="24"), "shape must be a list, got '24'"),
        (
            None,
            tells("tiles", block_size=[1, 64]),
            r"scale_and_zero must be bfloat16 \[16, 24, 2\]",
        ),
        (None, tells("tiles", block_size=[1, 0]), r"block_size \[1, 0\] .* must be rows and col"),
        (None, tells("tiles", block_size=[2, 32]), r"block_size \[2, 32\] .* is not supported"),
        (
            # What AMD's kernels take where they say so by their shape.
            put("tiles._weight_qdata", lambda x: x.view(-1, 8, 64, 2)),
            None,
            r"tiles._weight_qdata must be int32 \[any, any, 32, 4\]",
        ),
        (put("tiles._weight_qdata", lambda x: x[0]), None, r"must be int32 \[any, any, 32, 4\]"),
        (put("tiles._weight_scale_and_zero", torch.Tensor.double), None, "tiles.*: scale type"),
        (
            put("tiles._weight_scale_and_zero", lambda x: x[..., 0]),
            None,
            "tiles._weight_scale_and_zero must have 3 dimensions",
        ),
        (
            put("tiles._weight_scale_and_zero", lambda x: x.fill_(float("nan"))),
            None,
            "tiles: scales .* NaN",
        ),
        (
            put("tiles_scaled._weight_act_pre_scale", lambda x: x[:-1]),
            None,
            r"tiles_scaled._weight_act_pre_scale must be .* \[96\], got float32 \[95\]",
        ),
        (
            put("plain._weight_scale", lambda x: x.t()),
            None,
            r"plain._weight_scale must be bfloat16 \[3, 24\], got bfloat16 \[24, 3\]",
        ),
        (None, tells("plain", activation_dtype="int8"), "activation_dtype 'int8' is not supp"),
        (None, tells("plain", activation_dtype=[1]), r"activation_dtype \[1\] is not supp"),
        (
            put("intx_real_zeros._weight_zero_point", lambda x: x.fill_(1e-9)),
            None,
            "zero points that fp32 does not hold exactly after 8 is added",
        ),
        (
            put("intx_real_zeros._weight_zero_point", lambda x: x.fill_(float("nan"))),
            None,
            "intx_real_zeros._weight_zero_point holds NaN or infinity",
        ),
        (
            put("int8_static._weight_act_quant_scale", lambda x: x.expand(3, 1)),
            None,
            r"int8_static._weight_act_quant_scale must be .* \[1\], got float32 \[3, 1\]",
        ),
        (
            put("int8_static._weight_act_quant_scale", torch.zeros_like),
            None,
            "int8_static: activation_scale must be > 0",
        ),
        (
            None,
            tells("int8_static", act_quant_kwargs=None),
            "act_quant_scale is stored, and act_quant_kwargs says nothing",
        ),
        (
            put("mxfp4._weight_scale", lambda x: x.view(torch.uint8).fill_(255)),
            None,
            "mxfp4._weight_scale holds 255, which stands for NaN",
        ),
        (
            None,
            hides("intx_real_zeros._weight_zero_point"),
            "says nothing of intx_real_zeros._weight_zero_point",
        ),
        (None, tells("mxfp4", elem_dtype="fp6_e3m2"), "elem_dtype 'fp6_e3m2' is not supported"),
        (None, tells("mxfp4", block_size=33), r"block_size 33 does not divide 160 columns"),
        (None, tells("mxfp4", block_size=0), "group size 0 is too small"),
        (
            None,
            tells("mxfp8", is_swizzled_scales=True),
            r"mxfp8._weight_scale must be .* \[64, 32\]",
        ),
        (
            put("nvfp4._weight_per_tensor_scale", lambda x: x.expand(2)),
            None,
            r"nvfp4._weight_per_tensor_scale must be float32 \[1\], got float32 \[2\]",
        ),
        (
            put("fp8_blocks._weight_scale", lambda x: x[:1]),
            None,
            r"fp8_blocks._weight_scale must be float32 \[2, 1\], got float32 \[1, 1\]",
        ),
        (
            put("fp8_blocks._weight_qdata", lambda x: x.view(torch.int8)),
            None,
            "fp8_blocks._weight_qdata must be float8_e4m3fn or float8_e5m2",
        ),
        (
            put("plain._weight_qdata", lambda x: x[None]),
            None,
            r"plain._weight_qdata must be int8 or uint8 \[24, 48\], got int8 \[1, 24, 48\]",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path, tensors, metadata, named):
    with pytest.raises(CheckpointError, match=named) as caught:
        read_weights(damaged(tmp_path, tensors, metadata))
    assert "\n" not in str(caught.value)


def test_a_config_of_other_classes_is_named(tmp_path):
    folder = damaged(tmp_path)
    section = {"quant_method": "torchao", "quant_type": {"default": {"_type": "X"}}}
    for said, refused in (("Int4WeightOnlyConfig", True), ("FqnToConfig", False)):
        section["quant_type"]["default"]["_type"] = said
        (folder / "config.json").write_text(json.dumps({"quantization_config": section}))
        if refused:
            with pytest.raises(CheckpointError, match=r"says Int4WeightOnlyConfig, and .* is of"):
                read_weights(folder)
        else:
            assert len(read_weights(folder)) == len(SCHEMES)


def test_our_own_format_holds_every_class(tmp_path):
    from tests.checkpoints.folders import write_layers

    weights = read_weights(FOLDER)
    again = read_weights(write_layers(tmp_path / "out", "qkernels", weights))
    assert all(same_weight(again[name], weight) for name, weight in weights.items())
