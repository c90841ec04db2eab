"""The table of other packages' quantized modules: what each says of itself, as a file would.

A module is known by the name of its class and by its tensors, and no package is imported. Its
tensors, under the names that the package stores them by, and a quantization_config that says what
the module itself says, are what the reader of a checkpoint format reads.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Section = dict[str, Any]
"""A quantization_config."""


def _state(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.state_dict())


def _nothing(module: nn.Module, name: str) -> dict[str, str]:
    return {}


def _no_reason(module: nn.Module) -> str | None:
    return None


def _unknown_dtype(module: nn.Module) -> torch.dtype | None:
    return None


@dataclass(frozen=True, kw_only=True)
class ModuleKind:
    """A row of the table.

    Attributes:
        name: the package, and what of it.
        format: the row of `checkpoints.FORMATS` that reads it.
        matches: whether a module is of this kind.
        section: (module, name of the layer) -> quantization_config of a folder with it alone.
        why_not: why a module of this kind cannot be read, or None.
        tensors: its tensors, by the names below the layer's that they are stored by.
        metadata: what the header of a file says of them, by whole names.
        dtype: of the weight that it stands for; None where the bias or the scales have it.
        wraps_forward: the package itself replaces the forward of modules.
    """

    name: str
    format: str
    matches: Callable[[nn.Module], bool]
    section: Callable[[nn.Module, str], Section]
    why_not: Callable[[nn.Module], str | None] = _no_reason
    tensors: Callable[[nn.Module], dict[str, Tensor]] = _state
    metadata: Callable[[nn.Module, str], dict[str, str]] = _nothing
    dtype: Callable[[nn.Module], torch.dtype | None] = _unknown_dtype
    wraps_forward: bool = False


def _has_words(*classes: str) -> Callable[[nn.Module], bool]:
    return lambda module: type(module).__name__ in classes and _held(module, "qweight") is not None


def _held(module: nn.Module, name: str) -> Tensor | None:
    return module._buffers.get(name, module._parameters.get(name))


def _first(module: nn.Module, *names: str) -> Any:
    """The first of these attributes that a module has."""
    return next((value for n in names if (value := getattr(module, n, None)) is not None), None)


def _group_size(module: nn.Module) -> int:
    """As files spell it: modules put K where one group spans a row."""
    size, k = module.group_size, _first(module, "in_features", "infeatures")
    return -1 if size in (-1, k) else int(size)  # type: ignore[arg-type]


def _computes_more(module: nn.Module) -> str | None:
    """What GPTQModel's modules may have beside their weight."""
    if getattr(module, "adapter", None) is not None:
        return "it has an adapter of GPTQModel, which is no part of its weight"
    if any(getattr(module, name, False) for name in ("online_full_had", "online_partial_had")):
        return "it rotates its inputs"
    if getattr(module, "planar", False):
        return "its words hold bits in planes, which is not supported"
    return None


def _awq(version: str) -> Callable[[nn.Module, str], Section]:
    def section(module: nn.Module, name: str) -> Section:
        return {
            "quant_method": "awq",
            "version": version,
            "bits": _first(module, "w_bit", "bits"),
            "group_size": _group_size(module),
            "zero_point": True,
        }

    return section


def _gptq(version: str) -> Callable[[nn.Module, str], Section]:
    def section(module: nn.Module, name: str) -> Section:
        return {
            "quant_method": "gptq",
            "checkpoint_format": version,
            "bits": module.bits,
            "group_size": _group_size(module),
            "sym": False,
            # Where there is a g_idx, groups are those that it says.
            "desc_act": _held(module, "g_idx") is not None,
        }

    return section


_IN_ORDER = ("cuda", "cuda-old", "cuda_old", "torch", "triton", "tritonv2")
"""QUANT_TYPEs whose words stay as they were stored; others are put into a kernel's order."""

_AUTO_ROUND = "auto_round_extension."


def _quant_linear(less_one: bool) -> Callable[[nn.Module], bool]:
    """QuantLinear of AutoGPTQ and AutoRound. Args: less_one: zero points are stored less one."""
    words = _has_words("QuantLinear")

    def matches(module: nn.Module) -> bool:
        where = type(module).__module__
        whole = where.startswith(_AUTO_ROUND) and not where.endswith("_zp")
        in_order = getattr(module, "QUANT_TYPE", None) in _IN_ORDER
        return words(module) and in_order and whole != less_one

    return matches


def _scheme_of(module: nn.Module) -> Any:
    return getattr(module, "quantization_scheme", None)


