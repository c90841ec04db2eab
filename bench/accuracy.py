"""Is an output right? Compared with the float64 product, in time linear in the weight.

Two checks, of which the larger error counts:
- a few rows of y, every element, against x[rows] @ W.T;
- all rows at once by random projections: y V = x (W.T V) for a few vectors of signs V, so that
  every element of y takes part for the price of a thin product. The difference is taken relative to
  the norm of y, not of y V: with one row y V is a few numbers, any of which may be near zero by
  chance. An error of relative Frobenius norm e then shows as about e.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.scheme import QuantScheme

ROWS_CHECKED = 4
PROJECTIONS = 8
"""So many that their mean square is near the truth: one alone may show twice the error, or none."""

_SLICE_ELEMENTS = 1 << 24

# These tell a wrong kernel from a right one; how exact the kernels are is what tests/ asserts.
# 16-bit weights and sums err by 2^-8 at most; rounding x to int8 or fp8 adds 1% to 3%.
_LIMIT = 2.0**-6
_LIMIT_QUANTIZED_X = 2.0**-4


def error_limit(scheme: QuantScheme | None, *, quantizes_x: bool = False) -> float:
    """The relative error from which on an output counts as wrong; None is a dense product.

    `quantizes_x` is of a subject that rounds x to 8 bits where the scheme does not.
    """
    exact_x = scheme is None or (scheme.weight_only and not quantizes_x)
    return _LIMIT if exact_x else _LIMIT_QUANTIZED_X


class Reference:
    """The float64 answers for one weight [N, K], fp32: made once, used for every M and subject."""

    def __init__(self, weight: Tensor, seed: int = 0) -> None:
        source = torch.Generator().manual_seed(seed)
        n = weight.shape[0]
        signs = torch.randint(0, 2, (n, PROJECTIONS), generator=source) * 2.0 - 1
        self._weight = weight
        self._signs = signs.to(weight.device, torch.float64)
        self._projected = torch.zeros(
            weight.shape[1], PROJECTIONS, dtype=torch.float64, device=weight.device
        )
        for start, stop in self._slices():
            rows = weight[start:stop].double()
            self._projected += rows.T @ self._signs[start:stop]

    def _slices(self) -> list[tuple[int, int]]:
        n, k = self._weight.shape
        step = max(1, _SLICE_ELEMENTS // max(k, 1))
        return [(start, min(n, start + step)) for start in range(0, n, step)]

    def expected(self, x: Tensor) -> Expected:
        """The answers for x [M, K]."""
        rows = _some_rows(x.shape[0])
        wide = x[rows].double()
        parts = [wide @ self._weight[a:b].double().T for a, b in self._slices()]
        projection = x.double() @ self._projected
        return Expected(rows, torch.cat(parts, dim=1), projection, self._signs)


class Expected:
    """What y must be for one x."""

    def __init__(self, rows: list[int], direct: Tensor, projection: Tensor, signs: Tensor) -> None:
        self._rows, self._direct = rows, direct
        self._projection, self._signs = projection, signs
        # About the norm of all of y, from the rows that are known.
        self._scale = float(direct.norm()) * (projection.shape[0] / max(len(rows), 1)) ** 0.5

    @property
    def shape(self) -> tuple[int, int]:
        """Of y: (M, N)."""
        return self._projection.shape[0], self._direct.shape[1]

    def error(self, y: Tensor) -> float:
        """Relative error of y [M, N]; infinity where the shape is wrong or y is not finite."""
        if tuple(y.shape) != self.shape:
            return float("inf")
        if not bool(y.isfinite().all()):
            return float("inf")
        direct = _relative(y[self._rows].double(), self._direct)
        # float32 sums err by far less than 16-bit outputs, and need no 64-bit copy of y.
        projection = (y.float() @ self._signs.float()).double()
        difference = float((projection - self._projection).norm()) / PROJECTIONS**0.5
        return max(direct, difference / self._scale if self._scale else difference)


def _some_rows(m: int) -> list[int]:
    """The first and the last row and some between: tiles go wrong at their ends."""
    count = min(m, ROWS_CHECKED)
    return sorted({i * (m - 1) // max(count - 1, 1) for i in range(count)})


def _relative(value: Tensor, expected: Tensor) -> float:
    scale = float(expected.norm())
    return float((value - expected).norm()) / scale if scale else float(value.norm())
