"""Static activations with a scale for each position: products, caches, calibration and files."""

import copy
import threading

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import qkernels as qk
from qkernels import positions, reference, rounding
from qkernels.backends import cpu
from qkernels.calibration.observers import OBSERVERS, ObserverChoice, range_of
from qkernels.calibration.ranges import Cells, Numbers, scale_and_zero
from qkernels.calibration.statistics import POSITIONS, PositionRanges
from qkernels.errors import CheckpointError, LayerError, SchemeError, WeightError
from qkernels.layouts import PLAIN, VNNI, pack
from qkernels.select import KERNELS, make_problem
from tests.tiny_model import LINEAR_LAYERS, tiny_model

TOKENS = torch.arange(96).view(4, 24) % 60
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SCHEMES = ("w8a8-position", "w8a8-positionasym", "w4a4-g32-position")
SCALES = torch.tensor([4.0, 1.0, 0.5])


def by_hand(scheme="w8a8-position", scales=SCALES, **fields):
    """The integers 1, 2, -1 and 0, with a scale of 1/2."""
    return qk.QuantizedWeight(
        scheme=qk.QuantScheme.parse(scheme),
        codes=torch.tensor([[129, 130, 127, 128]], dtype=torch.uint8),
        scales=torch.tensor([[0.5]]),
        activation_scale=scales,
        **fields,
    )


@pytest.mark.parametrize("backend", [None, "reference"])
def test_by_hand(backend):
    layer = qk.WQLinear.from_weight(by_hand(), backend=backend)
    row = torch.tensor([5.0, 3.0, 1.0, 1.0])
    # Multiples of 4: 4, 4, 0; of 1; and from the third position on of 1/2.
    at = [0.5 * (4 + 2 * 4 - 0), 0.5 * (5 + 6 - 1), 5.0, 5.0, 5.0]
    sequence = row.expand(5, 4)
    assert layer(sequence).tolist() == [[y] for y in at]
    assert layer(sequence.expand(2, 3, 5, 4)).tolist() == [[[[y] for y in at]] * 3] * 2
    assert layer(row).tolist() == [at[0]]
    assert layer(row.expand(6, 1, 4)).flatten().tolist() == [at[0]] * 6
    assert layer(torch.empty(2, 0, 4)).shape == (2, 0, 1)
    assert layer(torch.empty(0, 4)).shape == (0, 1)
    # 500 is 125 of the first scale, and saturates at 127 of the others.
    large = torch.tensor([500.0, 0.0, 0.0, 0.0]).expand(3, 4)
    assert layer(large).flatten().tolist() == [250.0, 63.5, 31.75]
    broken = sequence.clone()
    broken[1, 2] = float("nan")
    y = layer(broken)[:, 0]
    assert y[1].isnan() and y[[0, 2, 3, 4]].tolist() == [6.0, 5.0, 5.0, 5.0]


def test_zero_points_by_hand():
    zeros = torch.tensor([-100, 0, 20], dtype=torch.int32)
    weight = by_hand("w8a8-positionasym", activation_zero=zeros)
    layer = qk.WQLinear.from_weight(weight)
    # 40 is 10, 40 and 80 steps; -120 is -28 of those that -128 leaves below -100.
    x = torch.tensor([40.0, -120.0, 0.0, 0.0]).expand(4, 4)
    wanted = [0.5 * (40 - 2 * 4 * 28), 0.5 * (40 - 240), *[0.5 * (40 - 2 * 0.5 * 148)] * 2]
    assert layer(x).flatten().tolist() == wanted


def random_weight(scheme, n=40, k=200, last=3):
    source = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(n, k, generator=source), torch.randn(n, generator=source)
    scale = torch.linspace(0.02, 0.2, last)
    return rounding.quantize(weight, scheme, bias=bias, activation_scale=scale)


