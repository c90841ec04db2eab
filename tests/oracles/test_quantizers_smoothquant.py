"""SmoothQuant's factors beside those of torchao and of llm-compressor: the same inputs, the same s.

Each is compared up to one number for all columns, which changes nothing. llm-compressor has half
the difference between the largest and the smallest value in place of max|x|, which is less where a
column's values are of one sign. So its model is odd here: each sequence comes with one of negated
embeddings, and nothing has a bias.
"""

import pytest
import torch
from torch import nn

import qkernels as qk
from tests.bounds import FOREIGN_FACTORS
from tests.oracles.block_quantizers import LLMCOMPRESSOR_PREPARED, model_of, theirs
from tests.oracles.packages import package, require


def even(ratio):
    """Whether all are one number, to the last bits of fp32."""
    return bool(((ratio / ratio.mean() - 1).abs() <= FOREIGN_FACTORS).all())


def odd_model():
    model = model_of()
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[64:] = -embeddings[:64]
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return model


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_norms_have_the_weights_that_llmcompressor_gives_them(tmp_path, alpha):
    require("llmcompressor")
    dense, made = odd_model(), odd_model()
    tokens = torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(3))
    tokens = torch.cat((tokens, tokens + 64))
    other = theirs(
        *(LLMCOMPRESSOR_PREPARED, tmp_path, dense, tokens),
        modifier="smoothquant",
        smoothing_strength=alpha,
    )
    qk.quantize_model(made, f"smoothquant(alpha={alpha}, fold=true)", "w8a8", calibration=[tokens])
    before, ours, wanted = (model.model.layers[0] for model in (dense, made, other))
    for name in ("input_layernorm", "post_attention_layernorm"):
        gains = [getattr(block, name).weight.detach() for block in (before, ours, wanted)]
        assert not even(gains[0] / gains[2])
        assert even(gains[1] / gains[2])


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.8])
def test_factors_of_inputs_are_those_of_torchao(alpha):
    package("torchao")
    from torchao.prototype.smoothquant import SmoothQuantConfig
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    from torchao.quantization.quantize_.common.quantization_step import QuantizationStep

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(96, 128)).eval()

    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(40, 96, generator=generator) for _ in range(2)]
    for x in batches:
        x[:, ::16] *= 12

    def config(step):
        return SmoothQuantConfig(Int8DynamicActivationInt8WeightConfig(), step, alpha)

    other, made = model(), model()
    quantize_(other, config(QuantizationStep.PREPARE))
    for x in batches:
        other(x)
    quantize_(other, config(QuantizationStep.CONVERT))
    qk.quantize_model(made, f"smoothquant(alpha={alpha})", "w8a8", calibration=batches)
    factor = made[0].to_weight().input_factor
    assert not even(factor) and even(factor / other[0].weight.act_pre_scale)
    x = batches[0]
    with torch.no_grad():
        wanted = model()(x)
        ours, others = ((layer(x) - wanted).norm() for layer in (made, other))
    assert 0.9 * others <= ours <= 1.1 * others
