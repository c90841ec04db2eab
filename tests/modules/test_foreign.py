"""Layers of other packages are known by what they hold, and refused by name."""

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.errors import CheckpointError, LayerError
from qkernels.modules.foreign import foreign_layers
from tests.integrations.modules import module_of, packed_linear
from tests.integrations.test_tensors import four_or_eight_bits, hqq, torchao

BITS, INT8, ROWS = "bnb-nf4", "bnb-int8", "model.layers.0.self_attn.k_proj"


def fp8():
    layer = nn.Linear(4, 4, bias=False)
    weight = torch.zeros(4, 4).to(torch.float8_e4m3fn)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def torch_ao():
    layer = module_of("Linear", {}, where="torch.ao.nn.quantized.dynamic.modules.linear")
    layer._packed_params = nn.Module()
    return layer


LAYERS = {
    "GEMM": lambda: packed_linear("WQLinear_GEMM", "words-awq-gemm-g32"),
    "GPTQ": lambda: packed_linear("TorchLinear", "words-gptq-4bit-desc-act"),
    "Marlin": lambda: module_of("X", {"B": torch.zeros(2, 4, dtype=torch.int32)}),
    "4 bits": lambda: four_or_eight_bits(BITS, ROWS),
    "8 bits": lambda: four_or_eight_bits(INT8, ROWS),
    "HQQ": lambda: hqq("hqq-bits", "four"),
    "torchao": lambda: torchao("torchao-bits", "int8"),
    "float8": fp8,
    "compressed": lambda: module_of("Linear", {"weight_scale": torch.ones(1)}),
    "torch.ao": torch_ao,
    "ours, with AutoAWQ's buffers": lambda: qk.WQLinear_GEMM(4, 32, 64, 64, False, "cpu"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_they_are_known(kind):
    model = nn.Sequential(nn.Linear(8, 8), LAYERS[kind](), nn.Embedding(3, 4), nn.LayerNorm(4))
    assert list(foreign_layers(model)) == ["1"]


def test_what_is_dense_or_ours_is_not():
    marked = module_of("Layer", {"B": torch.zeros(3), "position_ids": torch.arange(3)})
    marked.tokens = nn.Parameter(torch.arange(3), requires_grad=False)
    model = nn.Sequential(nn.Linear(64, 64), nn.Conv1d(2, 2, 1), marked)
    qk.quantize_model(model, scheme="w4a16-g32")
    assert not foreign_layers(model)


def test_quantizing_a_model_with_one_is_refused_and_changes_nothing():
    model = nn.Sequential(nn.Linear(64, 64), packed_linear("TorchLinear", "words-gptq-3bit"))
    with pytest.raises(LayerError, match=r"^1 is a TorchLinear .*qk.replace_linears\(model\)"):
        qk.quantize_model(model, scheme="w4a16-g32")
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("partly", [False, True])
def test_saving_a_model_with_one_is_refused_and_writes_nothing(tmp_path, partly):
    pytest.importorskip("transformers", reason="models come from transformers")
    from tests.checkpoints.models import UP, tiny_model

    model = tiny_model()
    if partly:
        qk.quantize_model(model, scheme="w4a16-g32")
    model.set_submodule(UP, four_or_eight_bits(BITS, ROWS))
    named = rf"^{UP} is a Linear4bit .*qk.replace_linears\(model\)"
    with pytest.raises(CheckpointError, match=named):
        qk.save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if partly:
        with pytest.raises(CheckpointError, match=named):
            model.save_pretrained(tmp_path / "out")