@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("scheme", ["w8a8-position", "w4a8-g64-position", "w4a4-g64-flat-position"])
def test_rows_are_multiplied_by_each_set_of_instructions(scheme, isa, monkeypatch):
    if cpu.why_no_isa(isa) is not None:
        pytest.skip(cpu.why_no_isa(isa))
    monkeypatch.setenv(cpu.ISA_VARIABLE, isa)
    weight = random_weight(scheme)
    name = "cpu_int4_activations" if "a4" in scheme else "cpu_int8_positions"
    (kernel,) = (row for row in KERNELS if row.name == name)
    for m in (0, 1, 2, 12):
        for dtype in DTYPES:
            x = (3 * torch.randn(m, 200)).to(dtype)
            problem = make_problem(
                weight.scheme, n=40, k=200, m=m, device="cpu", layout="vnni", x_dtype=dtype
            )
            y = kernel.run(x, pack(weight, VNNI), weight.bias, problem)
            assert torch.equal(y, reference.linear(x, pack(weight, PLAIN), weight.bias))


@pytest.mark.parametrize("scheme", ["w8a8-position", "w4a4-g64-position"])
def test_sequences_do_not_see_each_other(scheme):
    layer = qk.WQLinear.from_weight(random_weight(scheme))
    x = torch.randn(3, 7, 200)
    for _ in range(3):
        whole = layer(x)
        for b in range(3):
            assert torch.equal(layer(x[b]), whole[b])


def test_explain_says_who_knows_positions():
    rows = {row.kernel: row for row in qk.explain("w8a8-position", n=64, k=256, m=20)}
    assert rows["cpu_int8_positions"].chosen
    assert rows["reference"].reason is None
    for name in ("cpu_portable_int8", "cpu_int8_outliers"):
        assert rows[name].reason == "knows no scales of activations per position"
    rows = {row.kernel: row for row in qk.explain("w4a4-g64-position", n=64, k=256)}
    assert rows["cpu_int4_activations"].chosen
    rows = {row.kernel: row for row in qk.explain("w8a8-positionasym", n=64, k=256)}
    assert rows["reference"].chosen
    rows = {row.kernel: row for row in qk.explain("w8a8", n=64, k=256)}
    refusal = rows["cpu_int8_positions"].reason
    assert refusal == "is for schemes with scales of activations per position"


@pytest.mark.parametrize(
    ("scales", "named"),
    [
        (torch.tensor([1.0, 0.0]), "activation_scale must be > 0, got 0.0"),
        (torch.tensor([1.0, -2.0]), "must be > 0, got -2.0"),
        (torch.tensor([1.0, float("nan")]), "holds NaN or infinity"),
        (torch.empty(0), "must hold a scale, got none"),
        (torch.tensor(1.0), r"must have shape \[positions\], got \[\]"),
        (torch.ones(2, dtype=torch.float16), "must be float32"),
        (None, "or use a scheme without -static or -position"),
    ],
)
def test_wrong_scales_are_named(scales, named):
    with pytest.raises(WeightError, match=named):
        by_hand(scales=scales)


def test_wrong_zero_points_are_named():
    for zeros, named in (([0, 0, 128], "-128..127, got 128"), ([0, 0], r"shape \[3\], got \[2\]")):
        with pytest.raises(WeightError, match=named):
            by_hand("w8a8-positionasym", activation_zero=torch.tensor(zeros, dtype=torch.int32))
    with pytest.raises(WeightError, match=r"must have shape \[\], got \[3\]"):
        by_hand("w8a8-static")


def test_what_does_not_go_together_is_named():
    with pytest.raises(SchemeError, match=r"per position \(position\) are for int8 and int4"):
        qk.QuantScheme.parse("fp8-a8-position")
    with pytest.raises(SchemeError, match="columns with outliers"):
        qk.QuantScheme.parse("w8a8-position-outliers6")
    with pytest.raises(SchemeError, match="scales of activations per position are not learned"):
        qk.prepare_qat(tiny_model(), "w8a8-position")
    with pytest.raises(LayerError, match="pass calibration batches"):
        qk.quantize_model(tiny_model(), "rtn", "w8a8-position")
    layer = qk.WQLinear.from_weight(by_hand())
    with pytest.raises(WeightError, match="which layers of w8a8-position do not take"):
        layer(qk.quantize_activation(torch.randn(2, 4)))


