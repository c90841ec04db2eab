"""Tensors that a program holds, as the readers of formats take them."""

import pytest
import torch

from qkernels.checkpoints.held import HeldStore
from qkernels.errors import CheckpointError


def test_it_gives_tensors_as_a_folder_does():
    held = torch.arange(12, dtype=torch.int32).view(3, 4).t()
    store = HeldStore({"a.words": held}, where="a model", metadata={"format": "pt"})
    assert list(store) == ["a.words"] and "a.words" in store and len(store) == 1
    assert (store.shape("a.words"), store.dtype("a.words")) == ((4, 3), torch.int32)
    assert store.nbytes("a.words") == 48 and store.metadata == {"format": "pt"}
    got = store.take("a.words", (4, None), (torch.int32,))
    assert torch.equal(got, held) and got.is_contiguous()
    got.zero_()
    assert held.any()
    with pytest.raises(CheckpointError, match=r"a model: a.words must be int32 \[3, any\]"):
        store.take("a.words", (3, None), (torch.int32,))
    with pytest.raises(CheckpointError, match="a model: b is missing"):
        store.get("b")


def test_what_it_gives_is_memory_of_its_own():
    held = torch.ones(4)
    HeldStore({"a": held}).get("a").zero_()
    assert held.all()


def test_types_that_files_do_not_have_are_refused():
    store = HeldStore({"a": torch.zeros(1, dtype=torch.complex64)})
    with pytest.raises(CheckpointError, match=r"complex64: not supported"):
        store.dtype("a")
