"""eval, generate, explain and inspect on a tiny model."""

import json
import re

import pytest
import torch
import transformers

import qkernels as qk
from qkernels.models import compare_models, evaluation
from tests.checkpoints.test_golden import GOLDEN
from tests.tiny_model import tiny_model, tiny_tokenizer


def cell(out: str, name: str) -> str:
    """What the table says of `name`."""
    return re.search(rf"│ {re.escape(name)} +│ (.*?) *│", out)[1]


def test_eval_prints_the_perplexity(run, model_folder, text_file):
    code, out, err = run(
        "eval",
        model_folder,
        "--text",
        text_file,
        "--window",
        128,
        "--windows",
        3,
        "--dtype",
        "fp32",
    )
    assert (code, err) == (0, "")
    ids = evaluation.encode(tiny_tokenizer(), text_file.read_text())
    expected = evaluation.perplexity(tiny_model(), ids, window=128, max_windows=3)
    assert cell(out, "perplexity") == f"{expected.perplexity:.4f}"
    assert cell(out, "measured on") == "384 of 1,600 tokens, 3 windows of 128"
    assert "\x1b" not in out


def test_eval_quantizes_on_the_fly(run, model_folder, text_file):
    code, out, _ = run(
        "eval", model_folder, "--text", text_file, "--window", 128, "--scheme", "w8a8"
    )
    assert code == 0
    assert cell(out, "model").endswith("w8a8")


def test_eval_against_the_dense_model(run, model_folder, text_file, tmp_path):
    out, file = tmp_path / "out", tmp_path / "eval.json"
    scheme = ("--scheme", "w3a16-g32", "--dtype", "fp32")
    assert run("quantize", model_folder, *scheme, "-o", out, "--format", "qkernels")[0] == 0
    options = ("--text", text_file, "--window", 64, "--windows", 3, "--against", model_folder)
    code, text, err = run("eval", out, *options, "--layers", "worst", "--json", file)
    assert (code, err) == (0, "")
    model, ids = tiny_model(), evaluation.encode(tiny_tokenizer(), text_file.read_text())
    qk.quantize_model(model, "rtn", "w3a16-g32")
    want = compare_models(tiny_model(), model, ids, window=64, max_windows=3, layers=True)
    record = json.loads(file.read_text())
    assert record["against"] == str(model_folder)
    for name in ("kl_divergence", "top1_agreement", "perplexity", "dense_perplexity"):
        assert record[name] == pytest.approx(getattr(want, name), rel=1e-5)
    assert f"│ {want.kl_divergence:.6f} nats a token" in text
    assert f"│ {want.top1_agreement:.2%}" in text
    assert f"│ {want.perplexity:.4f}, dense {want.dense_perplexity:.4f}" in text
    worst = sorted(want.layers, key=lambda layer: layer.snr_db)
    shown = re.findall(r"│ (model\S+) +│ w3a16-g32 │ +(\S+) │", text)
    assert shown == [(layer.name, f"{layer.snr_db:.2f}") for layer in worst[:10]]
    assert [layer["name"] for layer in record["layers"]] == [x.name for x in want.layers]
    _, text, _ = run("eval", out, *options, "--layers", "all")
    shown = re.findall(r"│ (model\S+) +│ w3a16-g32 │", text)
    assert shown == [layer.name for layer in want.layers]


def test_eval_quantizes_before_it_compares(run, model_folder, text_file):
    options = ("--text", text_file, "--window", 64, "--against", model_folder, "--scheme", "w8a16")
    code, text, _ = run("eval", model_folder, *options)
    assert code == 0
    assert "nats a token" in text and "w8a16" in text
    assert "signal to noise" not in text


def test_eval_of_encoders(run, text_file, tmp_path):
    folder, out = tmp_path / "dense", tmp_path / "out"
    tiny_bert().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    assert run("quantize", folder, "--scheme", "w4a16-g32", "-o", out, "--dtype", "fp32")[0] == 0
    options = ("--text", text_file, "--window", 64, "--against", folder, "--layers", "all")
    code, text, err = run("eval", out, *options, "--json", tmp_path / "eval.json")
    assert (code, err) == (0, "")
    assert re.search(r"│ cosine of embeddings +│ mean 0\.99\d+, least 0\.99\d+ ", text)
    assert "│ 1 paragraphs, 64 tokens" in text
    assert len(re.findall(r"│ bert\S+ +│ w4a16-g32 +│", text)) == 12
    assert re.search(r"│ cls\S+dense +│ not compared: no token reached it │ +- │", text)
    assert 0.99 < json.loads((tmp_path / "eval.json").read_text())["cosine"] < 1 - 1e-6