def calibrated(scheme="w8a8-position", recipe="rtn", batches=(TOKENS, TOKENS[:, :9]), **options):
    model = tiny_model()
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        # So that it matters which position a token is at.
        embedding.weight[0] *= 100
    report = qk.quantize_model(model, recipe, scheme, calibration=list(batches), **options)
    return model, report


@pytest.mark.parametrize("scheme", ["w8a8-position", "w8a8-positionasym", "w8a4-position"])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_every_observer_finds_a_scale_for_each_position(observer, scheme):
    torch.manual_seed(0)
    layer, lengths = nn.Linear(16, 8), (7, 3)
    batches = [torch.randn(5, length, 16) for length in lengths]
    for x in batches:
        x[:, 0] *= 50
    model = nn.Sequential(copy.deepcopy(layer))
    report = qk.quantize_model(model, "rtn", scheme, calibration=batches, observer=observer)
    scale = model[0].to_weight().activation_scale
    assert scale.shape == (7,) and float(scale[0]) > 5 * float(scale[1:].max())
    bound = 0.1 if observer == "moving_average" else 0.04
    assert 0 < report.layers[0].output_error < (0.3 if "a4" in scheme else bound)
    if observer in ("tokenwise", "moving_average"):
        return  # the output decides on the first, and the second weighs batches
    numbers = Numbers.of(qk.QuantScheme.parse(scheme).activation)
    for t in range(7):
        seen = torch.cat([x[:, t] for x in batches if x.shape[1] > t])
        alone = scale_and_zero(*range_of(seen, numbers, observer), numbers)[0]
        assert torch.equal(scale[t], alone)


def test_the_last_scale_is_that_of_all_positions_behind_it():
    x = torch.randn(2, POSITIONS + 30, 8)
    x[:, -1] *= 9
    model = nn.Sequential(nn.Linear(8, 4))
    qk.quantize_model(model, "rtn", "w8a8-position", calibration=[x])
    scale = model[0].to_weight().activation_scale
    assert scale.shape == (POSITIONS,)
    assert float(scale[-1]) == float(x[:, POSITIONS - 1 :].abs().max() / 127)
    assert torch.allclose(scale[:-1], x.abs().amax(dim=(0, 2))[: POSITIONS - 1] / 127, rtol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_padding_counts_nowhere(side, observer):
    lengths = (9, 24, 4, 15)
    padded, mask = torch.full((4, 24), 5), torch.zeros(4, 24, dtype=torch.int64)
    for row, length in enumerate(lengths):
        part = slice(0, length) if side == "right" else slice(24 - length, 24)
        padded[row, part], mask[row, part] = TOKENS[row, :length], 1
    batches = [{"input_ids": padded, "attention_mask": mask}]
    if observer == "moving_average":
        pytest.skip("averages over batches, and these are one and four")
    model, _ = calibrated(batches=batches, observer=observer)
    alone = [TOKENS[row : row + 1, :length] for row, length in enumerate(lengths)]
    other, _ = calibrated(batches=alone, observer=observer)
    for name in ("q_proj", "k_proj", "v_proj"):
        path = f"model.layers.0.self_attn.{name}"
        # Of the first block, whose inputs no padding has passed through.
        mine, its = (m.get_submodule(path).activation_scale for m in (model, other))
        assert mine.shape == (24,) and torch.allclose(mine, its, rtol=1e-5)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_what_is_merged_is_what_one_has_seen(observer):
    choice = ObserverChoice.parse(observer)
    parts = [(torch.randn(3, length, 8), batch) for batch, length in enumerate((6, 2, 4))]

    def seen(some):
        made = PositionRanges(choice)
        for x, batch in some:
            places = torch.arange(x.shape[1]).repeat(3)
            made.add_at(places, x.flatten(0, 1), batch=batch)
        return made

    whole, first, second = seen(parts), seen(parts[1:]), seen(parts[:1])
    stored = PositionRanges(choice)
    stored.load_state_dict(second.state_dict())
    first.merge(stored)
    numbers = Numbers.integers()
    for mine, its in zip(whole.observer.range(numbers), first.observer.range(numbers), strict=True):
        assert torch.equal(mine, its)
    assert torch.equal(whole.sampled.rows, first.sampled.rows)


def test_cells_stop_at_the_most():
    x = torch.arange(20.0).view(2, 5, 2)
    parts = list(Cells("token", most=3).parts(x))
    assert [(first, values.tolist()) for first, values in parts] == [
        (0, [[0, 1, 10, 11], [2, 3, 12, 13]]),
        (2, [[4, 5, 14, 15, 6, 7, 16, 17, 8, 9, 18, 19]]),
    ]
    assert [first for first, _ in Cells("token", most=1).parts(x)] == [0]
    assert [first for first, _ in Cells("token", most=6).parts(x)] == [0]


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.body(x).mean(dim=1))


