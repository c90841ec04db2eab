"""Layers that GPTQModel and llm-compressor quantize, each in a process of its own."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.oracles.packages import run

_COMMON = """
import json, os, sys
os.environ["TORCHDYNAMO_DISABLE"] = "1"
import torch
from safetensors.torch import load_file, save_file

folder = sys.argv[1]
layers, made = load_file(f"{folder}/layers.safetensors"), {}
cases = json.load(open(f"{folder}/cases.json")).items()

def keep(name, q, scales, zeros, group_of):
    index = group_of.long().expand(q.shape)
    codes = (q / scales.gather(1, index)).round() + zeros.gather(1, index)
    parts = {"codes": codes.to(torch.uint8), "scales": scales, "zeros": zeros, "group_of": group_of}
    made.update({f"{name}/{part}": value.contiguous() for part, value in parts.items()})

def done():
    save_file(made, f"{folder}/made.safetensors")
    # Its threads may keep the process from ending.
    os._exit(0)
"""

GPTQMODEL = (
    _COMMON
    + """
from gptqmodel.quantization import GPTQ, QuantizeConfig
from gptqmodel.quantization.config import GPTAQConfig
from gptqmodel.quantization.gptaq import GPTAQ
from gptqmodel.looper.named_module import NamedModule
from gptqmodel.looper.native_processor import NATIVE_INPUTS_STATE_KEY

for name, case in cases:
    weight, x = (layers[f"{case['layer']}/{part}"] for part in ("weight", "x"))
    linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight.data = weight.clone()
    config = {key: case[key] for key in ("bits", "sym", "group_size")}
    if "act_order" in case:
        config |= {
            "damp_percent": 0.01,
            "act_group_aware": False,
            "desc_act": case["act_order"] != "off",
            "static_groups": case["act_order"] == "static",
        }
    if "alpha" in case:
        named = NamedModule(linear, name="layer", full_name="layer", layer_index=0)
        named.state[NATIVE_INPUTS_STATE_KEY] = [layers[f"{case['layer']}/dense"][None]]
        aq = GPTAQConfig(alpha=case["alpha"])
        task = GPTAQ(named, QuantizeConfig(**config, gptaq=aq))
    else:
        task = GPTQ(linear, QuantizeConfig(**config))
    task.quantizer.configure(perchannel=True)
    task.add_batch(x[None], None)
    keep(name, *task.quantize(blocksize=case.get("block", 128))[:4])
done()
"""
)

LLMCOMPRESSOR = (
    _COMMON
    + """
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.gptq.helpers import accumulate_hessian, make_empty_hessian

for name, case in cases:
    weight, x = (layers[f"{case['layer']}/{part}"] for part in ("weight", "x"))
    n, k = weight.shape
    linear = torch.nn.Linear(k, n, bias=False)
    hessian, count = accumulate_hessian(x, linear, make_empty_hessian(linear), torch.zeros(()))
    length = k if case["group_size"] == -1 else case["group_size"]
    strategy = {"strategy": "channel"} if length == k else {"group_size": length}
    orders = {"off": None, "static": "static"}
    order = {"actorder": orders[case["act_order"]]} if "act_order" in case else {}
    args = QuantizationArgs(num_bits=case["bits"], symmetric=case["sym"], **strategy, **order)
    groups = weight.unflatten(1, (-1, length))
    scales, zeros = calculate_qparams(groups.amin(2), groups.amax(2), args)
    q, _, failed = quantize_weight(
        weight[None].clone(), hessian[None] / count, scales[None], zeros[None], None, args
    )
    assert not failed.any()
    # Its codes are signed.
    zeros = zeros.float() + (1 << case["bits"] - 1)
    keep(name, q[0], scales, zeros, torch.arange(k) // length)
done()
"""
)


@dataclass(frozen=True)
class ForeignLayer:
    """Attributes: codes: uint8 [N, K]; scales, zeros: [N, G]; group_of: [K], each column's."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_of: Tensor

    def dequantize(self) -> Tensor:
        index = self.group_of.long().expand(self.codes.shape)
        zeros, scales = self.zeros.float().gather(1, index), self.scales.gather(1, index)
        return (self.codes - zeros) * scales


def quantize_layers(
    program: str, folder: Path, layers: dict[str, dict[str, Tensor]], cases: dict[str, dict]
) -> dict[str, ForeignLayer]:
    """What a package makes of layers, by the names of the cases.

    Args:
        layers: `weight` [N, K] and `x` [T, K] of each, and `dense` [T, K] for GPTAQ.
        cases: `layer`, `bits`, `sym`, `group_size` (-1: a row), and `act_order`; without it the
            package goes by its own settings.
    """
    tensors = {
        f"{layer}/{part}": tensor.contiguous().clone()
        for layer, parts in layers.items()
        for part, tensor in parts.items()
    }
    save_file(tensors, folder / "layers.safetensors")
    (folder / "cases.json").write_text(json.dumps(cases))
    run(program, folder)
    made = load_file(folder / "made.safetensors")
    parts = ("codes", "scales", "zeros", "group_of")
    return {name: ForeignLayer(*(made[f"{name}/{part}"] for part in parts)) for name in cases}


def layer_loss(weight: Tensor, x: Tensor, made: Tensor, dense: Tensor | None = None) -> float:
    """|x_dense W^T - x Q^T|^2, in fp64; without `dense` |x (W - Q)^T|^2."""
    wanted = (x if dense is None else dense).double() @ weight.double().T
    return float(torch.linalg.vector_norm(wanted - x.double() @ made.double().T) ** 2)
