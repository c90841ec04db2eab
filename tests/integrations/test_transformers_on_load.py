"""`from_pretrained` quantizes a model as it loads it."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qkernels as qk
from qkernels.errors import (
    CheckpointError,
    LayerError,
    NoKernelError,
    RecipeError,
    SchemeError,
    WeightError,
)
from qkernels.quantizers.method import BlockTask, Method, no_statistics
from qkernels.quantizers.methods import METHODS
from tests.checkpoints.folders import edit_tensors
from tests.memory import EXACT
from tests.tiny_model import tiny_config

transformers = pytest.importorskip("transformers", reason="models come from transformers")

from qkernels.integrations.transformers import QKernelsConfig  # noqa: E402

TOKENS = torch.arange(24).view(1, 24)
SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 128}
EXPERTS = {"intermediate_size": 96, "num_key_value_heads": 2}


def llama(tied=False):
    config = tiny_config()
    config.tie_word_embeddings, config.attention_bias = tied, True
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def mixtral():
    config = transformers.MixtralConfig(num_local_experts=3, **EXPERTS, **SIZES)
    return transformers.MixtralForCausalLM(config)


def qwen3_moe():
    config = transformers.Qwen3MoeConfig(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, **EXPERTS, **SIZES
    )
    return transformers.Qwen3MoeForCausalLM(config)


def bert():
    config = transformers.BertConfig(intermediate_size=96, **SIZES)
    return transformers.BertForMaskedLM(config)


@pytest.fixture
def dense(tmp_path):
    def save(model):
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path / "dense")
        return tmp_path / "dense"

    return save


def load(folder, *arguments, dtype=torch.float32, **options):
    if arguments or options:
        options = {"quantization_config": QKernelsConfig(*arguments, **options)}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def logits(model):
    # A copy has memory of its own: Transformers maps files, and torch computes by alignment.
    with torch.no_grad():
        return copy.deepcopy(model)(TOKENS).logits


def assert_same(a, b):
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name
    assert torch.equal(logits(a), logits(b))


CASES = {
    "llama": (llama, {"scheme": "w4a16-g32"}),
    "tied": (lambda: llama(True), {"scheme": "nf4-g32"}),
    "a head": (llama, {"scheme": "nf4-g32", "overrides": {"lm_head": "w8a16"}}),
    "a tied head": (lambda: llama(True), {"scheme": "w8a8", "overrides": {"lm_head": "w8a16"}}),
    "patterns": (llama, {"scheme": "w4a16-g32", "include": ["*.0.*"], "exclude": ["*q_proj"]}),
    "conv1d": (gpt2, {"scheme": "w4a16-g32"}),
    "experts": (mixtral, {"scheme": "w4a16-g32"}),
    "some experts": (
        mixtral,
        {"scheme": "w4a16-g32", "overrides": {"*expert_1": None, "*gate_up*expert_2": "w8a16"}},
    ),
    "an embedding": (llama, {"scheme": "w4a16-g32", "overrides": {"*embed_tokens": "w8a16"}}),
    "an embedding with its head": (
        lambda: llama(True),
        {"scheme": "w4a16-g32", "overrides": {"*embed_tokens": "w8a16", "lm_head": "w8a16"}},
    ),
    "others": (qwen3_moe, {"scheme": "w8a16"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_it_is_what_quantize_model_makes(case, dtype, dense, tmp_path):
    make, options = CASES[case]
    folder = dense(make())
    want = load(folder, dtype=dtype)
    report = qk.quantize_model(want, **options)
    made = load(folder, dtype=dtype, **options)
    assert_same(made, want)
    assert made.config.quantization_config.report == report
    assert not made.training
    # And it comes back.
    made.save_pretrained(tmp_path / "out")
    assert_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), want)


def test_an_encoder(dense):
    folder = dense(bert())
    want = transformers.BertForMaskedLM.from_pretrained(folder)
    qk.quantize_model(want, scheme="w4a16-g32")
    made, info = transformers.BertForMaskedLM.from_pretrained(
        folder, quantization_config=QKernelsConfig("w4a16-g32"), output_loading_info=True
    )
    assert_same(made, want)
    assert not any(info.values())


def test_new_weights_are_quantized_too(dense):
    config = QKernelsConfig("w8a16", overrides={"score": "w8a16"})
    made, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        dense(llama()), quantization_config=config, output_loading_info=True
    )
    assert info["missing_keys"] == {"score.weight"} and isinstance(made.score, qk.WQLinear)


def batches():
    yield {"input_ids": TOKENS}
    yield {"input_ids": TOKENS.flip(1)}


def test_calibration_comes_with_the_config(dense):
    folder = dense(llama())
    for options in ({"scheme": "w8a8-static"}, {"scheme": "w4a16-g32"}):
        want = load(folder)
        report = qk.quantize_model(want, calibration=batches(), **options)
        # A generator is not copied, nor kept with the model.
        made = load(folder, calibration=list(batches()), **options)
        assert_same(made, want)
        held = made.config.quantization_config
        assert held.report == report and held.report.layers[0].output_error is not None
        assert held.calibration is None and "calibration" not in held.to_dict()


def test_methods_that_look_at_the_model_run_when_it_is_loaded(dense, monkeypatch):
    seen = []

    def prepare(task: BlockTask, parameters: object) -> None:
        seen.append(task.name)
        task.rewrite("input_layernorm.weight", torch.full((64,), 2.0))

    row = Method(name="louder", title="", statistics=no_statistics, prepare_block=prepare)
    monkeypatch.setitem(METHODS, "louder", row)
    made = load(dense(llama()), "w4a16-g32", "louder")
    assert seen == ["model.layers.0", "model.layers.1"]
    assert (made.model.layers[0].input_layernorm.weight == 2).all()
    assert isinstance(made.model.layers[0].mlp.up_proj, qk.WQLinear)


@pytest.mark.parametrize("format", ["qkernels", "compressed-tensors", "gptq"])
def test_the_format_it_is_saved_in(format, dense, tmp_path):
    made = load(dense(llama()), "w4a16-g32", format=format)
    made.save_pretrained(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == format
    assert_same(qk.load_model(tmp_path / "out"), made)


WRONG = {
    "scheme": ({"scheme": "w5a16"}, SchemeError, "w5a16"),
    "method": ({"method": "magic"}, RecipeError, "method 'magic' is not one of autoround, awq, "),
    "format": ({"format": "gguf"}, CheckpointError, "gguf is only read"),
    "override": ({"overrides": {"*": "w99"}}, SchemeError, "w99"),
    "backend": ({"backend": "abacus"}, NoKernelError, "abacus"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_config(case):
    options, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        QKernelsConfig(**options)


def test_a_wrong_key():
    for section in ({"bits": 4}, {"scheme": "w8a16", "group_size": 128}):
        with pytest.raises(LayerError, match=r"has no '(bits|group_size)': it has scheme, method"):
            QKernelsConfig.from_dict(section)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"include": ["*.nothing"]}, LayerError, r"pattern '\*\.nothing' matches none"),
        ({"scheme": "w8a8-static"}, LayerError, "pass calibration batches"),
        ({"scheme": "nf4-g32", "format": "gptq"}, CheckpointError, "nf4-g32, and gptq"),
    ],
)
def test_what_does_not_fit_the_model_is_said_before_it_is_read(options, error, message, dense):
    folder = dense(llama())
    # No weight can be read any more.
    path = folder / "model.safetensors"
    size = int.from_bytes(path.read_bytes()[:8], "little")
    path.write_bytes(path.read_bytes()[: size + 8])
    with pytest.raises(error, match=message):
        load(folder, **options)


def test_a_weight_that_is_not_finite(dense):
    folder = dense(llama())
    name = "model.layers.1.mlp.up_proj"
    edit_tensors(folder, lambda t: t[f"{name}.weight"].fill_(torch.nan))
    with pytest.raises(WeightError, match=rf"{name}\.weight"):
        load(folder, "w4a16-g32")


def test_as_plain_types():
    config = QKernelsConfig(
        "w4a16-g128",
        include=("*.mlp.*",),
        overrides={"*.down_proj": qk.QuantScheme.parse("w8a16"), "*.up_proj": None},
        calibration=batches(),
    )
    section = json.loads(config.to_json_string())
    assert section["overrides"] == {"*.down_proj": "w8a16", "*.up_proj": None}
    assert section["quant_method"] == "qkernels" and "calibration" not in section
    for again in (
        QKernelsConfig.from_dict(section),
        copy.deepcopy(config),
        copy.copy(config),
        transformers.quantizers.AutoQuantizationConfig.from_dict(section),
    ):
        assert type(again) is QKernelsConfig and again.to_dict() == section
        assert dict(again) == section and repr(again) == repr(config)
    assert copy.deepcopy(config).calibration is config.calibration


def test_a_plain_dict_is_taken(dense):
    folder = dense(llama())
    section = {"quant_method": "qkernels", "scheme": "w4a16-g32"}
    made = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=section)
    assert_same(made, load(folder, "w4a16-g32"))


def test_beside_a_folder_that_is_quantized(dense, tmp_path):
    made = load(dense(llama()), "w4a16-g32")
    made.save_pretrained(tmp_path / "out")
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = load(tmp_path / "out", "w8a16")
    assert_same(again, made)
    assert str(again.model.layers[0].mlp.up_proj.scheme).startswith("w4a16-g32")


LINEARS = 4 * 1024 * 1024 + 3 * 1024 * 2816
BLOCKS = 6
SCRIPT = """
import sys
from pathlib import Path
import torch, transformers
import qkernels.quantizers.incoming as incoming
from qkernels.integrations.transformers import QKernelsConfig
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))
held, build = [], incoming.build_layer
def measured(*arguments):
    held.append(anonymous())
    made = build(*arguments)
    held.append(anonymous())
    return made
load = transformers.AutoModelForCausalLM.from_pretrained
small, large = sys.argv[1:]
config = QKernelsConfig("w4a16-g128")
load(small, quantization_config=config)
incoming.build_layer = measured
before = anonymous()
model = load(large, quantization_config=config)
held.append(anonymous())
print(max(held) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_dense_model_is_never_held(tmp_path):
    for name, blocks in (("small", 1), ("large", BLOCKS)):
        config = transformers.LlamaConfig(
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=blocks,
            num_attention_heads=16,
            vocab_size=64,
            dtype=torch.bfloat16,
        )
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.fill_(0.5)
        model.save_pretrained(tmp_path / name)
        del model
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True,
        text=True,
        env=EXACT,
    )
    assert done.returncode == 0, done.stderr
    packed, layer = BLOCKS * LINEARS * 4.25 / 8, 1024 * 2816 * 2
    # The packed model, a layer in bf16, and what one takes in fp32 on its way; the dense model is
    # 3.8 times the packed one.
    assert int(done.stdout) <= 1.2 * packed + 6 * layer
