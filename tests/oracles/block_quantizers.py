"""A block of Llama that packages quantize with its inputs at hand, each in a process of its own."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import qkernels as qk
from tests.oracles.models import llama
from tests.oracles.packages import run
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

LLMCOMPRESSOR_AWQ = (
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

AUTOROUND = (
    _COMMON
    + """
from auto_round import AutoRound
from transformers import PreTrainedTokenizerFast

# Weights are left rounded to their grid, with `scale` and `zp` beside them.
AutoRound(
    model,
    PreTrainedTokenizerFast.from_pretrained(f"{folder}/dense"),
    bits=case["bits"], group_size=case["group_size"], sym=False, iters=case["iters"],
    dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}
             for row in tokens],
    nsamples=len(tokens), seqlen=tokens.shape[1], batch_size=8,
    device_map="cpu", enable_torch_compile=False, low_cpu_mem_usage=False, amp=False,
).quantize()
done()
"""
)

LLMCOMPRESSOR_PREPARED = (
    _COMMON
    + """
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import PreTrainedTokenizerFast

# It locks pages for a device that is not there.
IntermediatesCache.pin_memory = lambda self, index: None
modifiers = {"smoothquant": SmoothQuantModifier, "spinquant": SpinQuantModifier}
oneshot(
    model=model,
    processor=PreTrainedTokenizerFast.from_pretrained(f"{folder}/dense"),
    dataset=Dataset.from_dict(
        {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    ),
    recipe=[modifiers[case.pop("modifier")](**case)],
    num_calibration_samples=len(tokens),
    max_seq_length=tokens.shape[1],
)
done()
"""
)


def model_of(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return outlying(llama(torch.float32))


def tokens_of(seed: int = 3) -> torch.Tensor:
    return torch.randint(128, (16, 32), generator=torch.Generator().manual_seed(seed))


def theirs(
    program: str,
    folder: Path,
    model: LlamaForCausalLM | None = None,
    tokens: torch.Tensor | None = None,
    **case,
) -> LlamaForCausalLM:
    """The model, that of `model_of` where none is given, with the weights that a package has made,
    by `case` of its program."""
    model = model_of() if model is None else copy.deepcopy(model)
    model.save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    tokens = tokens_of() if tokens is None else tokens
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    (folder / "case.json").write_text(json.dumps(case))
    run(program, folder)
    model.load_state_dict(load_file(folder / "made.safetensors"))
    return model


def ours(recipe: str, bits: int) -> LlamaForCausalLM:
    model = model_of()
    qk.quantize_model(
        model, recipe, f"w{bits}a16-g32-sfp32", calibration=[tokens_of()], check_kernels=False
    )
    return model


@torch.no_grad()
def block_errors(model: LlamaForCausalLM) -> list[float]:
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
