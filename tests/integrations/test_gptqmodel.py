"""Our layers for GPTQModel, behind a stand-in with the names that they look for there."""

import sys
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qkernels.integrations import gptqmodel as ours
from tests.integrations.modules import golden

METHOD = SimpleNamespace(GPTQ="gptq", AWQ="awq")
FORMAT = SimpleNamespace(GPTQ="gptq", GPTQ_V2="gptq_v2", GEMM="gemm")


class Plain(nn.Module):
    """As far as a layer of GPTQModel matters here."""

    online_full_had = online_partial_had = False
    adapter = None

    def __init__(self, tensors, bits, group_size, k, n):
        super().__init__()
        self.bits, self.group_size, self.in_features, self.out_features = bits, group_size, k, n
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.bias = tensors.get("bias")

    def post_init(self):
        self.ready = True

    def forward(self, x):
        return "theirs"


@pytest.fixture
def choices(monkeypatch):
    theirs = OrderedDict(theirs=Plain)
    known = {"gptq": {"gptq": theirs.copy(), "gptq_v2": theirs.copy()}, "awq": {"gemm": theirs}}
    stand_ins = {
        "gptqmodel.utils.importer": SimpleNamespace(AUTO_BACKEND_KERNEL_MAPPING=known),
        "gptqmodel.quantization": SimpleNamespace(METHOD=METHOD, FORMAT=FORMAT),
        "gptqmodel.models._const": SimpleNamespace(
            DEVICE=SimpleNamespace(CPU="cpu", CUDA="cuda"), PLATFORM=SimpleNamespace(ALL="all")
        ),
        "gptqmodel.adapter.adapter": SimpleNamespace(Lora=object),
        "gptqmodel.nn_modules.qlinear.torch": SimpleNamespace(TorchLinear=Plain),
        "gptqmodel.nn_modules.qlinear.torch_awq": SimpleNamespace(AwqTorchLinear=Plain),
    }
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    ours._classes.cache_clear()
    yield known
    ours._classes.cache_clear()


def test_first_in_order_and_taken_away_again(choices):
    ours.install()
    ours.install()
    orders = [list(table) for formats in choices.values() for table in formats.values()]
    assert orders == [["qkernels", "theirs"]] * 3
    layer = choices["awq"]["gemm"]["qkernels"]
    assert issubclass(layer, Plain) and layer is ours.QKernelsAWQLinear
    assert not hasattr(ours, "QKernelsOtherLinear")
    ours.uninstall()
    ours.uninstall()
    orders = [list(table) for formats in choices.values() for table in formats.values()]
    assert orders == [["theirs"]] * 3


def made(cls, folder, bits, group):
    tensors, weight, _ = golden(folder)
    n, k = tensors["scales"].shape[1], weight.shape[1]
    layer = cls(tensors, bits, k if group == -1 else group, k, n)
    layer.post_init()
    assert layer.ready
    return layer, weight


@pytest.mark.parametrize(
    ("folder", "bits", "group"),
    [("words-gptq_v2-2bit-desc-act", 2, 32), ("words-gptq_v2-8bit-sym", 8, -1)],
)
def test_gptq(choices, folder, bits, group):
    ours.install()
    size = golden(folder)[2]["group_size"]
    layer, weight = made(choices["gptq"]["gptq"]["qkernels"], folder, bits, size)
    y = layer(torch.eye(weight.shape[1])[None])
    bias = 0 if layer.bias is None else layer.bias[: len(weight)].float()
    assert torch.equal(y[0, :, : len(weight)], weight.T + bias)


def test_awq_with_an_adapter_and_a_rotation(choices):
    ours.install()
    layer, weight = made(choices["awq"]["gemm"]["qkernels"], "words-awq-gemm-g32", 4, 32)
    bias = 0 if layer.bias is None else layer.bias[: len(weight)].float()
    layer.adapter = SimpleNamespace(apply=lambda x, out: out + x.sum(1, keepdim=True))
    layer.online_full_had = True
    layer._apply_rotation_to_input = lambda x: 2 * x
    x = torch.eye(weight.shape[1])
    assert torch.equal(layer(x)[:, : len(weight)], 2 * weight.T + bias + 2)


def test_what_ours_do_not_take_is_theirs(choices):
    ours.install()
    cls = choices["gptq"]["gptq_v2"]["qkernels"]
    tensors, weight, config = golden("words-gptq_v2-2bit-desc-act")
    k = weight.shape[1]
    tensors["g_idx"] = torch.zeros(k, dtype=torch.int32)
    tensors["g_idx"][0] = 1
    layer = cls(tensors, 2, config["group_size"], k, tensors["scales"].shape[1])
    with pytest.warns(UserWarning, match="runs on GPTQModel's plain product"):
        layer.post_init()
    assert layer(torch.eye(k)) == "theirs"
