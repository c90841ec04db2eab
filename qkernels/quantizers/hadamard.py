"""Hadamard matrices, and the random rotations that are made of them.

A Hadamard matrix H of order n has entries of 1 and -1 and H H^T = n I. These are constructed:

    Sylvester   2 n from n:  [[H, H], [H, -H]]
    Paley I     q + 1        for a prime power q = 3 mod 4
    Paley II    2 (q + 1)    for a prime power q = 1 mod 4
    Kronecker   m n          from m and n

where q is a prime, its square or its cube (Paley 1933, On orthogonal matrices). So are all orders
that are a multiple of 4 up to 88, and those of nearly all models: 576 = 36 x 16, 3584 = 28 x 128,
11008 = 344 x 32. Other sizes are turned by O x H, O a random orthogonal matrix of what is left
when the largest order in them is taken out.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_RADIX = 16
"""Sylvester's matrix is applied in factors of this order: K log K operations, and few passes."""

_SLICE = 2**20
"""Numbers that are turned at a time, so that what lies between factors stays in a cache."""


def hadamard(n: int) -> Tensor:
    """A Hadamard matrix: fp64 [n, n].

    Raises:
        ValueError: for an order that is not constructed here.
    """
    factors = _factors(n)
    if factors is None:
        raise ValueError(f"no Hadamard matrix of order {n} is constructed")
    return functools.reduce(torch.kron, (_base(m) for m in factors), torch.ones(1, 1).double())


def has_hadamard(n: int) -> bool:
    """Whether `hadamard(n)` is constructed."""
    return _factors(n) is not None


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q = diag(signs) (F_1 x F_2 x ...) (I - 2 m m^T), x Kronecker's product.

    Attributes:
        signs: fp64 [n], 1 and -1.
        factors: fp64, square and orthogonal; their orders multiply to n.
        mirror: m, fp64 [n] of length 1, or None for Q without its last part.
    """

    signs: Tensor
    factors: Sequence[Tensor]
    mirror: Tensor | None = None

    @staticmethod
    def random(n: int, generator: torch.Generator, *, keep_ones: bool = False) -> Rotation:
        """A randomized Hadamard matrix / sqrt(n), or the nearest to it where n has none.

        Args:
            generator: of the CPU, so that all devices get the same.
            keep_ones: Q 1 = 1, so that it leaves the mean of a row as it is.
        """
        signs = torch.randint(2, (n,), generator=generator).double() * 2 - 1
        order = max(d for d in range(1, n + 1) if n % d == 0 and has_hadamard(d))
        factors = [_base(m) / math.sqrt(m) for m in _factors(order) or () if m > 1]
        if order < n:
            factors.insert(0, _random_orthogonal(n // order, generator))
        made = Rotation(signs, factors)
        if not keep_ones:
            return made
        ones = torch.ones(1, n, dtype=torch.float64)
        # A reflection takes where the ones went back to them.
        mirror = (made.apply(ones) - ones)[0]
        length = mirror.norm()
        return made if length < 1e-9 else Rotation(signs, factors, mirror / length)

    @property
    def n(self) -> int:
        """The order."""
        return len(self.signs)

    def apply(self, x: Tensor) -> Tensor:
        """x Q, fp64. Args: x: [..., n]."""
        rows = x.reshape(-1, self.n)
        turned = torch.empty(rows.shape, dtype=torch.float64, device=x.device)
        at_once = max(1, _SLICE // self.n)
        for start in range(0, len(rows), at_once):
            turned[start : start + at_once] = self._apply(rows[start : start + at_once].double())
        return turned.view(x.shape)

    def _apply(self, x: Tensor) -> Tensor:
        behind = self.n
        y = x * self.signs.to(x.device)
        for factor in self.factors:
            m = len(factor)
            behind //= m
            y = torch.matmul(factor.t().to(x.device), y.view(-1, m, behind))
        y = y.view(x.shape)
        if self.mirror is not None:
            mirror = self.mirror.to(x.device)
            y = y - 2 * (y @ mirror)[:, None] * mirror
        return y


def _random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """fp64 [n, n], every one as likely as any other (Mezzadri 2007)."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).contiguous()