def _is_linear(module: nn.Module) -> bool:
    """Whether its class is that of a linear layer: packages quantize embeddings the same way."""
    return isinstance(module, nn.Linear) and type(module).__name__ in _LINEAR_CLASSES


_LINEAR_CLASSES = ("Linear", "NonDynamicallyQuantizableLinear", "CompressedLinear")


def _is_compressed(module: nn.Module) -> bool:
    return _is_linear(module) and getattr(_scheme_of(module), "weights", None) is not None


def _why_not_compressed(module: nn.Module) -> str | None:
    status = getattr(module, "quantization_status", None)
    if getattr(status, "value", status) != "compressed":
        return (
            f"compressed-tensors has unpacked its weight, as its quantization_status "
            f"{getattr(status, 'value', status)!r} says: replace layers right after loading, "
            "before the first forward, and load without dequantize"
        )
    if any(True for _ in module.children()):
        return "it has modules of its own, such as a rotation of its inputs"
    return None


_FORMAT_OF = {torch.int8: "int-quantized", torch.float8_e4m3fn: "float-quantized"}
"""The format of an unpacked weight, by its type."""


def _compressed(module: nn.Module, name: str) -> Section:
    group = dict(_scheme_of(module).model_dump(mode="json"))
    weight = _held(module, "weight")
    if group.get("format") is None and weight is not None:
        group["format"] = _FORMAT_OF.get(weight.dtype)
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "targets": [name]}},
    }


def _is_four_bit(module: nn.Module) -> bool:
    named = type(module).__name__ in ("Linear4bit", "LinearNF4", "LinearFP4")
    return named and _held(module, "weight") is not None


def _why_not_four_bit(module: nn.Module) -> str | None:
    state = getattr(_held(module, "weight"), "quant_state", None)
    if state is None:
        return "its weight is not quantized yet: move it to a device first"
    if getattr(state, "packing_format_for_cpu", False):
        return (
            "bitsandbytes has reordered its weight for this CPU and rounded its scales to 16 bits: "
            "replace layers right after loading, before the first forward"
        )
    return None


def _four_bit_dtype(module: nn.Module) -> torch.dtype | None:
    weight: Any = _held(module, "weight")
    dtype: torch.dtype | None = weight.quant_state.dtype
    return dtype


def _is_eight_bit(module: nn.Module) -> bool:
    return type(module).__name__ == "Linear8bitLt" and _held(module, "weight") is not None


def _why_not_eight_bit(module: nn.Module) -> str | None:
    weight = _held(module, "weight")
    assert weight is not None
    if weight.dtype != torch.int8:
        return f"its weight is {weight.dtype}, not quantized yet: move it to a device first"
    return None


def _eight_bit_dtype(module: nn.Module) -> torch.dtype:
    """LLM.int8() computes in fp16 whatever x is, and biases have the model's type."""
    bias = _held(module, "bias")
    return torch.float16 if bias is None else bias.dtype


def _hqq_tensors(module: nn.Module) -> dict[str, Tensor]:
    # The package stores no scales that are quantized themselves, and raises where there are some.
    found = {"W_q": module.W_q, "bias": module.bias, **vars(module)["meta"]}
    encoded = {name: _as_tensor(value) for name, value in found.items()}
    return {name: tensor for name, tensor in encoded.items() if tensor is not None}


def _as_tensor(value: object) -> Tensor | None:
    """A value as HQQ stores it, or None where it stores none such."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, str):
        return torch.tensor(list(value.encode()), dtype=torch.uint8)
    if isinstance(value, (bool, int, float, tuple, list)):
        return torch.tensor(value)
    return None


def _weight_subclass(module: nn.Module) -> Any:
    """The weight of a linear layer where it is one of torchao's tensors."""
    weight = _held(module, "weight")
    return weight if hasattr(weight, "tensor_data_names") else None


def _torchao_tensors(module: nn.Module) -> dict[str, Tensor]:
    weight = _weight_subclass(module)
    tensors = {f"_weight_{name}": getattr(weight, name) for name in _torchao_parts(weight)}
    bias = _held(module, "bias")
    return tensors if bias is None else {**tensors, "bias": bias}


def _torchao_parts(weight: Any) -> list[str]:
    names = [*getattr(weight, "optional_tensor_data_names", ()), *weight.tensor_data_names]
    return [name for name in names if getattr(weight, name) is not None]


