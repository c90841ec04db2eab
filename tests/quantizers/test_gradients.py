"""Blocks that run again in the backward pass give the gradients of those that keep everything."""

import pytest
import torch
from torch import nn

from qkernels.quantizers.gradients import Recomputed
from tests.tiny_model import VOCABULARY, tiny_model


def gradients(model, ids, layers, recomputed):
    """Of all parameters, and how often each block ran."""
    model.zero_grad(set_to_none=True)
    runs = [0] * len(model.model.layers)
    hooks = []
    for number, block in enumerate(model.model.layers):

        def count(*_, number=number):
            runs[number] += 1

        # Not of the block itself: what runs again is its forward.
        hooks.append(block.input_layernorm.register_forward_hook(count))
    if recomputed:
        with Recomputed(model, layers):
            model(ids).logits.square().mean().backward()
    else:
        model(ids).logits.square().mean().backward()
    for hook in hooks:
        hook.remove()
    return {name: p.grad.clone() for name, p in model.named_parameters()}, runs


def test_gradients_are_the_same_and_blocks_run_twice():
    model = tiny_model()
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n]
    ids = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    wanted, once = gradients(model, ids, layers, recomputed=False)
    found, twice = gradients(model, ids, layers, recomputed=True)
    assert set(once) == {1} and set(twice) == {2}
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name
    assert all("forward" not in vars(block) for block in model.model.layers)
    with torch.no_grad(), Recomputed(model, layers):
        kept = model(ids).logits
    assert not kept.requires_grad


class WritesToItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, scale=None):
        x.mul_(scale["by"])
        return self.layer(torch.tanh(x))


class Chain(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x):
        x = x * 1
        for layer in self.layers:
            x = layer(x, scale={"by": torch.tensor(0.5)})
        return x


@pytest.mark.parametrize("count", [1, 3])
def test_blocks_that_write_to_what_they_are_given(count):
    torch.manual_seed(0)
    model, x = Chain([WritesToItsInput() for _ in range(count)]), torch.randn(4, 8)
    names = [f"layers.{i}.layer" for i in range(count)]
    wanted = torch.autograd.grad(model(x).square().sum(), model.parameters())
    with Recomputed(model, names) as blocks:
        loss = model(x).square().sum()
        assert not blocks.again
        found = torch.autograd.grad(loss, model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_who_asks_is_told_what_runs_again():
    torch.manual_seed(0)
    model, seen = Chain([WritesToItsInput() for _ in range(2)]), []
    with Recomputed(model, ["layers.0.layer", "layers.1.layer"]) as blocks:
        model.layers[0].layer.register_forward_pre_hook(lambda *_: seen.append(blocks.again))
        model(torch.randn(4, 8)).sum().backward()
    assert seen == [False, True]
