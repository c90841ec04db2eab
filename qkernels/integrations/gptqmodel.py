"""GPTQModel's layers on our kernels, and so those of Transformers, optimum and PEFT.

    import qkernels.integrations.gptqmodel
    qkernels.integrations.gptqmodel.install()

GPTQModel chooses a class of layers for a model from tables of its own; `install` puts two of ours
at the front of those for GPTQ (2, 3, 4 and 8 bits, both versions, groups by activations) and for
AWQ with the words of GEMM, so that `backend="auto"` finds them. A backend that is named is taken as
ever. Nothing else is changed, and `uninstall` takes them away.

They are GPTQModel's own plain layers, TorchLinear and AwqTorchLinear, with another product. Their
words stay where they are, since GPTQModel saves a model from its buffers, and converts the zero
points among them when it loads and saves; packed twins lie beside them (`integrations/words.py`).
So weights take twice their memory; `qkernels.load_model` and `replace_linears` do without the
words. What our kernels do not take, such as groups of several sizes, runs on the plain product,
with a warning.
Source: GPTQModel (Apache-2.0), read as documentation.
"""

from __future__ import annotations

import importlib
import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qkernels.errors import WeightError
from qkernels.integrations import words

_NAME = "qkernels"
_GPTQ, _AWQ = "QKernelsGPTQLinear", "QKernelsAWQLinear"


def install() -> None:
    """Has GPTQModel choose our layers where its backend is "auto".

    Raises:
        ModuleNotFoundError: where there is no GPTQModel.
    """
    for choices, layer in _tables():
        choices[_NAME] = layer
        choices.move_to_end(_NAME, last=False)


def uninstall() -> None:
    """Has it choose as it did; models that have our layers keep them."""
    for choices, _ in _tables():
        choices.pop(_NAME, None)


def __getattr__(name: str) -> Any:
    # Where pickle looks for the classes.
    if name in (_GPTQ, _AWQ):
        return _classes()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _tables() -> list[tuple[Any, type]]:
    """Its choices for each format, in order, and our layer for it."""
    importer: Any = importlib.import_module("gptqmodel.utils.importer")
    quantization: Any = importlib.import_module("gptqmodel.quantization")
    methods, formats = quantization.METHOD, quantization.FORMAT
    known, ours = importer.AUTO_BACKEND_KERNEL_MAPPING, _classes()
    return [
        (known[methods.GPTQ][formats.GPTQ], ours[_GPTQ]),
        (known[methods.GPTQ][formats.GPTQ_V2], ours[_GPTQ]),
        (known[methods.AWQ][formats.GEMM], ours[_AWQ]),
    ]


class _OnOurKernels:
    """The product of a layer of GPTQModel; a class in front of its own."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    bias: Tensor | None
    bits: int
    group_size: int
    in_features: int
    out_features: int
    adapter: Any
    _plain = False

    def _format(self) -> str:
        raise AssertionError("a subclass names its format")

    def _tensors(self) -> dict[str, Tensor]:
        return {"qweight": self.qweight, "scales": self.scales, "qzeros": self.qzeros}

    def _about(self) -> dict[str, Any]:
        return {
            "format": self._format(),
            "bits": self.bits,
            "n": self.out_features,
            "k": self.in_features,
            "group": self.group_size,
        }

    def post_init(self) -> None:
        super().post_init()  # type: ignore[misc]
        if self.qweight.is_meta:
            return
        try:
            words.check(self._tensors(), **self._about())
        except WeightError as error:
            self._plain = True
            name = getattr(self, "name", type(self).__name__)
            warnings.warn(f"{name} runs on GPTQModel's plain product: {error}", stacklevel=2)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] for x [..., K], in the type of x."""
        if self._plain or x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            y: Tensor = super().forward(x)  # type: ignore[misc]
            return y
        layer: Any = self
        rows = x.reshape(-1, x.shape[-1])
        if layer.online_full_had or layer.online_partial_had:
            rows = layer._apply_rotation_to_input(rows)
        y = words.linear(rows, self._tensors(), self.bias, **self._about())
        if self.adapter is not None:
            y = self.adapter.apply(x=rows, out=y)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


@lru_cache(maxsize=1)
def _classes() -> dict[str, type]:
    """Our layers, whose bases are imported with GPTQModel."""
    consts: Any = importlib.import_module("gptqmodel.models._const")
    quantization: Any = importlib.import_module("gptqmodel.quantization")
    adapters: Any = importlib.import_module("gptqmodel.adapter.adapter")
    torch_linear: Any = importlib.import_module("gptqmodel.nn_modules.qlinear.torch")
    awq_linear: Any = importlib.import_module("gptqmodel.nn_modules.qlinear.torch_awq")
    method, format = quantization.METHOD, quantization.FORMAT

    # GPTQModel looks for these in the class itself. No backend is named ours: a name has one class.
    both = {
        "__module__": __name__,
        "SUPPORTS_BACKENDS": [],
        "SUPPORTS_BACKEND_SELECTION": False,
        "SUPPORTS_DESC_ACT": [True, False],
        "SUPPORTS_SYM": [True, False],
        "SUPPORTS_SHARDS": True,
        "SUPPORTS_TRAINING": True,
        "SUPPORTS_IN_FEATURES_DIVISIBLE_BY": [1],
        "SUPPORTS_DEVICES": [consts.DEVICE.CPU, consts.DEVICE.CUDA],
        "SUPPORTS_PLATFORM": [consts.PLATFORM.ALL],
        "SUPPORTS_PACK_DTYPES": [torch.int32],
        "SUPPORTS_ADAPTERS": [adapters.Lora],
        "SUPPORTS_DTYPES": [torch.float16, torch.bfloat16, torch.float32],
        "QUANT_TYPE": _NAME,
    }
    gptq = {
        **both,
        "SUPPORTS_METHODS": [method.GPTQ],
        "SUPPORTS_FORMATS": {format.GPTQ: 1, format.GPTQ_V2: 1},
        "SUPPORTS_BITS": [2, 3, 4, 8],
        "SUPPORTS_GROUP_SIZE": [-1, 16, 32, 64, 128, 256, 512, 1024],
        "SUPPORTS_AUTO_PADDING": True,
        "SUPPORTS_OUT_FEATURES_DIVISIBLE_BY": [1],
        # It converts the zero points of version 1 then, and says so on the layer.
        "REQUIRES_FORMAT_V2": True,
        "_format": lambda self: "gptq_v2",
        "_tensors": lambda self: {**_OnOurKernels._tensors(self), "g_idx": self.g_idx},
    }
    awq = {
        **both,
        "SUPPORTS_METHODS": [method.AWQ],
        "SUPPORTS_FORMATS": {format.GEMM: 1},
        "SUPPORTS_BITS": [4],
        "SUPPORTS_GROUP_SIZE": [-1, 16, 32, 64, 128],
        "SUPPORTS_AUTO_PADDING": False,
        "SUPPORTS_OUT_FEATURES_DIVISIBLE_BY": [8],
        "REQUIRES_FORMAT_V2": False,
        "_format": lambda self: "awq",
    }
    return {
        _GPTQ: type(_GPTQ, (_OnOurKernels, torch_linear.TorchLinear), gptq),
        _AWQ: type(_AWQ, (_OnOurKernels, awq_linear.AwqTorchLinear), awq),
    }
