"""The weights of the Triton kernels: checked once, and gone with the buffers they were made of."""

from __future__ import annotations

import importlib
import weakref
from dataclasses import replace

import pytest
import torch

from qkernels import rounding
from qkernels.backends import triton
from qkernels.layouts import PLANAR, PackedWeight, pack


def make(scheme: str = "w4a16-g64") -> PackedWeight:
    return pack(rounding.quantize(torch.randn(48, 200), scheme), PLANAR, torch.device("cpu"))


def test_a_weight_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    planar = importlib.import_module("qkernels.triton_kernels.planar")
    checked = []
    monkeypatch.setattr(planar, "_check", checked.append)
    packed = make()
    weight = triton.planar_weight(packed)
    # The operator makes a `PackedWeight` of the same buffers at every call.
    assert triton.planar_weight(replace(packed, buffers=dict(packed.buffers))) is weight
    assert checked == [weight]


@pytest.mark.parametrize("name", ["words", "scales", "zeros"])
def test_another_buffer_makes_another_weight(name: str) -> None:
    packed = make("w4a16-g64-asym")
    weight = triton.planar_weight(packed)
    other = packed.buffers[name].clone()
    changed = triton.planar_weight(replace(packed, buffers=packed.buffers | {name: other}))
    assert changed is not weight
    assert getattr(changed, name).data_ptr() == other.data_ptr()


def test_memory_that_was_changed_under_a_buffer_makes_another_weight() -> None:
    packed = make()
    weight = triton.planar_weight(packed)
    words = packed.buffers["words"]
    words.data = words.clone()
    changed = triton.planar_weight(packed)
    assert changed is not weight
    assert changed.words.data_ptr() == words.data_ptr()


def test_the_same_words_with_another_meaning_are_another_weight() -> None:
    packed = make()
    weight = triton.planar_weight(packed)
    narrow = triton.planar_weight(replace(packed, k=packed.k - 1))
    assert (weight.k, narrow.k) == (200, 199)


def test_what_is_written_in_place_is_seen() -> None:
    packed = make()
    weight = triton.planar_weight(packed)
    packed.buffers["words"].fill_(7)
    assert triton.planar_weight(packed) is weight
    assert (weight.words == 7).all()


def test_a_weight_goes_with_its_words() -> None:
    packed = make()
    key, weight = id(packed.buffers["words"]), weakref.ref(triton.planar_weight(packed))
    assert key in triton._held
    del packed
    assert key not in triton._held
    assert weight() is None
