"""Triton's interpreter where there is no GPU, and the device that kernels are tested on.

QKERNELS_EMULATOR names the library of emulated CUDA kernels that csrc/emulator/build.py makes; with
it, their rows can run, and so the tests of every kernel run over them too.
"""

import ctypes
import os
import signal

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell's job in the background is started with Ctrl-C ignored, and tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Else the layers of bitsandbytes that ours are compared with would run on ours.
os.environ["QKERNELS_BITSANDBYTES"] = "0"

if "QKERNELS_EMULATOR" in os.environ:
    torch.ops.load_library(os.environ["QKERNELS_EMULATOR"])
    ctypes.CDLL(os.environ["QKERNELS_EMULATOR"]).qkernels_emulator_check_races(1)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
