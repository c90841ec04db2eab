"""Experts of one parameter as layers, and the model's own code on them."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk
from qkernels import WQLinear
from qkernels.errors import LayerError
from qkernels.modules.experts import WQExperts, fused_experts, unfuse

E, HIDDEN, INNER = 5, 32, 48


class Experts(nn.Module):
    """As Transformers has them; `transposed` as in GPT-OSS and Llama 4."""

    def __init__(self, transposed=False, hidden=HIDDEN, inner=INNER, marked=True):
        super().__init__()
        if marked:
            self.is_transposed = transposed
        self.turned = transposed
        self.hidden_size = hidden
        up, down = (2 * inner, hidden), (hidden, inner)
        up, down = (up[::-1], down[::-1]) if transposed else (up, down)
        self.first = nn.Parameter(torch.ones(3))
        self.gate_up_proj = nn.Parameter(torch.randn(E, *up) / 8)
        self.down_proj = nn.Parameter(torch.randn(E, *down) / 8)
        self.last = nn.Parameter(torch.ones(3))

    def product(self, x, weight):
        return x @ weight if self.turned else F.linear(x, weight)

    def forward(self, x, experts):
        out = torch.zeros_like(x)
        for e in experts.unique():
            rows = experts == e
            gate, up = self.product(x[rows], self.gate_up_proj[e]).chunk(2, dim=-1)
            out[rows] = self.product(F.silu(gate) * up, self.down_proj[e])
        return out


class BatchedExperts(Experts):
    """As in Llama 4: every expert on every row."""

    def forward(self, x, experts):
        x = x.repeat(self.gate_up_proj.shape[0], 1, 1)
        gate, up = torch.bmm(x, self.turn(self.gate_up_proj)).chunk(2, dim=-1)
        y = torch.bmm(F.silu(gate) * up, self.turn(self.down_proj))
        return y[experts, torch.arange(len(experts))]

    def turn(self, weight):
        return weight if self.turned else weight.transpose(1, 2)


class GroupedExperts(Experts):
    """As Transformers runs them by default: rows sorted by their expert."""

    def forward(self, x, experts):
        order = experts.argsort()
        stops = torch.bincount(experts, minlength=E).cumsum(0).int()
        turn = (lambda w: w) if self.turned else (lambda w: w.transpose(-2, -1))
        x = x[order].to(self.gate_up_proj.dtype)
        gate, up = F.grouped_mm(x, turn(self.gate_up_proj), offs=stops).chunk(2, dim=-1)
        y = F.grouped_mm(F.silu(gate) * up, turn(self.down_proj), offs=stops)
        return torch.empty_like(y).index_copy(0, order, y)


class GatheredExperts(Experts):
    """An expert's weight for each row."""

    def forward(self, x, experts):
        up = self.gate_up_proj[experts]
        up = up.mT if self.turned else up
        gate, up = torch.bmm(up, x[..., None]).squeeze(-1).chunk(2, dim=-1)
        down = self.down_proj[experts]
        return torch.bmm(down.mT if self.turned else down, (F.silu(gate) * up)[..., None])[..., 0]


CLASSES = (Experts, BatchedExperts, GroupedExperts, GatheredExperts)


def make(kind=Experts, transposed=False, **options):
    torch.manual_seed(0)
    return nn.ModuleList([kind(transposed, **options), nn.Linear(HIDDEN, HIDDEN)])


def inputs():
    torch.manual_seed(1)
    # Expert 3 gets no row.
    return torch.randn(9, HIDDEN), torch.tensor([0, 2, 2, 1, 4, 0, 2, 4, 1])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", CLASSES)
def test_the_models_own_code_runs_on_the_layers(kind, transposed):
    model, (x, experts) = make(kind, transposed), inputs()
    want = model[0](x, experts)
    report = qk.quantize_model(model, scheme="w8a16")
    assert [r.name for r in report.layers][:1] == ["0.gate_up_proj.expert_0"]
    assert len(report.layers) == 2 * E + 1 and not report.skipped.keys() - {"0"}
    assert report.layers[0].n == 2 * INNER and report.layers[0].k == HIDDEN
    got = model[0](x, experts)
    assert (got - want).norm() / want.norm() < 0.02
    # The same, written out.
    for row, e in zip(range(9), experts.tolist(), strict=True):
        up_layer = model.get_submodule(f"0.gate_up_proj.expert_{e}")
        gate, up = up_layer(x[row]).chunk(2, dim=-1)
        y = model.get_submodule(f"0.down_proj.expert_{e}")(F.silu(gate) * up)
        assert torch.allclose(got[row], y, atol=1e-4)


