"""Transformers 5 on these kernels.

    from qkernels.integrations.transformers import QKernelsConfig, use

Importing this registers `QKernelsConfig`, for quantizing a model while `from_pretrained` loads it.
Folders in our own format it loads wherever qkernels is imported; `use()` has it load those of other
packages too, without these packages.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qkernels.checkpoints.hf_quantizer import StoredConfig, StoredHfQuantizer
from qkernels.errors import LayerError
from qkernels.integrations.on_load import QKernelsConfig, QKernelsHfQuantizer

__all__ = ["QKernelsConfig", "QKernelsHfQuantizer", "stop_using", "use"]

_QUANTIZERS: dict[str, Any] = AUTO_QUANTIZER_MAPPING

_METHODS = {
    "awq": ("awq",),
    "gptq": ("gptq",),
    "auto-round": ("auto-round",),
    "compressed-tensors": ("compressed-tensors",),
    "bitsandbytes": ("bitsandbytes_4bit", "bitsandbytes_8bit"),
    "torchao": ("torchao",),
}
"""`quant_method` of a folder -> what Transformers has a quantizer for."""

USED = ("awq", "gptq", "auto-round", "compressed-tensors")
"""What `use` takes unless it is told."""


def use(formats: Iterable[str] = USED) -> None:
    """Makes `from_pretrained` load quantized folders of these formats onto our kernels.

    Models that are to be quantized by another package still are, and what is loaded already stays
    as it is. Calling it again adds formats; `stop_using` ends it.

    Args:
        formats: of awq, gptq, auto-round, compressed-tensors, bitsandbytes and torchao, as
            the `quant_method` in config.json spells it.

    Raises:
        LayerError: for a format that is not one of them.
    """
    formats = list(formats)
    for format in formats:
        if format not in _METHODS:
            raise LayerError(f"format {format!r} is not one of {', '.join(_METHODS)}")
    for method in (method for format in formats for method in _METHODS[format]):
        quantizer = _QUANTIZERS[method]
        if not isinstance(quantizer, _Choice):
            config = AUTO_QUANTIZATION_CONFIG_MAPPING[method]
            _QUANTIZERS[method] = _Choice(quantizer, config)
            AUTO_QUANTIZATION_CONFIG_MAPPING[method] = _stored(config)


def stop_using() -> None:
    """Makes `from_pretrained` load every format as Transformers does by itself."""
    for method, choice in list(_QUANTIZERS.items()):
        if isinstance(choice, _Choice):
            _QUANTIZERS[method] = choice.quantizer
            AUTO_QUANTIZATION_CONFIG_MAPPING[method] = choice.config


@dataclass(frozen=True)
class _Choice:
    """Stands in Transformers' table: our quantizer for folders, theirs for dense models."""

    quantizer: type[HfQuantizer]
    config: type[QuantizationConfigMixin]

    def __call__(
        self, quantization_config: Any, pre_quantized: bool = True, **options: Any
    ) -> HfQuantizer:
        if pre_quantized:
            if getattr(quantization_config, "dequantize", False):
                raise LayerError(
                    "dequantize=True asks for dense layers, which Transformers loads by itself: "
                    "call qkernels.integrations.transformers.stop_using() before"
                )
            return StoredHfQuantizer(quantization_config, pre_quantized=True, **options)
        if isinstance(quantization_config, StoredConfig):
            # It was given as a dict.
            quantization_config = self.config.from_dict(quantization_config.to_dict())
        return self.quantizer(quantization_config, pre_quantized=False, **options)


def _stored(theirs: type[QuantizationConfigMixin]) -> type[QuantizationConfigMixin]:
    """A class for the config of a folder, which `theirs` may refuse, or need its package for.

    It is a kind of theirs, of the same name: Transformers compares it with one that is given to
    `from_pretrained` beside the folder.
    """
    computed = {
        name: None
        for kind in theirs.__mro__
        for name, value in vars(kind).items()
        if isinstance(value, property)
    }
    return type(theirs.__name__, (_Stored, theirs), computed)


class _Stored(StoredConfig):
    """Writes what was read, whatever the class does of which it is made a kind."""

    to_dict = QuantizationConfigMixin.to_dict
    to_diff_dict = QuantizationConfigMixin.to_dict
    __iter__ = QuantizationConfigMixin.__iter__

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config
