"""Training with quantization: its gradients, and that what was trained is what runs."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import qkernels as qk
from qkernels import rounding
from qkernels.errors import LayerError, NoKernelError, SchemeError, WeightError
from qkernels.modules import FakeQuantLinear
from qkernels.modules.fake_quant import rounded_input
from tests.bounds import DEEP_LOGITS, SUM_BOUND, TRAINED_LOSS
from tests.plain_model import snapshot, unchanged
from tests.tiny_model import VOCABULARY, tiny_model

LEARNED = (
    *("w4a16-g16", "w4a16-g16-sym", "w3a16", "w2a16-gtensor", "nf4-g16", "fp4-g32-sfp32"),
    *("log4-g16", "fp8e4m3-a16", "w8a8", "w8a8-tensor", "w8a8-static", "w8a8-tokenasym"),
    *("w4a8-g16-flat", "fp8-a8", "w4afp8-g16"),
    *("w4a4-g16-flat", "w8a4-tensor", "w8a4-static", "w8a4-tokenasym", "w8a4-outliers2"),
)
RANGED = (*LEARNED, "binary-g16", "w4a8-g16", "w4a4-g16", "nf4-g16-dq", "w4a16-g24")


def tokens(seed=0):
    return torch.randint(VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(seed))


def linear(n=24, k=80, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(k, n, bias=bias, dtype=dtype)


def through(values, like):
    """`values`, with the gradient of `like`."""
    return like + (values - like).detach()


def lsq(weight, scale, zero, scheme, k):
    """W' by autograd through the formula of LSQ+, with what rounding passes."""
    length = scheme.group_length(k)
    spread = torch.arange(k) // length
    rows = weight.shape[0]
    scale = scale.expand(rows, -1)[:, spread]
    largest = (1 << scheme.bits) - 1
    zero = (
        torch.full_like(scale, float(scheme.implied_zero))
        if zero is None
        else through(zero.round(), zero).expand(rows, -1)[:, spread]
    )
    scaled = weight / scale + zero
    return scale * (through(scaled.round(), scaled).clamp(0, largest) - zero)


def clipped(layer, scheme):
    """A layer in training, its weight, and what that was given as a gradient."""
    fake = FakeQuantLinear(layer, scheme)
    # So that some weights are clipped, and zero points lie between whole numbers.
    with torch.no_grad():
        fake.scales *= 0.8
        if fake.zeros is not None:
            fake.zeros += 0.3
    upstream = torch.randn(24, 80, generator=torch.Generator().manual_seed(1))
    made = fake.fake_weight()
    (made * upstream).sum().backward()
    return fake, made, upstream


def test_by_hand():
    """Codes of 2 bits are the numbers -2..1; two of these four weights are clipped."""
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[0.6, -0.2, 2.0, -3.0]])
    fake = FakeQuantLinear(layer, "w2a16-sym-sfp32")
    with torch.no_grad():
        fake.scales.fill_(0.5)
    # v = W / s = 1.2, -0.4, 4, -6, rounded and clipped 1, 0, 1, -2.
    made = fake.fake_weight()
    assert made.tolist() == [[0.5, 0, 0.5, -1]]
    made.sum().backward()
    assert fake.weight.grad.tolist() == [[1, 1, 0, 0]]
    # 1 - 1.2, 0 + 0.4, 1 and -2 are -0.8, times 1 / sqrt(4 weights * 2).
    assert float(fake.scales.grad) == pytest.approx(-0.8 / math.sqrt(8))


@pytest.mark.parametrize("text", ["w4a16-g16", "w4a16-g16-sym", "w3a16", "w2a16-gtensor"])
def test_gradients_are_those_of_lsq(text):
    layer, scheme = linear(), qk.QuantScheme.parse(text + "-sfp32")
    fake, made, upstream = clipped(layer, scheme)

    weight = layer.weight.detach().clone().requires_grad_()
    scale = fake.scales.detach().clone().requires_grad_()
    zero = None if fake.zeros is None else fake.zeros.detach().clone().requires_grad_()
    wanted = lsq(weight, scale, zero, scheme, 80)
    (wanted * upstream).sum().backward()
    assert (made - wanted).abs().max() <= SUM_BOUND
    assert torch.allclose(fake.weight.grad, weight.grad, atol=1e-5)
    count = scheme.group_length(80) * (24 if scheme.per_tensor else 1)
    largest = 2 ** (scheme.bits - 1) if scheme.symmetric else 2**scheme.bits - 1
    share = 1 / math.sqrt(min(count, 80 * (24 if scheme.per_tensor else 1)) * largest)
    assert torch.allclose(fake.scales.grad, scale.grad * share, atol=1e-4)
    if zero is not None:
        assert zero.grad.any()
        assert torch.allclose(fake.zeros.grad, zero.grad * share, atol=1e-4)