@functools.cache
def _factors(n: int) -> tuple[int, ...] | None:
    """Orders that multiply to n, each of Paley's or a power of two up to `_RADIX`."""
    if n < 1 or (n > 2 and n % 4):
        return None
    if n & (n - 1) == 0:
        return (n,) if n <= _RADIX else (_RADIX, *(_factors(n // _RADIX) or ()))
    for m in range(12, n + 1, 4):
        if n % m == 0 and m & (m - 1) and _paley_of(m) is not None:
            rest = _factors(n // m)
            if rest is not None:
                return (m, *(order for order in rest if order > 1))
    return None


@functools.lru_cache(maxsize=64)
def _base(n: int) -> Tensor:
    """Of an order in `_factors`."""
    if n & (n - 1):
        return _paley(n)
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


def _paley_of(n: int) -> tuple[int, int] | None:
    """The field that Paley's matrix of order n is made from, as (p, k) with q = p^k."""
    first, second = _prime_power(n - 1), _prime_power(n // 2 - 1)
    if first is not None and (n - 1) % 4 == 3:
        return first
    return second if second is not None and (n // 2 - 1) % 4 == 1 else None


def _paley(n: int) -> Tensor:
    field = _paley_of(n)
    assert field is not None
    p, k = field
    q = p**k
    # chi(a - b): 1 where a - b is a square, -1 where it is none, 0 where a = b.
    jacobsthal = _characters(p, k)
    border = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    border[0, 1:] = 1
    border[1:, 1:] = jacobsthal
    one = torch.eye(q + 1, dtype=torch.float64)
    if q % 4 == 3:
        border[1:, 0] = -1
        return border + one
    border[1:, 0] = 1
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(border, plus) + torch.kron(one, diagonal)


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k, p an odd prime and k <= 3."""
    for k in (1, 2, 3):
        p = round(q ** (1 / k))
        if p > 2 and p**k == q and all(p % d for d in range(2, math.isqrt(p) + 1)):
            return p, k
    return None


def _characters(p: int, k: int) -> Tensor:
    """chi(a - b) for all a and b of the field of p^k: fp64 [p^k, p^k].

    An element is a polynomial of degree below k over the integers mod p, its number in base p.
    """
    elements = list(itertools.product(range(p), repeat=k))
    modulus = _irreducible(p, k)
    squares = {_square(a, modulus, p) for a in elements if any(a)}
    chi = torch.tensor(
        [0.0 if not any(a) else 1.0 if a in squares else -1.0 for a in elements],
        dtype=torch.float64,
    )
    digits = torch.tensor(elements)
    powers = p ** torch.arange(k - 1, -1, -1)
    difference = (digits[:, None] - digits[None]) % p
    return chi[(difference * powers).sum(dim=2)]


def _irreducible(p: int, k: int) -> tuple[int, ...]:
    """The coefficients c_0, ..., c_(k-1) of x^k + ... + c_0 that has no root mod p, for which, up
    to k = 3, that is to be irreducible."""
    assert k <= 3
    return next(
        c
        for c in itertools.product(range(p), repeat=k)
        if k == 1 or all((x**k + sum(v * x**i for i, v in enumerate(c))) % p for x in range(p))
    )


def _square(a: tuple[int, ...], modulus: tuple[int, ...], p: int) -> tuple[int, ...]:
    """a^2 mod the modulus; coefficients of the highest power first, as in elements."""
    k = len(a)
    low = a[::-1]
    product = [0] * (2 * k - 1)
    for i, j in itertools.product(range(k), repeat=2):
        product[i + j] += low[i] * low[j]
    for power in range(2 * k - 2, k - 1, -1):
        for i, c in enumerate(modulus):
            product[power - k + i] -= product[power] * c
    return tuple(v % p for v in product[:k][::-1])
