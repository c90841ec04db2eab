"""`replace_linears`: modules of other packages become `WQLinear` with the same numbers."""

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.checkpoints import open_checkpoint
from qkernels.errors import LayerError
from tests.integrations.modules import (
    GOLDEN,
    compressed_linear,
    golden,
    module_of,
    packed_linear,
)
from tests.tiny_model import tiny_model

AUTO_ROUND = "auto_round_extension.triton.qlinear_tritonv2"
WORDS = [
    # class, what else it has, folder, scheme
    ("WQLinear_GEMM", {}, "words-awq-gemm-g32", "w4a16-g32"),
    ("AwqTorchLinear", {}, "words-awq-gemm-g32", "w4a16-g32"),
    ("WQLinear_GEMV", {}, "words-awq-gemv-g32", "w4a16-g32"),
    ("TorchLinear", {"planar": False, "adapter": None}, "words-gptq_v2-2bit-desc-act", "w2a16-g32"),
    ("TritonV2Linear", {}, "words-gptq_v2-8bit-sym", "w8a16-g32-sym"),
    ("QuantLinear", {"where": AUTO_ROUND}, "words-auto_round-4bit", "w4a16-g32"),
    ("QuantLinear", {"where": AUTO_ROUND + "_zp"}, "words-auto_round-auto_gptq-2bit", "w2a16-g32"),
    ("QuantLinear", {}, "words-auto_round-auto_gptq-3bit", "w3a16-g32"),
    ("QuantLinear", {}, "words-auto_round-auto_gptq-4bit", "w4a16-g32"),
]
COMPRESSED = {
    "ct-pack-w4a16-sym-g128": "w4a16-g128-sym-sbf16",
    "ct-pack-w4a16-asym-g128": "w4a16-g128-sbf16",
    "ct-int-w8a8-dynamic": "w8a8-sbf16",
    "ct-int-w4a8": "w4a8-g128-flat-sbf16",
    "ct-float-fp8-dynamic": "fp8-a8-sbf16",
}
ATTENTION = "model.layers.0.self_attn."


def words(kind="WQLinear_GEMM", folder="words-awq-gemm-g32", **more):
    if kind == "QuantLinear":
        more = {"QUANT_TYPE": "tritonv2", **more}
    return packed_linear(kind, folder, **more)


@pytest.mark.parametrize(("kind", "more", "folder", "scheme"), WORDS)
def test_words_become_the_same_numbers(kind, more, folder, scheme):
    model = nn.Sequential(nn.ReLU(), nn.ModuleDict({"proj": words(kind, folder, **more)}))
    bias = model[1]["proj"]._buffers.get("bias")
    report = qk.replace_linears(model)
    (replaced,) = report.replaced
    layer = model[1]["proj"]
    assert type(layer) is qk.WQLinear
    assert (replaced.name, replaced.scheme, str(layer.scheme)) == ("1.proj", scheme, scheme)
    want, got = golden(folder)[1], layer.dequantize()
    assert (replaced.n, replaced.k) == tuple(got.shape)
    assert torch.equal(got[: len(want)], want)
    assert (layer.bias is None) == (bias is None)
    assert bias is None or torch.equal(layer.bias, bias)
    assert layer.dtype == torch.float16
    assert report.left == {}


def test_words_of_gemv_fast_have_offsets():
    model = nn.Sequential(words("WQLinear_GEMVFast", "words-awq-gemv_fast-g64"))
    qk.replace_linears(model)
    want, got = golden("words-awq-gemv_fast-g64")[1], model[0].dequantize()
    assert torch.equal(got[: len(want)], want)


@pytest.mark.parametrize("folder", COMPRESSED)
def test_compressed_linears_become_the_same_numbers(folder):
    name = ATTENTION + "k_proj"
    model = nn.ModuleDict({"k_proj": compressed_linear(folder, name)})
    # What compressed-tensors does to compute as if weights were quantized.
    model["k_proj"].forward = lambda x: x
    report = qk.replace_linears(model)
    layer, want = model["k_proj"], golden(folder, name)[1]
    assert report.replaced[0].scheme == str(layer.scheme) == COMPRESSED[folder]
    assert torch.equal(layer.dequantize().to(torch.bfloat16), want)
    assert layer.dtype == torch.bfloat16
    assert not hasattr(layer, "quantization_scheme") and "forward" not in vars(layer)


def test_symmetric_weights_have_no_zero_points():
    checkpoint = open_checkpoint(GOLDEN / "words-gptq_v2-8bit-sym")
    model = nn.Sequential(words("TorchLinear", "words-gptq_v2-8bit-sym"))
    qk.replace_linears(model)
    ours, theirs = model[0].to_weight(), checkpoint.read("layer")
    assert ours.zeros is None and ours.scheme == theirs.scheme
    assert torch.equal(ours.codes, theirs.codes)


def test_a_model_runs_and_saves_as_one_of_ours(tmp_path):
    model = tiny_model()
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    for name in linears:
        made = qk.WQLinear_GEMM.from_linear(model.get_submodule(name), 4, 32)
        model.set_submodule(name, made)
    model.is_quantized = model.is_loaded_in_4bit = True
    x = torch.arange(12)[None]
    with torch.no_grad():
        want = model(x).logits
        report = qk.replace_linears(model)
        assert [layer.name for layer in report.replaced] == linears
        assert report.left == {"lm_head": "it is not quantized"}
        assert torch.equal(model(x).logits, want)
    assert not hasattr(model, "is_loaded_in_4bit") and not hasattr(model, "is_quantized")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(qk.load_model(tmp_path)(x).logits, want)