@pytest.mark.parametrize("text", ["w4a16-g16", "w4a16-g16-sym", "w3a16", "w2a16-g40"])
def test_weights_and_gradients_are_those_of_torch(text):
    """Its fake quantization with learned scales and zero points, each group a channel."""
    layer, scheme = linear(), qk.QuantScheme.parse(text + "-sfp32")
    fake, made, upstream = clipped(layer, scheme)

    length, most = scheme.group_length(80), (1 << scheme.bits) - 1
    weight = layer.weight.detach().reshape(-1, length).requires_grad_()
    scale = fake.scales.detach().flatten().requires_grad_()
    implied = torch.full_like(fake.scales, float(scheme.implied_zero or 0))
    zero = (implied if fake.zeros is None else fake.zeros).detach().flatten().requires_grad_()
    share = 1 / math.sqrt(length * (2 ** (scheme.bits - 1) if scheme.symmetric else most))
    wanted = torch._fake_quantize_learnable_per_channel_affine(
        weight, scale, zero, 0, 0, most, share
    )
    (wanted * upstream.view(-1, length)).sum().backward()
    assert torch.allclose(made, wanted.view(24, 80), atol=1e-6)
    assert torch.allclose(fake.weight.grad, weight.grad.view(24, 80))
    assert (fake.weight.grad == 0).any()
    assert torch.allclose(fake.scales.grad.flatten(), scale.grad, atol=1e-5)
    if fake.zeros is not None:
        assert torch.allclose(fake.zeros.grad.flatten(), zero.grad, atol=1e-5)


@pytest.mark.parametrize(("scheme", "largest"), [("w8a8-static", 127), ("w8a4-static", 7)])
def test_static_activations_and_their_gradients_are_those_of_torch(scheme, largest):
    fake = FakeQuantLinear(linear(), scheme)
    scale = 0.02
    with torch.no_grad():
        fake.activation_scale.fill_(scale)
    x = torch.randn(5, 80, generator=torch.Generator().manual_seed(1))
    # Up to half a step beyond the largest number torch gives x its gradient, which LSQ does not.
    x[((x / scale).abs() - largest - 0.25).abs() <= 0.3] = 0
    upstream = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    given = x.clone().requires_grad_()
    (fake(given) * upstream).sum().backward()

    mine, own = x.clone().requires_grad_(), torch.tensor([scale], requires_grad=True)
    share = 1 / math.sqrt(x.numel() * largest)
    rounded = torch._fake_quantize_learnable_per_tensor_affine(
        mine, own, torch.zeros(1), -largest, largest, share
    )
    (F.linear(rounded, fake.fake_weight().detach(), fake.bias) * upstream).sum().backward()
    assert (given.grad == 0).any() and (given.grad != 0).any()
    assert torch.allclose(given.grad, mine.grad, atol=1e-5)
    assert float(fake.activation_scale.grad) == pytest.approx(float(own.grad), rel=1e-4)