def test_models_that_cannot_be_compared(run, model_folder, text_file, tmp_path):
    folder = tmp_path / "t5"
    tiny_t5().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    code, _, err = run("eval", folder, "--text", text_file, "--against", folder)
    assert code == 1 and "takes more than a text: it cannot be compared on one" in err
    other = tmp_path / "other"
    tiny_model().save_pretrained(other)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["is a"])
    tokenizer.save_pretrained(other)
    code, _, err = run("eval", model_folder, "--text", text_file, "--against", other)
    assert code == 1 and f"the tokenizer of {other} gives other tokens for this text" in err


def test_eval_measures_the_shipped_text_unless_told(run, model_folder):
    code, out, _ = run("eval", model_folder, "--window", 32, "--windows", 1)
    assert code == 0
    assert cell(out, "text") == "shipped: persuasion.txt"


def test_generate_prints_nothing_but_the_text(run, model_folder):
    code, out, err = run(
        "generate", model_folder, "-p", "Once", "--max-new-tokens", 5, "--dtype", "fp32"
    )
    expected = evaluation.generate_text(tiny_model(), tiny_tokenizer(), "Once", max_new_tokens=5)
    assert (code, out) == (0, expected.text + "\n")
    assert re.fullmatch(r"\d tokens in [\d.]+ s, [\d.]+ tokens a second, fp32\n", err)


def test_generate_says_what_compiling_took(run, model_folder, monkeypatch):
    monkeypatch.setattr(evaluation, "prepare_decoding", lambda model: {})
    options = ("-p", "Once", "--max-new-tokens", 5, "--dtype", "fp32", "--compile")
    code, out, err = run("generate", model_folder, *options)
    expected = evaluation.generate_text(tiny_model(), tiny_tokenizer(), "Once", max_new_tokens=5)
    assert (code, out) == (0, expected.text + "\n")
    assert re.search(r"tokens a second, fp32, compiled in \d+ s\n$", err)


def test_generate_with_a_chat_template_and_a_scheme(run, model_folder):
    code, _, err = run(
        "generate", model_folder, "-p", "hi", "--chat", "--max-new-tokens", 2, "--scheme", "nf4-g32"
    )
    assert code == 0
    assert err.endswith("nf4-g32\n")


def test_explain_lists_every_kernel(run):
    code, out, err = run("explain", "w4a16-g128-sym", "--n", 512, "--k", 256, "--m", 3)
    assert (code, err) == (0, "")
    found = qk.explain("w4a16-g128-sym", n=512, k=256, m=3)
    assert all(f"│ {row.kernel} " in out for row in found)
    chosen = next(row.kernel for row in found if row.chosen)
    assert re.search(rf"│ {chosen} +│ \w+ +│ yes", out)
    assert "x [3, 256] bf16, weight [512, 256]" in out


def test_inspect_groups_layers_of_all_blocks(run, model_folder):
    code, out, err = run("inspect", model_folder)
    assert (code, err) == (0, "")
    row = r"│ model.layers.\*.mlp.down_proj +│ +2 │ bfloat16 +│ +64 │ +96 │ +16.000 │"
    assert re.search(row, out)
    assert re.search(r"│ lm_head +│ +1 │", out)
    assert re.search(r"│ all linear layers +│ +15 │", out)
    _, out, _ = run("inspect", model_folder, "--all")
    assert out.count("down_proj") == 2


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}


def tiny_bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, num_attention_heads=4))


def tiny_llama_without_a_head():
    return transformers.LlamaModel(transformers.LlamaConfig(**SIZES, num_attention_heads=4))


