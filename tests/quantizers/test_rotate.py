"""Rotated models compute the same, round better, and are refused where rotations do not fit."""

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.calibration.observe import calibrating
from qkernels.errors import LayerError, RecipeError
from qkernels.models.loading import load_dense
from qkernels.quantizers.changes import Changes
from qkernels.quantizers.linear_forms import LinearForms
from qkernels.quantizers.method import ModelTask
from qkernels.quantizers.plan import plan_layers
from qkernels.quantizers.recipe import Recipe
from qkernels.quantizers.rotate import ROTATE, RotateParameters
from qkernels.scheme import QuantScheme
from tests.bounds import FOLDED_BOUND
from tests.calibration.test_architectures import GEMMA, LLAMA_LIKE, MIXTRAL, OPT, SMALL_GPT
from tests.cli.conftest import model_folder, run, text_file  # noqa: F401
from tests.plain_model import TOKENS, Model, snapshot, unchanged
from tests.tiny_model import tiny_config, tiny_model

transformers = pytest.importorskip("transformers", reason="models come from transformers")

IDS = torch.arange(96).view(4, 24) * 7 % 99
GROUPED = {**LLAMA_LIKE, "num_key_value_heads": 2}
QWEN_MOE = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# 36, whose matrix is Paley's, and 4: sizes that are no powers of two.
NO_POWER = {**GROUPED, "hidden_size": 144, "head_dim": 36, "tie_word_embeddings": True}
FIT = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "llama, biases and tied": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**NO_POWER, "attention_bias": True, "mlp_bias": True},
    ),
    # No Hadamard matrix has this order.
    "llama, 50": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**GROUPED, "hidden_size": 50, "num_attention_heads": 5, "num_key_value_heads": 1},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 16}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**GROUPED, "pad_token_id": 0}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 16}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**GROUPED, "residual_multiplier": 0.5}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", MIXTRAL),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**QWEN_MOE, "shared_expert_intermediate_size": 48},
    ),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**QWEN_MOE, "head_dim": 16}),
    # Norms that take means away, and have biases.
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 100, "n_embd": 64, "n_head": 4}),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT),
    "phi": ("PhiForCausalLM", "PhiConfig", LLAMA_LIKE),
    "cohere": ("CohereForCausalLM", "CohereConfig", GROUPED),
}


