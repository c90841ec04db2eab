"""Block by block gives what the whole model gives, and holds the inputs of one block."""

import contextlib
import signal
import threading
import weakref
from typing import ClassVar

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels import rounding
from qkernels.calibration.blocks import find_blocks
from qkernels.calibration.forwards import CannotFollow
from qkernels.calibration.statistics import Needs
from qkernels.calibration.walks import DENSE, BlockByBlock, WholeModel
from qkernels.errors import LayerError
from qkernels.quantizers.method import Method
from qkernels.quantizers.methods import METHODS
from tests.plain_model import TOKENS, Block, Model, no_forward_is_left, snapshot, unchanged
from tests.tiny_model import tiny_model

BATCHES = [TOKENS, TOKENS[:1, :5], TOKENS.flip(0), TOKENS[:, 3:]]


def scales_of(model):
    return {
        name: float(module.activation_scale)
        for name, module in model.named_modules()
        if isinstance(module, qk.WQLinear)
    }


def quantized(model, scheme="w8a8-static", batches=BATCHES, **options):
    report = qk.quantize_model(model, "rtn", scheme, calibration=batches, **options)
    assert no_forward_is_left()
    return report


def check_scales(model, batches, layers):
    """The static scale of each layer is that of what reaches it in the model as it is now."""
    largest = dict.fromkeys(layers, 0.0)

    def note(name):
        def hook(_, args):
            largest[name] = max(largest[name], float(args[0].abs().max()))

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in layers]
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    for hook in hooks:
        hook.remove()
    scales = scales_of(model)
    assert {name: scales[name] for name in layers} == pytest.approx(
        {name: value / 127 for name, value in largest.items()}, rel=1e-6
    )


def test_inputs_come_from_quantized_blocks():
    model, dense = Model(), Model()
    dense.load_state_dict(model.state_dict())
    report = quantized(model, include=["*"])
    assert report.whole_model is None and not report.unreached
    check_scales(model, BATCHES, [*(f"blocks.{i}.up" for i in range(3)), "lm_head"])
    assert scales_of(model)["blocks.2.up"] != pytest.approx(
        float(max(seen(dense, "blocks.2.up"))) / 127, rel=1e-4
    )


def seen(model, name):
    found = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, a: found.append(a[0].abs().max()))
    with torch.no_grad():
        for batch in BATCHES:
            model(batch)
    return found


def test_inside_a_block_inputs_come_from_its_dense_layers():
    model, dense = Model(), Model()
    dense.load_state_dict(model.state_dict())
    quantized(model)
    # The first block gets the same in both.
    largest = max(seen(dense, "blocks.0.down"))
    assert scales_of(model)["blocks.0.down"] == pytest.approx(float(largest) / 127, rel=1e-6)


