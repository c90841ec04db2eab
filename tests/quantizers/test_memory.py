"""Rounding to nearest through `quantize_model` never holds the codes of a layer whole."""

import torch
from torch import nn

import qkernels as qk
from qkernels import rounding, weight


def test_codes_are_made_in_slices(monkeypatch):
    real, rows = rounding.encode_rows, []

    def encode_rows(part, parameters, start):
        rows.append(len(part))
        return real(part, parameters, start)

    def whole(self, **parts):
        raise AssertionError("this holds all codes")

    monkeypatch.setattr(weight, "SLICE_ELEMENTS", 256 * 64)
    monkeypatch.setattr(rounding, "encode_rows", encode_rows)
    monkeypatch.setattr(weight.QuantizedWeight, "__init__", whole)
    model = nn.Sequential(nn.Linear(64, 1000))
    # Kernels are checked on small weights that are held whole.
    report = qk.quantize_model(
        model, scheme="w4a16-g32", calibration=[torch.randn(3, 64)], check_kernels=False
    )
    assert rows == [256, 256, 256, 232]
    assert report.layers[0].weight_error < 0.1