def made(model, config, kwargs):
    """A model of that class with random norms and biases."""
    torch.manual_seed(0)
    kwargs = {"bos_token_id": None, "eos_token_id": None, **kwargs}
    if "n_embd" in kwargs:
        kwargs["n_layer"] = 2
    model = getattr(transformers, model)(getattr(transformers, config)(**kwargs)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def relative(got, wanted):
    return float(((got - wanted).norm() / wanted.norm()).detach())


def rotate(model, include=None, batches=(), **parameters):
    """Rotates a model, as before its first block is quantized; what takes that back."""
    names = list(plan_layers(model, QuantScheme.parse("w4a16"), include, None, {}).schemes)
    forms, changes = LinearForms(model, names), Changes(model)
    layers = {name: model.get_submodule(name) for name in names}
    with calibrating(model):
        ROTATE.prepare_model(
            ModelTask(model, layers, {}, batches, {}, changes), RotateParameters(**parameters)
        )

    def undo():
        changes.undo()
        forms.undo()

    return undo


@pytest.mark.parametrize("name", FIT)
def test_a_rotated_model_computes_the_same(name):
    model = made(*FIT[name])
    before, wanted = snapshot(model), logits(model)
    undo = rotate(model)
    assert relative(logits(model), wanted) < FOLDED_BOUND
    state = model.state_dict()
    norm = [key for key in state if key.endswith(("ln_f.weight", "norm.weight"))][-1]
    assert len(state[norm].unique()) == 1
    head = model.get_output_embeddings().weight
    assert head.shape[1] == 32 or relative(head, before[1]["lm_head.weight"]) > 0.5
    undo()
    unchanged(model, before)


def test_weights_are_those_of_the_formulas():
    """W diag(g) Q for what reads the stream, Q^T W and b Q for what writes to it, (b / g) Q for the
    biases of norms, with the Q that took E to E Q, and that takes ones to ones."""
    model = made(*FIT["gpt2"])
    before = {name: p.detach().double() for name, p in model.named_parameters()}
    rotate(model, r2=False)
    after = {name: p.detach().double() for name, p in model.named_parameters()}
    embeddings = "transformer.wte.weight"
    q = torch.linalg.lstsq(before[embeddings], after[embeddings]).solution
    ones = torch.ones(len(q), dtype=torch.float64)
    assert relative(q @ q.T, torch.eye(len(q))) < FOLDED_BOUND
    assert relative(q @ ones, ones) < FOLDED_BOUND
    block = "transformer.h.0."
    g, b = (before[f"{block}ln_1.{part}"] for part in ("weight", "bias"))
    # GPT-2 has its weights the other way around, and as nn.Linear once they are rotated.
    wanted = {
        "attn.c_attn.weight": before[f"{block}attn.c_attn.weight"].T * g @ q,
        "attn.c_attn.bias": before[f"{block}attn.c_attn.bias"],
        "attn.c_proj.weight": q.T @ before[f"{block}attn.c_proj.weight"].T,
        "attn.c_proj.bias": before[f"{block}attn.c_proj.bias"] @ q,
        "ln_1.weight": ones,
        "ln_1.bias": (b / g) @ q,
    }
    for name, values in wanted.items():
        assert relative(after[f"{block}{name}"], values) < FOLDED_BOUND, name


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "phi"])
def test_values_alone_are_turned(name):
    model = made(*FIT[name])
    before, wanted = snapshot(model), logits(model)
    rotate(model, r1=False)
    assert relative(logits(model), wanted) < FOLDED_BOUND
    after = model.state_dict()
    changed = [name for name in after if not torch.equal(after[name], before[1][name])]
    assert changed and all("attn" in name for name in changed)


@pytest.mark.parametrize(("name", "include"), [("mixtral", "*q_proj"), ("gpt2", "*h.0.mlp.c_fc")])
def test_layers_that_stay_in_16_bits_are_rotated_in_their_own_forms(name, include):
    model = made(*FIT[name])
    before, wanted = snapshot(model), logits(model)
    undo = rotate(model, [include])
    assert relative(logits(model), wanted) < FOLDED_BOUND
    fused = "model.layers.0.mlp.experts.down_proj" if name == "mixtral" else "lm_head.weight"
    assert not torch.equal(model.get_parameter(fused), before[1][fused])
    undo()
    unchanged(model, before)


UNFIT = {
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        GEMMA,
        "at model.layers.0: .*post_attention_layernorm lies between self_attn.o_proj",
    ),
    "olmo2": (
        "Olmo2ForCausalLM",
        "Olmo2Config",
        GROUPED,
        "Olmo2ForCausalLM at model.layers.0: .*post_feedforward_layernorm lies between mlp.down",
    ),
    "bert": (
        "BertForMaskedLM",
        "BertConfig",
        LLAMA_LIKE,
        "bert.encoder.layer.0: it does not add to what it is given",
    ),
    "bloom": ("BloomForCausalLM", "BloomConfig", SMALL_GPT, r"no values .* use rotate\(r2=false\)"),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", LLAMA_LIKE, "is run more than once"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_rotations_do_not_fit_is_refused_before_anything_is_done(name):
    *how, message = UNFIT[name]
    model, seen = made(*how), []
    before = snapshot(model)
    with pytest.raises(LayerError, match=message):
        qk.quantize_model(model, "rotate", "w4a16-g16", progress=lambda *a: seen.append(a))
    assert not seen
    unchanged(model, before)


