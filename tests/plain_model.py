"""A small model of plain modules, with repeated blocks and a head that is tied."""

import threading

import torch
from torch import nn

from qkernels.calibration.forwards import THREAD_NAME


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(72, 96), nn.Linear(96, 72, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 72)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.lm_head = nn.Linear(72, 50, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


TOKENS = torch.arange(40).view(2, 20)


def snapshot(model):
    return {name: type(module) for name, module in model.named_modules()}, {
        name: tensor.clone() for name, tensor in model.state_dict().items()
    }


def unchanged(model, before):
    types, state = before
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert all(
        torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(model.state_dict().values(), state.values(), strict=True)
    )


def no_forward_is_left():
    """Whether every suspended forward has ended, and its thread with it."""
    return all(thread.name != THREAD_NAME for thread in threading.enumerate())
