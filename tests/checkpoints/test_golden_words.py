"""AWQ, GPTQ, Marlin and AutoRound as their packages wrote them: tests/golden/README.md."""

import pytest
import torch
from safetensors.torch import load_file

import qkernels as qk
from qkernels.checkpoints import is_quantized, open_checkpoint
from tests.bounds import FOREIGN_LOGITS
from tests.checkpoints.test_golden import GOLDEN

MODELS = {
    "awq-autoawq-gemm-g128": ("awq", "w4a16-g128"),
    "awq-autoawq-gemv-g64": ("awq-gemv", "w4a16-g64"),
    "gptq-2bit-g32-asym": ("gptq", "w2a16-g32"),
    "gptq-3bit-g64-asym": ("gptq", "w3a16-g64"),
    "gptq-4bit-g128-sym": ("gptq", "w4a16-g128-sym"),
    "gptq-4bit-g32-asym-desc-act": ("gptq", "w4a16-g32"),
    "gptq-v2-4bit-g64-asym": ("gptq_v2", "w4a16-g64"),
}
LAYERS = {
    "words-awq-gemm-g32": ("awq", "w4a16-g32"),
    "words-awq-gemv-g32": ("awq-gemv", "w4a16-g32"),
    "words-awq-marlin-channel": ("marlin", "w4a16-sym"),
    "words-awq-marlin-g128": ("marlin", "w4a16-g128-sym"),
    "words-gptq-3bit": ("gptq", "w3a16-g32"),
    "words-gptq-4bit-desc-act": ("gptq", "w4a16-g32"),
    "words-gptq-8bit": ("gptq", "w8a16-g32"),
    "words-gptq_v2-2bit-desc-act": ("gptq_v2", "w2a16-g32"),
    "words-gptq_v2-8bit-sym": ("gptq_v2", "w8a16-g32-sym"),
    "words-auto_round-4bit": ("gptq_v2", "w4a16-g32"),
    "words-auto_round-auto_awq-sym": ("awq", "w4a16-g32-sym"),
    "words-auto_round-auto_gptq-2bit": ("gptq", "w2a16-g32"),
    "words-auto_round-auto_gptq-3bit": ("gptq", "w3a16-g32"),
    "words-auto_round-auto_gptq-4bit": ("gptq", "w4a16-g32"),
    "words-auto_round-gptqmodel-8bit": ("gptq_v2", "w8a16-g32"),
}


def opened(folder):
    """The checkpoint, its layers and the package's numbers."""
    checkpoint = open_checkpoint(GOLDEN / folder)
    weights = {name: checkpoint.read(name) for name in checkpoint.layers}
    return checkpoint, weights, load_file(GOLDEN / folder / "oracle.safetensors")


@pytest.mark.parametrize("folder", LAYERS)
def test_layers_are_those_of_the_package_bit_for_bit(folder):
    checkpoint, weights, oracle = opened(folder)
    format, scheme = LAYERS[folder]
    assert (checkpoint.format.name, str(weights["layer"].scheme)) == (format, scheme)
    want = oracle["layer.weight"]
    assert torch.equal(weights["layer"].dequantize()[: len(want)], want)
    assert (weights["layer"].perm is not None) == ("desc-act" in folder)


@pytest.mark.parametrize("folder", MODELS)
def test_models_give_the_weights_and_logits_of_the_package(folder):
    checkpoint, weights, oracle = opened(folder)
    format, scheme = MODELS[folder]
    assert checkpoint.format.name == format and is_quantized(GOLDEN / folder)
    assert {str(weight.scheme) for weight in weights.values()} == {scheme}
    model = qk.load_model(GOLDEN / folder)
    for name in [name for name in oracle if name.endswith("weight")]:
        want = oracle[name]
        layer = model.get_submodule(name.removesuffix(".weight"))
        # The packages dequantize in fp16, where only the product is rounded.
        assert torch.equal(layer.dequantize()[: len(want)].half(), want), name
    with torch.no_grad():
        logits = model(oracle["input_ids"]).logits.float()
    error = (logits - oracle["logits"]).norm() / oracle["logits"].norm()
    assert error < FOREIGN_LOGITS


@pytest.mark.parametrize(
    "folder", [n for n, (f, _) in (MODELS | LAYERS).items() if f in ("awq", "gptq", "gptq_v2")]
)
def test_what_is_written_is_what_the_package_wrote(folder):
    checkpoint, weights, _ = opened(folder)
    for name, weight in weights.items():
        written = checkpoint.format.write_layer(weight)
        stored = {n.rpartition(".")[2] for n in checkpoint.layers[name].tensors}
        # AutoRound leaves out an index that says nothing.
        assert set(written) == stored | ({"g_idx"} if checkpoint.format.name != "awq" else set())
        for part in stored:
            wanted = checkpoint.store.get(f"{name}.{part}")
            assert written[part].dtype == wanted.dtype and torch.equal(written[part], wanted), part


def test_whole_words_less_one_are_read_as_their_writer_took_them():
    """71 of the model's zero points are 0, which borrows from the field above."""
    _, weights, _ = opened("gptq-2bit-g32-asym")
    assert sum(int((weight.zeros == 0).sum()) for weight in weights.values()) == 71


def test_gemv_fast_is_q_s_less_a_product_that_is_rounded():
    checkpoint, weights, oracle = opened("words-awq-gemv_fast-g64")
    weight = weights["layer"]
    assert checkpoint.format.name == "awq-gemv-fast" and weight.offsets is not None
    want = oracle["layer.weight"]
    assert torch.equal(weight.dequantize()[: len(want)], want)