def _torchao_metadata(module: nn.Module, name: str) -> dict[str, str]:
    weight = _weight_subclass(module)
    names = (
        *getattr(weight, "optional_tensor_attribute_names", ()),
        *weight.tensor_attribute_names,
    )
    about = {
        "_type": type(weight).__name__,
        "_data": {attribute: _spelled(getattr(weight, attribute)) for attribute in names},
        "_tensor_data_names": _torchao_parts(weight),
    }
    return {f"{name}.weight": json.dumps(about)}


def _spelled(value: Any) -> Any:
    """An attribute of a tensor, as torchao's files spell it."""
    name = type(value).__name__
    if isinstance(value, torch.dtype):
        return {"_type": "torch.dtype", "_data": str(value).removeprefix("torch.")}
    if isinstance(value, enum.Enum):
        return {"_type": name, "_data": value.name}
    if dataclasses.is_dataclass(value):
        fields = {f.name: _spelled(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"_type": name, "_data": fields}
    if hasattr(value, "_asdict"):
        return {"_type": name, "_data": {k: _spelled(v) for k, v in value._asdict().items()}}
    if isinstance(value, (list, tuple)):
        return [_spelled(entry) for entry in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


KINDS: tuple[ModuleKind, ...] = (
    ModuleKind(
        name="AWQ GEMM, of AutoAWQ or GPTQModel",
        format="awq",
        matches=_has_words(
            *("WQLinear_GEMM", "AwqTorchLinear", "AwqGEMMLinear", "AwqGEMMTritonLinear"),
            "QKernelsAWQLinear",
        ),
        section=_awq("gemm"),
        why_not=_computes_more,
    ),
    ModuleKind(
        name="AWQ GEMV, of AutoAWQ or GPTQModel",
        format="awq-gemv",
        matches=_has_words("WQLinear_GEMV", "AwqGEMVLinear"),
        section=_awq("gemv"),
        why_not=_computes_more,
    ),
    ModuleKind(
        name="AWQ GEMV_FAST, of AutoAWQ or GPTQModel",
        format="awq-gemv-fast",
        matches=_has_words("WQLinear_GEMVFast", "AwqGEMVFastLinear", "LLMAwqLinear"),
        section=_awq("gemv_fast"),
        why_not=_computes_more,
    ),
    ModuleKind(
        # Version 1 is made version 2 when these are loaded, since their kernels need it.
        name="GPTQ of GPTQModel",
        format="gptq_v2",
        matches=_has_words(
            *("TorchLinear", "TritonV2Linear", "TorchQuantLinear", "TritonV2QuantLinear"),
            "QKernelsGPTQLinear",
        ),
        section=_gptq("gptq_v2"),
        why_not=_computes_more,
    ),
    ModuleKind(
        name="GPTQ of AutoGPTQ",
        format="gptq",
        matches=_quant_linear(less_one=True),
        section=_gptq("gptq"),
    ),
    ModuleKind(
        name="GPTQ of AutoRound",
        format="gptq_v2",
        matches=_quant_linear(less_one=False),
        section=_gptq("gptq_v2"),
    ),
    ModuleKind(
        name="compressed-tensors",
        format="compressed-tensors",
        matches=_is_compressed,
        section=_compressed,
        why_not=_why_not_compressed,
        wraps_forward=True,
    ),
    ModuleKind(
        name="Linear4bit of bitsandbytes",
        format="bitsandbytes",
        matches=_is_four_bit,
        section=lambda module, name: {"quant_method": "bitsandbytes", "load_in_4bit": True},
        why_not=_why_not_four_bit,
        dtype=_four_bit_dtype,
    ),
    ModuleKind(
        name="Linear8bitLt of bitsandbytes",
        format="bitsandbytes",
        matches=_is_eight_bit,
        section=lambda module, name: {"quant_method": "bitsandbytes", "load_in_8bit": True},
        why_not=_why_not_eight_bit,
        dtype=_eight_bit_dtype,
    ),
    ModuleKind(
        name="HQQLinear",
        format="hqq",
        matches=lambda module: (
            type(module).__name__ == "HQQLinear" and _held(module, "W_q") is not None
        ),
        section=lambda module, name: {"quant_method": "hqq"},
        tensors=_hqq_tensors,
        dtype=lambda module: getattr(module, "compute_dtype", None),
    ),
    ModuleKind(
        name="a linear layer of torchao",
        format="torchao",
        matches=lambda module: _is_linear(module) and _weight_subclass(module) is not None,
        section=lambda module, name: {"quant_method": "torchao"},
        tensors=_torchao_tensors,
        metadata=_torchao_metadata,
        dtype=lambda module: _weight_subclass(module).dtype,
    ),
)
"""The first that matches counts."""
