"""What a call of a layer does on the host beside its kernel, counted: no time is measured."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from qkernels import WQLinear
from tests.emulated.emulator import needs_emulator, skipped_launches

pytestmark = needs_emulator

MOST_CALLS = 4
"""Of Python, beyond those of a module that does nothing: the list of buffers (a function before
Python 3.12), whether x is quantized, torch's OpOverload, and the operator."""

OPERATORS = ({"qkernels::linear": 1, "aten::empty": 1}, {"qkernels::linear": 1, "aten::empty": 2})
"""y, and partial sums where blocks share a tile."""

SCHEMES = ("w4a16-g64", "nf4-g64", "w8a16")
SIZES = [(64, 64), (48, 256), (2048, 64), (64, 4096), (2048, 2048)]


@contextmanager
def python_calls() -> Iterator[Counter[str]]:
    """Counts calls of functions, of Python and of C, by name."""
    seen: Counter[str] = Counter()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            seen[frame.f_code.co_name] += 1
        elif event == "c_call" and argument is not sys.setprofile:
            seen[getattr(argument, "__name__", repr(argument))] += 1

    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(None)


def calls_of(module: nn.Module, x: torch.Tensor) -> Counter[str]:
    with python_calls() as seen:
        module(x)
    return seen


def operators_of(module: nn.Module, x: torch.Tensor) -> dict[str, int]:
    """Torch's operators, at any depth, also those that C++ calls."""
    with torch.autograd.profiler.profile() as profile:
        module(x)
    return dict(Counter(event.name for event in profile.function_events))


def layer_of(scheme: str, n: int, k: int) -> WQLinear:
    # What a check of the kernels would compare is never written.
    linear = nn.Linear(k, n)
    return WQLinear.from_linear(linear, scheme, backend="emulated", check_kernels=False)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_call_is_one_operator_whatever_its_size(scheme: str) -> None:
    done = set()
    for n, k in SIZES:
        layer = layer_of(scheme, n, k)
        for m in (1, 8, 64):
            x = torch.randn(m, k).half()
            with skipped_launches():
                layer(x)  # asks Python for the route
                calls, operators = calls_of(layer, x), operators_of(layer, x)
            nothing = calls_of(nn.Identity(), x)
            assert calls.total() - nothing.total() <= MOST_CALLS, (n, k, m, calls)
            assert operators in OPERATORS, (n, k, m)
            done.add(frozenset(calls.items()))
    assert len(done) == 1


def test_a_step_more_is_counted() -> None:
    class Cautious(WQLinear):
        def forward(self, input: Any) -> torch.Tensor:
            return super().forward(input.clone())

    layer, x = layer_of("w4a16-g64", 64, 64), torch.randn(1, 64).half()
    with skipped_launches():
        layer(x)
        layer.__class__ = Cautious
        calls, operators = calls_of(layer, x), operators_of(layer, x)
    assert calls.total() - calls_of(nn.Identity(), x).total() > MOST_CALLS
    assert operators["aten::clone"] == 1


def test_operators_of_a_route_are_counted() -> None:
    """Columns of groups of 24 are filled up, in C++."""
    layer, x = layer_of("w4a16-g24", 64, 64), torch.randn(1, 64).half()
    with skipped_launches():
        layer(x)
        operators = operators_of(layer, x)
    assert operators["aten::zeros"] == 1 and operators["aten::copy_"] == 2
