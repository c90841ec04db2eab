"""Layers of AWQ, GPTQ and Marlin words: what is read, written, refused and damaged."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import qkernels as qk
from qkernels.bits import pack_awq, pack_dense, pack_gptq_zeros
from qkernels.checkpoints import FORMATS, read_weights
from qkernels.checkpoints.format import WeightKind
from qkernels.checkpoints.table import check_holds
from qkernels.errors import CheckpointError
from tests.checkpoints.folders import edit_tensors, same_weight, write_layers
from tests.checkpoints.test_formats import quantized
from tests.checkpoints.test_packed_config import copied, say

GPTQS = ("gptq", "gptq_v2")


def written(tmp_path, format, weight):
    return write_layers(tmp_path / "out", format, {"up": weight})


def in_activation_order(text, k=128):
    """A weight whose columns are sorted by groups, and each group's by their place."""
    weight = quantized(text, 64, k)
    index = (torch.arange(k) // weight.scheme.group_length(k))[torch.randperm(k)]
    return weight.replace(perm=index.argsort(stable=True)), index


@pytest.mark.parametrize("format", GPTQS)
@pytest.mark.parametrize("text", ["w2a16-g32", "w3a16-g64-sym", "w4a16-g32", "w8a16-g32-sbf16"])
def test_groups_by_activations_come_back_and_say_their_index(text, format, tmp_path):
    weight, index = in_activation_order(text)
    folder = written(tmp_path, format, weight)
    assert torch.equal(load_file(folder / "model.safetensors")["up.g_idx"].long(), index)
    read = read_weights(folder)["up"]
    assert same_weight(read, weight) and torch.equal(read.dequantize(), weight.dequantize())
    section = FORMATS[format].write_config({"up": WeightKind.of(weight)}, [])
    assert section["desc_act"] is True and "dynamic" not in section


def test_columns_within_a_group_are_put_in_their_order(tmp_path):
    weight = quantized("w4a16-g32", 64, 128).replace(perm=torch.randperm(128))
    read = read_weights(written(tmp_path, "gptq", weight))["up"]
    assert torch.equal(read.dequantize(), weight.dequantize())


@pytest.mark.parametrize("format", GPTQS)
@pytest.mark.parametrize("text", ["w2a16-g32", "w3a16-g32", "w4a16", "w8a16-g32"])
def test_zero_points_of_all_values_come_back(text, format, tmp_path):
    weight = quantized(text, 64, 128)
    zeros = torch.randint(0, 1 << weight.scheme.bits, weight.zeros.shape, dtype=torch.uint8)
    zeros[:8] = 0
    weight = weight.replace(zeros=zeros)
    assert same_weight(read_weights(written(tmp_path, format, weight))["up"], weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_other_writers_take_the_one_off_each_field(bits, tmp_path):
    weight = quantized(f"w{bits}a16-g32", 64, 128)
    weight = weight.replace(zeros=weight.zeros.clone().fill_(0))
    folder = written(tmp_path, "gptq", weight)
    words = pack_gptq_zeros(weight.zeros, bits, "fields")
    edit_tensors(folder, lambda tensors: tensors.update({"up.qzeros": words}))
    say(folder, meta={"quantizer": ["optimum:1.0"]})
    assert (words == -1).all() and same_weight(read_weights(folder)["up"], weight)
    say(folder, meta=...)
    assert same_weight(read_weights(folder)["up"], weight)


@pytest.mark.parametrize(("size", "k"), [(32, 80), (128, 96)])
def test_a_last_group_may_be_short_where_it_is_read(size, k, tmp_path):
    """GPTQModel writes such groups; 80 columns make two of 32 and one of 16."""
    weight = quantized(f"w4a16-g{size}", 64, k)
    folder = written(tmp_path, "gptq", weight)
    assert same_weight(read_weights(folder)["up"], weight)


def test_an_index_of_zeros_is_none_where_columns_are_in_order(tmp_path):
    weight = quantized("w4a16-g32", 64, 128)
    folder = written(tmp_path, "gptq", weight)
    edit_tensors(folder, lambda tensors: tensors["up.g_idx"].zero_())
    assert same_weight(read_weights(folder)["up"], weight)
    edit_tensors(folder, lambda tensors: tensors.pop("up.g_idx"))
    assert same_weight(read_weights(folder)["up"], weight)
    say(folder, desc_act=True)
    with pytest.raises(CheckpointError, match=r"up.g_idx is missing, and the config says desc_act"):
        read_weights(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("format", ["awq", *GPTQS])
def test_scales_keep_their_type(format, dtype, tmp_path):
    weight = quantized({2: "w4a16-g32", 4: "w4a16-g32-sfp32"}[dtype.itemsize], 64, 128)
    if dtype == torch.bfloat16:
        weight = quantized("w4a16-g32-sbf16", 64, 128)
    read = read_weights(written(tmp_path, format, weight))["up"]
    assert read.scales.dtype == dtype and same_weight(read, weight)


def fast_words(codes):
    """int16 words of GEMV_FAST, word by word from their formula."""
    n, k = codes.shape
    words = torch.zeros(n // 4, k, dtype=torch.int32)
    for column in range(k):
        block, i, h, u = column // 64, column // 16 % 4, column // 8 % 2, column % 8
        for j in range(4):
            words[:, column] |= codes[i::4, 64 * block + 32 * h + 8 * j + u].int() << (4 * j)
    return words.to(torch.int16)


@pytest.mark.parametrize("size", [32, 64, 128, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gemv_fast_has_integer_zero_points_where_products_are_exact(size, dtype, tmp_path):
    text = f"w4a16{f'-g{size}' if size else ''}{'-sbf16' if dtype == torch.bfloat16 else ''}"
    weight = quantized(text, 16, 256)
    weight = weight.replace(scales=torch.full_like(weight.scales, 0.0625))
    folder = written(tmp_path, "awq", weight)
    multiple = {32: 4, 64: 2}.get(size, 1)
    rows = 8 * multiple * -(-weight.scales.shape[1] // (8 * multiple))
    padding = (0, 0, 0, rows - weight.scales.shape[1])

    def rewrite(tensors):
        products = -(weight.scales.float() * weight.zeros).to(dtype)
        tensors["up.qweight"] = fast_words(weight.codes)
        tensors["up.qzeros"] = torch.nn.functional.pad(products.t(), padding).contiguous()
        tensors["up.scales"] = torch.nn.functional.pad(weight.scales.t(), padding).contiguous()

    edit_tensors(folder, rewrite)
    say(folder, version="gemv_fast")
    assert same_weight(read_weights(folder)["up"], weight)
    edit_tensors(folder, lambda tensors: tensors["up.qzeros"][0, 3].fill_(1.0))
    with pytest.raises(CheckpointError, match=r"up.qzeros holds zero points outside of 0..15, s"):
        read_weights(folder)
    edit_tensors(folder, lambda tensors: tensors["up.qzeros"][0, 3].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"up.qzeros holds zero points outside of 0..15, s"):
        read_weights(folder)


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_gemv_pads_its_groups(size, tmp_path):
    weight = quantized(f"w4a16-g{size}", 24, 512)
    folder = written(tmp_path, "awq", weight)
    multiple = {32: 4, 64: 2}.get(size, 1)
    width = 8 * multiple * -(-weight.scales.shape[1] // (8 * multiple))
    padding = (0, width - weight.scales.shape[1])

    def rewrite(tensors):
        tensors["up.qweight"] = pack_dense(weight.codes, 4)
        tensors["up.qzeros"] = pack_dense(torch.nn.functional.pad(weight.zeros, padding), 4)
        tensors["up.scales"] = torch.nn.functional.pad(weight.scales, padding)

    edit_tensors(folder, rewrite)
    say(folder, version="gemv")
    assert same_weight(read_weights(folder)["up"], weight)


HELD = {
    "nf4-g32": "has no nf4 codebooks",
    "fp8e4m3-a16": "has no float8 weights",
    "w8a8": "has no quantized activations",
}


@pytest.mark.parametrize("format", ["awq", *GPTQS])
def test_what_is_not_held_has_its_reason(format):
    def refuse(weight, reason, **more):
        kind = replace(WeightKind.of(weight), **more)
        named = re.escape(f"and {format} {reason}") + ".*; formats that hold it: .*qkernels"
        with pytest.raises(CheckpointError, match=named):
            check_holds(format, {"up": kind})

    for text, reason in HELD.items():
        refuse(quantized(text, 64, 128), reason)
    plain = quantized("w4a16-g32", 64, 128)
    refuse(plain.replace(zeros=plain.zeros + 0.5), "has integer zero points alone")
    refuse(plain.replace(zeros=plain.zeros + 16.0), "has integer zero points alone")
    refuse(plain.replace(input_factor=torch.ones(128)), "has no tensor for input_factor")
    refuse(plain, "is read into", instead_of="an expert of a fused parameter")
    ragged = quantized("w4a16-g48", 64, 128)
    refuse(ragged, "has no groups of 48 where K is 128: use a group size that divides K")
    fills = "fills words of 8 channels" if format == "awq" else "fills words of 32 bits"
    refuse(quantized("w4a16-g32", 60, 128), fills)
    if format == "awq":
        refuse(quantized("w8a16-g32", 64, 128), "has 4 bits alone")
        refuse(plain.replace(perm=torch.randperm(128)), "has no tensor for perm")
        refuse(plain, "is read into", instead_of="a Conv1D")
    else:
        kind = type(WeightKind.of(plain))(
            **{**vars(WeightKind.of(plain)), "instead_of": "a Conv1D"}
        )
        check_holds(format, {"up": kind})


def test_awq_quantizes_all_layers_alike():
    kinds = {
        "up": WeightKind.of(quantized("w4a16-g32", 64, 128)),
        "down": WeightKind.of(quantized("w4a16-g64", 64, 128)),
    }
    named = (
        "awq quantizes all layers alike, and these are w4a16-g32, w4a16-g64; formats that hold "
        "them: compressed-tensors, qkernels, gptq, gptq_v2"
    )
    with pytest.raises(CheckpointError, match=named):
        check_holds("awq", kinds)
    kinds["down"] = WeightKind.of(quantized("w4a16-g32-sbf16", 64, 128))
    check_holds("awq", kinds)


def change(part, edit):
    def damage(tensors):
        value = edit(tensors.pop(f"layer.{part}"))
        if value is not None:
            tensors[f"layer.{part}"] = value.contiguous()

    return damage


def poisoned(scales):
    scales.view(-1)[3] = float("nan")
    return scales


DESC, V2, GEMM = "words-gptq-4bit-desc-act", "words-gptq_v2-8bit-sym", "words-awq-gemm-g32"
GEMV, FAST, MARLIN = "words-awq-gemv-g32", "words-awq-gemv_fast-g64", "words-awq-marlin-g128"
ALL = (DESC, V2, GEMM, GEMV, FAST, MARLIN)
DAMAGES = [
    *((name, "qweight", lambda x: x[:-1], r"layer.\w+ must be|no groups of") for name in ALL),
    *((name, "qweight", lambda x: x.float(), r"layer.qweight must be int(16|32) ") for name in ALL),
    *((name, "qweight", lambda x: x[None], r"layer.qweight must have two dim") for name in ALL),
    *((name, "scales", lambda x: None, r"layer.scales is missing") for name in ALL),
    *((name, "scales", poisoned, r"layer: scales .* holds NaN or infinity") for name in ALL[:4]),
    *((name, "scales", lambda x: x[:, :-1], r"layer.* (must be|the scales have)") for name in ALL),
    *((name, "scales", lambda x: x.int(), r"scale type torch.int32 is not one of") for name in ALL),
    *((name, "qzeros", lambda x: None, r"layer.qzeros is missing") for name in ALL[:5]),
    *((name, "qzeros", lambda x: x[:-1], "qzeros must be|for 3 gr") for name in ALL[:5]),
    *((name, "qzeros", lambda x: x.bool(), r"layer.qzeros must be \w+ \[") for name in ALL[:5]),
    *((name, "qweight", lambda x: None, r"layer.qweight is missing") for name in ALL[:5]),
    (DESC, "g_idx", lambda x: None, "layer.g_idx is missing, and the config says desc_act"),
    (DESC, "g_idx", lambda x: x + 1, r"layer.g_idx must be in 0..3, got 1 to 4"),
    (DESC, "g_idx", lambda x: x - 1, r"layer.g_idx must be in 0..3, got -1 to 2"),
    (DESC, "g_idx", lambda x: x * 0, "layer.g_idx puts 128 columns into group 0, which has 32"),
    (DESC, "g_idx", lambda x: x[:-1], r"layer.g_idx must be int32 or int64 \[128\], got int32"),
    (DESC, "g_idx", lambda x: x.half(), r"layer.g_idx must be int32 or int64 \[128\], got float16"),
    (V2, "g_idx", lambda x: x.flip(0), "columns out of order, and the config says desc_act=false"),
    (V2, "g_idx", lambda x: x + 2, r"layer.g_idx must be in 0..3, got 2 to 5"),
    (V2, "qzeros", lambda x: x + 1, "layer.qzeros holds zero points other than 128, such as 129"),
    (DESC, "bias", lambda x: x[:-1], r"layer.bias must be .* \[64\], got float16 \[63\]"),
    (DESC, "bias", lambda x: x / 0, "layer: bias .* holds NaN or infinity"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "part", "edit", "named"), DAMAGES)
def test_damage_is_named(name, part, edit, named, tmp_path):
    folder = copied(tmp_path, name)
    edit_tensors(folder, change(part, edit))
    with pytest.raises(CheckpointError, match=named) as caught:
        read_weights(folder)
    assert name in str(caught.value)


def test_symmetric_marlin_words_with_zero_points_are_refused(tmp_path):
    folder = copied(tmp_path, MARLIN)
    say(folder, zero_point=True)
    with pytest.raises(CheckpointError, match="layer has no zero points, and the config says bits"):
        read_weights(folder)
    folder = copied(tmp_path, FAST)
    say(folder, zero_point=False)
    with pytest.raises(CheckpointError, match=r"layer.qzeros is no multiple of the scales"):
        read_weights(folder)


def test_marlin_words_of_half_a_tile_are_refused(tmp_path):
    folder = copied(tmp_path, MARLIN)
    edit_tensors(folder, change("qweight", lambda x: x[:, :64]))
    edit_tensors(folder, change("scales", lambda x: x[:, :32]))
    with pytest.raises(CheckpointError, match=r"with N a multiple of 64, got \[16, 64\]"):
        read_weights(folder)


def test_the_words_of_autoawq_modules_are_those_of_the_format():
    linear = torch.nn.Linear(128, 64)
    module = qk.WQLinear_GEMM.from_linear(linear, 4, 32)
    weight = module.to_weight()
    tensors = FORMATS["awq"].write_layer(weight)
    assert tensors.keys() == module.state_dict().keys()
    assert all(torch.equal(tensors[name], value) for name, value in module.state_dict().items())
    assert torch.equal(tensors["qweight"], pack_awq(weight.codes.t()))
