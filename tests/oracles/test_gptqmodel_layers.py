"""GPTQModel's choice of layers, and models of Transformers and PEFT, on ours.

In processes of their own with a time limit: GPTQModel may not end, and compiles its own kernels
where it chooses them.
"""

import pytest

from tests.oracles.packages import package, run

package("gptqmodel")

BEGIN = """
import os, sys, warnings
import torch
import qkernels as qk
import qkernels.integrations.gptqmodel as ours
from qkernels.modules.linear import WQLinear

def done():
    print("right")
    sys.stdout.flush()
    os._exit(0)

products = []
real = WQLinear.view_product
WQLinear.view_product = lambda self, *a: (products.append(self), real(self, *a))[1]
torch.manual_seed(0)
"""

LAYERS = (
    BEGIN
    + """
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.importer import AUTO_BACKEND_KERNEL_MAPPING, hf_select_quant_linear_v2
import pickle

def tables():
    known = AUTO_BACKEND_KERNEL_MAPPING.items()
    return {method: {f: list(names) for f, names in formats.items()} for method, formats in known}

before = tables()
ours.install()
ours.install()

def chosen(method, format, bits, group=32, desc_act=False, backend="auto"):
    return hf_select_quant_linear_v2(
        bits=bits, group_size=group, desc_act=desc_act, sym=False, format=format,
        quant_method=method, pack=False, backend=backend, device_map={"": "cpu"},
    )

def words(layer):
    # Any bits are codes and zero points.
    for name in ("qweight", "qzeros"):
        buffer = getattr(layer, name)
        buffer.copy_(torch.randint(-(2**31), 2**31, buffer.shape, dtype=torch.int64).int())
    layer.scales.copy_(torch.rand(layer.scales.shape) + 0.5)
    layer.bias.copy_(torch.randn(layer.bias.shape))

def same(layer, weight, index):
    # The package's weight [K, N] is rounded to the type of the scales; its integers are not.
    scales = layer.scales.float()[index]
    weight = scales * (weight.float() / scales).round()
    layer.post_init()
    layer.eval()
    products.clear()
    k = len(weight)
    y = layer(torch.eye(k))
    assert torch.equal(y, weight + layer.bias.float())
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.randn(2, 3, k, dtype=dtype)
        exact = x.double() @ weight.double() + layer.bias.double()
        y = layer(x)
        assert y.dtype == dtype and y.shape == exact.shape
        assert (y.double() - exact).norm() / exact.norm() < 2**-7.5
        assert layer(x[:0]).shape == (0, 3, weight.shape[1])
    assert products and len(set(map(id, products))) == 1
    x = torch.randn(4, k, requires_grad=True)
    layer.train()(x).sum().backward()
    assert torch.allclose(x.grad, weight.sum(1).expand(4, -1), rtol=1e-3, atol=1e-2)

k, n = 128, 96
for bits in (2, 3, 4, 8):
    for group in (32, 64, -1):
        for sorted_columns in (False, True):
            for format in ("gptq", "gptq_v2"):
                cls = chosen("gptq", format, bits, group, sorted_columns)
                assert cls is ours.QKernelsGPTQLinear
                layer = cls(bits=bits, group_size=group, sym=False, desc_act=sorted_columns,
                            in_features=k, out_features=n, bias=True)
                words(layer)
                if sorted_columns:
                    layer.g_idx.copy_(layer.g_idx[torch.randperm(k)])
                plain = TorchLinear.__new__(TorchLinear)
                vars(plain).update(vars(layer))
                same(layer, super(TorchLinear, plain).dequantize_weight(), layer.g_idx.long())
for group in (32, 128, -1):
    cls = chosen("awq", "gemm", 4, group)
    assert cls is ours.QKernelsAWQLinear
    layer = cls(bits=4, group_size=group, sym=False, desc_act=False, in_features=k,
                out_features=n, bias=True, register_buffers=True)
    words(layer)
    weight = dequantize_gemm(qweight=layer.qweight, qzeros=layer.qzeros, scales=layer.scales,
                             bits=4, group_size=layer.group_size)
    same(layer, weight, torch.arange(k) // layer.group_size)
    model = torch.nn.Sequential(layer)
    x = torch.randn(2, k)
    y = model(x)
    assert len(qk.replace_linears(model).replaced) == 1 and torch.allclose(model(x), y)
assert pickle.loads(pickle.dumps(cls)) is cls

# Groups of several sizes are GPTQModel's own.
layer = chosen("gptq", "gptq", 4)(bits=4, group_size=32, sym=False, desc_act=True, in_features=k,
                                  out_features=n, bias=False)
layer.bias = torch.zeros(n)
words(layer)
layer.g_idx.zero_()
layer.g_idx[:40] = 1
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    layer.post_init()
assert any("plain product" in str(w.message) for w in caught)

assert chosen("gptq", "gptq", 4, backend="torch") is TorchLinear
ours.uninstall()
assert tables() == before
done()
"""
)

MODELS = (
    BEGIN
    + """
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from tests.bounds import FOREIGN_LOGITS
from tests.checkpoints.models import TOKENS, tiny_model

method, format, folder = sys.argv[1:]
folder = Path(folder)
ours.install()
model = tiny_model()
qk.quantize_model(model, "rtn", "w4a16-g32")
qk.save_model(model, folder / "saved", format)
exact = qk.load_model(folder / "saved")(TOKENS).logits
products.clear()
loaded = AutoModelForCausalLM.from_pretrained(folder / "saved", device_map="cpu").eval()
kinds = {type(module).__name__ for module in loaded.modules()}
assert ("QKernelsAWQLinear" if method == "awq" else "QKernelsGPTQLinear") in kinds, kinds
y = loaded(TOKENS).logits
assert products
error = (y.double() - exact.double()).norm() / exact.double().norm()
assert error < FOREIGN_LOGITS, error

loaded.save_pretrained(folder / "again")
one, two = (load_file(folder / name / "model.safetensors") for name in ("saved", "again"))
words = [name for name in one if name.endswith("qweight")]
assert words and all(torch.equal(one[name], two[name]) for name in words)

import peft
tuned = peft.get_peft_model(loaded, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
assert any("Gptq" in k or "GPTQ" in k or "Awq" in k
           for k in {type(module).__name__ for module in tuned.modules()})
tuned.train()
products.clear()
losses = []
optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
for _ in range(8):
    loss = tuned(input_ids=TOKENS, labels=TOKENS).loss
    losses.append(float(loss.detach()))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
assert products and losses[-1] < losses[0], losses
done()
"""
)


def test_layers_are_the_numbers_of_gptqmodel():
    assert run(LAYERS).split()[-1] == "right"


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_models_of_transformers_and_peft(tmp_path, format):
    package("optimum")
    package("peft")
    assert run(MODELS, format, format, tmp_path).split()[-1] == "right"
