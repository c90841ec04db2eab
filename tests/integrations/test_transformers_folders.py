"""`from_pretrained` loads quantized folders onto our layers."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

import qkernels as qk
from qkernels.errors import CheckpointError, LayerError
from tests.checkpoints.folders import edit_config, edit_tensors
from tests.tiny_model import tiny_config, tiny_tokenizer

transformers = pytest.importorskip("transformers", reason="models come from transformers")

from transformers.quantizers import auto  # noqa: E402

from qkernels.integrations.transformers import stop_using, use  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENS = torch.arange(24).view(1, 24)
pytestmark = pytest.mark.filterwarnings("ignore:saved in the qkernels format")


def llama(tied=False):
    config = tiny_config()
    config.tie_word_embeddings = tied
    return transformers.LlamaForCausalLM(config).eval()


def saved(folder, scheme="nf4-g32", model=None, **options):
    """A model, and the folder of it, in our own format."""
    model = llama() if model is None else model
    qk.quantize_model(model, scheme=scheme, **options)
    qk.save_model(model, folder, format="qkernels")
    return model


def logits(model, **inputs):
    with torch.no_grad():
        return model(TOKENS, **inputs).logits


def same(a, b):
    """Whether two models have the same tensors, of the same types."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name])
        for name, tensor in first.items()
    )


@pytest.fixture
def used():
    use(["awq", "gptq", "compressed-tensors", "bitsandbytes", "torchao"])
    yield
    stop_using()


@pytest.mark.parametrize("head", [None, "w8a16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_comes_back_exactly(head, tied, tmp_path):
    model = saved(tmp_path / "out", model=llama(tied), overrides={"lm_head": head})
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    assert same(loaded, model) and torch.equal(logits(loaded), logits(model))
    assert isinstance(loaded.lm_head, qk.WQLinear) is (head is not None)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is (tied and head is None)
    loaded.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert same(again, model) and torch.equal(logits(again), logits(model))


SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


def gpt2():
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(intermediate_size=96, **SIZES)
    return transformers.BertForMaskedLM(config)


def t5():
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config)


def bart():
    config = transformers.BartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
    )
    return transformers.BartForConditionalGeneration(config)


def mixtral():
    config = transformers.MixtralConfig(
        intermediate_size=96, num_key_value_heads=2, num_local_experts=3, **SIZES
    )
    return transformers.MixtralForCausalLM(config)


def mamba():
    config = transformers.MambaConfig(
        hidden_size=32, num_hidden_layers=1, state_size=4, vocab_size=64
    )
    return transformers.MambaForCausalLM(config)


def llava():
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    text = transformers.LlamaConfig(intermediate_size=96, **SIZES)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    )


@pytest.mark.parametrize("make", [gpt2, bert, t5, bart, mixtral, mamba, llava])
def test_models_of_all_kinds_come_back_exactly(make, tmp_path):
    model = make().eval()
    qk.quantize_model(model, scheme="nf4-g32")
    model.save_pretrained(tmp_path / "out")
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert same(loaded, model)


def test_a_folder_of_one_class_is_loaded_as_another(tmp_path):
    model = saved(tmp_path / "out", overrides={"lm_head": "w8a16"})
    base, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert same(base, model.model) and not info["missing_keys"]
    assert all(key.startswith("lm_head.") for key in info["unexpected_keys"])
    assert info["unexpected_keys"]
    auto_class = transformers.AutoModelForSequenceClassification
    other, info = auto_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert same(other.model, model.model) and info["missing_keys"] == {"score.weight"}
    base.save_pretrained(tmp_path / "base")
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", output_loading_info=True
    )
    assert same(back.model, model.model) and info["missing_keys"] == {"lm_head.weight"}
    vision = saved(tmp_path / "bert", model=bert())
    without = transformers.BertModel.from_pretrained(tmp_path / "bert", add_pooling_layer=False)
    assert same(without, vision.bert)
    config = gpt2().config
    config.quantization_config = without.config.quantization_config.to_dict()
    with pytest.raises(CheckpointError, match=r"none of its quantized layers, such as bert\."):
        transformers.GPT2Model.from_pretrained(tmp_path / "bert", config=config)


def test_nothing_of_the_folder_is_in_use(tmp_path):
    model = saved(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    # In place, as a copy onto it does.
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert same(loaded, model) and torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_type_of_what_is_dense(name, tmp_path):
    model = saved(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", **{name: torch.bfloat16}
    )
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    other = qk.load_model(tmp_path / "out", dtype=torch.bfloat16)
    assert same(loaded, other) and torch.equal(logits(loaded), logits(other))
    # Scales are what they were.
    layers = [m for m in loaded.modules() if isinstance(m, qk.WQLinear)]
    assert all(m.scales.dtype == model.model.layers[0].mlp.up_proj.scales.dtype for m in layers)


def test_options_of_loading(tmp_path):
    model = saved(tmp_path / "out")
    for options in (
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"device_map": {"model": "cpu", "lm_head": "cpu"}},
        {"low_cpu_mem_usage": True},
        {"attn_implementation": "eager"},
    ):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
        assert same(loaded, model), options
        if "attn_implementation" in options:
            assert loaded.config._attn_implementation == "eager"