@pytest.mark.parametrize(("scheme", "largest"), [("w8a8-static", 127), ("w8a4-static", 7)])
def test_the_gradient_of_a_static_scale_is_that_of_lsq(scheme, largest):
    fake = FakeQuantLinear(linear(), scheme)
    x = torch.randn(5, 80, generator=torch.Generator().manual_seed(1))
    fake(x)
    # LSQ's own beginning, 2 mean|x| / sqrt(largest), would leave steps unused.
    assert float(fake.activation_scale) == pytest.approx(float(x.abs().max()) / largest, rel=1e-5)
    with torch.no_grad():
        fake.activation_scale *= 0.5
    given, upstream = x.clone().requires_grad_(), torch.randn(5, 24)
    (fake(given) * upstream).sum().backward()
    scale = fake.activation_scale.detach().clone().requires_grad_()
    mine = x.clone().requires_grad_()
    # What is clipped has no gradient, also where it would be rounded to the largest number.
    scaled = (mine / scale).clamp(-largest, largest)
    rounded = scale * through(scaled.round(), scaled)
    (F.linear(rounded, fake.fake_weight().detach(), fake.bias) * upstream).sum().backward()
    share = 1 / math.sqrt(x.numel() * largest)
    assert (x.abs() > largest * float(scale.detach())).any()
    assert torch.allclose(given.grad, mine.grad, atol=1e-5)
    assert float(fake.activation_scale.grad) == pytest.approx(float(scale.grad * share), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("text", "step"), [(t, "lsq") for t in LEARNED] + [(t, "range") for t in RANGED]
)
def test_what_was_trained_is_what_runs(text, step, dtype):
    """The codes and scales of the trained layer are those that its quantized form has."""
    torch.manual_seed(0)
    model = nn.Sequential(linear(dtype=dtype), nn.Tanh(), nn.Linear(24, 16, dtype=dtype))
    names = qk.prepare_qat(model, text, step=step)
    assert names == ["0", "2"]
    x = torch.randn(40, 80).to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
    model.eval()
    wanted = [model[i].fake_weight().detach() for i in (0, 2)]
    with torch.no_grad():
        before = model(x).float()
    report = qk.convert_qat(model)
    assert [layer.name for layer in report.layers] == ["0", "2"] and report.method == "qat"
    for number, weight in zip((0, 2), wanted, strict=True):
        assert isinstance(model[number], qk.WQLinear)
        assert str(model[number].scheme) == str(qk.QuantScheme.parse(text))
        assert torch.equal(model[number].dequantize(), weight)
    with torch.no_grad():
        after = model(x).float()
    assert (after - before).norm() <= DEEP_LOGITS * before.norm()


@pytest.mark.parametrize("step", ["lsq", "range"])
def test_training_wins_back_what_rounding_lost(step):
    batches = [tokens(seed) for seed in range(8)]
    dense = tiny_model()

    def lost(model):
        with torch.no_grad():
            return float(sum(F.mse_loss(model(b).logits, dense(b).logits) for b in batches))

    nearest = tiny_model()
    qk.quantize_model(nearest, "rtn", "w2a16-g16")
    model = tiny_model().train()
    qk.prepare_qat(model, "w2a16-g16", step=step)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(6):
        for batch in batches:
            optimizer.zero_grad()
            F.mse_loss(model(batch).logits, dense(batch).logits.detach()).backward()
            optimizer.step()
    model.eval()
    trained = lost(model)
    qk.convert_qat(model)
    assert lost(model) == pytest.approx(trained, rel=1e-3)
    assert trained < TRAINED_LOSS * lost(nearest)


def test_other_names_and_shares_of_a_layer():
    layer = linear(80, 80)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    seen = []
    layer.register_forward_hook(lambda *call: seen.append(1))
    assert qk.prepare_qat(model, "w4a16-g16") == ["0", "2"]
    assert model[0] is model[2]
    model(torch.randn(3, 80))
    qk.convert_qat(model)
    assert model[0] is model[2]
    model(torch.randn(3, 80))
    assert len(seen) == 4


def test_taken_out_again():
    model = tiny_model()
    before, ids = snapshot(model), tokens()
    wanted = model(ids).logits
    names = qk.prepare_qat(
        model, "w4a16-g32", exclude=["*.down_proj"], overrides={"*q_proj": "w8a16"}
    )
    assert len(names) == 12 and "lm_head" not in names
    assert str(model.model.layers[0].self_attn.q_proj.scheme) == "w8a16"
    assert not torch.equal(model(ids).logits, wanted)
    qk.undo_qat(model)
    unchanged(model, before)
    assert torch.equal(model(ids).logits, wanted)


def test_a_checkpoint_of_a_run_goes_on():
    model = nn.Sequential(linear())
    qk.prepare_qat(model, "w8a8-static")
    model(torch.randn(4, 80))
    state = copy.deepcopy(model.state_dict())
    other = nn.Sequential(linear())
    qk.prepare_qat(other, "w8a8-static")
    assert not other.load_state_dict(state)[0]
    x = torch.randn(4, 80)
    assert torch.equal(other(x), model(x))


