"""Experts that are alike run as one stack, and stay the layers that they are."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import qkernels as qk
from qkernels import ops
from qkernels.modules.experts import _MOST_UNUSED, WQExperts
from qkernels.modules.stacks import why_not_stacked

N, K = 48, 32
COUNTS = {1: [5], 4: [0, 3, 1, 0], 60: [(5 * e) % 7 if e % 3 else 0 for e in range(60)]}
SCHEMES = ("w4a16-g16", "w8a8", "nf4-g16")


def experts_of(text="w4a16-g16", count=4, transposed=False):
    torch.manual_seed(count)
    dense = [nn.Linear(K, N, bias=False) for _ in range(count)]
    return WQExperts([qk.WQLinear.from_linear(each, text) for each in dense], transposed)


def rows(counts, behind=0, dtype=torch.float32):
    torch.manual_seed(7)
    x = torch.randn(sum(counts) + behind, K).to(dtype)
    return x, torch.tensor(counts).cumsum(0).int()


def grouped(experts, x, ends):
    weight = experts.weight
    return F.grouped_mm(x, weight if experts.transposed else weight.mT, offs=ends)


def one_by_one(experts, x, ends):
    y, start = x.new_zeros(len(x), N), 0
    for layer, stop in zip(experts.layers, ends.tolist(), strict=True):
        if stop > start:
            y[start:stop] = layer(x[start:stop])
        start = stop
    return y


@pytest.fixture
def calls(monkeypatch):
    """How often the operator was called: a list of its numbers of experts."""
    seen, operator = [], ops.linear_grouped_operator

    def call(x, ends, buffers, spec):
        seen.append(len(ends))
        return operator(x, ends, buffers, spec)

    monkeypatch.setattr(ops, "linear_grouped_operator", call)
    return seen


def assert_stacked(experts, calls, x=None, ends=None):
    """It gives what its layers give, in one call."""
    x, ends = rows(COUNTS[4]) if x is None else (x, ends)
    want = one_by_one(experts, x, ends)
    del calls[:]
    assert torch.equal(grouped(experts, x, ends), want)
    assert calls == [len(experts)]


def assert_not_stacked(experts, calls):
    x, ends = rows(COUNTS[4], 1)
    want = one_by_one(experts, x, ends)
    del calls[:]
    assert torch.equal(grouped(experts, x, ends), want)
    assert not calls


PRODUCTS = [F.grouped_mm]
if hasattr(torch, "_grouped_mm"):
    PRODUCTS.append(torch._grouped_mm)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("text", SCHEMES)
def test_a_grouped_product_is_one_call(text, count, dtype, transposed, calls):
    experts = experts_of(text, count, transposed)
    x, ends = rows(COUNTS[count], 3, dtype)
    want = one_by_one(experts, x, ends)
    for product in PRODUCTS:
        for offs in (ends, ends.long()):
            weight = experts if transposed else experts.transpose(-2, -1)
            assert torch.equal(product(x, weight, offs=offs), want)
    assert calls == [count] * 2 * len(PRODUCTS)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("text", SCHEMES)
def test_batched_products_are_one_call(text, transposed, calls):
    experts = experts_of(text, 4, transposed)
    as_output, as_input = (
        (experts.mT, experts.weight) if transposed else (experts.weight, experts.mT)
    )
    x = torch.randn(4, 3, K)
    want = torch.stack([layer(part) for layer, part in zip(experts.layers, x, strict=True)])
    assert torch.equal(torch.bmm(x, as_input), want)
    assert torch.equal(torch.bmm(as_output, x.mT), want.mT)
    # Experts picked for each of some inputs, as Transformers' `batched_mm` does.
    numbers = torch.tensor([2, 0, 2, -1, 1, 2])
    for given in (numbers, numbers.int()):
        picked = experts[given]
        assert picked.shape == (6, *experts.shape[1:])
        for length in (1, 5):
            x = torch.randn(6, length, K)
            want = torch.stack(
                [experts.layers[e](part) for e, part in zip(numbers.tolist(), x, strict=True)]
            )
            weight = picked if transposed else picked.mT
            assert torch.allclose(torch.bmm(x, weight), want, atol=1e-6)
            assert torch.allclose(torch.bmm(weight.mT, x.mT), want.mT, atol=1e-6)
    assert calls == [4] * 10


def test_experts_picked_by_a_tensor_read_like_a_tensor():
    experts = experts_of()
    numbers = torch.tensor([2, 0, 2, -1])
    values = torch.stack([layer.dequantize() for layer in experts.layers])[numbers]
    picked = experts[numbers]
    assert torch.equal(picked + 0, values) and torch.equal(picked.mT + 0, values.mT)
    assert torch.equal(picked[1] + 0, values[1]) and torch.equal(picked[-1] + 0, values[-1])
    assert torch.equal(picked[torch.tensor([3, 1])] + 0, values[[3, 1]])
    x, ends = torch.randn(7, K), torch.tensor([2, 2, 3, 6])
    want = torch.cat([*(x[a:b] @ values[i].T for i, a, b in ((0, 0, 2), (2, 2, 3), (3, 3, 6)))])
    got = F.grouped_mm(x, picked.mT, offs=ends.int())
    assert torch.allclose(got[:6], want, atol=1e-5) and not got[6:].any()
    with pytest.raises(qk.errors.LayerError, match="picked by a tensor"):
        picked.mul_(2)
    for wrong in ([4], [-5]):
        with pytest.raises(IndexError, match="out of range for 4 experts"):
            torch.bmm(torch.randn(1, 1, K), experts[torch.tensor(wrong)].mT)


def test_transformers_own_operator_is_a_grouped_product(calls):
    pytest.importorskip("transformers.integrations.moe", reason="it defines the operator")
    experts = experts_of()
    x, ends = rows(COUNTS[4], 2)
    product = torch.ops.transformers.grouped_mm_fallback
    for y in (product(x, experts.mT, offs=ends), product(x, experts.mT, ends)):
        assert torch.equal(y, one_by_one(experts, x, ends))
    assert calls == [4, 4]


def test_layers_hold_slices_and_nothing_is_held_twice():
    experts = experts_of()
    before = experts.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    x, ends = rows(COUNTS[4])
    grouped(experts, x, ends)
    stack = experts._stack
    for name, whole in zip(experts.layers[0]._held, stack.buffers, strict=True):
        parts = [layer._buffers[name] for layer in experts.layers]
        assert [part.data_ptr() for part in parts] == [part.data_ptr() for part in whole]
    after = experts.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in after)
    grouped(experts, x, ends)
    assert experts._stack is stack


def test_gradients_of_x(calls):
    experts = experts_of()
    x, ends = rows(COUNTS[4])
    gradients = []
    for product in (grouped, one_by_one):
        again = x.clone().requires_grad_()
        product(experts, again, ends).square().sum().backward()
        gradients.append(again.grad)
    assert torch.equal(*gradients) and calls == [4]


@pytest.mark.parametrize("stackable", [True, False])
def test_under_autocast(stackable, calls):
    experts, (x, ends) = experts_of(), rows(COUNTS[4], 2)
    if not stackable:
        experts.layers[0].register_forward_hook(lambda module, args, y: None)
    want = one_by_one(experts, x.bfloat16(), ends)
    with torch.autocast("cpu", torch.bfloat16):
        got = grouped(experts, x, ends)
        assert torch.equal(grouped(experts, x, ends), want)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)
    assert len(calls) == 2 * stackable


def test_whoever_is_put_on_a_layer_counts(calls):
    experts = experts_of()
    assert_stacked(experts, calls)
    layer, stack = experts.layers[1], experts._stack

    handle = layer.register_forward_hook(lambda module, args, y: y + 1)
    assert_not_stacked(experts, calls)
    handle.remove()
    assert_stacked(experts, calls)

    handle = layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    assert_not_stacked(experts, calls)
    handle.remove()

    handle = layer.register_full_backward_hook(lambda *args: None)
    assert_not_stacked(experts, calls)
    handle.remove()
    assert_stacked(experts, calls)

    # As accelerate does.
    layer.forward = lambda x: qk.WQLinear.forward(layer, x) - 1
    assert_not_stacked(experts, calls)
    del layer.forward
    assert_stacked(experts, calls)

    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: y + 2)
    try:
        assert_not_stacked(experts, calls)
    finally:
        handle.remove()
    assert_stacked(experts, calls)

    # What changes nothing.
    layer.training, layer.remark = False, "mine"
    assert_stacked(experts, calls)
    assert experts._stack is stack

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer, self.low = base, nn.Linear(K, N, bias=False)
            self.in_features, self.out_features, self.weight = K, N, base.weight

        def forward(self, x):
            return self.base_layer(x) + self.low(x)

    experts.expert_1 = Adapter(layer)
    assert_not_stacked(experts, calls)
    experts.expert_1 = layer
    assert_stacked(experts, calls)


def test_what_is_changed_in_place_or_replaced_is_seen(calls):
    experts, other = experts_of(), experts_of()
    with torch.no_grad():
        for name, buffer in other.named_buffers():
            if name.endswith("scales"):
                buffer.mul_(2)
    assert_stacked(experts, calls)
    stack = experts._stack
    experts.mul_(2)  # written into the stack
    assert_stacked(experts, calls)
    assert experts._stack is stack
    for assign in (False, True):
        experts.load_state_dict(other.state_dict(), assign=assign)
        assert_stacked(experts, calls)
        x, ends = rows(COUNTS[4])
        assert torch.equal(grouped(experts, x, ends), grouped(other, x, ends))
    middle = experts.layers[2]
    middle._buffers["scales"] = middle._buffers["scales"] * 4
    assert_stacked(experts, calls)
    experts.expert_0 = qk.WQLinear.from_linear(nn.Linear(K, N, bias=False), "w4a16-g16")
    assert_stacked(experts, calls)
    experts.layers[-1].scales.data = experts.layers[-1].scales * 8
    assert_stacked(experts, calls)


def test_moving_and_casting(calls):
    experts = experts_of()
    assert_stacked(experts, calls)
    stack = experts._stack
    experts.half().to("cpu")
    x, ends = rows(COUNTS[4], 0, torch.float16)
    assert_stacked(experts, calls, x, ends)
    assert experts._stack is stack  # nothing has moved
    state = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    experts.to("meta")
    assert experts._stack is None
    experts.load_state_dict(state, assign=True)
    assert_stacked(experts, calls)
    experts.share_memory()
    assert all(buffer.is_shared() for buffer in experts.buffers())
    assert_stacked(experts, calls)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies_have_memory_of_their_own(copied, calls):
    experts = experts_of()
    assert_stacked(experts, calls)
    again = copied(experts)
    addresses = {buffer.data_ptr() for buffer in experts.buffers()}
    assert not addresses & {buffer.data_ptr() for buffer in again.buffers()}
    assert_stacked(again, calls)
    again.mul_(2)
    x, ends = rows(COUNTS[4])
    assert torch.equal(grouped(again, x, ends), 2 * grouped(experts, x, ends))


def test_files_hold_each_layer_once(tmp_path, calls):
    def sizes(experts):
        layer = experts.layers[1]
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        save_file(experts.state_dict(), tmp_path / "file")
        save_model(experts, str(tmp_path / "model"))
        return [
            len(pickle.dumps(experts)),
            len(pickle.dumps(layer)),
            len(file.getbuffer()),
            *((tmp_path / name).stat().st_size for name in ("file", "model")),
        ]

    # So large that what tensors are called in a pickle is little.
    torch.manual_seed(0)
    layers = [nn.Linear(256, 128, bias=False) for _ in range(8)]
    experts = WQExperts([qk.WQLinear.from_linear(each, "w4a16-g32") for each in layers], False)
    want = sizes(experts)
    x, ends = torch.randn(8, 256), torch.arange(1, 9).int()
    y = grouped(experts, x, ends)
    assert calls == [8]
    assert all(got < 1.05 * size for got, size in zip(sizes(experts), want, strict=True))
    for name in ("file", "model"):
        with torch.no_grad():
            experts.load_state_dict({k: 0 * v for k, v in experts.state_dict().items()})
        experts.load_state_dict(load_file(tmp_path / name))
        assert torch.equal(grouped(experts, x, ends), y)


def test_as_a_function_of_its_buffers(calls):
    class Holder(nn.Module):
        def __init__(self, experts):
            super().__init__()
            self.experts = experts

        def forward(self, x, ends):
            return grouped(self.experts, x, ends)

    holder, x_and_ends = Holder(experts_of()), rows(COUNTS[4])
    want = holder(*x_and_ends)
    for factor in range(2, 2 * _MOST_UNUSED):
        other = Holder(copy.deepcopy(holder.experts))
        other.experts.load_state_dict(
            {k: v * factor if "scales" in k else v for k, v in other.experts.state_dict().items()}
        )
        buffers = dict(other.named_buffers())
        y = torch.func.functional_call(holder, buffers, x_and_ends)
        assert torch.equal(y, one_by_one(other.experts, *x_and_ends))
        assert torch.equal(holder(*x_and_ends), want)
    # Stacks that nobody finds again are given up.
    assert holder.experts._stack is None


def test_the_first_call_may_be_in_inference_mode(calls):
    with torch.inference_mode():
        experts = experts_of()
        assert_stacked(experts, calls)
    assert not any(buffer.is_inference() for buffer in experts.buffers())
    x = rows(COUNTS[4])[0].requires_grad_()
    grouped(experts, x, rows(COUNTS[4])[1]).sum().backward()
    experts.load_state_dict(experts_of("w4a16-g16", 4).state_dict())
    assert_stacked(experts, calls)


def different(change):
    experts = experts_of()
    change(experts)
    return experts


MIXED = {
    "dense": lambda e: e.add_module("expert_2", nn.Linear(K, N, bias=False)),
    "another scheme": lambda e: e.add_module(
        "expert_2", qk.WQLinear.from_linear(nn.Linear(K, N, bias=False), "w8a16")
    ),
    "a bias": lambda e: e.add_module(
        "expert_2", qk.WQLinear.from_linear(nn.Linear(K, N), "w4a16-g16")
    ),
    "a backend": lambda e: e.add_module(
        "expert_2",
        qk.WQLinear.from_linear(nn.Linear(K, N, bias=False), "w4a16-g16", backend="reference"),
    ),
}


@pytest.mark.parametrize("change", MIXED)
def test_layers_that_differ_run_one_by_one(change, calls):
    experts = different(MIXED[change])
    assert why_not_stacked(experts.layers) is not None
    assert_not_stacked(experts, calls)
    x = torch.randn(4, 2, K)
    want = torch.stack([layer(part) for layer, part in zip(experts.layers, x, strict=True)])
    assert torch.equal(torch.bmm(x, experts.mT), want)
    numbers = torch.tensor([3, 2, 2, 0])
    want = torch.stack(
        [experts.layers[e](part) for e, part in zip(numbers.tolist(), x, strict=True)]
    )
    assert torch.allclose(torch.bmm(x, experts[numbers].mT), want, atol=1e-6)


def test_single_numbers_kept_in_16_bits_are_of_other_sizes(calls):
    layers = []
    for count in (1, 2, 3, 4):
        weight = qk.WQLinear.from_linear(nn.Linear(K, N, bias=False), "w4a16-g16").to_weight()
        columns = torch.arange(count)
        layers.append(
            qk.WQLinear.from_weight(
                weight.replace(outlier_columns=columns, outlier_values=torch.ones(N, count).half())
            )
        )
    experts = WQExperts(layers, False)
    assert "shape" in why_not_stacked(layers)
    assert_not_stacked(experts, calls)


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("transposed", [False, True])
def test_compiled_programs_hold_the_operator(text, transposed):
    experts = experts_of(text, 4, transposed)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = experts

        def forward(self, x, numbers):
            weight = self.up[numbers]
            y = torch.bmm(x[:, None], weight if self.up.transposed else weight.mT)[:, 0]
            z = torch.bmm(x.expand(4, -1, -1), self.up if self.up.transposed else self.up.mT)
            return F.relu(y) + z.sum(0)

    model = Model()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    whole = torch.compile(model, backend=backend, fullgraph=True)
    x, numbers = torch.randn(5, K), torch.tensor([1, 0, 3, 1, 1])
    assert torch.allclose(whole(x, numbers), model(x, numbers), atol=1e-6)
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("linear_grouped" in target for target in targets) == 2
    assert not any("dequantize" in target for target in targets)
    # What is loaded and moved afterwards is seen.
    state = {k: v * 2 if "scales" in k else v for k, v in experts.state_dict().items()}
    for assign in (False, True):
        model.load_state_dict({f"up.{k}": v for k, v in state.items()}, assign=assign)
        assert torch.allclose(whole(x, numbers), model(x, numbers), atol=1e-6)
    moved = {k: v.clone() for k, v in experts.state_dict().items()}
    experts.to("meta").load_state_dict(moved, assign=True)
    assert torch.allclose(whole(x, numbers), model(x, numbers), atol=1e-6)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("hooked", [False, True])
def test_compiled_programs_without_a_full_graph(hooked):
    """Grouped products of torch, which compilers do not hand over; and layers that count alone."""
    experts = experts_of()
    if hooked:
        experts.layers[1].register_forward_hook(lambda module, args, y: y + 1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = experts

        def forward(self, x, ends):
            return F.relu(F.grouped_mm(2 * x, self.up.transpose(-2, -1), offs=ends)) + 1

    model, (x, ends) = Model(), rows(COUNTS[4], 2)
    whole = torch.compile(model, backend="eager")
    for _ in range(2):
        assert torch.equal(whole(x, ends), model(x, ends))