def test_rows_of_no_sequence_have_one_scale():
    model, x = Pooled(), torch.randn(6, 5, 8)
    exact = model(x)
    qk.quantize_model(model, "rtn", "w8a8-position", calibration=[x])
    assert model.body.to_weight().activation_scale.shape == (5,)
    assert model.head.to_weight().activation_scale.shape == (1,)
    assert (model(x) - exact).norm() < 0.03 * exact.norm()


def test_experts_have_one_scale_each():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = MixtralForCausalLM(
        MixtralConfig(vocab_size=64, num_local_experts=4, **sizes, **heads)
    ).eval()
    qk.quantize_model(model, "rtn", "w8a8-position", calibration=[TOKENS])
    for name, module in model.named_modules():
        if isinstance(module, qk.WQLinear):
            scale = module.to_weight().activation_scale
            assert scale.shape == ((1,) if "expert_" in name else (24,)), name


@torch.no_grad()
def test_fused_layers_know_positions():
    model, _ = calibrated()
    exact = logits_by_token(model)
    assert qk.fuse(model).fused
    assert torch.equal(logits_by_token(model), exact)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_is_that_without(scheme, cache):
    include = ["*_proj", "lm_head"]
    model, report = calibrated(scheme, include=include)
    assert len(report.layers) == LINEAR_LAYERS + 1
    assert model.lm_head.to_weight().activation_scale.shape == (1,)
    ids = torch.cat((torch.zeros(2, 1, dtype=torch.int64), TOKENS[:2, 1:5]), dim=1)
    options = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, cache_implementation=cache, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def logits_by_token(model, first=7, call=None):
    call = model if call is None else call
    out = call(TOKENS[:, :first], use_cache=True)
    parts = [out.logits]
    for t in range(first, TOKENS.shape[1]):
        cache = out.past_key_values
        out = call(TOKENS[:, t : t + 1], past_key_values=cache, use_cache=True)
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


@torch.no_grad()
def test_tokens_behind_a_cache_have_their_positions():
    model, _ = calibrated()
    exact = model(TOKENS).logits
    scale = exact.abs().max()
    assert (logits_by_token(model) - exact).abs().max() < 1e-5 * scale
    assert int(positions._CACHED) == 0
    # A copy is told too; without being told, all new tokens are at the first position.
    assert (logits_by_token(copy.deepcopy(model)) - exact).abs().max() < 1e-5 * scale
    for module in model.modules():
        module._forward_pre_hooks.clear()
    assert (logits_by_token(model) - exact).abs().max() > 1e-3 * scale


@torch.no_grad()
def test_an_error_leaves_no_position_behind():
    model, _ = calibrated()
    cache = model(TOKENS, use_cache=True).past_key_values
    with pytest.raises(IndexError):
        model(torch.full((4, 1), 10_000), past_key_values=cache)
    assert int(positions._CACHED) == 0


