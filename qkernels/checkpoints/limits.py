"""What a model may take before its files are seen to give reason for it."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from torch import nn

from qkernels.checkpoints.config import brief
from qkernels.errors import CheckpointError


def check_depth(section: Mapping[str, Any], tensors: int, path: Path) -> None:
    """Raises where a config asks for more layers than `tensors` of its files can be: lists of that
    length are made before the first layer is."""
    for key, value in section.items():
        if isinstance(value, dict):
            check_depth(value, tensors, path)
            continue
        counts = key.endswith(("layer", "layers")) and isinstance(value, int)
        if counts and value > max(tensors, 1000):
            raise CheckpointError(
                f"{path} says {key}={brief(value)}, and the files hold {tensors} tensors"
            )


_PATCHING = threading.RLock()
"""Held while the method of all modules is another."""


class TooManyParametersError(CheckpointError):
    """A model that is described with many more parameters than its files hold."""


@contextlib.contextmanager
def parameters_on_meta(tensors: int) -> Iterator[None]:
    """Within, a parameter that a module registers goes to the meta device; not many more than
    `tensors` may. Modules that other threads make are left alone, and one thread at a time is here.

    Under `torch.device("meta")` buffers would go there too, and those that are not saved be lost.
    """
    most, numbers, here = 4 * tensors + 1000, itertools.count(1), threading.get_ident()

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if threading.get_ident() != here:
            return register(module, name, param)
        if param is not None and next(numbers) > most:
            raise TooManyParametersError(
                f"config.json describes a model with more than {most} parameters, many more than "
                "the files hold"
            )
        if type(param) is nn.Parameter and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        return register(module, name, param)

    with _PATCHING:
        register = nn.Module.register_parameter
        with mock.patch.object(nn.Module, "register_parameter", on_meta):
            yield
