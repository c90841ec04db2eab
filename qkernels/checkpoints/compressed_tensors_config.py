"""The quantization_config of compressed-tensors: config groups to schemes, and back.

A group says what its targets' weights and inputs are quantized to. A target is a layer's name, a
pattern ("re:...") or the name of a class of modules, and they count in this order, and patterns in
that of the alphabet, wherever they stand in the file. A group may also be the name of a preset,
with its targets alone.

Inputs that are quantized in groups, as beside float8 blocks and 4-bit floats, are read as 16-bit
ones: the weights are what they are, and the products are nearer to the unquantized model's.
Source: the compressed-tensors package (Neural Magic, Apache-2.0), read as documentation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qkernels.checkpoints.compressed_tensors_presets import PRESETS
from qkernels.checkpoints.config import Config, brief, only, shortened, strings, typed
from qkernels.checkpoints.patterns import Pattern, pattern
from qkernels.errors import CheckpointError, SchemeError
from qkernels.scheme import WEIGHT_TYPES, Activation, QuantScheme

NAME = "compressed-tensors"
PACKED, INTEGER, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
NAIVE, MIXED = "naive-quantized", "mixed-precision"
NVFP4, MXFP4, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"

_KEYS = frozenset(
    (
        *("quant_method", "format", "config_groups", "ignore", "kv_cache_scheme"),
        *("quantization_status", "sparsity_config", "transform_config", "moe_sparsity_config"),
        # These say nothing of what is stored.
        *("version", "provider", "global_compression_ratio", "run_compressed", "dequantize"),
    )
)
_GROUP_KEYS = frozenset(("targets", "weights", "input_activations", "output_activations", "format"))
_ARGUMENT_KEYS = frozenset(
    (
        *("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic"),
        "actorder",
        # How scales were found, and types that the tensors themselves have.
        *("observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
    )
)


@dataclass(frozen=True)
class Group:
    """One of the config groups. The type of the scales stands in the tensors, not here.

    Attributes:
        kind: the format in which its weights are stored.
        bits: of the stored codes; the scheme may hold them in more.
        block_rows: rows that share a scale, more than one of float8 blocks alone.
        version: of the package that wrote it, or None.
        ordered: groups are by activations, as `weight_g_idx` says.
    """

    name: str
    targets: tuple[str, ...]
    scheme: QuantScheme
    kind: str
    bits: int
    block_rows: int = 1
    version: str | None = None
    ordered: bool = False


class Targets:
    """Which layers are named, in the order in which names count, and what is said of them."""

    def __init__(self, said: Iterable[tuple[str, Any]]) -> None:
        self._names: dict[str, Any] = {}
        self._patterns: list[tuple[Pattern, Any]] = []
        self._linear: list[Any] = []
        # Of a target that stands there twice the package knows the last alone.
        for target, value in sorted(dict(said).items()):
            if target.startswith("re:"):
                self._patterns.append((pattern(target[3:]), value))
            elif target == "Linear":
                self._linear.append(value)
            else:
                self._names.setdefault(target, value)

    def find(self, layer: str) -> Any:
        """What is said of a linear layer, or None."""
        if layer in self._names:
            return self._names[layer]
        matching = (value for made, value in self._patterns if made.matches(layer))
        return next(matching, self._linear[0] if self._linear else None)


@dataclass(frozen=True)
class Section:
    """A quantization_config: its groups, by their targets, and what it leaves dense."""

    groups: Targets
    ignored: Targets

    def group_of(self, layer: str) -> Group:
        """The group of a quantized linear layer.

        Raises:
            CheckpointError: where no group has it, or the layer is to stay dense.
        """
        ignored = self.ignored.find(layer)
        if ignored is not None:
            raise CheckpointError(
                f"{layer} is quantized in the file, and the config ignores {brief(ignored)}"
            )
        group: Group | None = self.groups.find(layer)
        if group is None:
            raise CheckpointError(f"{layer} is quantized, but no config group names it")
        return group


def kind_of(scheme: QuantScheme) -> str:
    """The format in which compressed-tensors stores a scheme that it holds."""
    if scheme.weight.kind == "float8":
        return FLOAT
    return PACKED if scheme.weight_only else INTEGER


def write_section(schemes: Mapping[str, QuantScheme], ignored: Sequence[str]) -> dict[str, Any]:
    """The quantization_config of a model with these layers; `ignored` ones stay dense."""
    by_scheme: dict[QuantScheme, list[str]] = {}
    for name, scheme in schemes.items():
        by_scheme.setdefault(scheme, []).append(name)
    kinds = {kind_of(scheme) for scheme in by_scheme}
    groups = {
        f"group_{i}": {
            "targets": names,
            "weights": _weight_arguments(scheme),
            "input_activations": _activation_arguments(scheme.activation),
            "output_activations": None,
            "format": kind_of(scheme),
        }
        for i, (scheme, names) in enumerate(by_scheme.items())
    }
    return {
        "quant_method": NAME,
        "quantization_status": "compressed",
        "format": kinds.pop() if len(kinds) == 1 else MIXED,
        "config_groups": groups,
        "ignore": list(ignored),
        "kv_cache_scheme": None,
    }


def read_section(section: Config) -> Section:
    """A quantization_config, understood.

    Raises:
        CheckpointError: naming what is wrong with it, or unknown here.
    """
    only(section, _KEYS, "quantization_config")
    for key in ("transform_config", "sparsity_config", "moe_sparsity_config"):
        if section.get(key):
            raise CheckpointError(
                f"quantization_config.{key} is not supported: {brief(section[key])} changes what "
                "the weights mean"
            )
    status = section.get("quantization_status")
    if status not in (None, "compressed"):
        raise CheckpointError(
            f"quantization_status {brief(status)} is not supported, 'compressed' is"
        )
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"quantization_config has no config_groups, but {brief(groups)}")
    read = [_read_group(name, entry, section) for name, entry in groups.items()]
    said = [(target, group) for group in read if group is not None for target in group.targets]
    # A class of modules is in there for those that were left dense.
    ignored = [
        (target, target)
        for target in strings(section.get("ignore") or [], "ignore")
        if target != "Linear"
    ]
    return Section(Targets(said), Targets(ignored))


def _read_group(name: str, entry: object, section: Config) -> Group | None:
    """One of the config groups, or None where it quantizes nothing."""
    where = f"config group {name}"
    if isinstance(entry, list):
        if name.upper() not in PRESETS:
            known = ", ".join(PRESETS)
            raise CheckpointError(f"{where} is no preset that is known; they are {known}")
        entry = {"targets": entry, **PRESETS[name.upper()]}
    group = typed(entry, dict, where)
    only(group, _GROUP_KEYS, where)
    if group.get("output_activations"):
        raise CheckpointError(f"{where} quantizes output activations, which is not supported")
    if not group.get("weights"):
        if group.get("input_activations"):
            raise CheckpointError(f"{where} has no weights entry: {brief(group)}")
        return None
    targets = strings(group.get("targets"), f"targets of {where}")
    weights = typed(group["weights"], dict, f"weights of {where}")
    only(weights, _ARGUMENT_KEYS, f"weights of {where}")
    scheme = _read_scheme(weights, group.get("input_activations"), where)
    version = section.get("version")
    return Group(
        name,
        tuple(targets),
        scheme,
        kind=_read_kind(group.get("format") or section.get("format"), weights, scheme, where),
        bits=weights["num_bits"],
        block_rows=_block(weights, where)[0] if weights.get("strategy") == "block" else 1,
        version=version if isinstance(version, str) else None,
        ordered=weights.get("actorder") in ("group", "dynamic"),
    )


def _read_kind(stated: object, weights: Config, scheme: QuantScheme, where: str) -> str:
    """How the group's weights are stored; its own format counts before that of the file."""
    powers = weights.get("scale_dtype") == "torch.uint8"
    if scheme.weight.name == "fp4":
        fits: tuple[str, ...] = (NVFP4 if weights.get("strategy") == "tensor_group" else MXFP4,)
    elif scheme.weight.kind == "float8":
        fits = (MXFP8,) if powers or stated == MXFP8 else (FLOAT, NAIVE)
    else:
        fits = (PACKED, INTEGER, NAIVE)
    if stated in (None, MIXED):
        return kind_of(scheme) if len(fits) > 1 else fits[0]
    if stated not in fits:
        raise CheckpointError(
            f"{where} has the format {brief(stated)}; supported for {scheme} are {', '.join(fits)}"
        )
    unpacked = FLOAT if scheme.weight.kind == "float8" else INTEGER
    return unpacked if stated == NAIVE else str(stated)


