"""The survey of architectures: what it finds wrong, what a fault costs, and what it writes."""

import json
import re

import pytest
import torch
import transformers

import qkernels as qk
from bench import architectures
from bench.survey import trial
from bench.survey.classes import KINDS, ModelClass, model_classes
from bench.survey.compare import equal, relative_error
from bench.survey.models import DoesNotStart, example, run
from bench.survey.processes import error_line, try_all
from bench.survey.row import FAILS, LEFT_ALONE, STARTS_NOT, WORKS, Row
from bench.survey.shrink import VOCABULARY, tiny_config
from bench.survey.table import markdown
from bench.survey.trial import Wrong, try_class

LLAMA = ModelClass("LlamaForCausalLM", "causal", "llama")


def test_every_kind_has_classes_and_each_class_one_kind():
    classes = model_classes()
    assert {one.kind for one in classes.values()} == set(KINDS)
    assert classes["LlamaForCausalLM"] == LLAMA
    assert classes["LlamaModel"].kind == "encoder"
    assert classes["T5ForConditionalGeneration"].kind == "seq2seq"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("LlamaConfig", {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}),
        ("MistralConfig", {"num_key_value_heads": 2, "intermediate_size": 96}),
        ("JambaConfig", {"layers_block_type": ["mamba", "attention"]}),
        ("Gemma3TextConfig", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("PvtConfig", {"hidden_sizes": (16, 32, 80, 128), "num_attention_heads": (1, 2, 5, 8)}),
    ],
)
def test_tiny_configs(kind, expected):
    config = tiny_config(getattr(transformers, kind), {})
    assert {name: getattr(config, name) for name in expected} == expected


def test_tiny_configs_of_nested_ones():
    config = tiny_config(transformers.LlavaConfig, {"text_config.num_hidden_layers": 3})
    assert config.text_config.hidden_size == config.vision_config.hidden_size == 64
    assert config.text_config.num_hidden_layers == 3
    assert config.image_token_index < config.text_config.vocab_size == VOCABULARY
    two = {"encoder": "bert", "decoder": "gpt2"}
    config = tiny_config(transformers.EncoderDecoderConfig, two)
    assert config.encoder.hidden_size == config.decoder.n_embd == 64


def test_examples_are_the_same_each_time():
    made = example(LLAMA, torch.float32)
    first, second = made.model(), made.model()
    first, second = run(first, made.inputs)["logits"], run(second, made.inputs)["logits"]
    assert equal(first, second)


def test_a_class_without_inputs_does_not_start():
    with pytest.raises(DoesNotStart, match=r"no inputs are known for .*inference_session"):
        example(model_classes()["Sam3VideoModel"], torch.float32)


def test_errors_of_outputs():
    want = torch.tensor([3.0, 4.0, float("inf")])
    assert relative_error(torch.tensor([3.0, 3.0, 7.0]), want) == pytest.approx(0.2)
    assert relative_error(torch.tensor([3.0, float("nan"), 7.0]), want) == float("inf")
    assert relative_error(want[:2], want) == float("inf")
    assert relative_error(torch.ones(4), torch.zeros(4)) == 2.0


@pytest.fixture
def quantized(monkeypatch):
    """Lets a test change each model behind `quantize_model`."""

    def install(change):
        def quantize(model, *arguments, **options):
            report = qk.quantize_model(model, *arguments, **options)
            change(model, report)
            return report

        monkeypatch.setattr(trial, "qk", _With(qk, quantize_model=quantize))

    return install


class _With:
    """A module with other functions in it."""

    def __init__(self, module, **others):
        self._module = module
        vars(self).update(others)

    def __getattr__(self, name):
        return getattr(self._module, name)


def _double(model, report):
    model.get_submodule(report.layers[-1].name).weight.mul_(2.0)


def _drop_a_bias(model, report):
    model.get_submodule(report.layers[0].name).bias.zero_()


def _forget(model, report):
    report.skipped.clear()


def _take_the_head(model, report):
    model.lm_head = qk.WQLinear.from_linear(model.lm_head, "w8a16")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("LlamaForCausalLM", _double, "relative error 1 of the weight of model.layers.1.mlp"),
        ("Qwen2ForCausalLM", _drop_a_bias, "against dense layers with the same weights"),
        ("LlamaForCausalLM", _forget, "model.embed_tokens.weight, .*% of the parameters, is left"),
        ("LlamaForCausalLM", _take_the_head, "head is quantized though nobody asked"),
    ],
)
def test_a_wrong_model_is_noticed(quantized, name, change, message, tmp_path):
    quantized(change)
    with pytest.raises(Wrong, match=message):
        try_class(model_classes()[name], tmp_path)


def _another_bit(model):
    model.model.norm.weight.data[0] += 1e-7


def _another_type(model):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.bfloat16()


