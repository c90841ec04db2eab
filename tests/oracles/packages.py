"""What the tests against real packages share: skips, programs with a time limit, random layers."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qkernels.checkpoints import open_checkpoint
from qkernels.weight import QuantizedWeight

ROOT = Path(__file__).parents[2]
SECONDS = 300


def package(name: str) -> ModuleType:
    """The package; the test is skipped where it cannot be imported."""
    reason = f"{name} is not installed: make oracles installs it"
    return pytest.importorskip(name, reason=reason, exc_type=ImportError)


def require(*names: str) -> None:
    """Skips the test where one of the packages is not installed; imports none."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: make oracles installs it")


def run(program: str, *arguments: object, seconds: int = SECONDS) -> str:
    """What a Python program printed, run in a process of its own from the root of the repository.

    For packages whose threads may keep a process from ending: the program ends it by os._exit.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return process.stdout


def write_folder(folder: Path, tensors: dict[str, Tensor], section: dict | None) -> Path:
    """A folder without a model, of the tensors that a package made and what its config says."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {} if section is None else {"quantization_config": section}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return folder


def read_folder(folder: Path) -> dict[str, QuantizedWeight]:
    """All quantized layers of a folder, by name."""
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.layers}


def random_parts(
    n: int, k: int, group: int, bits: int, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], zero points [N, G] of 0..2^b - 1 and scales [N, G]; group -1 is all of K."""
    groups = 1 if group == -1 else -(-k // group)
    codes = torch.randint(0, 1 << bits, (n, k))
    zeros = torch.randint(0, 1 << bits, (n, groups))
    return codes, zeros, (torch.rand(n, groups) + 0.1).mul(0.02).to(dtype)


def weight_of(codes: Tensor, zeros: Tensor, scales: Tensor, group: int) -> Tensor:
    """(q - z) * s in fp32, which rounds once."""
    index = torch.arange(codes.shape[1]) // (group if group != -1 else codes.shape[1])
    return (codes - zeros[:, index]) * scales.float()[:, index]
