"""GPTQ: columns are rounded one after the other, and what is left makes up for each error.

With H = x^T x over calibration inputs and U the upper Cholesky factor of its inverse,

    e_j = (w_j - round(w_j)) / U[j, j],    w_k -= e_j U[j, k]  for all k > j

(Frantar et al. 2022, GPTQ, algorithm 1). What is rounded is not W itself but

    W + drift W D H^-1,    D = (x_dense - x)^T x

which gives, at drift = 1, the dense model's outputs from the inputs that quantized blocks give
(the corrected weight of QEP, Arai & Ichikawa 2025; the cross term of GPTAQ and Qronos). When the
codes are there, the scales of each row are solved for: a quadratic in as many scales as the row has
groups. Sweeps of coordinate descent follow (the greedy updates of QuIP, Chee et al. 2023): each
code in turn becomes the one that leaves the least error beside all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels import rounding
from qkernels.calibration.statistics import Needs
from qkernels.quantizers import grids
from qkernels.quantizers.columns import Columns, Kept, descend
from qkernels.quantizers.hessian import MOST_DAMPING, damped_gram, gram_of
from qkernels.quantizers.method import LayerTask, Method
from qkernels.scheme import QuantScheme
from qkernels.weight import (
    SLICE_ELEMENTS,
    QuantizedWeight,
    WeightParameters,
    apply_by_group,
    code_values,
)

_BLOCK = 128
"""Columns whose errors are carried over to those behind them in one product."""


def check_parameters(damp_percent: float, drift: float, sweeps: int) -> None:
    """Raises ValueError for one that is out of range."""
    if not 0 < damp_percent <= MOST_DAMPING:
        raise ValueError(f"damp_percent must be in (0, 1], got {damp_percent:g}")
    if not 0 <= drift <= 1:
        raise ValueError(f"drift must be in [0, 1], got {drift:g}")
    if sweeps < 0:
        raise ValueError(f"sweeps must be 0 or more, got {sweeps}")


@dataclass(frozen=True)
class GptqParameters:
    """Attributes:
    act_order: the order of columns: "off": as they are, each group fitted when it is reached;
        "static": those with the largest inputs first, groups as they are, fitted beforehand;
        "full": those with the largest inputs first, and groups in that order.
    grid: what scales are fitted to; see `grids.Grid`.
    damp_percent: what is added to the diagonal of H, as a part of its mean; doubled until it can be
        factored.
    true_sequential: each layer of a block behind the quantized ones before it.
    drift: how much of the error of earlier blocks is made up for, 0 to 1.
    refit: solve for the scales when the codes are there.
    sweeps: of coordinate descent over the codes, each followed by `refit`.
    """

    act_order: Literal["off", "static", "full"] = "static"
    grid: grids.Grid = "hessian"
    damp_percent: float = 0.01
    true_sequential: bool = True
    drift: float = 0.5
    refit: bool = True
    sweeps: int = 3

    def __post_init__(self) -> None:
        check_parameters(self.damp_percent, self.drift, self.sweeps)


def _statistics(scheme: QuantScheme, parameters: GptqParameters) -> Needs:
    return needs(parameters.drift)


def needs(drift: float) -> Needs:
    """What calibration is to collect. Args: drift: how much of it is made up for."""
    return Needs(quantized=("gram",), paired=("drift",) if drift else ())


def _quantize(task: LayerTask, parameters: GptqParameters) -> WeightParameters:
    assert task.inputs is not None
    gram = gram_of(task.inputs)
    damped, lower = damped_gram(gram, parameters.damp_percent)
    weight = target_of(task, parameters.drift, lower)
    scheme, k = task.scheme, weight.shape[1]
    order = torch.arange(k, device=weight.device)
    if parameters.act_order != "off":
        order = gram.diagonal().argsort(descending=True, stable=True)
    perm = None
    if parameters.act_order == "full":
        perm, order = order, torch.arange(k, device=weight.device)
        weight, gram, damped = weight[:, perm], gram[perm][:, perm], damped[perm][:, perm]
    fitted = rounding.fit(weight, scheme, activation_scale=task.activation_scale)
    at_once = parameters.act_order == "static" or grids.why_not_by_group(scheme) is not None
    if at_once:
        fitted = grids.search(weight, fitted, parameters.grid, gram)
    upper = inverse_factor(damped[order][:, order])
    made = round_columns(
        weight, fitted, order.tolist(), upper, None if at_once else parameters.grid, gram
    )
    added = float((damped.diagonal() - gram.diagonal()).mean())
    if parameters.refit:
        made = refit_scales(made, weight, gram, added)
    for _ in range(parameters.sweeps):
        made = descend(made, weight, damped.float())
        if parameters.refit:
            made = refit_scales(made, weight, gram, added)
    return made if perm is None else made.replace(perm=perm)


def inverse_factor(matrix: Tensor) -> Tensor:
    """The upper Cholesky factor U of the inverse, U^T U, of an fp64 matrix: fp32."""
    # With R R^T = H and R upper, as the factor of H from its last column on is, U = R^-1. The
    # inverse itself, whose factorization may fail where that of H does not, is never made.
    upper = torch.linalg.cholesky(matrix.flip(0, 1)).flip(0, 1)
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(upper, eye, upper=True).float()


def target_of(task: LayerTask, drift: float, lower: Tensor) -> Tensor:
    """The weight whose outputs on these inputs are to be kept, fp32.

    Args:
        lower: the Cholesky factor of the damped H.
    """
    assert task.inputs is not None
    weight = task.weight.float()
    if not drift or "drift" not in task.inputs.paired:
        return weight
    drifted = task.inputs.paired["drift"]
    if not drifted.rows:
        return weight
    moved = drifted.matrix.to(weight.device) / drifted.rows
    missing = torch.cholesky_solve((weight @ moved).double().t(), lower)
    return weight + drift * missing.t().float()


def round_columns(
    weight: Tensor,
    fitted: WeightParameters,
    order: list[int],
    upper: Tensor,
    grid: grids.Grid | None = None,
    gram: Tensor | None = None,
    kept: Kept | None = None,
) -> QuantizedWeight:
    """The weight with its columns rounded in `order`.

    Args:
        weight: fp32 [N, K].
        fitted: its scales and zero points.
        upper: the factor of H^-1, in `order`.
        grid: fits each group again when its first column is reached, for columns that are in their
            order, with the inputs' `gram`; None leaves the groups.
        kept: numbers that leave no error.
    """
    scheme, k = fitted.scheme, fitted.k
    length = scheme.group_length(k)
    fields = {name: value.clone() for name, value in fitted.fields.items()}
    columns = Columns(fitted)
    # Columns are rows here, so that each lies in one piece.
    left = weight[:, order].t().contiguous()
    codes = torch.empty(k, fitted.n, dtype=torch.uint8, device=weight.device)
    start = 0
    while start < k:
        stop = min(k, start + _BLOCK)
        if grid is not None:
            # Up to the end of a group, or to that of the block in one that is longer.
            ends = (start // length + 1) * length, stop // length * length
            stop = min(max(ends), k) if max(ends) <= start + _BLOCK else stop
        errors = torch.empty_like(left[start:stop])
        # Groups that are fitted in between need all that columns before them have left.
        fits = [] if grid is None else [j for j in range(start, stop) if j % length == 0]
        for first, end in pairwise(sorted({start, *fits, stop})):
            if first in fits:
                assert grid is not None and gram is not None
                rows = left[first : first + length].t().contiguous()
                block = gram[first : first + length, first : first + length]
                own = replace(scheme, group_size=None)
                part = grids.search(rows, rounding.fit(rows, own), grid, block)
                group = first // length
                for name, value in part.fields.items():
                    fields[name][:, group] = value[:, 0]
                columns.take_group(group, part)
            moved = columns.round_block(
                left[first:end],
                upper[first:end, first:end],
                order[first:end],
                codes,
                kept=kept,
            )
            errors[first - start : end - start] = moved
            left[end:stop].addmm_(upper[first:end, end:stop].t(), moved, alpha=-1)
        left[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
        start = stop
    return QuantizedWeight(scheme=scheme, codes=codes.t().contiguous(), **fields)


def refit_scales(
    made: QuantizedWeight, weight: Tensor, gram: Tensor, added: float = 0.0
) -> QuantizedWeight:
    """The same codes under the scales that fit best, row by row.

    A row is q = sum_g s_g c_g with c_g its codes of group g less their zero point. Moving its
    scales by d changes its error (w - q) H (w - q)^T by d A d - 2 b d, with A[g, h] = c_g H c_h^T
    and b[g] = c_g H (w - q)^T, which is least where A d = b. A row keeps its scales where rounding
    those found to their type leaves more error than before.

    Where inputs are few, H does not tell all groups apart, and scales may go anywhere: rows that
    have more error then under H with `added` on its diagonal take what is best under that.

    Args:
        weight: fp32 [N, K] and `gram`, H, fp32 [K, K], both in the order of the codes.
    """
    scheme = made.scheme
    if grids.why_not_by_group(scheme) is not None:
        return made
    length, groups = scheme.group_length(made.k), scheme.groups(made.k)
    padding = groups * length - made.k
    scales = made.scales.clone()
    for start, stop in _slices(made.n, made.k, groups):
        values = code_values(scheme, made.codes[start:stop])
        zeros = made.group_zeros(start, stop)
        if zeros is not None:
            apply_by_group(values, zeros, length, Tensor.sub_)
        old = made.scales[start:stop].double()
        # Of the error and not of the weight, which in fp32 would hide what there is to gain.
        error = weight[start:stop] - made.dequantize_rows(made.codes[start:stop], start)
        wanted = _by_group((error @ gram).mul_(values), padding, groups)
        products = wanted.new_empty(stop - start, groups, groups)
        for group in range(groups):
            columns = slice(group * length, min((group + 1) * length, made.k))
            reach = (values[:, columns] @ gram[columns]).mul_(values)
            reach = F.pad(reach, (0, padding)).unflatten(1, (groups, length))
            products[:, group] = reach.sum(dim=2)
        more_wanted = wanted + added * _by_group(values * error, padding, groups)
        squares = _by_group(values.square(), padding, groups)
        more_products = products + added * torch.diag_embed(squares)
        kept = made.scales[start:stop]
        for a, b in ((more_products, more_wanted), (products, wanted)):
            found = (old + _solve(a, b)).to(kept.dtype)
            good = (found > 0).all(dim=1) & found.isfinite().all(dim=1)
            for each in ((a, b), (more_products, more_wanted)):
                good &= _change(*each, found.double() - old) < 0
            kept = torch.where(good[:, None], found, kept)
        scales[start:stop] = kept
    return made.replace(scales=scales)


def _by_group(values: Tensor, padding: int, groups: int) -> Tensor:
    """The sums of values [R, K] over each group, fp64 [R, G]."""
    return F.pad(values, (0, padding)).unflatten(1, (groups, -1)).double().sum(dim=2)


def _slices(n: int, k: int, groups: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose systems and whose values take about the memory of `row_slices`."""
    rows = max(1, SLICE_ELEMENTS // max(k, groups * groups))
    for start in range(0, n, rows):
        yield start, min(n, start + rows)


def _solve(products: Tensor, wanted: Tensor) -> Tensor:
    # A group whose codes are all at their zero point has an empty row and column, and stays.
    diagonal = products.diagonal(dim1=1, dim2=2)
    damping = 1e-9 * diagonal.mean(dim=1, keepdim=True) + (diagonal == 0)
    return torch.linalg.solve(products + torch.diag_embed(damping), wanted)


def _change(products: Tensor, wanted: Tensor, moved: Tensor) -> Tensor:
    """How much more error rows have, [R], when their scales are `moved`, [R, G]."""
    return ((products @ moved[:, :, None]).squeeze(2) - 2 * wanted).mul(moved).sum(dim=1)


GPTQ = Method(
    name="gptq",
    title="second-order rounding, column by column",
    parameters=GptqParameters,
    statistics=_statistics,
    quantize=_quantize,
    in_stages=lambda parameters: parameters.true_sequential,
    adds=lambda parameters: frozenset({"perm"} if parameters.act_order == "full" else ()),
)
