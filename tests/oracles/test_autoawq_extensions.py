"""AutoAWQ's own layers and fused modules, on what stands in for its extensions."""

import pytest
import torch

import qkernels as qk
from tests.oracles.packages import package, random_parts, run, weight_of

package("awq")

from awq.modules import linear as theirs

PROGRAM = """
import os, sys
import torch
from torch import nn
import qkernels.integrations.autoawq as autoawq
autoawq.install()
import awq
from awq.modules.linear import WQLinear_GEMM, WQLinear_GEMV, WQLinear_GEMVFast, gemm
from awq.modules.fused.mlp import QuantFusedMLP
from awq.modules.fused.moe import apply_moe_weights
from awq.modules.fused.norm import FasterTransformerRMSNorm
from tests.bounds import FROBENIUS_BOUND
from tests.oracles.packages import random_parts, weight_of

assert gemm.awq_ext.gemm_forward_cuda is autoawq.gemm_forward_cuda
torch.manual_seed(0)
BOUND = 4 * FROBENIUS_BOUND[torch.float16]


def layer(cls, n, k, group, bias=True):
    codes, zeros, scales = random_parts(n, k, group, 4)
    weight = weight_of(codes, zeros, scales, group)
    linear = nn.Linear(k, n, bias=bias)
    linear.weight.data = weight
    transposed = cls is WQLinear_GEMM
    given = [t.t().contiguous() if transposed else t for t in (scales, zeros)]
    made = cls.from_linear(linear, 4, group, scales=given[0], zeros=given[1])
    return made.eval(), weight.double(), None if linear.bias is None else made.bias.double()


def close(y, exact):
    assert y.shape == exact.shape, (y.shape, exact.shape)
    error = (y.double() - exact).norm() / exact.norm()
    assert error < BOUND, error


for cls in (WQLinear_GEMM, WQLinear_GEMV, WQLinear_GEMVFast):
    for n, k, group in ((96, 256, 64), (32, 384, 128), (64, 64, 32)):
        made, weight, bias = layer(cls, n, k, group)
        for shape in ((1, 1, k), (3, 1, k), (2, 9, k), (2, 600, k)):
            x = torch.randn(shape, dtype=torch.float16)
            close(made(x), x.double() @ weight.T + bias)
made, weight, bias = layer(WQLinear_GEMM, 96, 256, 64)
x = torch.randn(2, 5, 256, dtype=torch.float16, requires_grad=True)
y = made.train()(x)
grad = torch.randn_like(y)
y.backward(grad)
close(x.grad, grad.double() @ weight)

for cls in (WQLinear_GEMM, WQLinear_GEMV):
    gate, up, down = (layer(cls, n, k, 64, False) for n, k in ((128, 64), (128, 64), (64, 128)))
    fused = QuantFusedMLP(gate[0], down[0], up[0])
    x = torch.randn(2, 3, 64, dtype=torch.float16)
    inner = nn.functional.silu(x.double() @ gate[1].T) * (x.double() @ up[1].T)
    close(fused(x), inner @ down[1].T)


class Stacked:
    pass


def stacked(layers):
    made = Stacked()
    for name in ("qweight", "scales", "qzeros"):
        setattr(made, name, torch.stack([getattr(entry[0], name) for entry in layers]))
    return made


experts = [layer(WQLinear_GEMM, 256, 64, 32, False) for _ in range(4)]
seconds = [layer(WQLinear_GEMM, 64, 128, 32, False) for _ in range(4)]
x, gating = torch.randn(21, 64, dtype=torch.float16) / 4, torch.randn(21, 4)
y = apply_moe_weights(stacked(experts), stacked(seconds), x, gating, 2, True)
chosen, ids = gating.double().softmax(-1).topk(2)
chosen = chosen / chosen.sum(-1, keepdim=True)
exact = torch.zeros(21, 64, dtype=torch.float64)
for t in range(21):
    for weight, e in zip(chosen[t], ids[t].tolist()):
        hidden = experts[e][1] @ x[t].double()
        hidden = nn.functional.silu(hidden[:128]) * hidden[128:]
        exact[t] += weight * (seconds[e][1] @ hidden)
close(y, exact)

norm = FasterTransformerRMSNorm(torch.rand(64).half())
x = torch.randn(2, 3, 64, dtype=torch.float16)
close(norm(x), nn.functional.rms_norm(x.double(), (64,), norm.weight.double(), 1e-6))
print("right")
sys.stdout.flush()
os._exit(0)
"""


def test_its_modules_run_on_ours():
    assert run(PROGRAM).split()[-1] == "right"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("name", ["WQLinear_GEMM", "WQLinear_GEMV", "WQLinear_GEMVFast"])
def test_our_classes_have_its_words(name, group, bias):
    cls, ours = getattr(theirs, name), getattr(qk, name)
    codes, zeros, scales = random_parts(96, 384, group, 4)
    linear = torch.nn.Linear(384, 96, bias=bias)
    linear.weight.data = weight_of(codes, zeros, scales, group)
    if name == "WQLinear_GEMM":
        scales, zeros = scales.t().contiguous(), zeros.t().contiguous()
    given = {"scales": scales, "zeros": zeros}
    old = cls.from_linear(linear, 4, group, **given)
    new = ours.from_linear(linear, 4, group, **given)
    state = old.state_dict()
    assert state.keys() == new.state_dict().keys()
    for key, tensor in new.state_dict().items():
        assert tensor.dtype == state[key].dtype and torch.equal(tensor, state[key]), key
    empty = ours.from_linear(linear, 4, group, init_only=True)
    empty.load_state_dict(state, strict=True)
    x = torch.randn(2, 384, dtype=torch.float16)
    assert torch.equal(empty(x), new(x))
    cls.from_linear(linear, 4, group, init_only=True).load_state_dict(new.state_dict())
