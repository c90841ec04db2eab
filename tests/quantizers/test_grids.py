"""Searched scales against those of ranges, for every scheme."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels import rounding
from qkernels.quantizers import grids
from qkernels.quantizers.method import LayerTask
from qkernels.quantizers.recipe import Recipe
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight
from tests.schemes import ALL

PARSED = [QuantScheme.parse(text) for text in ALL]
SLACK = 1 + 1e-5
"""Of sums of squares in fp32 in two orders."""


def encoded(parameters, weight):
    if isinstance(parameters, QuantizedWeight):
        return parameters
    codes = rounding.encode_rows(weight, parameters, 0)
    return QuantizedWeight(scheme=parameters.scheme, codes=codes, **parameters.fields)


def made_by(recipe, weight, scheme):
    (part,) = Recipe.parse(recipe).parts
    scale = 1.0 if scheme.activation.is_static else None
    task = LayerTask("layer", weight, None, scheme, None, scale)
    return encoded(part.method.quantize(task, part.parameters), weight)


def errors(made, weight):
    """The squared error that each scale is to answer for."""
    wrong = (made.dequantize().double() - weight.double()).square()
    if made.scheme.per_tensor:
        return wrong.sum()[None]
    length = made.scheme.group_length(made.k)
    parts = [wrong[:, i : i + length].sum(dim=1) for i in range(0, made.k, length)]
    return torch.stack(parts, dim=1)


@st.composite
def weights(draw):
    """Weights with rows and groups of all sizes, some of them zero, some with a few large ones."""
    n, k = draw(st.integers(1, 9)), draw(st.integers(1, 140))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(n, k, generator=generator)
    weight *= 10 ** torch.empty(n, 1).uniform_(-3, 2, generator=generator)
    if draw(st.booleans()):
        weight[torch.rand(n, k, generator=generator) < 0.05] *= 6
    if draw(st.booleans()):
        weight += draw(st.sampled_from([-3.0, 0.5]))
    if draw(st.booleans()):
        weight[draw(st.integers(0, n - 1)), : draw(st.integers(1, k))] = 0
    return weight.to(draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])))


@settings(max_examples=150, deadline=None)
@given(weights(), st.sampled_from(PARSED))
def test_no_scale_answers_for_more_error_than_that_of_the_range(weight, scheme):
    if scheme.activation.granularity == "staticasym":
        return
    nearest, made = (made_by(recipe, weight, scheme) for recipe in ("rtn", "rtn(grid=mse)"))
    found, before = errors(made, weight), errors(nearest, weight)
    if scheme.scale_levels == "blocks":
        # 16 rows have their steps in common.
        found, before = (sums_of_blocks(each) for each in (found, before))
    assert (found <= SLACK * before + 1e-30).all()


def sums_of_blocks(errors):
    padded = F.pad(errors, (0, 0, 0, -len(errors) % 16))
    return padded.unflatten(0, (-1, 16)).sum(dim=1)


def spiked(n=24, k=256):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(n, k, generator=generator)
    weight[:, ::29] *= 3
    return weight


@pytest.mark.parametrize("scheme", PARSED, ids=str)
def test_there_is_something_to_find(scheme):
    weight = spiked()
    nearest, made = (made_by(recipe, weight, scheme) for recipe in ("rtn", "rtn(grid=mse)"))
    # The mean of |w| is the best scale of signs already, and a float has the same relative error
    # under any scale.
    share = {"binary": SLACK, "fp8e4m3": 1.0, "fp8e5m2": 1.0}.get(scheme.weight.name, 0.99)
    assert errors(made, weight).sum() < share * errors(nearest, weight).sum()


@pytest.mark.parametrize("scheme", ["w4a16-gtensor", "w4a8-g64-asym", "nf4-g64-dq"])
@pytest.mark.parametrize("grid", ["hessian", "block"])
def test_scales_of_every_form_are_fitted_to_inputs(scheme, grid):
    weight, scheme = spiked(), QuantScheme.parse(scheme)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(500, 256, generator=generator) * torch.rand(256, generator=generator) ** 3
    gram = x.T @ x
    fitted = rounding.fit(weight, scheme)
    found = {g: encoded(grids.search(weight, fitted, g, gram), weight) for g in ("mse", grid)}

    def cost(made):
        error = made.dequantize() - weight
        blocks = torch.block_diag(*[torch.ones(64, 64)] * 4)
        if grid == "hessian":
            blocks = torch.eye(256)
        elif scheme.per_tensor:
            blocks = torch.ones(256, 256)
        return float(((error @ (gram * blocks)) * error).sum())

    assert cost(found[grid]) < 0.995 * cost(found["mse"])
