"""ZeroQuant's layer-by-layer distillation: its steps, and what a block becomes."""

import math

import pytest
import torch

import qkernels as qk
from qkernels import rounding
from qkernels.errors import LayerError, RecipeError
from qkernels.quantizers.method import LayerTask
from qkernels.quantizers.zeroquant import TrainedWeight
from qkernels.scheme import QuantScheme
from tests.bounds import DISTILLED_LOSS
from tests.plain_model import Model, no_forward_is_left, snapshot, unchanged
from tests.quantizers.test_autoround import BATCHES
from tests.quantizers.test_gptq import weight_of
from tests.quantizers.test_resume import fresh, interrupt_at, quantized, same
from tests.tiny_model import VOCABULARY, tiny_model

FEW = "zeroquant(steps=4, batch=2)"


def trained(scheme="w4a16-g24"):
    weight = weight_of()
    task = LayerTask("layer", weight, None, QuantScheme.parse(scheme), None, None)
    return weight, TrainedWeight(task)


def test_steps_are_those_of_adam():
    weight, own = trained()
    parameter = weight.clone().requires_grad_()
    size = float(weight.square().mean().sqrt())
    optimizer = torch.optim.Adam([parameter], lr=0.01 * size, betas=(0.9, 0.99), eps=1e-20)
    for seed in range(4):
        gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        parameter.grad = gradient
        optimizer.step()
        own.step(gradient, 0.01)
    assert torch.allclose(own.learned[0], parameter.detach(), atol=1e-6)
    nearest = rounding.quantize(parameter.detach(), "w4a16-g24").dequantize()
    assert torch.allclose(own.weight(torch.float32), nearest, atol=1e-5)


def test_by_hand():
    """One token, four weights; codes of 2 bits, and a scale that is a third of the range."""
    weight, x = [0.0, 3.0, 1.4, 2.0], torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    model = torch.nn.Sequential(torch.nn.Linear(4, 1, bias=False))
    model[0].weight.data = torch.tensor([weight])
    # W' = 0, 3, 1, 2 gives 4 in place of 4.4. Adam's first step goes by its rate against the sign
    # of the gradient, which the last weight has none of: 0.15, 3.15, 1.55, 2. With the scale 1.05
    # that is 0, 3.15, 1.05, 2.1, which gives 4.2. What the second step made is met by no other.
    size = math.sqrt(sum(w * w for w in weight) / 4)
    method = f"zeroquant(steps=2, batch=1, lr={0.15 / size})"
    qk.quantize_model(model, method, "w2a16-sfp32", calibration=[x])
    wanted = torch.tensor([[0, 3.15, 1.05, 2.1]])
    assert torch.allclose(model[0].dequantize(), wanted, atol=1e-5)


@pytest.mark.parametrize(
    "scheme",
    [
        "w3a16-g32",
        "w3a16-g32-sym",
        "nf4-g32",
        "w4a8-g32",
        "w4a8-g32-flat",
        "binary-g32",
        "w8a8-static",
        "w4a4-g32",
        "w8a4-static",
    ],
)
def test_a_block_is_nearer_than_by_rounding_to_nearest(scheme):
    ids = [
        torch.randint(VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(i))
        for i in range(4)
    ]

    def lost(method):
        model = tiny_model()
        with torch.no_grad():
            wanted = [model(batch).logits for batch in ids]
            qk.quantize_model(model, method, scheme, calibration=ids)
            return sum(
                float((model(b).logits - w).norm()) for b, w in zip(ids, wanted, strict=True)
            )

    assert lost("zeroquant(steps=40)") < DISTILLED_LOSS * lost("rtn")
    assert lost("zeroquant(steps=0)") == lost("rtn")


def test_an_interrupted_run_goes_on(tmp_path):
    options = {"method": FEW, "scheme": "w4a16-g24", "calibration": BATCHES}
    expected = quantized(**options)
    model = fresh()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        quantized(tmp_path / "run", model, **options, progress=interrupt_at(3))
    unchanged(model, before)
    assert no_forward_is_left()
    same(quantized(tmp_path / "run", model, **options), expected)


@pytest.mark.parametrize(
    ("method", "what"),
    [("steps=-1", "steps"), ("batch=0", "batch"), ("lr=0", "lr"), ("lr=2", "lr")],
)
def test_values_out_of_range(method, what):
    with pytest.raises(RecipeError, match=what):
        qk.quantize_model(Model(), f"zeroquant({method})", "w4a16-g24", calibration=BATCHES)


def test_without_calibration():
    with pytest.raises(LayerError, match=r"zeroquant learns from inputs: pass calibration"):
        qk.quantize_model(Model(), "zeroquant", "w4a16-g24")