_HELD_BITS = {1: 2, 2: 2, 3: 3, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
"""Bits of the weight type that holds integers of so many bits."""

_STRATEGIES = {
    "int": ("tensor", "channel", "group"),
    "float8": ("tensor", "channel", "group", "block"),
    "float4": ("group", "tensor_group"),
}


def _read_scheme(weights: Config, inputs: object, where: str) -> QuantScheme:
    bits = typed(weights.get("num_bits"), int, f"{where}: num_bits")
    kind = weights.get("type", "int")
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("group" if size else "channel")
    name = {
        "int": f"int{_HELD_BITS.get(bits)}",
        "float": {8: "fp8e4m3", 4: "fp4"}.get(bits, ""),
    }.get(str(kind), "")
    known = _STRATEGIES["int" if kind == "int" else f"float{bits}"] if name in WEIGHT_TYPES else ()
    if strategy not in known:
        raise CheckpointError(
            f"{where}: weights of {bits} bits, type {shortened(kind)}, {shortened(strategy)} are "
            "not supported"
        )
    if weights.get("actorder") not in (None, "static", "weight", "group", "dynamic"):
        raise CheckpointError(f"{where}: actorder {brief(weights['actorder'])} is not supported")
    if weights.get("dynamic"):
        raise CheckpointError(f"{where}: weights that are quantized dynamically are not supported")
    if strategy == "block":
        size = _block(weights, where)[1]
    try:
        return QuantScheme(
            weight=WEIGHT_TYPES[name],
            group_size=typed(size, int, f"{where}: group_size")
            if strategy in ("group", "tensor_group", "block")
            else None,
            per_tensor=strategy == "tensor",
            symmetric=typed(weights.get("symmetric", True), bool, f"{where}: symmetric"),
            activation=_read_activation(inputs, where),
        )
    except SchemeError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _block(weights: Config, where: str) -> tuple[int, int]:
    """The rows and columns of a block."""
    where = f"{where}: block_structure"
    sizes = [typed(size, int, where) for size in typed(weights.get("block_structure"), list, where)]
    if len(sizes) != 2 or min(sizes) < 1:
        raise CheckpointError(f"{where} must be rows and columns, got {brief(sizes)}")
    return sizes[0], sizes[1]


def _read_activation(entry: object, where: str) -> Activation:
    if not entry:
        return Activation()
    arguments = typed(entry, dict, f"input_activations of {where}")
    only(arguments, _ARGUMENT_KEYS, f"input_activations of {where}")
    kind, bits = str(arguments.get("type", "int")), arguments.get("num_bits")
    strategy, dynamic = str(arguments.get("strategy")), arguments.get("dynamic", False)
    if kind == "float" and bits in (4, 6, 8) and strategy in ("group", "tensor_group") and dynamic:
        return Activation()
    dtype = {"int": "int8", "float": "fp8"}.get(kind)
    symmetric = arguments.get("symmetric", True)
    granularity = _GRANULARITIES.get((strategy, dynamic is True, symmetric is True))
    asymmetric_floats = symmetric is not True and dtype != "int8"
    if bits != 8 or dtype is None or granularity is None or asymmetric_floats:
        raise CheckpointError(
            f"{where}: input activations of {brief(bits)} bits, type {shortened(kind)}, "
            f"{shortened(strategy)}, dynamic={brief(dynamic)}, symmetric={brief(symmetric)} are "
            "not supported"
        )
    return Activation(dtype, granularity)


_GRANULARITIES = {
    ("token", True, True): "token",
    ("token", True, False): "tokenasym",
    ("tensor", True, True): "tensor",
    ("tensor", False, True): "static",
    ("tensor", False, False): "staticasym",
}
"""By strategy, whether it is dynamic, and symmetric."""


def _weight_arguments(scheme: QuantScheme) -> dict[str, Any]:
    grouped = scheme.group_size is not None
    return {
        "num_bits": scheme.bits,
        "type": "float" if scheme.weight.kind == "float8" else "int",
        "symmetric": scheme.symmetric,
        "strategy": "tensor" if scheme.per_tensor else "group" if grouped else "channel",
        "group_size": scheme.group_size,
        "dynamic": False,
    }


def _activation_arguments(activation: Activation) -> dict[str, Any] | None:
    if activation.dtype == "none":
        return None
    strategy, dynamic, symmetric = next(
        way for way, name in _GRANULARITIES.items() if name == activation.granularity
    )
    return {
        "num_bits": 8,
        "type": "int" if activation.dtype == "int8" else "float",
        "symmetric": symmetric,
        "strategy": strategy,
        "dynamic": dynamic,
    }