def test_hooks_names_and_training_mode_go_on():
    inner = words()
    model = nn.ModuleDict({"a": inner, "b": nn.Sequential(inner)}).eval()
    model["a"].train()
    seen = []
    handle = inner.register_forward_hook(lambda *_: seen.append(1))
    report = qk.replace_linears(model)
    assert [layer.name for layer in report.replaced] == ["a", "b.0"]
    assert model["a"] is model["b"][0] and model["a"].training and not model["b"].training
    x = torch.ones(1, model["a"].in_features)
    model["a"](x)
    handle.remove()
    model["a"](x)
    assert seen == [1]
    assert not hasattr(model["a"], "w_bit")


def test_accelerates_hooks_go_on():
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model = nn.Sequential(words())
    hooks.add_hook_to_module(model[0], hooks.AlignDevicesHook("cpu", io_same_device=True))
    hook = model[0]._hf_hook
    qk.replace_linears(model)
    assert model[0]._hf_hook is hook
    model[0](torch.ones(1, model[0].in_features))


def test_the_new_layers_share_no_memory_with_the_old():
    old = [words(), compressed_linear("ct-int-w8a8-dynamic", ATTENTION + "k_proj")]
    model = nn.Sequential(*old)
    qk.replace_linears(model)
    want = [layer.dequantize() for layer in model]
    for module in old:
        for tensor in (*module.buffers(), *module.parameters()):
            tensor.data.zero_()
    assert all(torch.equal(layer.dequantize(), w) for layer, w in zip(model, want, strict=True))


def test_what_is_left_alone_and_why():
    adapted, patched = words(), words()
    adapted.adapter, patched.forward = object(), lambda x: x
    marlin = module_of("MarlinLinear", {"B": torch.zeros(2, 2, dtype=torch.int32)})
    name = ATTENTION + "k_proj"
    turned = compressed_linear("ct-pack-w4a16-sym-g128", name)
    turned.add_module("rotation", nn.Identity())
    left = {
        "adapted": (adapted, "adapter"),
        "patched": (patched, "forward has been replaced"),
        "marlin": (marlin, "backend='torch'"),
        "exllama": (words("QuantLinear", "words-gptq-8bit", QUANT_TYPE="exllama"), "QuantLinear"),
        "planes": (words("TorchLinear", "words-gptq-8bit", planar=True), "planes"),
        "unpacked": (
            compressed_linear("ct-pack-w4a16-sym-g128", name, "frozen"),
            "before the first forward",
        ),
        "turned": (turned, "rotation"),
        "bits": (words("TorchLinear", "words-gptq-8bit", bits=5), "5 bits"),
        "dense": (nn.Linear(2, 2), "it is not quantized"),
    }
    model = nn.ModuleDict({name: module for name, (module, _) in left.items()})
    model["good"] = words()
    model["mixer"] = module_of("StateSpace", {"B": torch.zeros(2, 2)})
    model["lazy"], left["lazy"] = (lazy := nn.LazyLinear(2)), (lazy, "first forward")
    report = qk.replace_linears(model)
    assert [layer.name for layer in report.replaced] == ["good"]
    assert set(left) | {"turned.rotation"} >= set(report.left) >= set(left)
    for name, (module, reason) in left.items():
        assert model[name] is module and reason in report.left[name], report.left[name]
    assert report.as_dict()["left"] == report.left
    assert report.as_dict()["replaced"][0]["scheme"] == "w4a16-g32"


def test_a_model_without_such_layers_is_an_error_with_a_remedy():
    with pytest.raises(LayerError, match="quantize_model"):
        qk.replace_linears(nn.Sequential(nn.Linear(4, 4)))
    marlin = module_of("MarlinLinear", {"qweight": torch.zeros(2, 2, dtype=torch.int32)})
    with pytest.raises(LayerError, match=r"0: a MarlinLinear.*backend='torch'"):
        qk.replace_linears(nn.Sequential(marlin))
    with pytest.raises(LayerError, match=r"the model: it is the model itself.*nn.Sequential"):
        qk.replace_linears(words())
    ours = nn.Sequential(qk.WQLinear.from_linear(nn.Linear(64, 8), "w4a16"))
    with pytest.raises(LayerError, match="no layer that can be replaced"):
        qk.replace_linears(ours)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: m.scales.fill_(float("nan")), "NaN"),
        (lambda m: m.register_buffer("qzeros", m.qzeros[:, :1]), "qzeros"),
        (lambda m: m.register_buffer("bias", torch.zeros(3)), "bias"),
        (lambda m: m.to("meta"), "offloaded"),
    ],
)
def test_a_damaged_layer_leaves_the_model_as_it_was(damage, message):
    model = nn.ModuleDict({"good": words(), "bad": words()})
    damage(model["bad"])
    before = dict(model.named_modules())
    state = {name: tensor.clone() for name, tensor in model["good"].state_dict().items()}
    with pytest.raises(LayerError, match=rf"bad.*{message}"):
        qk.replace_linears(model)
    assert dict(model.named_modules()) == before
    assert all(torch.equal(t, state[n]) for n, t in model["good"].state_dict().items())


def test_device_and_check_kernels_are_those_asked_for():
    model, other = nn.Sequential(words()), nn.Sequential(words())
    qk.replace_linears(model, device="cpu", check_kernels=False)
    qk.replace_linears(other)
    assert not model[0].check_kernels and other[0].check_kernels
    assert torch.equal(model[0].dequantize(), other[0].dequantize())
