"""GGUF files of many kinds of models: experts, orders of rows, and what configs must say."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import qkernels as qk
from qkernels.errors import CheckpointError
from qkernels.models.loading import load_dense
from qkernels.modules.experts import WQExperts
from qkernels.modules.rows import WQRows
from tests.bounds import FROBENIUS_BOUND
from tests.checkpoints.gguf_models import KINDS, random_model, reference, transformers, write

IDS = torch.arange(16)[None]
GOLDEN = Path(__file__).parents[1] / "golden" / "gguf-qwen3moe"
FACTORS = np.linspace(1, 8, 8, dtype=np.float32)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def assert_close(model, wanted):
    got, want = logits(model).double(), logits(wanted).double()
    assert (got - want).norm() <= FROBENIUS_BOUND[torch.float32] * want.norm()


def inverse_frequencies(model):
    return next(m.inv_freq for m in model.modules() if hasattr(m, "inv_freq"))


# Transformers takes sizes of heads or experts of the others for those of its own configs.
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"qwen3", "qwen2moe", "qwen3moe"}))
def test_a_model_is_what_transformers_dequantizes(kind, tmp_path):
    file = write(tmp_path / "model.gguf", kind)
    model = qk.load_model(file)
    assert_close(model, load_dense(file, torch.float32, tokenizer=False)[0])
    dense = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"]
    assert not dense


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "qwen2moe", "qwen3moe", "phi3", "stablelm"])
def test_a_model_is_what_the_package_dequantizes(kind, tmp_path):
    model = qk.load_model(write(tmp_path / "model.gguf", kind))
    assert_close(model, reference(kind))


def test_experts_are_layers_of_their_own(tmp_path):
    model = qk.load_model(write(tmp_path / "model.gguf", "qwen3moe", "Q4_0"))
    wanted = reference("qwen3moe", "Q4_0")
    stacks = {n: m for n, m in model.named_modules() if isinstance(m, WQExperts)}
    assert len(stacks) == 4
    for name, stack in stacks.items():
        assert [str(layer.scheme) for layer in stack.layers] == ["w4a16-g32-sym"] * 3
        assert torch.equal(torch.as_tensor(stack.weight.values()), wanted.get_parameter(name))
    qk.save_model(model, tmp_path / "out", format="qkernels")
    assert torch.equal(logits(qk.load_model(tmp_path / "out")), logits(model))


def test_gate_and_up_may_be_of_two_types(tmp_path):
    types = {
        "blk.0.ffn_up_exps.weight": "Q8_0",
        "blk.0.ffn_down_exps.weight": "F32",
        "blk.1.ffn_gate_exps.weight": "F32",
    }
    model = qk.load_model(write(tmp_path / "model.gguf", "qwen3moe", "Q4_1", types))
    assert_close(model, reference("qwen3moe", "Q4_1", types))
    first, second = (layer.mlp.experts for layer in model.model.layers)
    expert = first.gate_up_proj.layers[2]
    assert isinstance(expert, WQRows)
    assert [str(layer.scheme) for layer in expert.layers] == ["w4a16-g32", "w8a16-g32-sym"]
    # Where one of two is of no type that a scheme holds, both are dense.
    assert isinstance(first.down_proj, torch.nn.Parameter)
    assert isinstance(second.gate_up_proj, torch.nn.Parameter)
    qk.save_model(model, tmp_path / "out", format="qkernels")
    assert torch.equal(logits(qk.load_model(tmp_path / "out")), logits(model))


def test_factors_divide_the_frequencies(tmp_path):
    plain = qk.load_model(write(tmp_path / "plain.gguf", "llama"))
    file = write(tmp_path / "model.gguf", "llama", more={"rope_freqs.weight": FACTORS})
    model = qk.load_model(file)
    wanted = inverse_frequencies(plain).double() / torch.from_numpy(FACTORS).double()
    assert torch.allclose(inverse_frequencies(model).double(), wanted, rtol=2**-22, atol=0)
    assert not torch.equal(logits(model), logits(plain))
    # Scores are not scaled: without factors it is the same model.
    ones = {"rope_freqs.weight": np.ones(8, dtype=np.float32)}
    same = qk.load_model(write(tmp_path / "ones.gguf", "llama", more=ones))
    assert torch.equal(logits(same), logits(plain))
    qk.save_model(model, tmp_path / "out", format="qkernels")
    again = qk.load_model(tmp_path / "out")
    assert torch.equal(inverse_frequencies(again), inverse_frequencies(model))
    assert torch.equal(logits(again), logits(model))


def test_factors_of_llama_3_are_those_that_transformers_works_out(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    config = transformers.LlamaConfig(
        **{**random_model("llama").config.to_dict(), "rope_parameters": rope}
    )
    wanted = inverse_frequencies(transformers.LlamaForCausalLM(config))
    # As llama.cpp writes them.
    factors = []
    for i in range(8):
        length = 2 * math.pi * 10000.0 ** (2 * i / 16)
        smooth = min(max((512 / length - 1) / (4 - 1), 0), 1)
        factors.append(1 / ((1 - smooth) / 8 + smooth))
    tensor = {"rope_freqs.weight": np.array(factors, dtype=np.float32)}
    model = qk.load_model(write(tmp_path / "model.gguf", "llama", more=tensor))
    assert len(set(factors)) == 3
    assert torch.allclose(inverse_frequencies(model), wanted, rtol=2**-20, atol=0)


def test_a_dense_model_of_the_file_has_its_factors(tmp_path):
    file = write(tmp_path / "model.gguf", "llama", more={"rope_freqs.weight": FACTORS})
    dense, _ = load_dense(file, torch.float32, tokenizer=False)
    quantized = qk.load_model(file, dtype=torch.float32)
    assert torch.equal(inverse_frequencies(dense), inverse_frequencies(quantized))
    assert dense.config.rope_parameters == quantized.config.rope_parameters


def test_factors_of_two_lengths(tmp_path):
    tensors = {
        "rope_factors_short.weight": FACTORS,
        "rope_factors_long.weight": 2 * FACTORS,
    }
    keys = {"rope.scaling.attn_factor": 1.25, "rope.scaling.original_context_length": 32}
    model = qk.load_model(write(tmp_path / "model.gguf", "phi3", more=tensors, keys=keys))
    assert model.config.rope_parameters["attention_factor"] == 1.25
    plain = inverse_frequencies(qk.load_model(write(tmp_path / "plain.gguf", "phi3")))
    rotary = next(m for m in model.modules() if hasattr(m, "inv_freq"))
    for length, factor in ((16, 1), (40, 2)):
        rotary(torch.zeros(1, length, 64), torch.arange(length)[None])
        wanted = plain / torch.from_numpy(factor * FACTORS)
        assert torch.allclose(rotary.inv_freq, wanted, rtol=2**-20, atol=0), length


@pytest.mark.parametrize(
    ("keys", "change"),
    [
        ({"rope.freq_base": 5000.0}, {"rope_theta": 5000.0}),
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ],
)
@pytest.mark.parametrize("kind", ["starcoder2", "qwen2"])
def test_what_keys_say_of_positions_is_taken_over(kind, keys, change, tmp_path):
    plain = qk.load_model(write(tmp_path / "plain.gguf", kind))
    model = qk.load_model(write(tmp_path / "model.gguf", kind, keys=keys))
    for key, value in change.items():
        assert model.config.rope_parameters[key] == value
    assert not torch.equal(inverse_frequencies(model), inverse_frequencies(plain))


@pytest.mark.parametrize(
    ("kind", "tensors", "message"),
    [
        ("llama", {"rope_freqs.weight": FACTORS[:5]}, "5 in rope_freqs.*makes it 8 freq"),
        ("llama", {"rope_freqs.weight": FACTORS - 1}, "must be above zero"),
        ("phi3", {"rope_factors_long.weight": FACTORS}, "takes none"),
        ("gpt2", {"rope_freqs.weight": FACTORS}, "takes none"),
        ("qwen3moe", {"blk.0.ffn_gate_exps.bias": np.ones((3, 32), np.float32)}, "has no place"),
    ],
)
def test_tensors_that_do_not_fit_are_errors(kind, tensors, message, tmp_path):
    file = write(tmp_path / "model.gguf", kind, more=tensors)
    with pytest.raises(CheckpointError, match=message):
        qk.load_model(file)


def test_an_unknown_scaling_is_refused(tmp_path):
    file = write(tmp_path / "model.gguf", "llama", keys={"rope.scaling.type": "cubic"})
    with pytest.raises(CheckpointError, match="'cubic': not supported"):
        qk.load_model(file)


def test_a_golden_mixture_of_experts():
    oracle = load_file(GOLDEN / "oracle.safetensors")
    model = qk.load_model(GOLDEN / "model.gguf")
    experts = model.model.layers[1].mlp.experts.gate_up_proj
    assert torch.equal(torch.as_tensor(experts.weight.values()), oracle["gate_up"])
    with torch.no_grad():
        got = model(oracle["input_ids"]).logits
    error = (got - oracle["logits"]).norm()
    assert error <= FROBENIUS_BOUND[torch.float32] * oracle["logits"].norm()