class Talkative(nn.Module):
    """Blocks that get and give more than hidden states, and a model that computes between them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 72)
        self.project = nn.Linear(72, 72)
        self.blocks = nn.ModuleList(TalkativeBlock() for _ in range(3))

    def forward(self, tokens, scale=1.0):
        x = self.project(self.embed(tokens))
        total, cache, bias = torch.zeros_like(x), {"seen": []}, None
        for i, block in enumerate(self.blocks):
            x, bias = block(x, total, cache=cache, number=i, scale=scale, bias=bias)
            total = total + x.mean(dim=1, keepdim=True)
            if i == 1:
                x = x * (1 + cache["seen"][0].tanh())
        return x + total


class TalkativeBlock(Block):
    def forward(self, x, total, *, cache, number, scale, bias):
        # Writes to what it is given: a run too many would show.
        cache["seen"].append(x.mean())
        assert len(cache["seen"]) == number + 1
        x *= scale
        if bias is None:
            bias = x.sum(dim=-1, keepdim=True).sin()
        return super().forward(x + total + bias), bias


def test_what_passes_between_blocks_is_followed():
    torch.manual_seed(0)
    model = Talkative()
    batches = [{"tokens": batch, "scale": 0.5 + i} for i, batch in enumerate(BATCHES)]
    report = quantized(model, batches=batches)
    assert report.whole_model is None and not report.unreached
    check_scales(model, batches, ["project", *(f"blocks.{i}.up" for i in range(3))])


def test_what_passes_between_blocks_is_followed_in_the_dense_chain(monkeypatch):
    kept = {}

    def look(task, parameters):
        kept[task.name] = task.inputs
        return rounding.fit(task.weight, task.scheme)

    method = Method(
        name="look",
        title="",
        quantize=look,
        statistics=lambda scheme, parameters: Needs(dense=("minmax",)),
    )
    monkeypatch.setitem(METHODS, "look", method)
    torch.manual_seed(0)
    model = Talkative()
    names = ["project", *(f"blocks.{i}.{part}" for i in range(3) for part in ("up", "down"))]
    dense = {name: float(max(seen(model, name))) for name in names}
    qk.quantize_model(model, "look", "w4a16-g24", calibration=BATCHES)
    ranges = {name: kept[name].dense["minmax"] for name in names}
    assert {name: float(max(-r.low, r.high)) for name, r in ranges.items()} == dense


def test_batches_are_tensors_tuples_or_dicts():
    scales = []
    for batches in ([TOKENS], [(TOKENS,)], [[TOKENS]], [{"tokens": TOKENS}], iter([TOKENS])):
        torch.manual_seed(0)
        model = Model()
        quantized(model, batches=batches)
        scales.append(scales_of(model))
    assert all(other == scales[0] for other in scales)


def walks(model):
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    blocks = find_blocks(model, names)
    for walk in (BlockByBlock, WholeModel):
        yield lambda walk=walk: walk(model, blocks, BATCHES, lambda _: contextlib.nullcontext())


def test_both_walks_reach_the_same_blocks_with_the_same_batches():
    model = Model()
    with torch.no_grad():
        for make in walks(model):
            walk, order = make(), []
            while (block := walk.next()) is not None:
                order.append(block.name)
                assert walk.batches() == list(range(len(BATCHES)))
                walk.advance()
            walk.close()
            assert order == ["blocks.0", "blocks.1", "blocks.2", "lm_head"]
        walk = next(walks(model))()
        for _ in range(2):
            walk.next()
            for batch in range(len(BATCHES)):
                # Twice: the arguments of a block outlive its runs.
                assert torch.equal(walk.run(batch), walk.run(batch))
                assert torch.equal(walk.run(batch), walk.run(batch, DENSE))
            walk.advance()
        walk.close()
    assert "forward" not in vars(model.blocks[0]) and not model.blocks[0].up._forward_pre_hooks


class Watched(Block):
    """Remembers what it was given, as long as anybody does."""

    given: ClassVar[list[tuple[int, weakref.ref]]] = []

    def forward(self, x):
        self.given.append((self.number, weakref.ref(x)))
        alive = [number for number, ref in self.given if ref() is not None]
        # Of blocks before, what they were given is gone; what the next one gets is being made.
        assert min(alive) >= self.number, alive
        return super().forward(x)


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8-static"])
def test_inputs_of_earlier_blocks_are_freed(scheme):
    model = Model()
    model.blocks = nn.ModuleList(Watched() for _ in range(5))
    for number, block in enumerate(model.blocks):
        block.number = number
    Watched.given.clear()
    report = quantized(model, scheme)
    assert report.whole_model is None
    # Each block ran twice for each batch, to look and to go on, but the last for one.
    assert len(Watched.given) == 2 * len(BATCHES) * 5 - (len(BATCHES) - 1)
    assert not any(ref() is not None for _, ref in Watched.given)


class Repeated(Model):
    """Calls its first block again at the end."""

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in (*self.blocks, self.blocks[0]):
            x = 3 * block(x)
        return self.lm_head(x)


class Bypassing(Model):
    """Calls a layer without its block."""

    def forward(self, tokens):
        return (
            super().forward(tokens)
            + self.blocks[1].down(self.blocks[1].up(self.embed(tokens)))[..., :50]
        )


class Nested(Model):
    """A block that calls the next one."""

    def __init__(self):
        super().__init__()
        first, second = self.blocks[0], self.blocks[1]
        own = first.forward
        first.forward = lambda x: second(own(x))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Repeated, "blocks.0 is called more than once"),
        (Bypassing, r"blocks.1.up is called outside of its block"),
        (Nested, "blocks.1 is called by the block blocks.0"),
    ],
)
def test_a_model_that_cannot_be_followed_is_run_whole(make, reason):
    model = make()
    report = quantized(model)
    assert report.whole_model == report.as_dict()["whole_model"]
    assert reason in report.whole_model
    assert len(report.layers) == 6 and not report.unreached
    # Layers that are called once see in the finished model what they were calibrated on.
    check_scales(model, BATCHES, ["blocks.2.up"])


def test_a_block_called_again_counts_all_its_calls():
    model = Repeated()
    dense = max(seen(model, "blocks.0.up"))
    assert len(seen(model, "blocks.0.up")) == 2 * len(BATCHES)
    quantized(model)
    assert scales_of(model)["blocks.0.up"] == pytest.approx(float(dense) / 127, rel=1e-6)


def test_shared_layers_are_run_whole_and_stay_shared():
    model = Model()
    model.blocks[2].up = model.blocks[0].up
    report = quantized(model)
    assert "blocks.2 and blocks.0 share blocks.2.up" in report.whole_model
    assert model.blocks[2].up is model.blocks[0].up
    assert [r.name for r in report.layers][4] == "blocks.2.up"


def test_the_whole_model_gives_the_same_scales(monkeypatch):
    torch.manual_seed(1)
    model = Model()
    twin = Model()
    twin.load_state_dict(model.state_dict())
    expected = quantized(model)

    class Unfollowed(BlockByBlock):
        def advance(self):
            raise CannotFollow("a test says so")

    monkeypatch.setattr("qkernels.quantizers.driver.BlockByBlock", Unfollowed)
    report = quantized(twin)
    assert report.whole_model == "a test says so"
    assert scales_of(twin) == scales_of(model)
    assert report.layers == expected.layers


def test_batches_may_take_the_blocks_in_another_order():
    class Switching(Model):
        def forward(self, tokens):
            x = self.embed(tokens)
            order = self.blocks if tokens.shape[1] > 10 else [self.blocks[i] for i in (2, 0)]
            for block in order:
                x = block(x)
            return self.lm_head(x)

    model = Switching()
    # The first batch meets block 0 behind block 2, which comes last for the others.
    report = quantized(model, batches=BATCHES[1:])
    assert report.whole_model.startswith("blocks.0 is called more than once, or in another order")
    assert not report.unreached

    class Skipping(Switching):
        def forward(self, tokens):
            skipped = () if tokens.shape[1] > 10 else (0, 1)
            x = self.embed(tokens)
            for i, block in enumerate(self.blocks):
                if i not in skipped:
                    x = block(x)
            return self.lm_head(x)

    model = Skipping()
    report = quantized(model)
    assert report.whole_model is None
    check_scales(model, BATCHES, ["blocks.2.up"])


def test_errors_of_the_model_and_interrupts_end_every_forward():
    class Failing(Model):
        def forward(self, tokens):
            super().forward(tokens)
            raise RuntimeError("no such head")

    class FailingLate(Block):
        def forward(self, x):
            if x.shape[1] == 5:
                raise RuntimeError("5 tokens")
            return super().forward(x)

    model = Model()
    model.blocks[1] = FailingLate()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="5 tokens"):
        qk.quantize_model(model, scheme="w8a16", calibration=BATCHES)
    unchanged(model, before)
    assert no_forward_is_left()
    model = Failing()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="no such head"):
        qk.quantize_model(model, scheme="w8a16", calibration=BATCHES)
    unchanged(model, before)
    with pytest.raises(TypeError, match="unexpected keyword argument 'ids'"):
        qk.quantize_model(model, scheme="w8a16", calibration=[{"ids": TOKENS}])
    unchanged(model, before)
    assert no_forward_is_left()


def test_ctrl_c_while_a_forward_runs_between_blocks():
    class Interrupted(Model):
        def forward(self, tokens):
            x = self.blocks[0](self.embed(tokens))
            # The handler runs in the main thread, which waits for this one.
            signal.raise_signal(signal.SIGINT)
            return self.blocks[1](x)

    model = Interrupted()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        qk.quantize_model(model, scheme="w8a16", calibration=BATCHES)
    unchanged(model, before)
    assert no_forward_is_left()
    assert "forward" not in vars(model.blocks[0])


def test_one_batch_alone_goes_behind_the_last_block():
    model, calls = Model(), []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    quantized(model)
    assert len(calls) == 1


def test_calibration_is_in_evaluation_mode_without_gradients_and_puts_it_back():
    class Dropping(Block):
        def forward(self, x):
            assert not torch.is_grad_enabled()
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    model = Model()
    model.blocks[0], model.blocks[1] = Dropping(), Dropping().eval()
    model.train()
    model.blocks[1].eval()
    quantized(model)
    assert model.training and model.blocks[0].training and not model.blocks[1].training
    check_scales(model.eval(), BATCHES, ["blocks.1.up", "blocks.2.up"])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_forwards_see_the_autocast_and_the_mode_of_the_caller():
    class Noting(Model):
        def forward(self, tokens):
            assert not torch.is_grad_enabled()
            modes.append((torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
            return super().forward(tokens)

    modes = []
    with torch.autocast("cpu", torch.bfloat16):
        quantized(Noting(), "w8a16")
    with torch.inference_mode():
        quantized(Noting(), "w8a16")
    assert modes == [(False, True)] * len(BATCHES) + [(True, False)] * len(BATCHES)


def test_the_number_of_threads_stays():
    def elsewhere():
        found = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return found[0]

    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        quantized(Model())
        assert torch.get_num_threads() == elsewhere() == 3
    finally:
        torch.set_num_threads(threads)


def test_where_there_are_too_few_threads_the_model_is_run_whole(monkeypatch):
    real, started = threading.Thread.start, []

    def start(self):
        started.append(self)
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    report = quantized(Model())
    assert report.whole_model.startswith("can't start new thread, and each batch needs one")
    assert len(report.layers) == 6 and not report.unreached


def test_inputs_that_are_not_finite_are_named():
    model = Model()
    model.blocks[1].down.weight.data[0, 0] = 3e38
    before = snapshot(model)
    with pytest.raises(LayerError, match=r"blocks\.2\.up: a calibration batch gives it inputs"):
        qk.quantize_model(
            model, scheme="w8a8-static", calibration=BATCHES, overrides={"blocks.1.down": None}
        )
    unchanged(model, before)


def test_no_logits_are_made_where_a_model_says_what_makes_them():
    model, calls = tiny_model(), []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.arange(12)[None]
    qk.quantize_model(model, scheme="w8a16", calibration=[ids, ids + 1])
    assert not calls
    model(ids)
    assert len(calls) == 1
