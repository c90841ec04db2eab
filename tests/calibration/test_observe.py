"""Which layers of a block are quantized together where a method works in stages."""

import torch
from torch import nn

from qkernels.calibration.blocks import Block
from qkernels.calibration.observe import stages
from qkernels.calibration.walks import WholeModel


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        # In another order than they run in.
        self.o = nn.Linear(16, 16)
        self.k, self.v, self.q = (nn.Linear(16, 16) for _ in range(3))
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(16, 8), "down": nn.Linear(8, 16)}) for _ in range(3)
        )
        self.unused = nn.Linear(16, 16)

    def forward(self, x):
        x = self.o(self.q(x) + self.k(x) + self.v(input=x))
        return sum(e["down"](e["up"](x[i : i + 2].clone())) for i, e in enumerate(self.experts))


def test_layers_go_by_the_order_they_run_in_and_the_tensor_they_read():
    model = Attention()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    walk = WholeModel(model, [Block("", tuple(layers))], [torch.randn(4, 16)], None)
    walk.next()
    with torch.no_grad():
        found = stages(walk, layers)
    assert [sorted(stage) for stage in found] == [
        ["k", "q", "v"],
        ["o"],
        [f"experts.{i}.up" for i in range(3)],
        [f"experts.{i}.down" for i in range(3)],
        ["unused"],
    ]
    assert all("forward" not in vars(layer) for layer in layers.values())
