"""Our half-quadratic quantization against that of the package it is named after."""

import pytest
import torch

from qkernels import rounding
from qkernels.quantizers.hqq import HQQ, HqqParameters
from qkernels.quantizers.method import LayerTask
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight
from tests.oracles.packages import package

package("hqq")

from hqq.core.quantize import Quantizer

GROUP = 64


def weights(kind):
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(48, 4 * GROUP, generator=generator)
    if kind == "heavy":
        # Few large values, as in real layers.
        weight *= 1 + 4 * (torch.rand(weight.shape, generator=generator) < 0.03)
    if kind == "shifted":
        weight += 0.8
    return weight


@pytest.mark.parametrize("kind", ["normal", "heavy", "shifted"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_more_error_than_the_package_leaves(bits, kind):
    weight = weights(kind)
    codes, meta = Quantizer.quantize(
        weight.clone(),
        nbits=bits,
        group_size=GROUP,
        optimize=True,
        axis=1,
        bitpack=False,
        compute_dtype=torch.float32,
        device="cpu",
    )
    theirs = (codes.float().view(-1, GROUP) - meta["zero"].float()) * meta["scale"].float()
    scheme = QuantScheme.parse(f"w{bits}a16-g{GROUP}-sfp32")
    task = LayerTask("layer", weight, None, scheme, None, None)
    made = HQQ.quantize(task, HqqParameters(zeros="real"))
    ours = QuantizedWeight(
        scheme=scheme, codes=rounding.encode_rows(weight, made, 0), **made.fields
    ).dequantize()
    rows = weight.view(-1, GROUP)
    mine, other = ((found.view(-1, GROUP) - rows).square().sum(dim=1) for found in (ours, theirs))
    assert mine.sum() < 0.99 * other.sum()
    assert (mine <= 1.02 * other).float().mean() > 0.9