def test_what_is_offloaded_is_refused(tmp_path):
    saved(tmp_path / "out")
    for devices in ({"model": "cpu", "lm_head": "disk"}, {"model": 0, "lm_head": "cpu"}):
        with pytest.raises(CheckpointError, match=r"offloads parts of the model to (disk|cpu)"):
            transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / "out", device_map=devices, offload_folder=tmp_path / "offload"
            )


def test_devices_are_chosen_by_the_size_of_packed_layers(tmp_path):
    config = tiny_config()
    config.hidden_size, config.intermediate_size = 256, 512
    saved(tmp_path / "out", model=transformers.LlamaForCausalLM(config))
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    load = transformers.AutoModelForCausalLM.from_pretrained
    loaded = load(tmp_path / "out", device_map="sequential", max_memory={"cpu": int(1.2 * size)})
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    with pytest.raises(CheckpointError, match="offloads parts of the model to disk"):
        load(tmp_path / "out", device_map="sequential", max_memory={"cpu": int(0.7 * size)})


def test_it_generates(tmp_path):
    model = saved(tmp_path / "out")
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "out")
    tiny_tokenizer().save_pretrained(tmp_path / "out")
    pipe = transformers.pipeline("text-generation", model=str(tmp_path / "out"))
    assert isinstance(pipe.model.model.layers[0].mlp.up_proj, qk.WQLinear)
    assert pipe.model.generation_config.max_new_tokens == 7
    found = pipe.model.generate(TOKENS, do_sample=False)
    assert torch.equal(found, model.generate(TOKENS, do_sample=False))
    assert pipe("abc", max_new_tokens=4)[0]["generated_text"].startswith("abc")


def test_adapters_on_top(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    saved(tmp_path / "out")
    load = transformers.AutoModelForCausalLM.from_pretrained
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(load(tmp_path / "out"), config)
    before = logits(adapted.base_model.model)
    adapted(TOKENS, labels=TOKENS).loss.backward()
    grads = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert grads and all("lora_" in name and grad is not None for name, grad in grads.items())
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    changed = logits(adapted.base_model.model)
    assert not torch.equal(changed, before)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(tmp_path / "out"), tmp_path / "adapter")
    assert torch.equal(logits(again.base_model.model), changed)
    # Transformers' own way, with the adapter beside the folder and in it.
    model = load(tmp_path / "out")
    model.add_adapter(config)
    assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "own")
    assert not list((tmp_path / "own").glob("model*.safetensors"))
    model = load(tmp_path / "out")
    model.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(model), changed)


def test_the_config_is_written_as_it_was_read(tmp_path):
    saved(tmp_path / "out")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    config = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    for held in (config.quantization_config, copy.deepcopy(config).quantization_config):
        assert held.to_dict() == section and json.loads(held.to_json_string()) == section
        assert json.loads(repr(held).partition(" ")[2]) == section
    assert json.loads(config.to_json_string())["quantization_config"] == section


