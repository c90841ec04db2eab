"""Which parts of a model are its blocks."""

from torch import nn

from qkernels.calibration.blocks import Block, find_blocks
from tests.plain_model import Model


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)


def blocks_of(model):
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    found = find_blocks(model, names)
    assert sorted(layer for block in found for layer in block.layers) == sorted(names)
    return {
        block.name: [name.removeprefix(block.name + ".") for name in block.layers]
        for block in found
    }


def test_entries_of_module_lists_are_blocks_and_other_layers_their_own():
    assert blocks_of(Model()) == {
        **{f"blocks.{i}": ["up", "down"] for i in range(3)},
        "lm_head": ["lm_head"],
    }


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(Pair() for _ in range(2))


def test_several_lists_and_the_outermost_of_nested_ones():
    def stack():
        return nn.ModuleDict({"layer": nn.ModuleList(Nested() for _ in range(2))})

    model = nn.ModuleDict({"first": nn.Linear(16, 16), "encoder": stack(), "decoder": stack()})
    assert list(blocks_of(model)) == [
        "first",
        *(f"{side}.layer.{i}" for side in ("encoder", "decoder") for i in (0, 1)),
    ]


def test_a_list_of_lists_is_not_called_but_its_entries_are():
    model = nn.ModuleList([Pair(), nn.ModuleList([Pair(), Pair()])])
    assert list(blocks_of(model)) == ["0", "1.0", "1.1"]


def test_sequentials_that_repeat_a_class():
    repeated = nn.Sequential(nn.Embedding(4, 16), Pair(), nn.ReLU(), Pair(), nn.Linear(16, 4))
    assert blocks_of(repeated) == {"1": ["a", "b"], "3": ["a", "b"], "4": ["4"]}


def test_a_model_without_blocks_is_one():
    plain = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    assert find_blocks(plain, ["0", "2"]) == [Block("", ("0", "2"))]
    assert blocks_of(nn.Sequential(Pair(), nn.ReLU())) == {"": ["0.a", "0.b"]}
    layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
    assert find_blocks(layers, ["0", "1"]) == [Block("", ("0", "1"))]
