"""Which modules count as linear layers, and what a layer takes over from the one before it."""

import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import prune

import qkernels as qk
from qkernels import WQLinear
from qkernels.modules.kinds import is_plain_linear, why_not_plain


class WithForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class WithoutForward(nn.Linear):
    pass


def weight_norm(layer):
    return nn.utils.parametrizations.weight_norm(layer)


def pruned(layer):
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


def patched(layer):
    forward = layer.forward
    layer.forward = lambda x: forward(x) * 2
    return layer


def with_buffer(layer):
    layer.register_buffer("mask", torch.ones(1))
    return layer


def offloaded(layer):
    """As accelerate does."""
    layer._hf_hook = object()
    return patched(layer)


OTHERS = {
    "forward of its own": (WithForward, "a WithForward, a subclass"),
    "subclass": (WithoutForward, "a WithoutForward, a subclass"),
    "weight norm": (lambda *size: weight_norm(nn.Linear(*size)), "subclass"),
    "spectral norm": (lambda *size: nn.utils.spectral_norm(nn.Linear(*size)), "computed"),
    "pruned": (lambda *size: pruned(nn.Linear(*size)), "computed"),
    "forward replaced": (lambda *size: patched(nn.Linear(*size)), "forward has been replaced"),
    "offloaded": (lambda *size: offloaded(nn.Linear(*size)), "remove_hook_from_submodules"),
    "buffer": (lambda *size: with_buffer(nn.Linear(*size)), "buffers"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_may_compute_something_else_is_not_plain(name):
    make, reason = OTHERS[name]
    layer = make(8, 4)
    assert reason in why_not_plain(layer)
    model = nn.Sequential(layer, nn.Linear(4, 8))
    report = qk.quantize_model(model, scheme="w8a16")
    assert model[0] is layer and isinstance(model[1], WQLinear)
    assert reason in report.skipped["0"] and 0 < report.shares["0"] < 1


def test_equivalents_are_plain():
    assert is_plain_linear(nn.Linear(8, 4)) and is_plain_linear(nn.Linear(8, 4, bias=False))
    assert is_plain_linear(NonDynamicallyQuantizableLinear(8, 4))
    assert not is_plain_linear(nn.Bilinear(8, 4, 2))
    assert not is_plain_linear(WQLinear.from_linear(nn.Linear(8, 4), "w8a16"))


def test_hooks_attributes_and_mode_go_on_to_the_new_layer():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4)).train()
    seen: list[str] = []
    first = model[0]
    handles = [
        first.register_forward_hook(lambda module, args, y: seen.append("forward")),
        first.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append("before"), with_kwargs=True
        ),
        first.register_full_backward_hook(lambda module, gx, gy: seen.append("backward")),
    ]
    first.is_gate = True
    qk.quantize_model(model, scheme="w8a16")
    assert isinstance(model[0], WQLinear) and model[0].is_gate and model[0].training
    model[0](torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert seen == ["before", "forward", "backward"]
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 8))
    assert len(seen) == 3


def test_hooks_see_calibration_as_they_see_any_run():
    model, seen = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4)), []
    model[2].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    qk.quantize_model(model, scheme="w8a8-static", calibration=[torch.randn(3, 8)])
    assert seen and set(seen) == {torch.Size([3, 4])}


def test_conv1d_is_a_linear_layer_with_its_weight_transposed():
    utils = pytest.importorskip("transformers.pytorch_utils", reason="Conv1D is of transformers")
    torch.manual_seed(0)
    conv, x = utils.Conv1D(96, 64), torch.randn(5, 64)
    conv.bias.data.normal_()
    linear = nn.Linear(64, 96)
    linear.weight.data, linear.bias.data = conv.weight.data.t().clone(), conv.bias.data.clone()
    layer = WQLinear.from_linear(conv, "w4a16-g32")
    assert torch.equal(layer(x), WQLinear.from_linear(linear, "w4a16-g32")(x))
    assert layer.weight.shape == (64, 96)
    assert torch.equal(torch.addmm(layer.bias, x, layer.weight), layer(x))
    model = nn.Sequential(conv, nn.ReLU(), utils.Conv1D(8, 96))
    want = model(x)
    report = qk.quantize_model(model, scheme="w8a8-static", calibration=[x], exclude=["2"])
    assert isinstance(model[0], WQLinear) and model[0].transposed and model[0].nf == 96
    assert type(model[2]) is utils.Conv1D and report.skipped == {"2": "excluded"}
    assert (model(x) - want).norm() / want.norm() < 0.02


def test_an_error_gives_a_model_its_conv1d_back():
    utils = pytest.importorskip("transformers.pytorch_utils", reason="Conv1D is of transformers")
    model = nn.Sequential(utils.Conv1D(96, 64), utils.Conv1D(8, 96))
    model[1].weight.data[0, 0] = torch.nan
    before = list(model)
    with pytest.raises(qk.QuantizationError, match=r"1\.weight"):
        qk.quantize_model(model, scheme="w8a16")
    assert list(model) == before


def test_a_subclass_that_is_known_to_compute_the_same_is_replaced():
    transformers = pytest.importorskip("transformers", reason="FalconLinear is of transformers")
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, bias=True
    )
    model, ids = transformers.FalconForCausalLM(config).eval(), torch.arange(9)[None]
    want = model(ids).logits
    report = qk.quantize_model(model, scheme="w8a16")
    assert len(report.layers) == 4
    assert (model(ids).logits - want).norm() / want.norm() < 0.05
