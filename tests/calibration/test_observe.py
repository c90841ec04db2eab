"""What is collected of layers, and which are quantized together where a method works in stages."""

import torch
from torch import nn

from qkernels.calibration.blocks import Block
from qkernels.calibration.observe import observe, stages
from qkernels.calibration.statistics import STATISTICS, Needs
from qkernels.calibration.walks import DENSE, WholeModel


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
    ups, downs = ([f"experts.{i}.{name}" for i in range(3)] for name in ("up", "down"))
    assert [(sorted(stage.names), sorted(stage.until), stage.once) for stage in found] == [
        (["k", "q", "v"], sorted(["o", *ups, *downs]), True),
        (["o"], sorted([*ups, *downs]), True),
        # The first one's down runs before the last one's up.
        (ups, [], False),
        (downs, [], False),
        (["unused"], [], False),
    ]
    assert all("forward" not in vars(layer) for layer in layers.values())


def test_a_run_ends_where_nothing_more_is_needed():
    model = Attention()
    layers = {"q": model.q, "k": model.k, "v": model.v}
    batches = [torch.randn(4, 16), torch.randn(6, 16)]
    walk = WholeModel(model, [Block("", tuple(layers))], batches, None)
    walk.next()
    reached = []
    model.experts[0]["up"].register_forward_hook(lambda *call: reached.append(call))
    needs = dict.fromkeys(layers, Needs(quantized=("rows",)))
    with torch.no_grad():
        found = observe(walk, layers, needs, until=[model.o])
        assert not reached
        whole = observe(walk, layers, needs)
    assert reached
    for name in layers:
        assert found[name].rows == whole[name].rows == 10
        assert torch.equal(found[name].quantized["rows"].rows, whole[name].quantized["rows"].rows)
    assert "forward" not in vars(model.o)


def test_a_run_of_layers_that_run_once_ends_at_the_last_of_them():
    model = Attention()
    layers = {"q": model.q, "k": model.k, "v": model.v}
    walk = WholeModel(model, [Block("", tuple(layers))], [torch.randn(4, 16)] * 2, None)
    walk.next()
    ran = []
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *call, name=name: ran.append(name))
    needs = dict.fromkeys(layers, Needs(quantized=("rows",)))
    with torch.no_grad():
        found = observe(walk, layers, needs, once=True)
    assert {name: inputs.rows for name, inputs in found.items()} == dict.fromkeys(layers, 8)
    # The last one's product is left out.
    assert len(ran) == 4 and len(set(ran)) == 2


class Pairs:
    """All pairs of rows, by their first numbers."""

    def __init__(self, columns):
        self.seen = []

    def add(self, x, *, batch, dense=None):
        self.seen += zip(x[:, 0].tolist(), dense[:, 0].tolist(), strict=True)


class Scripted:
    """A walk whose chains call a layer as they are told, with rows that say what they are."""

    def __init__(self, layer, calls):
        self.layer, self.calls = layer, calls

    def batches(self, chain):
        return [batch for kind, batch in self.calls if kind == chain]

    def run(self, batch, chain="quantized"):
        for value, rows in self.calls[chain, batch]:
            self.layer(torch.full((rows, 16), float(value)))


def test_rows_of_both_chains_are_paired_where_they_are_as_many(monkeypatch):
    monkeypatch.setitem(STATISTICS, "pairs", Pairs)
    layer = nn.Linear(16, 4)
    calls = {
        # One call too many of the dense model: what is left over is nobody's twin.
        ("dense", 0): [(10, 2), (11, 1)],
        ("quantized", 0): [(20, 2)],
        ("dense", 1): [(12, 1), (13, 3), (14, 0)],
        ("quantized", 1): [(22, 1), (23, 2), (24, 0), (25, 1)],
        ("quantized", 2): [(26, 2)],
        ("dense", 3): [(17, 1)],
        ("quantized", 3): [(27, 1)],
    }
    walk, names = Scripted(layer, calls), ("pairs",)
    needs = {"a": Needs(paired=names, dense=("minmax",)), "b": Needs()}
    found = observe(walk, {"a": layer, "b": nn.Linear(16, 4)}, needs)
    assert found["a"].paired["pairs"].seen == [(20, 10), (20, 10), (22, 12), (27, 17)]
    assert found["a"].rows == 2 + 4 + 2 + 1 and found["b"].rows == 0
    assert float(found["a"].dense["minmax"].high) == 17
    assert DENSE == "dense" and "forward" not in vars(layer)