@pytest.mark.parametrize("kind", [Experts, GroupedExperts])
def test_an_expert_without_rows_is_not_run(kind):
    model, (x, experts) = make(kind), inputs()
    qk.quantize_model(model, scheme="w8a16")
    ran = []
    for name, layer in model.named_modules():
        if isinstance(layer, WQLinear):
            layer.register_forward_hook(lambda *_, name=name: ran.append(name))
    model[0](x, experts)
    assert sorted(ran) == sorted(
        f"0.{part}.expert_{e}" for part in ("gate_up_proj", "down_proj") for e in (0, 1, 2, 4)
    )


def test_no_rows_at_all():
    model = make(GroupedExperts)
    qk.quantize_model(model, scheme="w8a16")
    assert model[0](torch.randn(0, HIDDEN), torch.zeros(0, dtype=torch.int64)).shape == (0, HIDDEN)


def test_each_expert_is_calibrated_by_its_own_rows():
    model, (x, experts) = make(), inputs()
    holder = nn.ModuleDict({"layers": model})
    holder.forward = lambda x, experts: model[0](x, experts)
    report = qk.quantize_model(holder, scheme="w8a8-static", calibration=[(x, experts)])
    assert "layers.0.gate_up_proj.expert_3" in report.unreached
    assert all("expert_3" in name or name == "layers.1" for name in report.unreached)
    for e in (0, 1, 2, 4):
        scale = model[0].get_submodule(f"gate_up_proj.expert_{e}").activation_scale
        assert float(scale) == pytest.approx(float(x[experts == e].abs().max()) / 127, rel=1e-5)
    assert str(model[0].get_submodule("gate_up_proj.expert_3").scheme) == "w8a8"


def test_patterns_name_a_parameter_or_one_expert():
    model = make()
    report = qk.quantize_model(
        model,
        scheme="w8a16",
        exclude=["*.down_proj"],
        overrides={"*.expert_1": None, "*.gate_up_proj.expert_2": "w4a16-g32"},
    )
    assert report.skipped["0.down_proj"] == "excluded"
    assert report.shares["0.down_proj"] == pytest.approx(
        E * HIDDEN * INNER / sum(p.numel() for p in make().parameters())
    )
    assert "left alone" in report.skipped["0.gate_up_proj.expert_1"]
    # A parameter none of whose experts is quantized stays a parameter, in its place.
    assert [name for name, _ in model[0].named_parameters(recurse=False)] == [
        *("first", "down_proj", "last"),
    ]
    stack = model[0].gate_up_proj
    assert type(stack.layers[1]) is nn.Linear and str(stack.layers[2].scheme) == "w4a16-g32"
    # And an expert that is not quantized has memory of its own.
    weight = stack.layers[1].weight
    assert weight.untyped_storage().nbytes() == weight.nbytes


@pytest.mark.parametrize("transposed", [False, True])
def test_an_error_leaves_the_parameters_as_they_were(transposed):
    model = make(transposed=transposed)
    model[1].weight.data[0, 0] = torch.nan
    before, tensors = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    with pytest.raises(qk.QuantizationError, match=r"1\.weight"):
        qk.quantize_model(model, scheme="w8a16")
    after = dict(model.named_parameters())
    assert list(before) == list(after) and all(before[n] is after[n] for n in before)
    assert all(torch.equal(t, tensors[n]) or n == "1.weight" for n, t in model.state_dict().items())


def test_it_can_be_copied_pickled_cast_and_loaded():
    model, (x, experts) = make(), inputs()
    qk.quantize_model(model, scheme="nf4-g32")
    want = model[0](x, experts)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied[0](x, experts), want)
    other = make()
    other[0].gate_up_proj.data.normal_()
    qk.quantize_model(other, scheme="nf4-g32")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other[0](x, experts), want)
    assert model.half()[0](x.half(), experts).dtype == torch.float16
    assert model[0].gate_up_proj.dtype == torch.float16


