"""`from_pretrained` with the package of a format, and with ours in its place."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

import qkernels as qk
from qkernels.integrations.transformers import QKernelsConfig, stop_using, use
from tests.bounds import FOREIGN_LOGITS
from tests.oracles.packages import package
from tests.tiny_model import tiny_config

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENS = torch.arange(24).view(1, 24)


@pytest.fixture(autouse=True)
def unused():
    yield
    stop_using()


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits.double()


def assert_close(ours, theirs):
    assert (ours - theirs).norm() <= FOREIGN_LOGITS * theirs.norm()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, qk.WQLinear)]


def dense_folder(folder, dtype=torch.bfloat16):
    torch.manual_seed(0)
    config = tiny_config()
    # bitsandbytes' kernel for CPUs takes no blocks that cross rows.
    config.intermediate_size = 128
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def test_compressed_tensors():
    package("compressed_tensors")
    path = GOLDEN / "ct-sharded-w4a16"
    tokens = TOKENS % 10
    theirs = AutoModelForCausalLM.from_pretrained(path)
    assert not layers_of(theirs)
    use()
    ours = AutoModelForCausalLM.from_pretrained(path)
    assert len(layers_of(ours)) == 7
    assert_close(logits(ours, tokens), logits(theirs, tokens))
    stop_using()
    again = AutoModelForCausalLM.from_pretrained(path)
    assert not layers_of(again) and torch.equal(logits(again, tokens), logits(theirs, tokens))


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a16"])
def test_what_is_quantized_on_load_is_read_by_compressed_tensors(scheme, tmp_path):
    package("compressed_tensors")
    config = QKernelsConfig(scheme, format="compressed-tensors")
    ours = AutoModelForCausalLM.from_pretrained(
        dense_folder(tmp_path / "dense", torch.float32), quantization_config=config
    )
    ours.save_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_close(logits(ours), logits(theirs))
    for name, module in ours.named_modules():
        if isinstance(module, qk.WQLinear):
            assert torch.equal(theirs.get_submodule(name).weight, module.dequantize()), name
    use()
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(back), logits(ours))


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_quantizes_and_our_layers_run_it(bits, tmp_path):
    package("bitsandbytes")
    use(["bitsandbytes"])
    options = {"load_in_8bit": True}
    if bits == 4:
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
    theirs = AutoModelForCausalLM.from_pretrained(
        dense_folder(tmp_path / "dense"), quantization_config=BitsAndBytesConfig(**options)
    )
    assert not layers_of(theirs)
    theirs.save_pretrained(tmp_path / "out")
    want = logits(theirs)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(layers_of(ours)) == 14
    assert_close(logits(ours), want)
