"""What is collected of layers, and which are quantized together where a method works in stages."""

import pytest
import torch
from torch import nn

from qkernels.calibration.batches import Tokens
from qkernels.calibration.blocks import Block
from qkernels.calibration.observe import observe, of_one_token, stages
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


def test_rows_of_both_chains_are_paired_call_by_call(monkeypatch):
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
    # Of calls with other numbers of rows, those that are each other's nearest.
    pairs = [(20, 10), (20, 10), (22, 12), (23, 13), (27, 17)]
    assert found["a"].paired["pairs"].seen == pairs
    assert found["a"].rows == 2 + 4 + 2 + 1 and found["b"].rows == 0
    assert float(found["a"].dense["minmax"].high) == 17
    assert DENSE == "dense" and "forward" not in vars(layer)


class TestRowsOfOneToken:
    """Experts are given other tokens in the dense model than in the quantized one."""

    def rows(self, count=200):
        generator = torch.Generator().manual_seed(0)
        dense = torch.randn(count, 32, generator=generator)
        return dense + 0.3 * torch.randn(count, 32, generator=generator), dense

    def test_in_one_order_they_are_taken_as_they_stand(self):
        x, dense = self.rows()
        found, twins = of_one_token(x, dense)
        assert found is x and twins is dense

    def test_a_token_that_comes_twice_has_two_twins(self):
        x, dense = self.rows()
        x, dense = (torch.cat((part, part[:40])) for part in (x, dense))
        found, twins = of_one_token(x, dense)
        assert found is x and twins is dense

    @pytest.mark.parametrize("gone", [[0], [199], [3, 77, 150]])
    def test_as_many_rows_of_other_tokens(self, gone):
        more_x, more = self.rows(200 + len(gone))
        kept = torch.tensor([i for i in range(200 + len(gone)) if i not in gone])
        # Those that the quantized model does not give the expert; the dense one lacks the last.
        found, twins = of_one_token(more_x[kept], more[:200])
        number = {tuple(row.tolist()): i for i, row in enumerate(more_x)}
        other = {tuple(row.tolist()): i for i, row in enumerate(more)}
        pairs = [
            (number[tuple(a.tolist())], other[tuple(b.tolist())])
            for a, b in zip(found, twins, strict=True)
        ]
        assert all(a == b for a, b in pairs)
        assert len(pairs) >= 200 - len(gone) - 1

    def test_another_order(self):
        x, dense = self.rows()
        order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
        found, twins = of_one_token(x[order], dense)
        assert len(found) == 200 and torch.equal(twins, dense[order])


def test_padding_is_left_out():
    layer = nn.Linear(16, 4)
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    x[mask == 0] = 1000
    tokens = [Tokens.of({"input_ids": torch.zeros(2, 5, dtype=torch.long), "attention_mask": mask})]

    class Once:
        def batches(self, chain):
            return [0] if chain == "quantized" else []

        def run(self, batch, chain="quantized"):
            layer(x)
            # As models that flatten their tokens give it.
            layer(x.flatten(0, 1))

    needs = {"a": Needs(quantized=("gram", "minmax", "rows"))}
    found = observe(Once(), {"a": layer}, needs, tokens=tokens)["a"]
    rows = x[mask == 1]
    assert found.rows == 2 * len(rows) == len(found.quantized["rows"].rows)
    assert torch.allclose(found.quantized["gram"].matrix, 2 * rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert float(found.quantized["minmax"].high) == float(rows.max())


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(2, 5, dtype=torch.long),
        {"input_ids": torch.zeros(2, 5), "attention_mask": torch.ones(2, 5)},
        # The mask does not speak of what the decoder is given.
        {
            "input_ids": torch.zeros(2, 5),
            "attention_mask": torch.zeros(2, 5),
            "decoder_input_ids": torch.zeros(2, 5),
        },
    ],
)
def test_batches_without_padding(batch):
    tokens = Tokens.of(batch)
    assert tokens.count == 10 and tokens.kept is None


def test_numbers_that_are_not_finite_are_seen_where_nothing_is_summed():
    layer, x = nn.Linear(16, 4), torch.randn(300, 16)
    x[270, 3] = float("nan")

    class Once:
        def batches(self, chain):
            return [0] if chain == "quantized" else []

        def run(self, batch, chain="quantized"):
            layer(x)

    found = observe(Once(), {"a": layer}, {"a": Needs(quantized=("rows",))})
    assert not found["a"].finite
