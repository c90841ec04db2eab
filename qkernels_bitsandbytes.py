"""What bitsandbytes calls when it is imported: its entry point `bitsandbytes.backends`.

A module of its own, since bitsandbytes must be imported without error where qkernels cannot be.
"""

import importlib
import os
import warnings

VARIABLE = "QKERNELS_BITSANDBYTES"
"""0 leaves bitsandbytes as it is; else the devices, `cpu` (the default), `cuda` or `cpu,cuda`."""

_DEVICES = ("cpu", "cuda")


def register() -> None:
    """Has bitsandbytes' layers run on our kernels, on the devices that the environment names."""
    said = os.environ.get(VARIABLE) or "cpu"
    if said == "0":
        return
    devices = tuple(said.split(","))
    unknown = [name for name in devices if name not in _DEVICES]
    if unknown:
        warnings.warn(
            f"{VARIABLE}={said!r} is neither 0 nor a list of {', '.join(_DEVICES)}: bitsandbytes "
            "runs on its own kernels",
            stacklevel=2,
        )
        return
    try:
        importlib.import_module("qkernels.integrations.bitsandbytes").register(devices)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        # Of a part that is missing, or versions of torch and bitsandbytes that do not fit.
        warnings.warn(
            f"qkernels cannot be used here, so bitsandbytes runs on its own kernels: {error}. "
            f"{VARIABLE}=0 says nothing of it",
            stacklevel=2,
        )
