"""What feeds what is found by running a block, in architectures that nothing here names."""

import contextlib

import pytest
import torch
from torch import nn

from qkernels.calibration.blocks import find_blocks
from qkernels.calibration.neighbours import Neighbours, find_neighbours, still_neighbours
from qkernels.quantizers.linear_forms import LinearForms
from qkernels.quantizers.plan import plan_layers
from qkernels.scheme import QuantScheme
from tests.bounds import FOLDED_BOUND
from tests.calibration.test_architectures import ARCHITECTURES, GEMMA, LLAMA_LIKE, MIXTRAL

transformers = pytest.importorskip("transformers", reason="models come from transformers")

GROUPED = {**LLAMA_LIKE, "num_key_value_heads": 2}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
EXPERTS = tuple(f"mlp.experts.gate_up_proj.expert_{i}" for i in range(4))
LLAMA = {
    "input_layernorm": (QKV, 64),
    "post_attention_layernorm": (("mlp.gate_proj", "mlp.up_proj"), 64),
    "self_attn.v_proj": (("self_attn.o_proj",), 32),
    "mlp.up_proj": (("mlp.down_proj",), 96),
}
OPT_BLOCK = {
    "self_attn_layer_norm": (QKV, 64),
    "final_layer_norm": (("fc1",), 64),
    "self_attn.v_proj": (("self_attn.out_proj",), 64),
    "fc1": (("fc2",), 96),
}
EXPECTED = {
    "LlamaForCausalLM": ("LlamaConfig", GROUPED, LLAMA),
    "Qwen3ForCausalLM": ("Qwen3Config", {**GROUPED, "head_dim": 16}, LLAMA),
    "Phi3ForCausalLM": (
        "Phi3Config",
        {**GROUPED, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        {
            "input_layernorm": (("self_attn.qkv_proj",), 64),
            "post_attention_layernorm": (("mlp.gate_up_proj",), 64),
            "self_attn.qkv_proj": (("self_attn.o_proj",), 32),
            "mlp.gate_up_proj": (("mlp.down_proj",), 96),
        },
    ),
    "Gemma3ForCausalLM": (
        "Gemma3TextConfig",
        GEMMA,
        {
            "input_layernorm": (QKV, 64),
            "pre_feedforward_layernorm": (("mlp.gate_proj", "mlp.up_proj"), 64),
            "self_attn.v_proj": (("self_attn.o_proj",), 32),
            "mlp.up_proj": (("mlp.down_proj",), 96),
        },
    ),
    "MixtralForCausalLM": (
        "MixtralConfig",
        MIXTRAL,
        {
            "input_layernorm": (QKV, 64),
            "post_attention_layernorm": (("mlp.gate", *EXPERTS), 64),
            "self_attn.v_proj": (("self_attn.o_proj",), 32),
            **{name: ((name.replace("gate_up", "down"),), 96) for name in EXPERTS},
        },
    ),
    "OPTForCausalLM": ("OPTConfig", ARCHITECTURES["OPTForCausalLM"][1], OPT_BLOCK),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4},
        {
            "ln_1": (("attn.c_attn",), 64),
            "ln_2": (("mlp.c_fc",), 64),
            # Values are the last third; gelu lies behind c_fc.
            "attn.c_attn": (("attn.c_proj",), 64),
        },
    ),
    "BertForMaskedLM": (
        "BertConfig",
        LLAMA_LIKE,
        {"attention.self.value": (("attention.output.dense",), 64)},
    ),
    # Heads lie between queries, keys and values: no rows that follow each other are values alone.
    "BloomForCausalLM": (
        "BloomConfig",
        ARCHITECTURES["BloomForCausalLM"][1],
        {
            "input_layernorm": (("self_attention.query_key_value",), 64),
            "post_attention_layernorm": (("mlp.dense_h_to_4h",), 64),
        },
    ),
}