def test_it_reads_like_the_parameter_it_stands_for():
    for transposed in (False, True):
        model = make(transposed=transposed)
        parameter = model[0].gate_up_proj
        qk.quantize_model(model, scheme="w8a16")
        stack = model[0].gate_up_proj
        assert isinstance(stack, WQExperts) and len(stack) == E
        assert (
            stack.shape == parameter.shape and stack.ndim == 3 and stack.size(1) == stack.shape[1]
        )
        assert stack.dtype == parameter.dtype and stack.device == parameter.device
        assert stack.transpose(1, 2).shape == parameter.transpose(1, 2).shape
        assert stack[-1].shape == parameter[-1].shape and stack.data.mT.shape == parameter.mT.shape
        assert (stack[1:3] - parameter[1:3]).norm() / parameter[1:3].norm() < 0.02
        assert len(list(stack)) == E
        with pytest.raises(IndexError):
            stack[E]
        with pytest.raises(LayerError, match="writes"):
            stack.data.zero_()
        with pytest.raises(AttributeError):
            stack.nonesuch  # noqa: B018
        assert not hasattr(stack, "quant_state")


def test_orientation_by_mark_or_by_the_sizes_that_the_module_remembers():
    def orientation(module):
        return [fused.transposed for fused in fused_experts(module).values()]

    assert orientation(Experts(True)) == [True, True]
    assert orientation(Experts(False)) == [False, False]
    # Without a mark; also where one of the two is square.
    for inner in (INNER, HIDDEN // 2, HIDDEN):
        assert orientation(Experts(True, inner=inner, marked=False)) == [True, True]
        assert orientation(Experts(False, inner=inner, marked=False)) == [False, False]

    class ParallelExperts(nn.Module):
        def __init__(self, shape, **sizes):
            super().__init__()
            vars(self).update(sizes)
            self.weight = nn.Parameter(torch.randn(*shape))

    assert orientation(ParallelExperts((E, 8, 6), in_features=8, out_features=6)) == [True]
    assert orientation(ParallelExperts((E, 8, 6), input_size=6, output_size=8)) == [False]
    assert orientation(ParallelExperts((E, 8, 8), input_size=8, output_size=8)) == [None]
    assert orientation(ParallelExperts((E, 8, 6))) == [None]
    # By the config of a module around it, where it remembers nothing itself.
    for hidden, transposed in ((6, False), (8, True)):
        block = nn.ModuleDict({"experts": ParallelExperts((E, 8, 6))})
        block.config = SimpleNamespace(hidden_size=hidden)
        assert orientation(nn.ModuleList([block])) == [transposed]
    model = nn.ModuleList([ParallelExperts((E, 8, 6)), nn.Linear(8, 8)])
    report = qk.quantize_model(model, scheme="w8a16")
    assert "nothing tells" in report.skipped["0.weight"] and len(report.layers) == 1


def test_other_parameters_of_three_dimensions_are_no_experts():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, 16, HIDDEN))

    model = nn.ModuleList([Positions(), nn.Conv1d(4, 4, 3), nn.Linear(HIDDEN, HIDDEN)])
    assert not fused_experts(model)
    report = qk.quantize_model(model, scheme="w8a16")
    assert len(report.layers) == 1
    assert "Positions" in report.skipped["0"] and "convolution" in report.skipped["1"]


def test_one_module_under_two_names_is_taken_apart_once():
    experts = Experts()
    model = nn.ModuleList([experts, experts])
    x, which = inputs()
    want = model[0](x, which)
    report = qk.quantize_model(model, scheme="w8a16")
    assert len(report.layers) == 4 * E and model[0] is model[1]
    assert (model[0](x, which) - want).norm() / want.norm() < 0.02


def test_unfused_layers_share_the_memory_of_the_parameter():
    experts = Experts(True)
    fused = fused_experts(experts)["gate_up_proj"]
    stack = unfuse(fused)
    assert stack.layers[2].weight.data_ptr() == fused_pointer(stack, 2)


def fused_pointer(stack, number):
    weight = stack.layers[0].weight
    return weight.data_ptr() + number * weight.nbytes