UP = "model.layers.0.mlp.up_proj."
DAMAGE = {
    "no tensor of a layer": (lambda t: t.pop(UP + "scales"), r"up_proj.*scales"),
    "no words": (lambda t: t.pop(UP + "words"), r"up_proj\.words"),
    "another shape": (lambda t: t.update({UP + "words": t[UP + "words"][1:]}), r"up_proj\.words"),
    "scales of NaN": (lambda t: t[UP + "scales"].fill_(torch.nan), r"up_proj: scales"),
    "no dense tensor": (lambda t: t.pop("model.norm.weight"), r"lacks \['model\.norm\.weight'\]"),
    "a dense one of another shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(3)}),
        r"model\.norm\.weight is \[3\] in the file and \[64\] in the model's config",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder(damage, tmp_path):
    saved(tmp_path / "out")
    change, message = DAMAGE[damage]
    edit_tensors(tmp_path / "out", change)
    # From 5.24 on, Transformers looks at shapes of dense tensors itself.
    errors = (CheckpointError, RuntimeError) if "a dense one" in damage else CheckpointError
    with pytest.raises(errors, match=message if errors is CheckpointError else None):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_other_damage(tmp_path):
    load = transformers.AutoModelForCausalLM.from_pretrained
    saved(tmp_path / "out")
    good = tmp_path / "out" / "model.safetensors"
    for name, damage, message in (
        ("truncated", lambda f: f.write_bytes(f.read_bytes()[:-20]), "model.safetensors"),
        ("version", lambda f: None, "version 7"),
        ("how", lambda f: None, "give it to from_pretrained"),
    ):
        folder = tmp_path / name
        shutil.copytree(good.parent, folder)
        damage(folder / good.name)
        section = {
            "version": lambda s: s.update(version=7),
            "how": lambda s: (s.clear(), s.update(quant_method="qkernels", scheme="w4a16-g32")),
        }.get(name)
        if section is not None:
            edit_config(folder, lambda c, change=section: change(c["quantization_config"]))
        with pytest.raises(CheckpointError, match=message):
            load(folder)


# Folders of other packages.

WHOLE = (
    *("awq-autoawq-gemm-g128", "awq-autoawq-gemv-g64", "ct-sharded-w4a16"),
    *("gptq-2bit-g32-asym", "gptq-3bit-g64-asym", "gptq-4bit-g128-sym"),
    *("gptq-4bit-g32-asym-desc-act", "gptq-v2-4bit-g64-asym"),
    *("bnb-int8-model", "bnb-nf4-dq-model", "torchao-model"),
)


def few_tokens(model):
    return torch.arange(16)[None] % model.get_input_embeddings().num_embeddings


@pytest.mark.parametrize("name", WHOLE)
def test_folders_of_other_packages(name, used, tmp_path):
    model = qk.load_model(GOLDEN / name)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        GOLDEN / name, output_loading_info=True
    )
    assert not any(info.values())
    assert same(loaded, model)
    tokens = few_tokens(model)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    section = json.loads((GOLDEN / name / "config.json").read_text())["quantization_config"]
    assert loaded.config.quantization_config.to_dict() == section
    # What is saved is in the same format, where that is written.
    loaded.save_pretrained(tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(again, model)
    written = again.config.quantization_config.quant_method
    if name.startswith(("awq-autoawq-gemm", "gptq", "ct")):
        assert written == section["quant_method"]


def test_a_config_beside_the_folder(used):
    load, path = transformers.AutoModelForCausalLM.from_pretrained, GOLDEN / "gptq-4bit-g128-sym"
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        loaded = load(path, quantization_config=transformers.GPTQConfig(bits=4, backend="marlin"))
    assert isinstance(loaded.model.layers[0].mlp.up_proj, qk.WQLinear)
    with pytest.raises(ValueError, match="quantized with GPTQConfig"):
        load(path, quantization_config=transformers.AwqConfig(bits=4))


def test_dense_layers_are_for_transformers(used, tmp_path):
    config = type("CompressedTensorsConfig", (), {"quant_method": "x", "dequantize": True})()
    choice = auto.AUTO_QUANTIZER_MAPPING["compressed-tensors"]
    with pytest.raises(LayerError, match=r"stop_using\(\)"):
        choice(config)


def test_models_to_be_quantized_go_to_the_other_package(used, monkeypatch):
    choice, seen = auto.AUTO_QUANTIZER_MAPPING["awq"], []
    theirs = type(choice)(lambda config, **options: seen.append((config, options)), choice.config)
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "awq", theirs)
    given = transformers.AwqConfig(bits=4)
    auto.AutoHfQuantizer.from_config(given, pre_quantized=False)
    auto.AutoHfQuantizer.from_config({"quant_method": "awq", "bits": 4}, pre_quantized=False)
    (first, options), (second, _) = seen
    assert first is given and options == {"pre_quantized": False}
    assert type(second) is transformers.AwqConfig and second.bits == 4


def test_nothing_changes_until_it_is_called_and_all_is_undone():
    tables = auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    before = [dict(table) for table in tables]
    assert before[1]["gptq"] is transformers.GPTQConfig
    with pytest.raises(LayerError, match="format 'gguff' is not one of awq, gptq"):
        use(["gptq", "gguff"])
    assert [dict(table) for table in tables] == before
    use(["gptq"])
    once = [dict(table) for table in tables]
    assert once[0]["awq"] is before[0]["awq"]
    use(["gptq"])
    assert [dict(table) for table in tables] == once
    use()
    assert all(tables[0][name] != before[0][name] for name in ("awq", "compressed-tensors"))
    assert tables[0]["bitsandbytes_4bit"] is before[0]["bitsandbytes_4bit"]
    stop_using()
    assert [dict(table) for table in tables] == before
    stop_using()
    assert [dict(table) for table in tables] == before


@pytest.mark.parametrize(
    "method", ["_adjust_missing_and_unexpected_keys", "_finalize_model_loading"]
)
def test_a_transformers_that_works_otherwise(method, tmp_path, monkeypatch):
    saved(tmp_path / "out")
    if method.startswith("_adjust"):
        monkeypatch.delattr(transformers.PreTrainedModel, method)
    else:
        done = classmethod(lambda cls, model, load_config, info: info)
        monkeypatch.setattr(transformers.PreTrainedModel, method, done)
    with pytest.raises(CheckpointError, match=r"quantized layers do not follow: use qkernels"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_embeddings_stay_one_beside_a_quantized_head(used, tmp_path):
    model = bart().eval()
    qk.quantize_model(model, scheme="w8a16", overrides={"lm_head": "w8a16"})
    qk.save_model(model, tmp_path / "out", format="compressed-tensors")
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert same(loaded, model) and isinstance(loaded.lm_head, qk.WQLinear)
    shared = loaded.model.shared.weight
    assert loaded.model.encoder.embed_tokens.weight is shared
    assert loaded.model.decoder.embed_tokens.weight is shared
