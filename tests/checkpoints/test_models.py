"""`save_model` and `load_model`: whole models, bit for bit, and what is said of damaged ones."""

import importlib
import os
import resource
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qkernels as qk
from qkernels import rounding
from qkernels.checkpoints import FORMATS, read_weights
from qkernels.checkpoints.store import ShardWriter
from qkernels.errors import CheckpointError
from qkernels.weight import QuantizedWeight
from tests.checkpoints.folders import WRITTEN, edit_config, edit_tensors, holding
from tests.checkpoints.models import LAYER, TOKENS, UP, config_of, logits, put, tiny_model

transformers = pytest.importorskip("transformers", reason="models come from transformers")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("format", "other"),
    [
        *(("compressed-tensors", "w8a8"), ("qkernels", "w8a8"), ("awq", "w4a16-g32")),
        *(("gptq", "w3a16-g32-sym"), ("gptq_v2", "w8a16")),
    ],
)
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_a_model_comes_back_exactly(tied, format, other, size, tmp_path):
    model = tiny_model(tied)
    qk.quantize_model(model, scheme="w4a16-g32", overrides={"*.down_proj": other, "*.o_proj": None})
    want = logits(model)
    qk.save_model(model, tmp_path / "out", format=format, max_shard_size=size)
    loaded = qk.load_model(tmp_path / "out")
    assert torch.equal(logits(loaded), want)
    assert not loaded.training
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) == 1) == (size == "5GB")
    weights = read_weights(tmp_path / "out")
    assert len(weights) == 12
    assert all(isinstance(weight, QuantizedWeight) for weight in weights.values())


def test_the_config_names_what_is_dense(tmp_path):
    model = tiny_model()
    qk.quantize_model(
        model, scheme="w4a16-g32", overrides={"*.down_proj": "w8a8", "*.o_proj": None}
    )
    qk.save_model(model, tmp_path / "out")
    config = config_of(tmp_path / "out")["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert "lm_head" in config["ignore"] and LAYER + "self_attn.o_proj" in config["ignore"]


def test_gptq_and_awq_name_what_is_dense_or_other(tmp_path):
    model = tiny_model()
    overrides = {"model.layers.1.mlp.down_proj": "w8a16-sym", "*.1.self_attn.o_proj": None}
    qk.quantize_model(model, scheme="w4a16-g32", overrides=overrides)
    qk.save_model(model, tmp_path / "gptq", format="gptq")
    section = config_of(tmp_path / "gptq")["quantization_config"]
    assert (section["bits"], section["group_size"], section["sym"]) == (4, 32, False)
    assert section["dynamic"] == {
        r"+:^model\.layers\.1\.mlp\.down_proj$": {"bits": 8, "group_size": -1, "sym": True},
        r"-:^model\.layers\.1\.self_attn\.o_proj$": {},
    }
    model = tiny_model()
    qk.quantize_model(model, scheme="w4a16-g32", overrides={"*.1.self_attn.o_proj": None})
    qk.save_model(model, tmp_path / "awq", format="awq")
    section = config_of(tmp_path / "awq")["quantization_config"]
    dense = ["model.layers.1.self_attn.o_proj", "lm_head"]
    assert section["modules_to_not_convert"] == dense
    mixed = tiny_model()
    overrides = {"lm_head": "w4a16-g64"}
    with pytest.raises(CheckpointError, match="awq quantizes all layers alike"):
        qk.quantize_model(mixed, scheme="w4a16-g32", overrides=overrides, format="awq")
    qk.quantize_model(mixed, scheme="w4a16-g32", overrides=overrides)
    with pytest.raises(CheckpointError, match="awq quantizes all layers alike"):
        qk.save_model(mixed, tmp_path / "mixed", format="awq")
    assert not (tmp_path / "mixed").exists()


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
def test_conv1d_layers_and_groups_by_activations_are_gptq(tmp_path, format):
    config = transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=4, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    qk.quantize_model(model, scheme="w4a16-g32")
    name = "transformer.h.0.mlp.c_fc"
    layer = model.get_submodule(name)
    weight = layer.to_weight()
    other = qk.WQLinear.from_weight(weight.replace(perm=torch.randperm(weight.k)))
    other.transposed = layer.transposed
    model.set_submodule(name, other)
    qk.save_model(model, tmp_path / "out", format=format)
    assert config_of(tmp_path / "out")["quantization_config"]["desc_act"] is True
    loaded = qk.load_model(tmp_path / "out")
    assert torch.equal(loaded.get_submodule(name).dequantize(), other.dequantize())
    error = (logits(loaded) - logits(model)).abs().max()
    assert error < 1e-5 * logits(model).abs().max()


def test_biases_of_zeros_that_old_gptq_files_have_are_passed_over(tmp_path):
    model = tiny_model()
    qk.quantize_model(model, scheme="w4a16-g32")
    want = logits(model)
    qk.save_model(model, tmp_path / "out", format="gptq")
    put(UP + ".bias", torch.zeros(96).half())(tmp_path / "out")
    assert torch.equal(logits(qk.load_model(tmp_path / "out")), want)
    put(UP + ".bias", torch.ones(96).half())(tmp_path / "out")
    with pytest.raises(CheckpointError, match="up_proj has a bias in the file, and none in the m"):
        qk.load_model(tmp_path / "out")


def test_the_package_that_defines_the_format_reads_it():
    """Unpacks our words with compressed-tensors itself, where it is installed."""
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers",
        reason="compressed-tensors is not installed",
    )
    weight = rounding.quantize(torch.randn(40, 64), "w4a16-g32-sym")
    tensors = FORMATS["compressed-tensors"].write_layer(weight)
    codes = helpers.unpack_from_int32(tensors["weight_packed"], 4, torch.Size(weight.shape))
    assert torch.equal(codes.int() + 8, weight.codes.int())