def test_gradient_checkpointing_gives_the_same():
    grads = []
    for again in (False, True):
        model = tiny_model().train()
        qk.prepare_qat(model, "w4a8-g32", step="range")
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(tokens()).logits.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True) if a is not None)


def test_under_autocast():
    model = nn.Sequential(linear())
    qk.prepare_qat(model, "w4a16-g16")
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(4, 80))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert model[0].weight.grad.dtype == torch.float32


def test_mistakes_are_named_and_change_nothing():
    model = tiny_model()
    before = snapshot(model)
    for arguments, error, what in (
        ({"scheme": "nf4-g32-dq"}, SchemeError, r"layers\.0\.self_attn\.q_proj: .*step=\"range\""),
        ({"scheme": "w8a8-staticasym"}, SchemeError, "zero points of static activations"),
        ({"step": "adam"}, SchemeError, "step is 'lsq' or 'range', got 'adam'"),
        ({"include": ["nothing"]}, LayerError, "matches none"),
    ):
        with pytest.raises(error, match=what):
            qk.prepare_qat(model, **arguments)
        unchanged(model, before)
    for ends in (qk.convert_qat, qk.undo_qat):
        with pytest.raises(LayerError, match="no layers of prepare_qat"):
            ends(model)
    qk.prepare_qat(model, "w8a8-static")
    inside = snapshot(model)
    with pytest.raises(SchemeError, match=r"q_proj: .* has met no batch: train, or run, the model"):
        qk.convert_qat(model)
    model(tokens())
    with pytest.raises(NoKernelError, match="nonesuch"):
        qk.convert_qat(model, backend="nonesuch")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(WeightError, match=r"layers\.1\.mlp\.up_proj\.weight\[0, 0\] is nan"):
        qk.convert_qat(model)
    assert {name: type(m) for name, m in model.named_modules()} == inside[0]


