"""SpQR: a few weights stay in 16 bits, each where it is, and all others are rounded as in GPTQ.

Which ones stay is told by how much error they cause: with H = x^T x, the one that an entry leaves
when all others make up for it as well as they can,

    (w_j - round(w_j))^2 / [H^-1]_jj

(Dettmers et al. 2023, SpQR, equation 2), and what the other weights of its group gain: those at the
ends of the range make the scale of all. They are chosen in passes, each behind scales that are
fitted without those of the pass before. In the columns of GPTQ such a weight is what it is to be,
and leaves no error to others; in the sweeps over the codes it makes up for theirs.

The scheme says how scales and zero points are stored; `-spqr` quantizes them as the paper does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels import rounding, sparse
from qkernels.calibration.statistics import Needs
from qkernels.quantizers import grids
from qkernels.quantizers.columns import Kept, descend
from qkernels.quantizers.gptq import (
    check_parameters,
    inverse_factor,
    needs,
    refit_scales,
    round_columns,
    target_of,
)
from qkernels.quantizers.hessian import damped_gram, gram_of
from qkernels.quantizers.method import LayerTask, Method
from qkernels.scheme import QuantScheme
from qkernels.weight import WeightParameters

_PASSES = 4
_AT_ONE_END = 3
"""Numbers of a group that are looked at together at each end of its range."""


@dataclass(frozen=True)
class SpqrParameters:
    """Attributes:
    outliers: the part of a layer's weights that stay in 16 bits: each takes 32 bits, 48 where rows
        are longer than 32768.
    damp_percent, true_sequential, drift, sweeps: as those of `gptq`.
    """

    outliers: float = 0.01
    damp_percent: float = 0.01
    true_sequential: bool = True
    drift: float = 0.5
    sweeps: int = 3

    def __post_init__(self) -> None:
        if not 0 <= self.outliers <= 0.5:
            raise ValueError(f"outliers must be in [0, 0.5], got {self.outliers:g}")
        check_parameters(self.damp_percent, self.drift, self.sweeps)


def _statistics(scheme: QuantScheme, parameters: SpqrParameters) -> Needs:
    return needs(parameters.drift)


def _quantize(task: LayerTask, parameters: SpqrParameters) -> WeightParameters:
    assert task.inputs is not None
    gram = gram_of(task.inputs)
    damped, lower = damped_gram(gram, parameters.damp_percent)
    weight = target_of(task, parameters.drift, lower)
    order = gram.diagonal().argsort(descending=True, stable=True)
    upper = inverse_factor(damped[order][:, order])
    importance = torch.empty_like(gram.diagonal())
    importance[order] = 1 / upper.square().sum(dim=0)
    mask = choose(weight, task.scheme, gram, importance, parameters.outliers)
    rest = _without(weight, mask, task.scheme)
    fitted = grids.search(rest, rounding.fit(rest, task.scheme), "hessian", gram)
    kept = Kept.of(mask)
    made = round_columns(weight, fitted, order.tolist(), upper, kept=kept)
    added = float((damped.diagonal() - gram.diagonal()).mean())
    for _ in range(parameters.sweeps):
        made = refit_scales(made, weight - kept.numbers, gram, added)
        made = descend(made, weight, damped.float(), kept)
    made = refit_scales(made, weight - kept.numbers, gram, added)
    return made.replace(**sparse.fields_of(kept.numbers, mask))


def choose(
    weight: Tensor, scheme: QuantScheme, gram: Tensor, importance: Tensor, part: float
) -> Tensor:
    """Which weights stay as they are: bool [N, K].

    Args:
        weight: fp32 [N, K].
        gram: H, fp32 [K, K].
        importance: fp32 [K], what the square of an error in each column costs.
        part: of all weights, how many stay.
    """
    mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    apart = replace(scheme, scale_levels="one")
    for number in range(1, _PASSES + 1):
        count = round(part * weight.numel() * number / _PASSES)
        if not count:
            continue
        rest = _without(weight, mask, scheme)
        fitted = grids.search(rest, rounding.fit(rest, apart), "hessian", gram)
        rounded = fitted.dequantize_rows(rounding.encode_rows(weight, fitted, 0), 0)
        gain = (weight - rounded).square_().mul_(importance)
        gain += _gain_of_others(rest, fitted, importance)
        mask = torch.zeros_like(mask)
        mask.view(-1)[gain.flatten().topk(count).indices] = True
    return mask


def _by_group(values: Tensor, scheme: QuantScheme) -> Tensor:
    """[N, K] as [N, G, L], with zeros behind the last column."""
    n, k = values.shape
    length, groups = scheme.group_length(k), scheme.groups(k)
    return F.pad(values, (0, groups * length - k)).view(n, groups, length)


def _without(weight: Tensor, mask: Tensor, scheme: QuantScheme) -> Tensor:
    """The weight with the mean of the other numbers of its group in place of each in `mask`."""
    others = _by_group((~mask).float(), scheme)
    sums = (_by_group(weight, scheme) * others).sum(dim=2)
    means = sums / others.sum(dim=2).clamp(min=1)
    length = scheme.group_length(weight.shape[1])
    spread = means.repeat_interleave(length, dim=1)[:, : weight.shape[1]]
    return torch.where(mask, spread, weight)


def _gain_of_others(rest: Tensor, fitted: WeightParameters, importance: Tensor) -> Tensor:
    """What a group gains where the largest or the least of its numbers are not in it, fp32 [N, K].

    Roundings of others leave scale^2 / 12 each on average, and the scale falls with the range. Of
    several numbers at one end, each has its part of what the group gains without all of them.
    """
    scheme, (n, k) = fitted.scheme, rest.shape
    groups = _by_group(rest, scheme)
    most = min(_AT_ONE_END, groups.shape[2] - 1)
    if not most:
        return torch.zeros_like(rest)
    scales = fitted.group_scales()
    span = scales * ((1 << scheme.bits) - 1)
    noise = scales.square() / 12 * _by_group(importance[None], scheme).sum(dim=2)
    highest, lowest = (groups.topk(most + 1, dim=2, largest=largest) for largest in (True, False))
    gain = torch.zeros_like(groups)
    for ends, others in ((highest, lowest), (lowest, highest)):
        for count in range(1, most + 1):
            narrower = (ends.values[..., count] - others.values[..., 0]).abs()
            ratio = (narrower / rounding.nonzero(span)).clamp(max=1)
            part = (noise * (1 - ratio.square()) / count)[..., None].expand(-1, -1, count)
            gain.scatter_reduce_(2, ends.indices[..., :count], part, "amax")
    return gain.view(n, -1)[:, :k]


def _why_not(scheme: QuantScheme, parameters: SpqrParameters) -> str | None:
    if scheme.weight.kind != "linear" or not scheme.weight_only:
        return "its outliers lie beside integers with 16-bit activations, as of w3a16-g16-spqr"
    return None


SPQR = Method(
    name="spqr",
    title="second-order rounding, with a few weights kept in 16 bits",
    parameters=SpqrParameters,
    statistics=_statistics,
    quantize=_quantize,
    in_stages=lambda parameters: parameters.true_sequential,
    adds=lambda parameters: frozenset(sparse.NAMES if parameters.outliers else ()),
    why_not=_why_not,
)