def _untie(model):
    if isinstance(model.lm_head, qk.WQLinear):
        return
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("LlamaForCausalLM", _another_bit, r"changed by saving and loading: \['logits'\]"),
        ("LlamaForCausalLM", _another_type, "changed by saving|is torch.float32, and torch.bfl"),
        ("OPTForCausalLM", _untie, "one tensor or layer before or after loading, not both"),
    ],
)
def test_a_model_that_loading_changes_is_noticed(monkeypatch, name, change, message, tmp_path):
    def load(folder):
        model = qk.load_model(folder)
        change(model)
        return model

    monkeypatch.setattr(trial, "qk", _With(qk, load_model=load))
    with pytest.raises(Wrong, match=message):
        try_class(model_classes()[name], tmp_path)


def tried(classes, **options):
    rows = []
    options = {"jobs": 2, "time_limit": 300.0} | options
    try_all(classes, torch.float32, done=rows.append, **options)
    return {row.name: row for row in rows}


def test_what_goes_wrong_costs_one_row():
    rows = tried(
        [
            LLAMA,
            ModelClass("NoSuchModel", "causal", "llama"),
            model_classes()["ResNetModel"],
            model_classes()["TimmBackbone"],
        ]
    )
    assert rows["LlamaForCausalLM"].outcome == WORKS
    assert rows["LlamaForCausalLM"].step is None and rows["LlamaForCausalLM"].error > 0
    assert rows["NoSuchModel"].outcome == STARTS_NOT
    assert "has no attribute NoSuchModel" in rows["NoSuchModel"].reason
    assert rows["ResNetModel"].outcome == LEFT_ALONE
    assert "no linear layer" in rows["ResNetModel"].reason


def test_a_class_that_hangs_is_ended():
    row = tried([LLAMA], time_limit=0.01)["LlamaForCausalLM"]
    assert row.outcome == STARTS_NOT
    assert row.reason == "not done after 0.01 s"


@pytest.mark.parametrize(
    ("log", "line"),
    [
        (
            "Traceback (most recent call last):\n  File a\nmodule.OurError: a\n  b\n",
            "OurError: a b",
        ),
        (
            "Traceback (most recent call last):\n  File a\nbench.survey.trial.Wrong: too far\n",
            "too far",
        ),
        (
            "Traceback (most recent call last):\n  File a\nKeyError: 1\n\nDuring ...:\n\n"
            "Traceback (most recent call last):\n  File b\nValueError: x: y\n",
            "ValueError: x: y",
        ),
        ("Fatal Python error: Segmentation fault\n", "no error was printed"),
    ],
)
def test_the_line_of_an_error(log, line):
    assert error_line(log) == line


def test_the_command(tmp_path, capsys):
    arguments = ["--only", "^(OPTForCausalLM|ResNetModel|BertForMaskedLM)$", "--jobs", "1"]
    assert architectures.run([*arguments, "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"all +3 +3 +2 +0 +1 +0\n", out)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["outcome"] for row in results["rows"]] == [WORKS, WORKS, LEFT_ALONE]
    text = (tmp_path / "architectures.md").read_text()
    assert "| OPTForCausalLM | causal |" in text
    assert re.search(r"\| ResNetModel \| vision \| 0% .* Conv2d", text)


def test_the_exit_code_of_a_failure(tmp_path, monkeypatch, capsys):
    failed = Row("A", "causal", "a", outcome=FAILS, step="load", reason="no")
    monkeypatch.setattr(architectures, "try_all", lambda *args, done, **more: done(failed))
    monkeypatch.setattr(
        architectures, "model_classes", lambda: {"A": ModelClass("A", "causal", "a")}
    )
    assert architectures.run(["--output", str(tmp_path)]) == 1
    assert "A fails: load: no" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "["], "no regular expression"),
        (["--only", "NoSuchModel"], "matches no class"),
        (["--jobs", "0"], "--jobs 0 must be more than 0"),
        (["--time-limit", "-1"], "--time-limit -1.0 must be more"),
    ],
)
def test_options_that_cannot_be_followed(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        architectures.run(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_table():
    row = Row("A", "causal", "a", step=None, quantized=0.875, error=0.0123, head="quantized")
    row.skipped = {f"layers.{i}.conv": "a Conv1d|" for i in range(12)} | {"embed": "an embedding"}
    broken = Row("B", "vision", "b", outcome=FAILS, step="load", reason="no")
    text = markdown([row, broken], ["heading"])
    assert "heading" in text
    assert "| all | 2 | 2 | 1 | 1 | 0 | 0 |" in text
    assert "| B | load | no |" in text
    alone = "layers.*.conv: a Conv1d\\|; embed: an embedding"
    assert f"| A | causal | 88% | 1.2e-02 | quantized | yes | {alone} |" in text