@torch.no_grad()
def test_torch_compile_is_not_compiled_anew_for_each_token():
    model, _ = calibrated()
    exact = logits_by_token(model)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, dynamic=True)
    assert torch.equal(logits_by_token(model, call=compiled), exact)
    assert counter.frame_count <= 6
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 5, layer.in_features)
    whole = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(whole(x), layer(x))
    torch._dynamo.reset()


def test_an_encoder_and_its_decoder_count_their_own_tokens():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
    config = T5Config(**sizes, num_heads=4, decoder_start_token_id=0, pad_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    batch = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :12]}
    qk.quantize_model(model, "rtn", "w8a8-position", calibration=[batch])
    options = {"max_new_tokens": 15, "min_new_tokens": 15, "do_sample": False}
    cached = model.generate(TOKENS[:2, :9], **options)
    assert torch.equal(cached, model.generate(TOKENS[:2, :9], use_cache=False, **options))
    assert torch.equal(cached, model.generate(TOKENS[:2, :9], **options))


def test_a_second_thread_is_refused_and_disturbs_nothing():
    model, _ = calibrated()
    with torch.no_grad():
        first = model(TOKENS[:, :5], use_cache=True)
        wanted = model(TOKENS[:, 5:9], past_key_values=copy.deepcopy(first.past_key_values)).logits
    (other, _), refused = calibrated(), []

    def meanwhile(*_):
        def run():
            with pytest.raises(LayerError, match="runs in another thread"):
                other(TOKENS)
            refused.append(True)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    handle = model.model.layers[0].register_forward_pre_hook(meanwhile)
    with torch.no_grad():
        got = model(TOKENS[:, 5:9], past_key_values=first.past_key_values).logits
    handle.remove()
    assert refused and torch.equal(got, wanted)
    with torch.no_grad():
        assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)


def test_a_cache_that_counts_no_tokens_is_refused():
    config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1)
    model = MambaForCausalLM(config).eval()
    qk.quantize_model(model, "rtn", "w8a8-position", calibration=[TOKENS])
    with pytest.raises(LayerError, match="cache_params, which does not say how many tokens"):
        model.generate(TOKENS[:1], max_new_tokens=3)
    model.generate(TOKENS[:1], max_new_tokens=3, use_cache=False)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "recipe",
    ["gptq", "smoothquant(steps=3)+rtn", "outlier_suppression+rtn", "zeroquant(steps=2)"],
)
def test_methods_save_and_load_bit_for_bit(recipe, scheme, tmp_path):
    model, report = calibrated(scheme, recipe, observer="tokenwise")
    assert {layer.scheme for layer in report.layers} == {scheme}
    assert len(report.layers) == LINEAR_LAYERS
    qk.save_model(model, tmp_path / "own", format="qkernels")
    loaded = qk.load_model(tmp_path / "own")
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
        assert torch.equal(logits_by_token(loaded), logits_by_token(model))


@torch.no_grad()
def test_first_tokens_of_their_own_scale_cost_the_others_nothing():
    # Large at the first position alone.
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 16), torch.randn(8, 12, 32)
    x[:, 0, 3] *= 200
    exact = layer(x)[:, 1:]

    def error(scheme):
        model = nn.Sequential(copy.deepcopy(layer))
        qk.quantize_model(model, "rtn", scheme, calibration=[x])
        return float((model(x)[:, 1:] - exact).norm() / exact.norm())

    assert error("w8a8-position") < 0.02 < 0.1 < error("w8a8-static")


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq"])
def test_other_formats_refuse_it_by_name(format, tmp_path):
    model, _ = calibrated()
    named = "scales of activations per position|no quantized activations"
    with pytest.raises(CheckpointError, match=named):
        qk.save_model(model, tmp_path / "other", format=format)
    model.save_pretrained(tmp_path / "own")
    with torch.no_grad():
        loaded = qk.load_model(tmp_path / "own")
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
