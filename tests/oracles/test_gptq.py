"""Words of GPTQModel's own layers, read; and ours, in the places of theirs.

In a process of its own, since its threads may keep one from ending.
"""

import json

from tests.oracles.packages import package, run

SHAPES = ((32, 64, 32), (96, 160, 32), (64, 128, 128), (32, 96, -1), (160, 192, 64))
"""N, K and the group size: multiples of 32, which its words are in 3 bits."""


def test_their_layers_are_read_and_ours_fill_them(tmp_path):
    package("gptqmodel")
    done = json.loads(run(_PROGRAM, tmp_path, json.dumps(SHAPES), seconds=600).splitlines()[-1])
    # Every shape in 2, 3, 4 and 8 bits, with zero points and without, in order and not, twice.
    assert done == {"read": len(SHAPES) * 4 * 2 * 2 * 2, "filled": len(SHAPES) * 4 * 2 * 2 * 2}


_PROGRAM = """
import itertools, json, os, sys
from pathlib import Path
import torch
from torch import nn
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from qkernels.checkpoints import FORMATS, open_checkpoint
from qkernels.checkpoints.format import WeightKind
from tests.checkpoints.folders import same_weight, write_layers
from tests.oracles.packages import random_parts, read_folder, weight_of, write_folder

folder, shapes = Path(sys.argv[1]), json.loads(sys.argv[2])
done = {"read": 0, "filled": 0}
torch.manual_seed(0)
cases = itertools.product(shapes, (2, 3, 4, 8), (False, True), (False, True))
for i, ((n, k, size), bits, symmetric, by_activations) in enumerate(cases):
    codes, zeros, scales = random_parts(n, k, size, bits)
    if symmetric:
        zeros = torch.full_like(zeros, 1 << (bits - 1))
    weight = weight_of(codes, zeros, scales, size)
    index = torch.arange(k) // (k if size == -1 else size)
    if by_activations:
        perm = torch.randperm(k)
        weight, index = weight[:, perm], index[perm]
    dense = nn.Linear(k, n, bias=symmetric)
    dense.weight.data = weight.clone()
    layer = TorchLinear(
        bits=bits, group_size=size, sym=symmetric, desc_act=by_activations, in_features=k,
        out_features=n, bias=symmetric, register_buffers=True,
    )
    layer.pack(dense, scales.float(), zeros, index.int())
    assert torch.equal(layer.dequantize_weight().t(), weight.half())
    said = {"bits": bits, "group_size": size, "sym": symmetric, "desc_act": by_activations}
    for version in ("gptq_v2", "gptq"):
        config = QuantizeConfig(**said, format=version)
        if version == "gptq":
            convert_gptq_v2_to_v1_format_module(layer, config)
        section = {"quant_method": "gptq", **config.to_dict(),
                   "meta": {"quantizer": ["gptqmodel:7.7.0"]}}
        tensors = {f"layer.{name}": tensor for name, tensor in layer.state_dict().items()}
        theirs = write_folder(folder / f"theirs{i}{version}", tensors, section)
        read = read_folder(theirs)["layer"]
        assert torch.equal(read.dequantize(), weight), (i, said, version)
        assert read.bias is None or torch.equal(read.bias, dense.bias.half())
        done["read"] += 1
        ours = write_layers(folder / f"ours{i}{version}", version, {"layer": read})
        assert same_weight(read_folder(ours)["layer"], read)
        store = open_checkpoint(ours).store
        for name, tensor in tensors.items():
            got = store.get(name)
            assert got.dtype == tensor.dtype and torch.equal(got, tensor), (name, said, version)
        wrote = json.loads((ours / "config.json").read_text())["quantization_config"]
        understood = QuantizeConfig.from_quant_config(wrote)
        same = (understood.bits, understood.group_size, understood.sym, understood.desc_act)
        assert same == (bits, size, symmetric, read.perm is not None), (same, said)
        assert str(understood.format) in (version, f"FORMAT.{version.upper()}"), understood.format
        done["filled"] += 1
print(json.dumps(done), flush=True)
os._exit(0)
"""