def test_values_of_a_model_with_norms_behind_its_blocks_are_turned():
    model = made("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA)
    wanted = logits(model)
    rotate(model, r1=False)
    assert relative(logits(model), wanted) < FOLDED_BOUND


class Gated(nn.Module):
    """A block that multiplies columns of the stream on their own."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(72, 96), nn.Linear(96, 72)
        self.gates = nn.Parameter(torch.rand(72) + 1)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x))) * self.gates


def test_a_block_that_nobody_foresaw_is_named_by_the_check():
    model = Model()
    model.blocks[1] = Gated()
    before = snapshot(model)
    with pytest.raises(LayerError, match=r"at blocks\.1: rotated, it would not compute the same"):
        qk.quantize_model(model, "rotate(r2=false)", "w4a16-g24")
    unchanged(model, before)


def test_a_module_that_does_not_run_is_named():
    model = Model()
    model.images = nn.Linear(8, 72)
    with pytest.raises(LayerError, match="at images: it does not run"):
        qk.quantize_model(model, "rotate(r2=false)", "w4a16-g8")


def test_a_model_of_plain_modules_with_a_tied_head():
    model = Model()
    wanted = model(TOKENS)
    undo = rotate(model, r2=False, batches=[TOKENS])
    assert model.lm_head.weight is not model.embed.weight
    assert relative(model(TOKENS), wanted) < FOLDED_BOUND
    undo()
    assert model.lm_head.weight is model.embed.weight
    assert torch.equal(model(TOKENS), wanted)


def outlying(model):
    """Some columns of every layer are large, as those of trained models are."""
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                layer.self_attn.get_submodule(name).weight[:, ::16] *= 10
            for name in ("gate_proj", "up_proj"):
                layer.mlp.get_submodule(name).weight[:, ::16] *= 10
            layer.self_attn.o_proj.weight[:, ::16] *= 10
    return model


@pytest.mark.parametrize("quantizing", ["rtn", "gptq"])
def test_rotations_take_the_cost_of_outliers_away(quantizing):
    errors = {}
    for recipe in (quantizing, f"rotate+{quantizing}"):
        model = outlying(made(*FIT["llama"]))
        wanted = logits(model)
        report = qk.quantize_model(
            model, recipe, "w4a16-g32", calibration=[IDS], check_kernels=False
        )
        assert report.method == recipe
        errors[recipe] = relative(logits(model), wanted)
    assert errors[f"rotate+{quantizing}"] < 0.8 * errors[quantizing], errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_are_rounded_once(dtype):
    model = made(*FIT["llama"]).to(dtype)
    exact = made(*FIT["llama"])
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    for one in (model, exact):
        rotate(one)
    for (name, got), wanted in zip(model.named_parameters(), exact.parameters(), strict=True):
        # The one differs from fp32, which it is rounded to, by no more than a tie.
        assert got.dtype == dtype and relative(got.float(), wanted.to(dtype).float()) < 1e-5, name


def tied():
    torch.manual_seed(0)
    config = tiny_config()
    config.tie_word_embeddings = True
    model = transformers.LlamaForCausalLM(config).eval()
    nn.init.normal_(model.model.norm.weight, 1, 0.1)
    return model


@pytest.mark.parametrize("head", [None, "w8a16-g32"])
@pytest.mark.parametrize("format", ["qkernels", "compressed-tensors", "gptq"])
@pytest.mark.filterwarnings("ignore:saved in the qkernels format")
def test_a_tied_model_is_untied_saved_and_loaded(format, head, tmp_path):
    if head is not None and format == "gptq":
        head = "w4a16-g32-sym"
    model = tied()
    wanted = logits(model)
    scheme = "w8a16-g32-sym"
    qk.quantize_model(
        model, "rotate", scheme, overrides={"lm_head": head}, format=format, check_kernels=False
    )
    assert model.config.tie_word_embeddings is False
    assert relative(logits(model), wanted) < (0.05 if head is None else 0.2)
    if head is None:
        assert isinstance(model.lm_head, nn.Linear)
        assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    model.tie_weights()
    quantized = logits(model)
    qk.save_model(model, tmp_path / "out", format)
    loaded = qk.load_model(tmp_path / "out")
    assert loaded.config.tie_word_embeddings is False
    assert torch.equal(logits(loaded), quantized)
    if format == "qkernels":
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(logits(again), quantized)


def test_a_rotated_dense_model_is_a_plain_one(tmp_path):
    model = tied()
    wanted = logits(model)
    rotate(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert relative(logits(loaded), wanted) < FOLDED_BOUND


def test_an_interrupt_gives_everything_back():
    def interrupt(done, total, name):
        if done == 5:
            raise KeyboardInterrupt

    model = tied()
    before, keys = snapshot(model), dict(model.all_tied_weights_keys)
    with pytest.raises(KeyboardInterrupt):
        qk.quantize_model(model, "rotate+awq", "w4a16-g32", calibration=[IDS], progress=interrupt)
    unchanged(model, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    assert model.all_tied_weights_keys == keys


def test_an_interrupted_run_goes_on_with_the_same_bits(tmp_path):
    def interrupt(done, total, name):
        if done == 9:
            raise KeyboardInterrupt

    def go(recipe="rotate(seed=3)+gptq", model=None, **options):
        model = tied() if model is None else model
        options |= {"calibration": [IDS], "check_kernels": False}
        qk.quantize_model(model, recipe, "w4a16-g32", **options)
        return model.state_dict()

    expected = go()
    model = tied()
    with pytest.raises(KeyboardInterrupt):
        go(model=model, resume=tmp_path, progress=interrupt)
    assert [path.name for path in tmp_path.glob("block*")] == ["block-0000.safetensors"]
    again = go(model=model, resume=tmp_path)
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[key], expected[key]) for key in expected)
    other = go("rotate(seed=4)+gptq")
    embedding = "model.embed_tokens.weight"
    assert not torch.equal(other[embedding], expected[embedding])


def test_awq_scales_what_is_rotated():
    model = outlying(made(*FIT["qwen2"]))
    wanted = logits(model)
    qk.quantize_model(model, "rotate+awq", "w8a16-g16", calibration=[IDS], check_kernels=False)
    assert relative(logits(model), wanted) < 0.02


def test_embeddings_stay_in_16_bits():
    model = tied()
    options = {"overrides": {"*embed_tokens": "w8a16-g32"}}
    with pytest.raises(LayerError, match=r"embeddings other values.*leave out model.embed_tokens"):
        qk.quantize_model(model, "rotate", "w4a16-g32", **options)
    qk.quantize_model(model, "rotate(r1=false)", "w4a16-g32", **options, check_kernels=False)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("rotate(r1=false, r2=false)", "r1 and r2 are both false"),
        ("rotate(seed=-1)", "seed must be 0 or more"),
        ("rtn+rotate", "what prepares them must come before it"),
    ],
)
def test_parameters_out_of_range_are_named(text, what):
    with pytest.raises(RecipeError, match=what):
        Recipe.parse(text)


def test_the_command_line_rotates(run, model_folder, text_file, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    code, text, _ = run("list", "methods")
    assert code == 0 and "prepares the model" in text
    arguments = ("--scheme", "w4a16-g32", "--method", "rotate(seed=1)+gptq")
    calibration = ("--calibration", text_file, "--sequences", 2)
    code, _, err = run("quantize", model_folder, *arguments, *calibration, "-o", out)
    assert code == 0, err
    dense, _ = load_dense(model_folder, torch.float32)
    loaded = qk.load_model(out)
    assert relative(logits(loaded).float(), logits(dense)) < 0.2
    assert len(loaded.model.norm.weight.unique()) == 1


def test_padding_in_front_is_not_looked_at():
    model, ids = tiny_model(), torch.arange(80).view(2, 40) % 60
    mask = torch.ones_like(ids)
    mask[:, :30] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    report = qk.quantize_model(model, "rotate+rtn", "w4a16-g32", calibration=[batch])
    assert report.method == "rotate+rtn"
