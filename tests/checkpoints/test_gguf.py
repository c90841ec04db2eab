"""GGUF files as models: the package's own numbers, without quantizing anything again."""

import contextlib
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import qkernels as qk
from qkernels.checkpoints import is_quantized, open_checkpoint
from qkernels.errors import CheckpointError
from qkernels.models.loading import load_dense, load_model_and_tokenizer
from tests.tiny_model import HIDDEN, LINEAR_LAYERS, write_gguf

gguf = pytest.importorskip("gguf", reason="GGUF files are read by the gguf package")
pytest.importorskip("transformers", reason="models come from transformers")

GOLDEN = Path(__file__).parents[1] / "golden" / "gguf-q4_k"
IDS = torch.arange(5, 21)[None]
TYPES = {
    "Q4_0": "w4a16-g32-sym",
    "Q4_1": "w4a16-g32",
    "Q5_0": "w8a16-g32-sym",
    "Q5_1": "w8a16-g32",
    "Q8_0": "w8a16-g32-sym",
}


def written(path, kind="Q4_1", **options):
    return write_gguf(path / "tiny.gguf", gguf.GGMLQuantizationType[kind], **options)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def relative(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("kind", TYPES)
def test_a_model_is_what_the_packages_dequantize(kind, tmp_path):
    file = written(tmp_path, kind)
    assert is_quantized(file) and is_quantized(tmp_path)
    model, dense = qk.load_model(file), load_dense(file, torch.float32)[0]
    layers = {n: m for n, m in model.named_modules() if isinstance(m, qk.WQLinear)}
    # The head too, which lies in the file like any other matrix.
    assert len(layers) == LINEAR_LAYERS + 1
    assert {str(layer.scheme) for layer in layers.values()} == {TYPES[kind]}
    for name, layer in layers.items():
        assert torch.equal(layer.dequantize(), dense.get_submodule(name).weight), name
    assert relative(logits(model), logits(dense)) < 1e-5
    # A folder with one such file is the same, and so is a model in 16 bits but for its roundings.
    half = qk.load_model(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.lm_head.weight.dtype == torch.bfloat16
    assert relative(logits(half).float(), logits(dense)) < 0.05


@pytest.mark.parametrize("kind", TYPES)
def test_a_tied_head_and_the_embedding_are_one_weight(kind, tmp_path):
    file = written(tmp_path, kind, tied=True)
    model, dense = qk.load_model(file), load_dense(file, torch.float32)[0]
    embedding, head = model.model.embed_tokens, model.lm_head
    assert isinstance(embedding, qk.WQEmbedding) and embedding.source is head
    assert str(head.scheme) == TYPES[kind]
    assert torch.equal(head.dequantize(), dense.lm_head.weight)
    assert torch.equal(embedding(IDS), dense.model.embed_tokens(IDS))
    assert relative(logits(model), logits(dense)) < 1e-5
    qk.save_model(model, tmp_path / "out", format="qkernels")
    assert torch.equal(logits(qk.load_model(tmp_path / "out")), logits(model))


def test_an_embedding_beside_a_head_of_its_own(tmp_path):
    file = written(tmp_path, "Q8_0")
    model, dense = qk.load_model(file), load_dense(file, torch.float32)[0]
    embedding = model.model.embed_tokens
    assert isinstance(embedding, qk.WQEmbedding) and embedding.source is None
    assert torch.equal(embedding(IDS), dense.model.embed_tokens(IDS))
    # Other formats have its numbers, in 16 bits or 32 as the model is.
    with pytest.warns(UserWarning, match="no place for quantized embeddings"):
        qk.save_model(model, tmp_path / "out", format="compressed-tensors")
    assert torch.equal(logits(qk.load_model(tmp_path / "out")), logits(model))


def test_an_embedding_of_another_type_stays_dense(tmp_path):
    file = written(tmp_path, "Q8_0", dense=("token_embd",), tied=True)
    model, dense = qk.load_model(file), load_dense(file, torch.float32)[0]
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert relative(logits(model), logits(dense)) < 1e-5


def test_a_model_by_llama_cpp_itself():
    oracle = load_file(GOLDEN / "oracle.safetensors")
    model = qk.load_model(GOLDEN / "model.gguf")
    schemes = {str(m.scheme) for m in model.modules() if isinstance(m, qk.WQLinear)}
    assert "w4a16-g32-sfp32" in schemes and "w8a16-g16-sym-sfp32" in schemes
    with torch.no_grad():
        got = model(oracle["input_ids"]).logits
    assert relative(got, oracle["logits"].float()) < 1e-5


def test_layers_of_other_types_stay_dense(tmp_path):
    file = written(tmp_path, "Q4_0", dense=("ffn_down",))
    model, dense = qk.load_model(file), load_dense(file, torch.float32)[0]
    down = "model.layers.0.mlp.down_proj"
    assert type(model.get_submodule(down)) is torch.nn.Linear
    assert torch.equal(model.get_submodule(down).weight, dense.get_submodule(down).weight)
    assert relative(logits(model), logits(dense)) < 1e-5


def test_it_is_saved_in_our_own_format(tmp_path):
    model = qk.load_model(written(tmp_path))
    with pytest.raises(CheckpointError, match="offsets; formats that hold it: qkernels"):
        qk.save_model(model, tmp_path / "other")
    qk.save_model(model, tmp_path / "out", format="qkernels")
    assert torch.equal(logits(qk.load_model(tmp_path / "out")), logits(model))
    with pytest.raises(CheckpointError, match="gguf is only read"):
        qk.save_model(model, tmp_path / "third", format="gguf")


def test_a_file_without_quantized_blocks_is_a_dense_model(tmp_path):
    file = written(tmp_path, "F32")
    assert not is_quantized(file)
    with pytest.raises(CheckpointError, match="no quantized layer"):
        qk.load_model(file)
    model, tokenizer = load_model_and_tokenizer(file, torch.float32)
    assert not any(isinstance(m, qk.WQLinear) for m in model.modules()) and tokenizer is not None


def test_the_command_line_runs_it_as_it_is(tmp_path):
    model, tokenizer = load_model_and_tokenizer(written(tmp_path))
    assert isinstance(model.lm_head, qk.WQLinear) and model.dtype == torch.bfloat16
    assert tokenizer("ab")["input_ids"] == [3]
    # What is to be quantized is dequantized first, as ever.
    dense, _ = load_dense(tmp_path, torch.float32)
    assert qk.quantize_model(dense, scheme="w8a16").layers


def test_tensors_without_a_place_are_named(tmp_path):
    for name, named in (
        ("rope_freqs.weight", "factors of its position embedding"),
        (
            "blk.0.attn_strange.weight",
            "attn_strange.weight, which has no place in a LlamaForCausal",
        ),
    ):
        folder = tmp_path / name
        folder.mkdir()
        file = written(folder, more={name: np.ones(HIDDEN, dtype=np.float32)})
        with pytest.raises(CheckpointError, match=named):
            qk.load_model(file)


def test_damage_is_an_error_of_ours(tmp_path):
    whole = written(tmp_path).read_bytes()
    file = tmp_path / "tiny.gguf"
    rng = np.random.default_rng(0)
    for cut in (5, 30, 2000, len(whole) // 2):
        file.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"tiny\.gguf"):
            qk.load_model(file)
    for _ in range(30):
        broken = bytearray(whole)
        for place in rng.integers(4, 6000, 3):
            broken[place] = rng.integers(256)
        file.write_bytes(broken)
        # Any other error is a failure of this test.
        with warnings.catch_warnings(), contextlib.suppress(CheckpointError):
            warnings.simplefilter("ignore")
            qk.load_model(file)
    file.write_bytes(b"GGML" + whole[4:])
    assert not is_quantized(file)


def test_a_scale_that_is_no_number_is_named(tmp_path):
    file = written(tmp_path, "Q4_0")
    store = open_checkpoint(file).store
    source = store._sources["model.layers.1.mlp.up_proj.weight"][0].tensor
    data = bytearray(file.read_bytes())
    data[source.data_offset : source.data_offset + 2] = b"\xff\xff"
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: model\.layers\.1\.mlp\.up_proj.*NaN"):
        qk.load_model(file)


def test_two_files_in_a_folder_are_a_question(tmp_path):
    shutil.copy(written(tmp_path), tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"several GGUF files \(other.gguf, tiny.gguf\)"):
        qk.load_model(tmp_path)
