"""Quantized embeddings, alone or tied to the output head, from quantize_model to folders and
back."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qkernels as qk
from qkernels.checkpoints import mark_quantized, read_weights
from qkernels.checkpoints.config import read_config
from qkernels.errors import CheckpointError, LayerError, SchemeError
from qkernels.modules.packed import PackedModule
from tests.checkpoints.folders import edit_config
from tests.checkpoints.test_ties import MODELS, llama, logits, pickled

transformers = pytest.importorskip("transformers", reason="models come from transformers")

pytestmark = pytest.mark.filterwarnings("ignore:saved in the qkernels format")
EMBEDDING = {
    "llama": "model.embed_tokens",
    "bert": "bert.embeddings.word_embeddings",
    "bart": "model.shared",
}
SCHEME = "w8a16-g32"
GOLDEN = Path(__file__).parents[1] / "golden" / "ct-embedding"


def tied_model(name, scheme=SCHEME):
    """A model whose head and embedding are one quantized weight; and the logits before."""
    model, head = MODELS[name]()
    dense = logits(model)
    overrides = {head: scheme, EMBEDDING[name]: scheme}
    report = qk.quantize_model(model, scheme=SCHEME, overrides=overrides)
    return model, model.get_submodule(head), dense, report


def embeddings(model):
    return [module for module in model.modules() if isinstance(module, qk.WQEmbedding)]


def nbytes(model):
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", MODELS)
def test_head_and_embedding_are_one_weight(name, tmp_path):
    model, head, dense, report = tied_model(name)
    found, want = embeddings(model), logits(model)
    assert (want - dense).norm() / dense.norm() < 0.02
    assert len(found) == (3 if name == "bart" else 1)
    assert all(embedding.source is head for embedding in found)
    assert model.get_input_embeddings() in found
    shared = [layer for layer in report.layers if layer.shares is not None]
    assert [layer.weight_error for layer in shared] == [shared[0].weight_error] * len(found)
    numbers = sum(layer.n * layer.k for layer in report.layers if layer.shares is None)
    assert report.numbers == numbers and EMBEDDING[name] not in report.skipped
    for other in (copy.deepcopy(model), pickled(model)):
        assert all(embedding.source in list(other.modules()) for embedding in embeddings(other))
        assert torch.equal(logits(other), want) and nbytes(other) == nbytes(model)
    qk.save_model(model, tmp_path / "out", format="qkernels")
    loaded = qk.load_model(tmp_path / "out")
    assert torch.equal(logits(loaded), want) and nbytes(loaded) == nbytes(model)
    assert len(embeddings(loaded)) == len(found)
    assert loaded.config.tie_word_embeddings
    files = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    # Once, with no more than its header and what is padded in memory.
    assert files < nbytes(model) + 20_000
    assert EMBEDDING[name] in read_weights(tmp_path / "out")
    model.tie_weights()
    model.init_weights()
    assert torch.equal(logits(model), want) and embeddings(model) == found


@pytest.mark.parametrize("name", MODELS)
def test_the_embedding_alone(name, tmp_path):
    model, head = MODELS[name]()
    dense = logits(model)
    report = qk.quantize_model(model, scheme=SCHEME, include=[EMBEDDING[name]])
    assert type(model.get_submodule(head)) is nn.Linear
    first, *others = embeddings(model)
    assert first.source is None and all(other.source is first for other in others)
    assert [layer.name for layer in report.layers if layer.shares is None] == [EMBEDDING[name]]
    want = logits(model)
    assert 0 < (want - dense).norm() / dense.norm() < 0.02
    qk.save_model(model, tmp_path / "out", format="qkernels")
    loaded = qk.load_model(tmp_path / "out")
    assert torch.equal(logits(loaded), want) and nbytes(loaded) == nbytes(model)
    model.tie_weights()
    assert torch.equal(logits(model), want)


def test_schemes_and_patterns(tmp_path):
    model, head = llama()
    before = copy.deepcopy(model.state_dict())
    for options, error, message in (
        (
            {"overrides": {head: "w8a16", "*embed_tokens": "w4a16-g32"}},
            LayerError,
            r"embed_tokens is to be w4a16-g32 and lm_head w8a16.*they share one weight",
        ),
        ({"overrides": {"*embed_tokens": "w8a8"}}, SchemeError, "no activations to quantize"),
        ({"include": ["*embed_tokns"]}, LayerError, "matches none of the 15 linear layers"),
    ):
        with pytest.raises(error, match=message):
            qk.quantize_model(model, scheme="w8a16", **options)
    for format in ("compressed-tensors", "awq", "gptq"):
        with pytest.raises(CheckpointError, match=r"place of an embedding; .*hold it: qkernels"):
            qk.quantize_model(
                model, scheme="w4a16-g32", overrides={"*embed_tokens": SCHEME}, format=format
            )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    qk.quantize_model(model, scheme=SCHEME, include=["*", "model.*"])
    # Patterns for everything include the head, and no embedding.
    assert isinstance(model.lm_head, qk.WQLinear) and not embeddings(model)
    with pytest.raises(LayerError, match="quantized already"):
        qk.quantize_model(model, scheme=SCHEME, include=["*embed_tokens"])


@pytest.mark.parametrize("head_too", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_format_without_embeddings_stores_their_numbers(name, head_too, tmp_path):
    model, head = MODELS[name]()
    ends = {EMBEDDING[name]: SCHEME, **({head: SCHEME} if head_too else {})}
    qk.quantize_model(model, scheme=SCHEME, overrides=ends)
    with pytest.warns(UserWarning, match=r"place for quantized embeddings: .*the format qkernels"):
        qk.save_model(model, tmp_path / "out", format="compressed-tensors")
    loaded = qk.load_model(tmp_path / "out")
    assert not embeddings(loaded) and not loaded.config.tie_word_embeddings
    assert torch.equal(logits(loaded), logits(model))
    weight = loaded.get_input_embeddings().weight
    assert torch.equal(weight, model.get_input_embeddings().dequantize())


def test_a_folder_of_embeddings_alone(tmp_path):
    model, _ = llama()
    qk.quantize_model(model, scheme=SCHEME, include=["*embed_tokens"])
    with pytest.raises(CheckpointError, match="no layer is quantized beside them"):
        qk.save_model(model, tmp_path / "out", format="compressed-tensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", MODELS)
def test_resized_embeddings_are_dense_and_tied_again(name, tmp_path):
    model, _, _, _ = tied_model(name)
    want = logits(model)
    model.resize_token_embeddings(140)
    resized = logits(model)
    assert not embeddings(model) and resized.shape[-1] == 140
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (resized[..., :128] - want).norm() / want.norm() < 0.02
    qk.save_model(model, tmp_path / "out", format="qkernels")
    assert torch.equal(logits(qk.load_model(tmp_path / "out")), resized)


def test_a_recipe_with_calibration_and_a_folder_to_resume(tmp_path):
    batches = [torch.randint(0, 128, (2, 16)) for _ in range(2)]
    overrides = {"lm_head": SCHEME, "*embed_tokens": SCHEME}
    states = []
    for _ in range(2):
        model, _ = llama()
        report = qk.quantize_model(
            model,
            scheme=SCHEME,
            overrides=overrides,
            calibration=batches,
            resume=tmp_path / "resume",
        )
        assert report.layers[-1].name == "model.embed_tokens"
        assert report.layers[-1].output_error is None
        assert model.model.embed_tokens.source is model.lm_head
        states.append(model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    with pytest.raises(CheckpointError, match="the schemes of layers"):
        qk.quantize_model(
            llama()[0], scheme=SCHEME, calibration=batches, resume=tmp_path / "resume"
        )


def test_generation_and_checkpointed_gradients():
    model, *_ = tied_model("llama")
    model.generation_config.pad_token_id = 0
    tokens = torch.arange(3, 9)[None]
    first = model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert first.shape == (1, 10)
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    rows = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: rows.append(out))
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert rows[0].grad is not None and rows[0].grad.abs().sum() > 0


def test_peft_trains_adapters_on_it():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, *_ = tied_model("llama")
    want = logits(model)
    prepared = peft.prepare_model_for_kbit_training(model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])
    adapted = peft.get_peft_model(prepared, config)
    assert torch.equal(logits(adapted), want)
    tokens = torch.arange(3, 9)[None]
    adapted.train()
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    trained = [n for n, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert any("embed_tokens.lora_embedding" in name for name in trained)
    assert all("lora_" in name for name in trained)


def test_gemma_multiplies_rows(tmp_path):
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    model = transformers.Gemma3ForCausalLM(config).eval()
    dense = logits(model)
    qk.quantize_model(model, scheme=SCHEME, include=["*embed_tokens", "lm_head"])
    want = logits(model)
    assert (want - dense).norm() / dense.norm() < 0.02
    qk.save_model(model, tmp_path / "out", format="qkernels")
    assert torch.equal(logits(qk.load_model(tmp_path / "out")), want)


def test_a_base_model_has_the_weight_of_its_embedding(tmp_path):
    model, *_ = tied_model("llama")
    qk.save_model(model.model, tmp_path / "out", format="qkernels")
    loaded = qk.load_model(tmp_path / "out")
    assert loaded.embed_tokens.source is None
    tokens = torch.arange(12)[None]
    got, want = loaded(tokens).last_hidden_state, model.model(tokens).last_hidden_state
    assert torch.equal(got, want)


def test_save_pretrained_writes_our_own_format(tmp_path):
    model, *_ = tied_model("llama")
    model.save_pretrained(tmp_path / "out")
    assert read_config(tmp_path / "out")["quantization_config"]["quant_method"] == "qkernels"
    assert torch.equal(logits(qk.load_model(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("name", MODELS)
def test_from_pretrained(name, tmp_path):
    from qkernels.integrations.transformers import QKernelsConfig

    model, _, _, _ = tied_model(name)
    qk.save_model(model, tmp_path / "out", format="qkernels")
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model)) and nbytes(loaded) == nbytes(model)
    dense, head = MODELS[name]()
    dense.save_pretrained(tmp_path / "dense")
    ends = {head: SCHEME, EMBEDDING[name]: SCHEME}
    config = QKernelsConfig(scheme=SCHEME, overrides=ends, format="qkernels")
    made = type(model).from_pretrained(tmp_path / "dense", quantization_config=config)
    assert torch.equal(logits(made), logits(model)) and nbytes(made) == nbytes(model)
    config = QKernelsConfig(scheme=SCHEME, overrides=ends, format="compressed-tensors")
    with pytest.raises(CheckpointError, match="place of an embedding"):
        type(model).from_pretrained(tmp_path / "dense", quantization_config=config)


def test_a_base_model_of_a_folder_with_a_tied_head(tmp_path):
    model, _, _, _ = tied_model("llama")
    qk.save_model(model, tmp_path / "out", format="qkernels")
    base = transformers.LlamaModel.from_pretrained(tmp_path / "out")
    tokens = torch.arange(12)[None]
    got, want = base(tokens).last_hidden_state, model.model(tokens).last_hidden_state
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        ({"model.embed_tokens": "nothing"}, "has the weight of 'nothing'"),
        ({"lm_head": "model.layers.0.self_attn.q_proj"}, "lm_head has the weight of"),
        ({"model.embed_tokens": "model.layers.0.self_attn.q_proj"}, r"\[64, 64\] in the file"),
        ({"model.norm": "lm_head"}, "is quantized in the file, and in the model a LlamaRMSNorm"),
        ([], "shared"),
    ],
)
def test_a_damaged_config(shared, message, tmp_path):
    model, *_ = tied_model("llama")
    qk.save_model(model, tmp_path / "out", format="qkernels")
    edit_config(tmp_path / "out", lambda c: c["quantization_config"].update(shared=shared))
    with pytest.raises(CheckpointError, match=message):
        qk.load_model(tmp_path / "out")


def test_an_embedding_that_compressed_tensors_packed(tmp_path):
    oracle = load_file(GOLDEN / "oracle.safetensors")
    model = qk.load_model(GOLDEN)
    embedding = model.model.embed_tokens
    assert isinstance(embedding, qk.WQEmbedding) and str(embedding.scheme) == "w4a16-g32-sym-sfp32"
    for name in ("model.embed_tokens", "lm_head"):
        weight = model.get_submodule(name).dequantize()
        assert torch.equal(weight, oracle[f"{name}.weight"])
    with torch.no_grad():
        got = model(oracle["input_ids"]).logits
    assert (got - oracle["logits"]).norm() / oracle["logits"].norm() < 1e-5
    with pytest.warns(UserWarning, match="no place for quantized embeddings"):
        qk.save_model(model, tmp_path / "out", format="compressed-tensors")
    assert torch.equal(logits(qk.load_model(tmp_path / "out")), logits(model))
    mark_quantized(model, "compressed-tensors")
    with pytest.warns(UserWarning, match="no place for quantized embeddings"):
        model.save_pretrained(tmp_path / "pretrained")
    assert torch.equal(logits(qk.load_model(tmp_path / "pretrained")), logits(model))


def test_a_class_that_ties_embeddings_whatever_a_file_says(tmp_path):
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    qk.quantize_model(model, scheme=SCHEME, overrides={"shared": SCHEME})
    assert type(model.lm_head) is nn.Linear
    with pytest.raises(CheckpointError, match="T5Config ties embeddings whatever"):
        qk.save_model(model, tmp_path / "out", format="compressed-tensors")
    assert not (tmp_path / "out").exists()
    qk.save_model(model, tmp_path / "out", format="qkernels")
    tokens = torch.arange(12)[None]
    loaded = qk.load_model(tmp_path / "out")
    got, want = (m(input_ids=tokens, decoder_input_ids=tokens).logits for m in (loaded, model))
    assert torch.equal(got, want)


def test_the_types_that_embeddings_stand_for(tmp_path):
    model, _ = llama()
    model.to(torch.bfloat16)
    qk.quantize_model(model, scheme=SCHEME, overrides={"lm_head": SCHEME, "*embed_tokens": SCHEME})
    model.model.embed_tokens.float()
    qk.save_model(model, tmp_path / "out", format="qkernels")
    loaded = qk.load_model(tmp_path / "out")
    assert loaded.model.embed_tokens.dtype == torch.float32
    assert loaded.model.layers[0].mlp.up_proj.dtype == torch.bfloat16
    assert all(isinstance(m, PackedModule) for m in (loaded.model.embed_tokens, loaded.lm_head))
