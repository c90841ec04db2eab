"""Folders of formats that are only read, to the numbers of the packages that wrote them."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qkernels as qk
from qkernels.checkpoints import open_checkpoint
from tests import truth
from tests.bounds import FOREIGN_LOGITS
from tests.checkpoints.folders import edit_tensors, same_weight

GOLDEN = Path(__file__).parents[1] / "golden"
FP4 = (
    "table(0.0,0.0052083334885537624,0.6666666865348816,1.0,0.3333333432674408,0.5,"
    "0.1666666716337204,0.25,0.0,-0.0052083334885537624,-0.6666666865348816,-1.0,"
    "-0.3333333432674408,-0.5,-0.1666666716337204,-0.25)"
)


def blocks(weight: str, levels: str) -> dict[str, str]:
    """Layers in blocks of 64 to 4096 that end with rows (`levels`), and others that do not."""
    return {
        "even": f"{weight}-g64-{levels}",
        "storage": f"{weight}-g64-{levels}",
        "crossed": f"{weight}-g4-sfp32",
        "large": f"{weight}-g32-sfp32",
        "many": f"{weight}-g16-sfp32",
        "odd": f"{weight}-g1-sfp32",
        "one": f"{weight}-g4-sfp32",
    }


WIDTHS = {
    "b3": "w3a16-g32-sym-sbf16",
    "wide3": "w3a16-g20-sym-sbf16",
    "b5": "w8a16-g32-sbf16",
    "b6": "w8a16-g32-sym-sbf16",
    "b7": "w8a16-g32-sym-sbf16",
}
FOLDERS = {
    "bnb-nf4": {"k_proj": "nf4-g64-sfp32"},
    "bnb-nf4-dq": {"k_proj": "nf4-g64-dq"},
    "bnb-nf4-blocks": blocks("nf4", "sfp32"),
    "bnb-nf4-dq-blocks": blocks("nf4", "dq"),
    "bnb-fp4-blocks": blocks(FP4, "sfp32"),
    "hqq-bits": {
        "eight": "w8a16-g32-sfp32",
        "six": "w8a16-g32-sfp32",
        "five": "w8a16-g64-sfp32",
        "four": "w4a16-g32-sfp32",
        "three": "w3a16-g32-sfp32",
        "two": "w2a16-g16-sfp32",
        "ternary": "w2a16-g32-sfp32",
        "one": "w2a16-g32-sfp32",
        "half": "w4a16-g64",
        "viewed": "w4a16-g64-sbf16",
        "viewed3": "w3a16-g64-sfp32",
        "crossed": "w4a16-g16-sfp32",
        "large": "w4a16-sfp32",
    },
    "hqq-4bit-g64-axis1": {"k_proj": "w4a16-g64-sbf16"},
    "torchao-bits": {
        "int8": "w8a16-sym-sfp32",
        "int8_tensor": "w8a16-gtensor-sym-sfp32",
        "int8_dynamic": "w8a8",
        "int8_asym": "w8a16-g32-sfp32",
        "int4_asym": "w4a16-g32-sfp32",
        "int4_channel": "w4a16-sym-sfp32",
        "int4_half": "w4a16-g32-sym",
        "int1": "w2a16-g16-sym-sfp32",
        "int2": "w2a16-g16-sym-sfp32",
        "int3": "w3a16-g16-sym-sfp32",
        "int5": "w8a16-g16-sym-sfp32",
        "int6": "w8a16-g16-sym-sfp32",
        "int7": "w8a16-g16-sym-sfp32",
        "fp8": "fp8e4m3-a16-sfp32",
        "fp8_dynamic": "fp8-a8",
    },
    "torchao-int8wo": {"k_proj": "w8a16-sym-sfp32"},
    "torchao-intx4-g32": {"k_proj": "w4a16-g32-sym-sbf16"},
    "ct-widths-0.17": {
        **WIDTHS,
        "ordered": "w4a16-g32-sbf16",
        "ordered_bytes": "w8a16-g32-sym-sbf16",
    },
    "ct-widths-0.20": WIDTHS,
    "ct-patterns": {
        "o_proj": "w8a16-sbf16",
        "k_proj": "w4a16-sbf16",
        "v_proj": "w8a16-sbf16",
    },
    "ct-micro": {
        "nv": "fp4-g16-sfp32",
        "nv_inputs": "fp4-g16-sfp32",
        "mx": "fp4-g32-sfp32",
        "mx_inputs": "fp4-g32-sfp32",
        "mx8": "fp8e4m3-a16-g32-sfp32",
        "block": "fp8e4m3-a16-g64-sbf16",
        "static_zero": "w8a8-staticasym-sbf16",
    },
    "ct-nvfp4a16": {"k_proj": "fp4-g16-sfp32"},
    "ct-float-fp8-block": {"down_proj": "fp8e4m3-a16-g128-sbf16"},
}
SIXTEEN_BITS = ("hqq-4bit-g64-axis1.k_proj", "hqq-bits.half", "hqq-bits.viewed")
"""Layers that the package dequantizes in 16 bits alone, with two roundings."""


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_numbers_are_those_of_the_package(folder):
    oracle = load_file(GOLDEN / folder / "oracle.safetensors")
    checkpoint = open_checkpoint(GOLDEN / folder)
    found = {}
    for name in checkpoint.layers:
        weight, short = checkpoint.read(name), name.rpartition(".")[2]
        found[short] = str(weight.scheme)
        want, got = oracle[f"{name}.weight"], weight.dequantize()
        if f"{folder}.{short}" in SIXTEEN_BITS:
            size = weight.group_zeros().abs().max() * weight.group_scales().max()
            assert (got - want.float()).abs().max() <= 2 * torch.finfo(want.dtype).eps * size
        else:
            assert torch.equal(got.to(want.dtype), want), name
        bias = f"{name}.bias"
        assert (weight.bias is None) == (bias not in checkpoint.store)
        assert weight.bias is None or torch.equal(weight.bias, checkpoint.store.get(bias))
    assert found == FOLDERS[folder]
    assert checkpoint.dense == (("layer.q_proj.weight",) if folder == "ct-patterns" else ())


@pytest.mark.parametrize("folder", ["bnb-int8", "bnb-int8-model"])
def test_llm_int8_agrees_to_the_last_bit_but_one(folder):
    oracle = load_file(GOLDEN / folder / "oracle.safetensors")
    checkpoint = open_checkpoint(GOLDEN / folder)
    layers = [name for name in checkpoint.layers if f"{name}.weight" in oracle]
    assert layers
    for name in layers:
        weight, want = checkpoint.read(name), oracle[f"{name}.weight"]
        assert str(weight.scheme) == "w8a16-sym-sfp32"
        # The package multiplies by fp32(1/127), which rounds once more than a scale a row.
        assert ((weight.dequantize() - want).abs() <= 2**-22 * want.abs()).all()
        largest = checkpoint.store.get(f"{name}.SCB").double()[:, None]
        exact = checkpoint.store.get(f"{name}.weight").double() * largest / 127
        assert ((weight.dequantize() - exact).abs() <= 2**-23 * exact.abs()).all()


MODELS = ("bnb-nf4-dq-model", "bnb-int8-model", "hqq-model", "torchao-model")


@pytest.mark.parametrize("folder", MODELS)
def test_a_model_gives_the_logits_of_the_package(folder):
    pytest.importorskip("transformers", reason="models come from transformers")
    oracle = load_file(GOLDEN / folder / "oracle.safetensors")
    model = qk.load_model(GOLDEN / folder)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"):
        layer, want = model.get_submodule(name), oracle[f"{name}.weight"]
        assert isinstance(layer, qk.WQLinear)
        exact = folder != "bnb-int8-model"
        assert not exact or torch.equal(layer.dequantize(), want)
    with torch.no_grad():
        logits = model(oracle["input_ids"]).logits
    error = (logits - oracle["logits"]).norm() / oracle["logits"].norm()
    assert error < FOREIGN_LOGITS


@pytest.mark.parametrize("folder", MODELS)
def test_what_is_read_is_saved_in_our_own_format(folder, tmp_path):
    pytest.importorskip("transformers", reason="models come from transformers")
    model = qk.load_model(GOLDEN / folder)
    qk.save_model(model, tmp_path / "out", format="qkernels")
    again, first = open_checkpoint(tmp_path / "out"), open_checkpoint(GOLDEN / folder)
    assert again.layers.keys() == first.layers.keys()
    assert all(same_weight(again.read(name), first.read(name)) for name in first.layers)


def test_groups_in_another_order_go_with_the_columns_that_they_were_made_of():
    weight = open_checkpoint(GOLDEN / "ct-widths-0.17").read("ordered")
    index = open_checkpoint(GOLDEN / "ct-widths-0.17").store.get("ordered.weight_g_idx")
    assert weight.perm is not None
    assert torch.equal(index[weight.perm], torch.arange(weight.k, dtype=torch.int32) // 32)


def test_static_inputs_with_a_zero_point():
    weight = open_checkpoint(GOLDEN / "ct-micro").read("static_zero")
    assert (float(weight.activation_scale), int(weight.activation_zero)) == (
        pytest.approx(0.02),
        -17,
    )
    x = torch.randn(9, weight.k)
    x[2] *= 100
    y, want = qk.WQLinear.from_weight(weight)(x), truth.product(weight, x)
    assert truth.error(y, want) < 2**-20
    # Beyond the range of the scale numbers saturate, and what is no number shows.
    x[3, 5] = float("nan")
    y = qk.WQLinear.from_weight(weight)(x)
    assert y[3].isnan().all() and y[:3].isfinite().all()
    written = open_checkpoint(GOLDEN / "ct-micro").format.write_layer(weight)
    assert written["input_zero_point"].tolist() == [-17]


def test_a_width_that_fits_both_packings_is_told_by_the_version(tmp_path):
    """20 codes of 3 bits take two words in both."""
    assert open_checkpoint(GOLDEN / "ct-widths-0.17").store.shape("wide3.weight_packed")[1] == 2
    shutil.copytree(GOLDEN / "ct-widths-0.17", tmp_path / "out")
    before = open_checkpoint(tmp_path / "out").read("wide3")
    text = (tmp_path / "out/config.json").read_text()
    (tmp_path / "out/config.json").write_text(text.replace('"0.17.1"', "null"))
    assert not torch.equal(open_checkpoint(tmp_path / "out").read("wide3").codes, before.codes)


def test_columns_of_weights_fit_their_first_blocks(tmp_path):
    """What a block's scale multiplies is the block, across the ends of rows."""
    shutil.copytree(GOLDEN / "bnb-nf4-blocks", tmp_path / "out")

    def mark(tensors):
        tensors["crossed.weight.absmax"][1] = 64.0

    edit_tensors(tmp_path / "out", mark)
    before = open_checkpoint(GOLDEN / "bnb-nf4-blocks").read("crossed").dequantize().flatten()
    after = open_checkpoint(tmp_path / "out").read("crossed").dequantize().flatten()
    changed = (before != after).nonzero().flatten()
    assert changed.min() >= 64 and changed.max() < 128 and len(changed) > 50
