"""Triton's interpreter where there is no GPU, and the device that kernels are tested on."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
