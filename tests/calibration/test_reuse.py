"""Parts of a block that no longer change run once for each batch, and give the same."""

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.calibration.blocks import Block
from qkernels.calibration.reuse import Reuse, Running
from qkernels.calibration.walks import BlockByBlock
from tests.tiny_model import VOCABULARY, tiny_model


def calibration():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (4, 24), generator=generator) for _ in range(3)]


def quantized(recipe):
    """The weights, and how often attention and MLP of the first block ran."""
    model, runs = tiny_model(), {"self_attn": 0, "mlp": 0}
    block = model.model.layers[0]
    for name in runs:
        child = block.get_submodule(name)
        inner = child.forward

        def forward(*args, name=name, inner=inner, **kwargs):
            runs[name] += 1
            return inner(*args, **kwargs)

        child.forward = forward
    qk.quantize_model(model, recipe, "w4a16-g32", calibration=calibration())
    return model.state_dict(), runs


@pytest.mark.parametrize("drift", [0, 0.5])
def test_codes_are_those_of_blocks_that_run_whole(monkeypatch, drift):
    recipe = f"gptq(true_sequential=true, drift={drift})"
    found, runs = quantized(recipe)
    monkeypatch.setattr(BlockByBlock, "change", lambda self, now, later: None)
    wanted, all_runs = quantized(recipe)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    chains, batches = 2 if drift else 1, 3
    # Once to see in which order layers run; for q, k and v; for o; and behind it once.
    assert runs["self_attn"] == 1 + chains * 3 * batches + (batches if drift else 0)
    assert all_runs["self_attn"] - runs["self_attn"] == batches * (2 if not drift else 3)
    assert all_runs["mlp"] == runs["mlp"]


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return self.layer(x)


class Parts(nn.Module):
    """Parts `a`, called as often as it is told, and `b`."""

    def __init__(self, times=1):
        super().__init__()
        self.a, self.b, self.times = Part(), Part(), times

    def forward(self, x):
        for _ in range(self.times):
            x = self.a(x)
        x += 1
        return self.b(x)


BLOCK = Block("", ("a.layer", "b.layer"))


def run(reuse, model, batch, **kwargs):
    reuse.running = Running(batch, **kwargs)
    return model(torch.full((2, 4), float(batch)))


def test_outputs_are_kept_by_batch_and_chain_and_let_go():
    model = Parts()
    reuse = Reuse(model, BLOCK)
    wanted = [model(torch.full((2, 4), float(batch))) for batch in range(2)]
    model.a.runs = 0
    reuse.change(["a.layer"], ["b.layer"])
    run(reuse, model, 0), run(reuse, model, 0)
    # Its layer may change yet.
    assert model.a.runs == 2
    run(reuse, model, 0, dense=True)
    reuse.change(["b.layer"], [])
    for _ in range(2):
        for batch in range(2):
            assert torch.equal(run(reuse, model, batch), wanted[batch])
    assert model.a.runs == 3 + 2 and model.b.runs == 2 + 3 + 4
    run(reuse, model, 0, dense=True)
    assert model.a.runs == 6
    reuse.change([], [])
    for batch in range(2):
        assert torch.equal(run(reuse, model, batch), wanted[batch])
    assert model.a.runs == 6
    # Nothing is kept for it where the last layers have been looked at.
    run(reuse, model, 0, dense=True)
    assert model.a.runs == 7
    assert not any(part.kept for part in reuse._parts.values())
    reuse.end()
    assert "forward" not in vars(model.a) and "forward" not in vars(model.b)


def test_the_dense_model_keeps_what_it_does_not_look_at():
    model = Parts()
    reuse = Reuse(model, BLOCK)
    reuse.change(["b.layer"], ["more"])
    for _ in range(3):
        run(reuse, model, 0, dense=True)
    assert (model.a.runs, model.b.runs) == (1, 3)


def test_what_a_run_calls_twice_always_runs():
    model = Parts(times=2)
    reuse = Reuse(model, BLOCK)
    wanted = model(torch.zeros(2, 4))
    model.a.runs = 0
    reuse.change(["b.layer"], [])
    for _ in range(3):
        assert torch.equal(run(reuse, model, 0), wanted)
    assert model.a.runs == 6
