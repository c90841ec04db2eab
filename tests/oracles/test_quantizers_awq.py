"""AWQ beside that of AutoAWQ and of llm-compressor: the same model, the same text.

Each multiplies columns by s = a^t / w^(1 - t) and looks for the t of the least error, in steps of
about a twentieth. They differ in what they measure it on: the packages run the attention or the MLP
behind the columns, or a layer where it is alone, on the inputs themselves; ours goes by x^T x of
each layer. a is the mean of |x| in the packages and the root of the mean of x^2 in ours, which also
tries each t without w. AutoAWQ clips ranges by the largest weight; ours are searched.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkernels as qk
from tests.oracles.models import llama
from tests.oracles.packages import require, run
from tests.quantizers.test_awq import outlying
from tests.tiny_model import tiny_tokenizer

_COMMON = """
import json, os, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

folder = sys.argv[1]
case = json.load(open(f"{folder}/case.json"))
model = LlamaForCausalLM.from_pretrained(f"{folder}/dense").eval()
tokens = load_file(f"{folder}/tokens.safetensors")["tokens"]

def done():
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()
               if "weight_" not in name}, f"{folder}/made.safetensors")
    os._exit(0)
"""

AUTOAWQ = (
    _COMMON
    + """
from awq.models.llama import LlamaAWQForCausalLM
from awq.quantize.quantizer import AwqQuantizer

quantizer = AwqQuantizer(
    LlamaAWQForCausalLM(model, "llama", False, model.config, None, None), model, None,
    w_bit=case["bits"], group_size=case["group_size"], zero_point=True, version="gemm",
    calib_data=tokens.tolist(), split=None, text_column=None, duo_scaling=True,
    apply_clip=case["clip"], export_compatible=True,
    max_calib_samples=len(tokens), max_calib_seq_len=tokens.shape[1],
)
quantizer.quantize()
for block in model.model.layers:
    for layer in block.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = quantizer.pseudo_quantize_tensor(layer.weight.data)[0]
done()
"""
)

LLMCOMPRESSOR = (
    _COMMON
    + """
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import PreTrainedTokenizerFast

# It locks pages for a device that is not there.
IntermediatesCache.pin_memory = lambda self, index: None
args = QuantizationArgs(num_bits=case["bits"], symmetric=False, group_size=case["group_size"])
scheme = QuantizationScheme(targets=["Linear"], weights=args)
oneshot(
    model=model,
    processor=PreTrainedTokenizerFast.from_pretrained(f"{folder}/dense"),
    dataset=Dataset.from_dict(
        {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    ),
    recipe=[
        AWQModifier(duo_scaling=case["duo"]),
        QuantizationModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
    ],
    num_calibration_samples=len(tokens),
    max_seq_length=tokens.shape[1],
)
for block in model.model.layers:
    for layer in block.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = fake_quantize(
                layer.weight.data, layer.weight_scale, layer.weight_zero_point, args
            )
done()
"""
)


def model_of(seed=0):
    torch.manual_seed(seed)
    return outlying(llama(torch.float32))


def tokens_of(seed=3):
    return torch.randint(128, (16, 32), generator=torch.Generator().manual_seed(seed))


def theirs(program, folder, **case):
    model = model_of()
    model.save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    save_file({"tokens": tokens_of()}, folder / "tokens.safetensors")
    (folder / "case.json").write_text(json.dumps(case))
    run(program, folder)
    model.load_state_dict(load_file(folder / "made.safetensors"))
    return model


def ours(recipe, bits):
    model = model_of()
    qk.quantize_model(
        model, recipe, f"w{bits}a16-g32-sfp32", calibration=[tokens_of()], check_kernels=False
    )
    return model


@torch.no_grad()
def block_errors(model):
    """|difference| / |change that the block makes|, each block on its inputs in the dense model."""
    dense, errors = model_of(), []
    blocks = list(zip(dense.model.layers, model.model.layers, strict=True))

    def compare(index):
        def hook(module, arguments, named, output):
            x = arguments[0] if arguments else named["hidden_states"]
            got = blocks[index][1](*arguments, **named)
            errors.append(float((got - output).norm() / (output - x).norm()))

        return hook

    for index, (block, _) in enumerate(blocks):
        block.register_forward_hook(compare(index), with_kwargs=True)
    dense(tokens_of(), use_cache=False)
    return errors


def test_beside_autoawq(tmp_path):
    require("awq")
    (tmp_path / "scaled").mkdir()
    (tmp_path / "clipped").mkdir()
    settings = {"bits": 4, "group_size": 32}
    scaled = block_errors(theirs(AUTOAWQ, tmp_path / "scaled", **settings, clip=False))
    clipped = block_errors(theirs(AUTOAWQ, tmp_path / "clipped", **settings, clip=True))
    assert all_less(block_errors(ours("awq(grid=minmax)", 4)), scaled)
    assert all_less(block_errors(ours("awq", 4)), clipped)


@pytest.mark.parametrize(("bits", "duo"), [(4, True), (3, "both")])
def test_beside_llmcompressor(tmp_path, bits, duo):
    require("llmcompressor")
    made = theirs(LLMCOMPRESSOR, tmp_path, bits=bits, group_size=32, duo=duo)
    assert all_less(block_errors(ours("awq(grid=minmax)", bits)), block_errors(made))


def all_less(errors, others):
    return all(error < other for error, other in zip(errors, others, strict=True))