@pytest.mark.parametrize("format", holding("w4a16-g32", "w8a16"))
def test_a_quantized_head_is_tied_to_nothing(tmp_path, format):
    model = tiny_model()
    qk.quantize_model(model, scheme="w4a16-g32", overrides={"lm_head": "w8a16"})
    qk.save_model(model, tmp_path / "out", format=format)
    # Readers of compressed-tensors would make the head the embedding again.
    tied = format == "qkernels"
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is tied
    assert model.config.tie_word_embeddings is True
    loaded = qk.load_model(tmp_path / "out")
    assert isinstance(loaded.lm_head, qk.WQLinear) and loaded.config.tie_word_embeddings is tied
    assert torch.equal(logits(loaded), logits(model))
    # qkernels 0.1.0 left the config as it was.
    edit_config(tmp_path / "out", lambda config: config.update(tie_word_embeddings=True))
    assert torch.equal(logits(qk.load_model(tmp_path / "out")), logits(model))


def test_code_that_asks_whether_embeddings_are_tied_hears_what_it_heard(tmp_path):
    """T5's relatives scale what goes into the head where they are."""
    config = transformers.UMT5Config(
        vocab_size=128,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=1,
        num_heads=4,
        tie_word_embeddings=True,
        decoder_start_token_id=0,
    )
    model = transformers.UMT5ForConditionalGeneration(config).eval()
    qk.quantize_model(model, scheme="w8a16", overrides={"lm_head": "w8a16"})
    want = logits(model, decoder_input_ids=TOKENS)
    qk.save_model(model, tmp_path / "out", format="qkernels")
    assert torch.equal(logits(qk.load_model(tmp_path / "out"), decoder_input_ids=TOKENS), want)
    with pytest.raises(CheckpointError, match="computes something else where embeddings are not"):
        qk.save_model(model, tmp_path / "other")


