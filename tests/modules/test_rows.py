"""Several layers as one, and what multiplies all of them or none."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qkernels import WQLinear
from qkernels.errors import LayerError
from qkernels.modules.experts import WQExperts
from qkernels.modules.rows import WQRows

K = 64


def layers(*sizes):
    return [WQLinear.from_linear(nn.Linear(K, n), "w4a16-g32-sfp16") for n in sizes]


def test_rows_are_those_of_the_parts():
    rows, x = WQRows(layers(32, 48)), torch.randn(3, K)
    assert rows.weight.shape == (80, K) and rows.weight.dtype == rows.dtype
    assert torch.equal(rows.weight.float(), rows.dequantize())
    assert torch.equal(rows(x), torch.cat([layer(x) for layer in rows.layers], dim=1))
    assert torch.allclose(F.linear(x, rows.weight, rows.bias), rows(x), atol=1e-6)


def test_torch_compile_sees_the_weight():
    rows, x = WQRows(layers(32, 48)), torch.randn(3, K)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def product(x):
        return F.linear(x, rows.weight.float())

    assert torch.allclose(product(x), F.linear(x, rows.weight), atol=1e-3)


@pytest.mark.parametrize("kind", [WQRows, partial(WQExperts, transposed=False)])
def test_all_are_multiplied_or_none(kind):
    made = layers(32, 32)
    together, before = kind(made), [layer.dequantize() for layer in made]
    together.view_scale(0.5)
    assert all(torch.equal(l.dequantize(), b / 2) for l, b in zip(made, before, strict=True))
    made[1]._buffers["scales"].fill_(60000)
    before = [layer.dequantize() for layer in made]
    with pytest.raises(LayerError, match="not multiplied in place by 2"):
        together.view_scale(2.0)
    assert all(torch.equal(l.dequantize(), b) for l, b in zip(made, before, strict=True))
