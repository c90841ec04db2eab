"""What is wrong with folders of formats that are only read is said by file, tensor and remedy."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from qkernels.checkpoints import read_weights
from qkernels.errors import CheckpointError
from tests.checkpoints.folders import edit_config, edit_metadata, edit_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
STATE = "weight.quant_state.bitsandbytes__nf4"


def put(name, value):
    """Changes a tensor to a value, to what a function makes of it, or takes it away."""

    def change(tensors):
        tensor = tensors.pop(name, None)
        made = value(tensor) if callable(value) else value
        if made is not None:
            tensors[name] = made.contiguous()

    return lambda folder: edit_tensors(folder, change)


def state(**changes):
    """Changes what the JSON of the layer `even` says."""

    def change(tensor):
        content = {**json.loads(bytes(tensor.tolist())), **changes}
        return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)

    return put(f"even.{STATE}", change)


def says(**changes):
    """Changes the quantization_config."""

    def change(config):
        config.setdefault("quantization_config", {}).update(changes)

    return lambda folder: edit_config(folder, change)


def tells(key, **changes):
    """Changes the metadata of a tensor."""

    def change(metadata):
        content = json.loads(metadata[key])
        content["_data"].update(changes)
        metadata[key] = json.dumps(content)

    return lambda folder: edit_metadata(folder, change)


def filled(number):
    return lambda tensor: torch.full_like(tensor, number)


NF4, DOUBLED, INT8 = "bnb-nf4-blocks", "bnb-nf4-dq-blocks", "bnb-int8"
K_PROJ = "model.layers.0.self_attn.k_proj"
HQQ, TORCHAO, MICRO = "hqq-bits", "torchao-bits", "ct-micro"
NAN = float("nan")

CASES = {
    # bitsandbytes
    "no state": (NF4, put(f"even.{STATE}", None), rf"even.{STATE} is missing: only weights that"),
    "no absmax": (NF4, put("even.weight.absmax", None), "even.weight.absmax is missing"),
    "no map": (NF4, put("even.weight.quant_map", None), "even.weight.quant_map is missing"),
    "no weight": (NF4, put("even.weight", None), "even.weight is missing"),
    "absmax of another type": (
        NF4,
        put("even.weight.absmax", torch.Tensor.half),
        r"even.weight.absmax must be float32 \[96\], got float16",
    ),
    "fewer blocks": (
        NF4,
        put("even.weight.absmax", lambda x: x[:-1]),
        r"even.weight.absmax must be float32 \[96\], got float32 \[95\]",
    ),
    "absmax NaN": (NF4, put("even.weight.absmax", filled(NAN)), "even: scales .* NaN"),
    "map NaN": (NF4, put("even.weight.quant_map", filled(NAN)), "even.*quant_map: .*finite"),
    "bias of another length": (
        NF4,
        put("even.bias", lambda x: x[1:]),
        r"even.bias must be any type \[48\]",
    ),
    "blocksize": (NF4, state(blocksize=128), r"even.weight.absmax must be float32 \[48\]"),
    "blocksize 48": (NF4, state(blocksize=48), "blocksize must be one of 32, .*, 4096, got 48"),
    "blocksize a string": (NF4, state(blocksize="64"), "blocksize must be an integer, got '64'"),
    "another shape": (NF4, state(shape=[48, 64]), r"shape \[48, 64\] does not fit the bytes"),
    "a huge shape": (NF4, state(shape=[2**40, 2**40]), "does not fit the bytes"),
    "a negative shape": (NF4, state(shape=[-48, -128]), "does not fit the bytes"),
    "no shape": (NF4, state(shape=None), "shape must be a list, got None"),
    "three dimensions": (NF4, state(shape=[2, 24, 128]), r"shape must be \[N, K\], got"),
    "another type": (NF4, state(quant_type="fp4"), "says quant_type='fp4'"),
    "an unknown key": (NF4, state(rotated=True), "has rotated=True, which is not known here"),
    "no JSON": (NF4, put(f"even.{STATE}", filled(65)), f"even.{STATE} is not valid JSON"),
    "JSON too long": (
        NF4,
        put(f"even.{STATE}", torch.zeros(1 << 17, dtype=torch.uint8)),
        "is no JSON of a layer: it has 131072 bytes",
    ),
    "offset a string": (DOUBLED, state(nested_offset="x"), "nested_offset must be a number"),
    "offset too large": (DOUBLED, state(nested_offset=1e40), "nested_offset must be a number"),
    "offset NaN": (DOUBLED, state(nested_offset=NAN), "nested_offset must be a number"),
    "no second level": (
        DOUBLED,
        put("even.weight.nested_absmax", None),
        "even.weight.nested_absmax is missing",
    ),
    "second level NaN": (
        DOUBLED,
        put("even.weight.nested_absmax", filled(NAN)),
        "even: nested_absmax .* NaN",
    ),
    "config of 8 bits": (NF4, says(load_in_8bit=True), "stored in 4 bits, .* load_in_8bit=true"),
    "config of 4 bits": (INT8, says(_load_in_4bit=True), "stored in 8 bits, .* _load_in_4bit=true"),
    "config of FP4": (
        NF4,
        says(bnb_4bit_quant_type="fp4"),
        "says bnb_4bit_quant_type='fp4', and crossed is stored with 'nf4'",
    ),
    "config without a second level": (
        DOUBLED,
        says(bnb_4bit_use_double_quant=False),
        "says bnb_4bit_use_double_quant=False, and crossed is stored with True",
    ),
    "config that skips": (NF4, says(llm_int8_skip_modules=["even"]), "skip_modules names it"),
    "unknown config": (NF4, says(bnb_3bit=True), "bnb_3bit=True, which is not known here"),
    "no SCB": (INT8, put(f"{K_PROJ}.SCB", None), f"{K_PROJ}.SCB is missing"),
    "SCB of another length": (
        INT8,
        put(f"{K_PROJ}.SCB", lambda x: x[1:]),
        r"SCB must be .*\[64\], got float32 \[63\]",
    ),
    "SCB negative": (INT8, put(f"{K_PROJ}.SCB", filled(-1.0)), "SCB is negative"),
    "SCB NaN": (INT8, put(f"{K_PROJ}.SCB", filled(NAN)), "scales .* NaN"),
    "weights of another type": (
        INT8,
        put(f"{K_PROJ}.weight", torch.Tensor.half),
        "k_proj.weight must be int8",
    ),
    "weights in tiles": (
        INT8,
        put(f"{K_PROJ}.weight_format", filled(2)),
        "only rows are read: load it with bitsandbytes and save it anew",
    ),
    # HQQ
    "no scale": (HQQ, put("four.scale", None), "four.scale is missing"),
    "no zero": (HQQ, put("four.zero", None), "four.zero is missing"),
    "no bits": (HQQ, put("four.nbits", None), "four.nbits is missing"),
    "other bits": (HQQ, put("four.nbits", filled(3)), "four.packing is '4bit_u8', and 3 bits are"),
    "unknown bits": (HQQ, put("four.nbits", filled(7)), "four.nbits is 7.0, not one of 8, 6"),
    "outputs": (HQQ, put("four.axis", filled(0)), "four.axis is 0, .*: quantize with axis=1"),
    "groups": (
        HQQ,
        put("four.group_size", filled(48)),
        r"four.W_q must be uint8 \[16, any\], got uint8 \[24, 32\]",
    ),
    "no groups": (HQQ, put("four.group_size", filled(7)), "does not split into groups of 7"),
    "groups of none": (HQQ, put("four.group_size", filled(0)), "does not split into groups of 0"),
    "a negative HQQ shape": (HQQ, put("four.shape", filled(-1)), "does not split into groups"),
    "a huge HQQ shape": (HQQ, put("four.shape", filled(2**31)), "four.W_q must be uint8"),
    "scale NaN": (HQQ, put("four.scale", filled(NAN)), "four: scales .* NaN"),
    "zero NaN": (HQQ, put("four.zero", filled(NAN)), "four: zeros .* NaN"),
    "scales in rows": (
        HQQ,
        put("four.scale", lambda x: x.view(24, 2)),
        r"four.scale must be float32 \[48, 1\], got float32 \[24, 2\]",
    ),
    "scales in bytes": (HQQ, put("four.scale", torch.Tensor.int), "four.scale: scale type"),
    "codes of another type": (HQQ, put("four.W_q", torch.Tensor.int), "four.W_q must be uint8"),
    "codes that are not": (HQQ, put("five.W_q", filled(32)), "holds the code 32, and there are 32"),
    "quantized scales": (
        HQQ,
        put("four.quant_scale", filled(1)),
        "four has scales or zero points that are quantized themselves",
    ),
    "their tensors": (HQQ, put("four.zero_q", torch.zeros(2)), r"themselves \(zero_q\)"),
    "a packing that is not": (HQQ, put("four.packing", filled(65)), "four.packing is 'AAAAAAA'"),
    "numbers that are many": (HQQ, put("four.axis", torch.ones(2).int()), "must be one number"),
    "HQQ config": (
        HQQ,
        says(quant_method="hqq", quant_config={"weight_quant_params": {"group_size": 128}}),
        "says group_size=128, and .*.group_size is",
    ),
    "unknown HQQ config": (HQQ, says(quant_method="hqq", rank=4), "has rank=4, which is not known"),
    "HQQ config that skips": (
        HQQ,
        says(quant_method="hqq", skip_modules=["four"]),
        "four is quantized in the file, and skip_modules names it",
    ),
    # torchao
    "no codes": (TORCHAO, put("int8._weight_qdata", None), "int8._weight_qdata is missing"),
    "no scales": (TORCHAO, put("int8._weight_scale", None), "int8._weight_scale is missing"),
    "no zero points": (TORCHAO, put("int8_asym._weight_zero_point", None), "zero_point is missing"),
    "scales of another shape": (
        TORCHAO,
        put("int4_asym._weight_scale", lambda x: x[:, :1]),
        r"int4_asym._weight_scale must be float32 \[24, 2\], got float32 \[24, 1\]",
    ),
    "scales NaN": (TORCHAO, put("int8._weight_scale", filled(NAN)), "int8: scales .* NaN"),
    "codes beyond": (
        TORCHAO,
        put("int4_asym._weight_qdata", filled(8)),
        "int4_asym._weight_qdata holds what is no integer of 4 bits",
    ),
    "zero points beyond": (
        TORCHAO,
        put("int4_asym._weight_zero_point", filled(-9)),
        "int4_asym._weight_zero_point holds what is no integer of 4 bits",
    ),
    "fewer bits": (
        TORCHAO,
        tells("int7.weight", target_dtype={"_type": "torch.dtype", "_data": "int3"}),
        "int7._weight_qdata holds what is no integer of 3 bits",
    ),
    "bits that are none": (
        TORCHAO,
        tells("int7.weight", target_dtype={"_type": "torch.dtype", "_data": "int9"}),
        "target_dtype 'int9' is not one of int1 to int8",
    ),
    "other groups": (
        TORCHAO,
        tells("int7.weight", block_size=[1, 32]),
        r"int7._weight_scale must be float32 \[24, 2\]",
    ),
    "blocks": (TORCHAO, tells("int7.weight", block_size=[2, 32]), r"block_size \[2, 32\] .* not"),
    "an unknown attribute": (TORCHAO, tells("int7.weight", axis=1), "axis=1, which is not known"),
    "unknown inputs": (
        TORCHAO,
        tells("int7.weight", activation_quantization="int4_per_token"),
        "inputs quantized as 'int4_per_token' are not supported",
    ),
    "no metadata": (TORCHAO, lambda f: edit_metadata(f, dict.clear), "metadata .* says nothing of"),
    "an unknown class": (
        TORCHAO,
        lambda f: edit_metadata(
            f, lambda m: m.update({"int7.weight": m["int7.weight"].replace("Intx", "Other")})
        ),
        "the class OtherUnpackedToInt8Tensor is not supported",
    ),
    "metadata that is no JSON": (
        TORCHAO,
        lambda f: edit_metadata(f, lambda m: m.update({"int7.weight": "{"})),
        "metadata of int7.weight is not valid JSON",
    ),
    "torchao config": (
        "torchao-int8wo",
        says(quant_type={"default": {"_type": "IntxWeightOnlyConfig"}}),
        "says IntxWeightOnlyConfig, and .*k_proj.weight is of Int8Tensor",
    ),
    "torchao config that skips": (
        TORCHAO,
        says(modules_to_not_convert=["int7"]),
        "int7 is quantized in the file, and modules_to_not_convert names it",
    ),
    "unknown torchao config": (TORCHAO, says(rank=4), "has rank=4, which is not known"),
    # compressed-tensors
    "exponents NaN": (MICRO, put("mx.weight_scale", filled(255)), "mx.weight_scale holds 255"),
    "exponents of another type": (
        MICRO,
        put("mx.weight_scale", torch.Tensor.float),
        r"mx.weight_scale must be uint8 \[32, 2\]",
    ),
    "no global scale": (MICRO, put("nv.weight_global_scale", None), "global_scale is missing"),
    "global scale 0": (MICRO, put("nv.weight_global_scale", filled(0)), "nv: scales .* NaN or inf"),
    "blocks of another shape": (
        MICRO,
        put("block.weight_scale", lambda x: x[:2]),
        r"block.weight_scale must be bfloat16 \[3, 2\], got bfloat16 \[2, 2\]",
    ),
    "no zero point of inputs": (
        MICRO,
        put("static_zero.input_zero_point", None),
        "static_zero.input_zero_point is missing",
    ),
    "an index out of range": (
        "ct-widths-0.17",
        put("ordered.weight_g_idx", filled(4)),
        "ordered.weight_g_idx must name each group of 0..3 for 32 columns, got 4..4",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_named(case, tmp_path):
    folder, damage, named = CASES[case]
    shutil.copytree(GOLDEN / folder, tmp_path / "out")
    assert read_weights(tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(CheckpointError, match=named) as caught:
        read_weights(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_method_that_is_not_known_is_named(tmp_path):
    shutil.copytree(GOLDEN / NF4, tmp_path / "out")
    says(quant_method="squeezed")(tmp_path / "out")
    with pytest.raises(
        CheckpointError, match=r"in the format 'squeezed'; known are .*bitsandbytes"
    ):
        read_weights(tmp_path / "out")


def test_the_first_folders_of_bitsandbytes_name_no_method(tmp_path):
    shutil.copytree(GOLDEN / NF4, tmp_path / "out")
    section = {"quantization_config": {"load_in_4bit": True, "llm_int8_threshold": 6.0}}
    (tmp_path / "out/config.json").write_text(json.dumps(section))
    assert len(read_weights(tmp_path / "out")) == 7