def test_what_a_model_says_it_does_not_use_is_passed_over(tmp_path, monkeypatch):
    class ShortLlama(transformers.LlamaForCausalLM):
        _keys_to_ignore_on_load_unexpected = (r"layers\.1\.",)

    model = tiny_model()
    qk.quantize_model(model, scheme="w4a16-g32")
    qk.save_model(model, tmp_path / "out")
    edit_config(tmp_path / "out", lambda config: config.update(num_hidden_layers=1))
    with pytest.raises(CheckpointError, match=r"no layer model.layers.1"):
        qk.load_model(tmp_path / "out")
    monkeypatch.setattr(transformers, "ShortLlama", ShortLlama, raising=False)
    edit_config(tmp_path / "out", lambda config: config.update(architectures=["ShortLlama"]))
    assert len(qk.load_model(tmp_path / "out").model.layers) == 1


def test_without_a_class_it_is_the_language_model_of_its_type(tmp_path):
    model = tiny_model()
    qk.quantize_model(model, scheme="w4a16-g32")
    qk.save_model(model, tmp_path / "out")
    edit_config(tmp_path / "out", lambda config: config.pop("architectures"))
    loaded = qk.load_model(tmp_path / "out")
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("format", holding("w8a16"))
@pytest.mark.parametrize("head", [None, "w8a16"])
def test_one_embedding_under_several_names(tmp_path, head, format):
    config = transformers.BartConfig(
        vocab_size=128,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_position_embeddings=64,
    )
    model = transformers.BartForConditionalGeneration(config).eval()
    model.final_logits_bias += 1
    qk.quantize_model(model, scheme="w8a16", overrides={"lm_head": head})
    want = logits(model, decoder_input_ids=TOKENS)
    qk.save_model(model, tmp_path / "out", format=format)
    names = load_file(tmp_path / "out" / "model.safetensors")
    stored = [name for name in names if "embed_tokens" in name]
    assert len(stored) == (2 if head and format != "qkernels" else 0)
    loaded = qk.load_model(tmp_path / "out")
    assert torch.equal(logits(loaded, decoder_input_ids=TOKENS), want)
    shared = loaded.model.shared.weight
    # Beside a quantized head as well, where the config cannot say so.
    assert loaded.model.encoder.embed_tokens.weight is shared
    assert loaded.model.decoder.embed_tokens.weight is shared


@pytest.mark.parametrize("scheme", ["w8a16", "nf4-g32"])
def test_weights_that_a_model_divides_in_place_are_saved_as_they_were(scheme, tmp_path):
    config = transformers.RwkvConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=3, rescale_every=1, context_length=32
    )
    model = transformers.RwkvForCausalLM(config).eval()
    dense = logits(model)
    assert model.rwkv.layers_are_rescaled
    exclude = ["rwkv.blocks.1.*"]
    qk.quantize_model(model, scheme=scheme, exclude=exclude)
    want = logits(model)
    qk.save_model(model, tmp_path / "out", format="qkernels")
    assert torch.equal(logits(model), want) and (want - dense).norm() / dense.norm() < 0.5
    loaded = qk.load_model(tmp_path / "out")
    assert not loaded.rwkv.layers_are_rescaled
    assert torch.equal(logits(loaded), want) and loaded.rwkv.layers_are_rescaled
    model.save_pretrained(tmp_path / "by transformers")
    assert torch.equal(logits(qk.load_model(tmp_path / "by transformers")), want)