def block_of(name, dtype=torch.float32, tokens=(4, 40)):
    """The first block of a model of that class with random norms, and a function that runs it."""
    torch.manual_seed(0)
    config, kwargs, _ = EXPECTED[name]
    kwargs = {"bos_token_id": None, "eos_token_id": None, **kwargs}
    model = getattr(transformers, name)(getattr(transformers, config)(**kwargs)).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    layers = list(plan_layers(model, QuantScheme.parse("w4a16"), None, None, {}).schemes)
    LinearForms(model, layers)
    block = model.get_submodule(find_blocks(model, layers)[-1].name)
    if name.startswith("Bert"):
        block = model.bert.encoder.layer[0]
    got = []
    with contextlib.ExitStack() as stack, torch.no_grad():
        hook = block.register_forward_pre_hook(lambda *call: got.append(call[1:]), with_kwargs=True)
        stack.callback(hook.remove)
        model(torch.randint(100, tokens), use_cache=False)
    args, kwargs = got[0]

    def run():
        with torch.no_grad():
            return block(*(a.clone() if isinstance(a, torch.Tensor) else a for a in args), **kwargs)

    return block, run


def first_output(outputs):
    return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


@pytest.mark.parametrize("name", EXPECTED)
def test_neighbours_are_found_and_take_any_factor(name):
    block, run = block_of(name)
    before = {n: p.clone() for n, p in block.named_parameters()}
    found = {one.producer: one for one in find_neighbours(block, run)}
    assert {
        producer: (one.consumers, len(one.channels.unique())) for producer, one in found.items()
    } == EXPECTED[name][2]
    assert all(torch.equal(p, before[n]) for n, p in block.named_parameters())
    wanted = first_output(run())
    for one in found.values():
        factor = torch.exp2(3 * torch.rand(one.count) - 1.5)
        for parameter, values in one.rewritten(block, factor):
            block.get_parameter(parameter).data = values
    after = first_output(run())
    assert float((after - wanted).norm() / wanted.norm()) < FOLDED_BOUND
    changed = [n for n, p in block.named_parameters() if not torch.equal(p, before[n])]
    assert changed
    assert still_neighbours(list(found.values()), block, run)


def test_neighbours_are_found_in_16_bits():
    block, run = block_of("LlamaForCausalLM", torch.bfloat16)
    found = {one.producer: one.consumers for one in find_neighbours(block, run)}
    assert found == {name: consumers for name, (consumers, _) in LLAMA.items()}


class Branches(nn.Module):
    """A norm whose output is also added to the end, and one that an unknown product reads too."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(32), nn.LayerNorm(32)
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)
        self.hidden = nn.Parameter(torch.randn(32, 32))

    def forward(self, x):
        kept = self.first(x)
        x = kept + self.one(kept)
        again = self.second(x)
        return self.two(again) + again @ self.hidden


def test_what_is_read_elsewhere_too_is_no_neighbour():
    block, x = Branches(), torch.randn(20, 32)
    assert find_neighbours(block, lambda: block(x)) == []


def test_an_expert_that_no_row_reached_is_a_neighbour_as_the_others_are():
    block, run = block_of("MixtralForCausalLM", tokens=(1, 1))
    found = {one.producer: one for one in find_neighbours(block, run)}
    assert len(set(found) & set(EXPERTS)) == 2
    reached = [name for name in found["post_attention_layernorm"].consumers if name in found]
    assert set(found["post_attention_layernorm"].consumers) == {"mlp.gate", *EXPERTS}
    assert len(reached) == 2


@pytest.mark.parametrize("producer", ["norm", "first"])
@pytest.mark.parametrize("plus_one", [False, True])
def test_factors_go_to_the_device_of_what_they_scale(producer, plus_one):
    """Here one without numbers, which refuses those of the CPU as a GPU does."""
    block = nn.ModuleDict(
        {
            "norm": nn.LayerNorm(8, device="meta"),
            "first": nn.Linear(8, 8, device="meta"),
            "linear": nn.Linear(8, 4, device="meta"),
        }
    )
    found = Neighbours(
        producer, ("linear",), torch.zeros(8, dtype=torch.int64), 8, plus_one=plus_one
    )
    made = dict(found.rewritten(block, torch.ones(8)))
    assert len(made) == 3
    assert all(values.device.type == "meta" for values in made.values())