def test_a_converted_model_is_saved_and_loaded(tmp_path):
    model = tiny_model()
    qk.prepare_qat(model, "w4a16-g32")
    model(tokens()).logits.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    qk.convert_qat(model)
    qk.save_model(model, tmp_path / "out")
    loaded = qk.load_model(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_range_is_round_to_nearest():
    model = nn.Sequential(linear())
    qk.prepare_qat(model, "w4a16-g16", step="range")
    nearest = rounding.quantize(linear().weight.detach(), "w4a16-g16")
    assert torch.equal(model[0].fake_weight().detach(), nearest.dequantize())


def unit(x):
    return x / x.norm()


FROM_QUANTIZED = ("w4a16-g16", "w3a16-g16-sym", "w2a16-gtensor", "nf4-g16", "fp8e4m3-a16", "w8a8")


@pytest.mark.parametrize("text", FROM_QUANTIZED)
def test_a_quantized_layer_goes_on_from_its_codes(text):
    model = nn.Sequential(qk.WQLinear.from_linear(linear(dtype=torch.bfloat16), text))
    wanted = model[0].dequantize()
    assert qk.prepare_qat(model) == ["0"]
    fake, x = model[0], torch.randn(5, 80).bfloat16()
    assert torch.equal(fake.fake_weight(), wanted) and torch.equal(fake.weight, wanted)
    assert fake(x).dtype == torch.bfloat16 and fake.weight.dtype == torch.float32
    qk.convert_qat(model)
    assert torch.equal(model[0].dequantize(), wanted) and model[0].dtype == torch.bfloat16


@pytest.mark.parametrize("text", [*FROM_QUANTIZED, "w8a16-g16"])
def test_scales_that_learn_behind_a_quantized_layer_take_their_weights_along(text):
    model = nn.Sequential(qk.WQLinear.from_linear(linear(), text))
    stored = model[0].to_weight()
    qk.prepare_qat(model)
    fake, x = model[0], torch.randn(7, 80)
    fake(x).square().sum().backward()
    weight = stored.dequantize().requires_grad_()
    rounded = rounded_input(x, stored.scheme)
    F.linear(rounded, weight, fake.bias.detach()).square().sum().backward()
    by_scale = (weight.grad * weight).detach()
    by_scale = by_scale.unflatten(1, (stored.scales.shape[1], -1)).sum(2)
    wanted = by_scale.sum_to_size(stored.scales.shape) / stored.scales
    assert torch.allclose(unit(fake.scales.grad), unit(wanted), rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        fake.scales *= 1.05
    assert torch.equal(fake.quantized().codes, stored.codes)
    moved = stored.dequantize() * 1.05
    assert torch.allclose(fake.fake_weight(), moved, rtol=2e-3, atol=1e-6)
    assert torch.allclose(fake.plain().weight, moved, rtol=2e-3, atol=1e-6)


def test_training_goes_on_where_a_method_ended():
    dense, model = tiny_model(), tiny_model()
    batches = [tokens(seed) for seed in range(8)]

    def lost(model):
        with torch.no_grad():
            return float(sum(F.mse_loss(model(b).logits, dense(b).logits) for b in batches))

    qk.quantize_model(model, "gptq(damp_percent=0.1)", "w2a16-g16", calibration=batches)
    first = lost(model)
    qk.prepare_qat(model)
    assert lost(model) == pytest.approx(first, rel=1e-3)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 64)
    for _ in range(8):
        for batch in batches:
            optimizer.zero_grad()
            F.mse_loss(model(batch).logits, dense(batch).logits.detach()).backward()
            optimizer.step()
            falling.step()
    qk.convert_qat(model)
    assert lost(model) < TRAINED_LOSS * first


def test_a_quantized_model_that_cannot_be_trained_is_named_and_left():
    def quantized(recipe, scheme, **options):
        model = tiny_model()
        qk.quantize_model(model, recipe, scheme, **options)
        return model

    model = quantized("rtn", "w4a16-g16")
    before = snapshot(model)
    with pytest.raises(LayerError, match="in their own schemes"):
        qk.prepare_qat(model, "w3a16-g16")
    unchanged(model, before)
    for scheme, error, what in (
        ("nf4-g16-dq", SchemeError, "q_proj: .*scales that are quantized themselves"),
        ("w4a16-g16-hqq", WeightError, "q_proj: .*zero points that are no integers"),
    ):
        recipe = "hqq" if scheme.endswith("-hqq") else "rtn"
        model = quantized(recipe, scheme.removesuffix("-hqq"))
        before = snapshot(model)
        with pytest.raises(error, match=what):
            qk.prepare_qat(model)
        unchanged(model, before)


def test_a_trained_model_moves_and_is_taken_out_in_its_own_type():
    model = nn.Sequential(qk.WQLinear.from_linear(linear(dtype=torch.float16), "w4a16-g16"))
    wanted = model[0].dequantize()
    qk.prepare_qat(model)
    copied = copy.deepcopy(model)
    qk.undo_qat(copied)
    assert type(copied[0]) is nn.Linear and copied[0].weight.dtype == torch.float16
    assert torch.equal(copied[0].weight, wanted.half())
    model.bfloat16()
    assert model[0].dtype == model[0].weight.dtype == torch.bfloat16


def test_a_head_that_an_embedding_shares_stays_quantized():
    model = tiny_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    shared = {"lm_head": "w8a16-g16", "*embed_tokens": "w8a16-g16"}
    qk.quantize_model(model, "rtn", "w4a16-g16", overrides=shared)
    wanted = model(tokens()).logits
    names = qk.prepare_qat(model)
    assert len(names) == 14 and "lm_head" not in names
    assert isinstance(model.lm_head, qk.WQLinear)
    assert model.model.embed_tokens.source is model.lm_head
    qk.convert_qat(model)
    assert torch.equal(model(tokens()).logits, wanted)


def test_experts_stay_and_other_layers_are_named():
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).eval()
    qk.quantize_model(model, "rtn", "w4a16-g16")
    wanted = model(tokens()).logits
    names = qk.prepare_qat(model)
    assert names and not any("experts" in name for name in names)
    assert (model(tokens()).logits - wanted).norm() <= DEEP_LOGITS * wanted.norm()
    qk.convert_qat(model)
    assert torch.equal(model(tokens()).logits, wanted)
    fused = tiny_model()
    qk.quantize_model(fused, "rtn", "w8a8")
    assert qk.fuse(fused).fused
    with pytest.raises(LayerError, match=r"is a FusedPart: call qk\.unfuse\(model\) first"):
        qk.prepare_qat(fused)