def test_a_layer_under_two_names_stays_one(tmp_path, monkeypatch):
    class SharedLlama(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model.layers[1].mlp.up_proj = self.model.layers[0].mlp.up_proj

    monkeypatch.setattr(transformers, "SharedLlama", SharedLlama, raising=False)
    model = SharedLlama(tiny_model().config).eval()
    qk.quantize_model(model, scheme="w4a16-g32")
    want = logits(model)
    qk.save_model(model, tmp_path / "out")
    loaded = qk.load_model(tmp_path / "out")
    assert torch.equal(logits(loaded), want)
    assert loaded.model.layers[1].mlp.up_proj is loaded.model.layers[0].mlp.up_proj

    def another(tensors):
        tensors["model.layers.1.mlp.up_proj.weight_scale"] *= 2

    edit_tensors(tmp_path / "out", another)
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj is one layer with another"):
        qk.load_model(tmp_path / "out")


def test_buffers_that_are_not_saved_are_those_of_a_new_model(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    model.model.rotary_emb.float()
    model.model.norm.weight.data = model.model.norm.weight.float()
    fresh = type(model)(model.config).model.rotary_emb.inv_freq
    qk.quantize_model(model, scheme="w4a16-g32")
    qk.save_model(model, tmp_path / "out")
    for dtype in (None, torch.float16, torch.float32):
        loaded = qk.load_model(tmp_path / "out", dtype=dtype)
        inv_freq = loaded.model.rotary_emb.inv_freq
        assert inv_freq.dtype == torch.float32 and torch.equal(inv_freq, fresh)
        # Stored in another type than the model's own, so it keeps that.
        assert loaded.model.norm.weight.dtype == torch.float32
        for tensor in (
            loaded.model.embed_tokens.weight,
            loaded.model.layers[0].input_layernorm.weight,
            loaded.model.layers[0].self_attn.q_proj.bias,
        ):
            assert tensor.dtype == (dtype or torch.bfloat16)
        assert loaded.config.dtype == (dtype or torch.bfloat16)


@pytest.mark.parametrize("way", ["compressed-tensors", "qkernels", "save_pretrained"])
def test_layers_keep_the_types_that_they_stand_for(tmp_path, way):
    # In fp16 T5 keeps a layer in fp32, and takes its inputs to that type.
    config = transformers.T5Config(
        d_model=64, d_ff=96, num_layers=1, num_heads=4, d_kv=16, vocab_size=128
    )
    dense = transformers.T5ForConditionalGeneration(config)
    dense.save_pretrained(tmp_path / "dense")
    model = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "dense", dtype=torch.float16
    )
    qk.quantize_model(model, scheme="w8a16")
    want = logits(model, decoder_input_ids=TOKENS)
    if way == "save_pretrained":
        model.save_pretrained(tmp_path / "out")
    else:
        qk.save_model(model, tmp_path / "out", format=way)
    types = config_of(tmp_path / "out")["qkernels_layer_dtypes"]
    assert list(types) == ["float32"] and all(name.endswith(".wo") for name in types["float32"])
    for _ in range(2):
        loaded = qk.load_model(tmp_path / "out")
        for name, layer in loaded.named_modules():
            if isinstance(layer, qk.WQLinear):
                assert layer.dtype == (torch.float32 if name.endswith("wo") else torch.float16)
        assert torch.equal(logits(loaded, decoder_input_ids=TOKENS), want)
        shutil.rmtree(tmp_path / "out")
        qk.save_model(loaded, tmp_path / "out")
        assert config_of(tmp_path / "out")["qkernels_layer_dtypes"] == types


class OddLlama(transformers.LlamaForCausalLM):
    """A model with a buffer that is made of a parameter's values when it is built."""

    def __init__(self, config):
        super().__init__(config)
        ones = torch.ones_like(self.model.norm.weight.detach())
        self.register_buffer("made", ones, persistent=False)


def test_buffers_made_of_parameters_get_their_values(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers, "OddLlama", OddLlama, raising=False)
    model = OddLlama(tiny_model().config)
    qk.quantize_model(model, scheme="w4a16-g32")
    qk.save_model(model, tmp_path / "out")
    loaded = qk.load_model(tmp_path / "out")
    assert torch.equal(loaded.made, torch.ones(64))
    assert torch.equal(logits(loaded), logits(model))


def test_numbers_that_json_does_not_have_come_back(tmp_path):
    config = transformers.Mamba2Config(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=1,
        state_size=8,
        num_heads=8,
        head_dim=16,
        n_groups=1,
        time_step_limit=(0.0, float("inf")),
    )
    model = transformers.Mamba2ForCausalLM(config).eval()
    qk.quantize_model(model, scheme="w8a16")
    qk.save_model(model, tmp_path / "out")
    assert "Infinity" in (tmp_path / "out" / "config.json").read_text()
    loaded = qk.load_model(tmp_path / "out")
    assert tuple(loaded.config.time_step_limit) == (0.0, float("inf"))
    assert torch.equal(logits(loaded), logits(model))


def test_files_are_open_to_others(tmp_path):
    model = tiny_model()
    qk.quantize_model(model, scheme="w4a16-g32")
    before = os.umask(0o027)
    try:
        qk.save_model(model, tmp_path / "out")
    finally:
        os.umask(before)
    files = list((tmp_path / "out").iterdir())
    assert {path.name for path in files} == {
        *("config.json", "generation_config.json", "model.safetensors")
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_a_generation_config_is_saved_as_it_is(tmp_path):
    model = tiny_model()
    # Transformers itself refuses to save this one.
    model.generation_config.temperature = 0.5
    model.generation_config.max_length = 77
    qk.quantize_model(model, scheme="w4a16-g32")
    qk.save_model(model, tmp_path / "out")
    loaded = qk.load_model(tmp_path / "out")
    assert loaded.generation_config.temperature == 0.5
    assert loaded.generation_config.max_length == 77


@pytest.mark.parametrize("format", WRITTEN)
def test_scales_of_zero_are_weights_of_zero(tmp_path, format):
    model = tiny_model()
    other = "w8a8" if format in holding("w4a16-g32", "w8a8") else "w4a16-g32"
    qk.quantize_model(model, scheme="w4a16-g32", overrides={"*.down_proj": other})
    for name in (UP, LAYER + "mlp.down_proj"):
        weight = model.get_submodule(name).to_weight()
        scales = weight.scales.clone()
        scales[3] = 0
        model.set_submodule(name, qk.WQLinear.from_weight(weight.replace(scales=scales)))
    qk.save_model(model, tmp_path / "out", format=format)
    loaded = qk.load_model(tmp_path / "out")
    assert not loaded.get_submodule(UP).dequantize()[3].any()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("format", holding("w4a16-g32"))
def test_negative_scales_are_kept(tmp_path, format):
    model = tiny_model()
    qk.quantize_model(model, scheme="w4a16-g32")
    weight = model.get_submodule(UP).to_weight()
    weight = weight.replace(scales=-weight.scales)
    model.set_submodule(UP, qk.WQLinear.from_weight(weight))
    qk.save_model(model, tmp_path / "out", format=format)
    assert torch.equal(logits(qk.load_model(tmp_path / "out")), logits(model))


def test_buffers_without_end_are_refused(tmp_path, monkeypatch):
    class LongLlama(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            mask = torch.zeros(config.max_position_embeddings, dtype=torch.bool)
            self.register_buffer("mask", mask, persistent=False)

    monkeypatch.setattr(transformers, "LongLlama", LongLlama, raising=False)
    model = LongLlama(tiny_model().config)
    qk.quantize_model(model, scheme="w4a16-g32")
    qk.save_model(model, tmp_path / "out")
    assert qk.load_model(tmp_path / "out").mask.shape == (2048,)
    edit_config(tmp_path / "out", lambda config: config.update(max_position_embeddings=10**14))
    with pytest.raises(CheckpointError, match=r"asks for 1.00e\+14 bytes that the model computes"):
        qk.load_model(tmp_path / "out")


def test_the_old_name_of_the_section_counts(saved):
    edit_config(saved, lambda c: c.update(compression_config=c.pop("quantization_config")))
    assert len(read_weights(saved)) == 14
    assert isinstance(qk.load_model(saved).get_submodule(UP), qk.WQLinear)


def test_what_cannot_be_saved_is_named_and_nothing_is_written(saved, tmp_path):
    model = tiny_model()
    with pytest.raises(CheckpointError, match="no WQLinear"):
        qk.save_model(model, tmp_path / "dense")
    qk.quantize_model(model, scheme="nf4-g32")
    with pytest.raises(CheckpointError, match="nf4 codebooks; formats that hold it: qkernels"):
        qk.save_model(model, tmp_path / "nf4")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        qk.save_model(model, saved, format="qkernels")
    with pytest.raises(CheckpointError, match="'exl2' is not one of compressed-tensors, qkernels"):
        qk.save_model(model, tmp_path / "x", format="exl2")
    with pytest.raises(CheckpointError, match="max_shard_size 'big'"):
        qk.save_model(model, tmp_path / "x", format="qkernels", max_shard_size="big")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("most", [100, 5000, 20_000])
def test_a_limit_on_files_leaves_nothing_and_the_model_can_be_saved_again(tmp_path, most):
    model = tiny_model()
    qk.quantize_model(model, scheme="w4a16-g32")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written: .*File too large"):
            qk.save_model(model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    qk.save_model(model, tmp_path / "out")
    assert torch.equal(logits(qk.load_model(tmp_path / "out")), logits(model))


def test_a_place_where_no_folder_can_be_is_named(tmp_path):
    model = tiny_model()
    qk.quantize_model(model, scheme="w4a16-g32")
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match=r"file/out cannot be written: (Not a directory|File exists)"
    ):
        qk.save_model(model, tmp_path / "file" / "out")


def test_an_error_while_saving_leaves_no_folder_and_the_model_as_it_was(tmp_path, monkeypatch):
    model = tiny_model()
    qk.quantize_model(model, scheme="w4a16-g32")
    want, added = logits(model), ShardWriter.add

    def fail(writer, name, tensor):
        if "layers.1" in name:
            raise KeyboardInterrupt
        added(writer, name, tensor)

    monkeypatch.setattr(ShardWriter, "add", fail)
    with pytest.raises(KeyboardInterrupt):
        qk.save_model(model, tmp_path / "out", max_shard_size=1000)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(logits(model), want)
    monkeypatch.undo()
    qk.save_model(model, tmp_path / "out")
    assert torch.equal(logits(qk.load_model(tmp_path / "out")), want)


@pytest.mark.parametrize("way", ["save_model", "save_pretrained"])
def test_an_offloaded_model_is_refused(way, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = tiny_model(False)
    qk.quantize_model(model, scheme="w4a16-g32")
    where = {"execution_device": torch.device("cpu"), "offload_buffers": True}
    accelerate.cpu_offload(model, **where)
    save = model.save_pretrained if way == "save_pretrained" else lambda f: qk.save_model(model, f)
    with pytest.raises(CheckpointError, match="is offloaded"):
        save(tmp_path / "out")
    accelerate.hooks.remove_hook_from_submodules(model)
    save(tmp_path / "again")
    assert torch.equal(logits(qk.load_model(tmp_path / "again")), logits(model))


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class Own(LlamaForCausalLM):
    config_class = OwnConfig

OwnConfig.register_for_auto_class()
Own.register_for_auto_class("AutoModelForCausalLM")
"""


def test_code_beside_a_model_goes_with_it(tmp_path, monkeypatch):
    (tmp_path / "own_code.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own_code")
    model = own.Own(own.OwnConfig(**tiny_model().config.to_diff_dict()))
    qk.quantize_model(model, scheme="w8a16")
    qk.save_model(model, tmp_path / "out")
    assert (tmp_path / "out" / "own_code.py").read_text() == CODE
    assert config_of(tmp_path / "out")["auto_map"] == {
        "AutoConfig": "own_code.OwnConfig",
        "AutoModelForCausalLM": "own_code.Own",
    }
    # It is not run.
    with pytest.raises(CheckpointError, match="Own is no model of Transformers but code"):
        qk.load_model(tmp_path / "out")


def with_adapter(model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))


WRAPPED = {
    "compiled": (lambda model: torch.compile(model, backend="eager"), "a OptimizedModule is no"),
    "parallel": (nn.DataParallel, "a DataParallel is no model of Transformers"),
    "adapted": (with_adapter, "a PeftModel is no model"),
    "inside of an adapted one": (
        lambda model: with_adapter(model).base_model.model,
        r"layers\.0\.self_attn\.q_proj has an adapter",
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_would_not_load_again_is_refused(name, tmp_path):
    wrap, message = WRAPPED[name]
    model = tiny_model()
    qk.quantize_model(model, scheme="w8a16")
    with pytest.raises(CheckpointError, match=message):
        qk.save_model(wrap(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()