def tiny_t5():
    sizes = {"d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
    config = transformers.T5Config(**sizes, d_kv=16, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def tiny_vit():
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    config = transformers.ViTConfig(**sizes, num_attention_heads=4, image_size=32, patch_size=8)
    return transformers.ViTForImageClassification(config)


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama_without_a_head, tiny_t5, tiny_vit])
def test_models_that_continue_no_text(run, tmp_path, text_file, make):
    model = make()
    folder, out, name = tmp_path / "dense", tmp_path / "out", type(model).__name__
    model.save_pretrained(folder)
    if make is not tiny_vit:
        tiny_tokenizer().save_pretrained(folder)
    code, text, _ = run("quantize", folder, "--scheme", "w8a16", "-o", out, "--dtype", "fp32")
    assert code == 0 and "quantized layers" in text
    code, text, _ = run("inspect", out)
    assert code == 0 and text.startswith(f"{out}: {name}\n") and "w8a16" in text
    assert type(qk.load_model(out)) is type(model)
    for path in (folder, out):
        for command in (("eval", path), ("generate", path, "-p", "a")):
            code, _, err = run(*command)
            assert code == 1
            assert f"holds a {name}, which does not continue a text: this needs a causal" in err
    arguments = ("quantize", folder, "--scheme", "w8a16", "-o", tmp_path / "calibrated")
    code, text, err = run(*arguments, "--calibration", text_file)
    if make in (tiny_bert, tiny_llama_without_a_head):
        assert code == 0 and "relative output error" in text
    else:
        assert code == 1 and ("takes more than a text" in err or "holds no tokenizer" in err)


def test_a_quantized_model_is_loaded_as_it_was_saved(run, model_folder, text_file, tmp_path):
    arguments = ("quantize", model_folder, "--scheme", "w4a16-g32", "-o", tmp_path / "out")
    assert run(*arguments, "--dtype", "fp32")[0] == 0
    arguments = ("eval", tmp_path / "out", "--text", text_file, "--window", 64, "--windows", 2)
    ids = evaluation.encode(tiny_tokenizer(), text_file.read_text())
    model = tiny_model()
    qk.quantize_model(model, "rtn", "w4a16-g32")
    for options, dtype in (((), None), (("--dtype", "bf16"), torch.bfloat16)):
        network = qk.load_model(tmp_path / "out", dtype=dtype) if dtype else model
        expected = evaluation.perplexity(network, ids, window=64, max_windows=2)
        code, out, _ = run(*arguments, *options)
        assert code == 0 and cell(out, "perplexity") == f"{expected.perplexity:.4f}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "MODEL", "--text", "missing.txt"), "cannot read the text missing.txt: No such"),
        (("eval", "missing"), "missing does not exist: give a model folder"),
        (("eval", "MODEL", "--layers", "all"), "with the dense model: name it by --against"),
        (("eval", "MODEL", "--json", "no/a.json"), "no does not exist: make it"),
        (("eval", "MODEL", "--json", "."), "is a folder: name a file"),
        (("eval", "MODEL", "--against", "missing"), "missing does not exist: give a model folder"),
        (("eval", "MODEL", "--scheme", "w4"), "scheme 'w4' does not parse"),
        (("eval", "MODEL", "--device", "tpu"), "device 'tpu' is not one of auto, cpu"),
        (("eval", "MODEL", "--window", "999"), "windows of 999 tokens exceed the model's context"),
        (("generate", "MODEL", "-p", " "), "--prompt is empty"),
        (("generate", "missing", "-p", "a"), "missing does not exist"),
        (("explain", "w4a16-g0"), "group size 0 is too small"),
        (("inspect", "missing"), "missing does not exist"),
    ],
)
def test_wrong_input(run, model_folder, arguments: tuple[str, ...], message: str):
    code, out, err = run(*(model_folder if word == "MODEL" else word for word in arguments))
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_a_gpu_that_is_not_there(run):
    code, _, err = run("explain", "w8a8", "--device", "cuda")
    assert code == 1
    assert "device 'cuda' is not there" in err


@pytest.mark.parametrize("format", ["awq", "gptq", "gptq_v2"])
def test_models_in_the_formats_of_others(run, tmp_path, model_folder, text_file, format):
    folder, scheme = tmp_path / "out", ("--scheme", "w4a16-g32")
    code, _, _ = run("quantize", model_folder, *scheme, "--format", format, "-o", folder)
    assert code == 0
    code, out, _ = run("inspect", folder)
    assert code == 0 and out.count("w4a16-g32") == 7
    seen = set()
    for path, more in ((folder, ()), (model_folder, scheme)):
        code, out, _ = run("eval", path, "--text", text_file, "--window", 64, *more)
        assert code == 0
        seen.add(cell(out, "perplexity"))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("folder", "scheme"),
    [
        ("awq-autoawq-gemm-g128", "w4a16-g128"),
        ("awq-autoawq-gemv-g64", "w4a16-g64"),
        ("gptq-3bit-g64-asym", "w3a16-g64"),
    ],
)
def test_models_that_others_wrote_are_listed(run, folder, scheme):
    code, out, _ = run("inspect", GOLDEN / folder)
    assert code == 0 and len(re.findall(rf"{scheme} ", out)) == 7
