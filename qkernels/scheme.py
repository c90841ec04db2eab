"""What a stored number means: weight type, granularity, zero points, activations, scale storage.

A `QuantScheme` is printable and parsed back from its one canonical spelling:

    w4a16-g128          4-bit linear with zero points, groups of 128 along K, 16-bit activations
    w4a16-g128-sym      the same without zero points
    w4a16               per output channel; `-gtensor` is one scale for the whole weight
    nf4-g64, fp4-g32    4-bit codebooks; `nf4-g64-dq` stores the scales double-quantized (QLoRA)
    w3a16-g16-spqr      scales and zero points of 4 bits each, in steps that 16 rows share (SpQR)
    log4-g32, log3-g64  signed powers of two and zero
    binary-g64          one bit: -1 or 1, times the mean |w| of the group
    table(-1,...,1)-g64 the user's own 16 values
    fp8e4m3-a16         float8 weights, per output channel
    w8a8                int8 weights per channel, symmetric; int8 activations per token, dynamic
    w8a8-tensor         activations per tensor, dynamic; `-static`: with a calibrated scale
    w8a8-outliers6      int8 but for columns of x with a magnitude of 6 or more (LLM.int8())
    w8a8-tokenasym      int8 activations per token with zero points; `-staticasym`: one, calibrated
    w8a8-position       a calibrated scale for each position of a sequence; `-positionasym`
    w4a8-g128           two-level scales: int8 = multiplier[n,g] * (code - zero), fp32 per channel
    w4a8-g128-flat      one floating scale per group
    w4a4-g128, w8a4     4-bit activations, simulated: integers -7..7, multiplied as int8
    fp8-a8              float8 E4M3 weights and activations; `w4afp8-g128` has int4 weights

SmoothQuant's levels have names of their own: `smoothquant-o1` is `w8a8-gtensor`, `-o2`
`w8a8-gtensor-tensor` and `-o3` `w8a8-gtensor-static`. A trailing `-sfp16`, `-sbf16` or `-sfp32`
names the scale type where it is not the default.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from qkernels.errors import SchemeError

NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of a normal distribution scaled to [-1, 1] (QLoRA, Dettmers et al. 2023, app. E)."""

FP4_E2M1_VALUES = (
    *(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    *(-0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
)
"""The 16 values of FP4 E2M1, in the order of their bit patterns (OCP Microscaling Formats 1.0)."""


def _powers_of_two(bits: int) -> tuple[float, ...]:
    """0, then 2^-e for e = 2^(bits-1) - 2 down to 0; then the same numbers negated."""
    half = 1 << (bits - 1)
    positive = (0.0, *(2.0 ** (code - (half - 1)) for code in range(1, half)))
    return (*positive, *(-value for value in positive))


LOG3_VALUES, LOG4_VALUES = _powers_of_two(3), _powers_of_two(4)
"""Zero and signed powers of two up to 1 (logarithmic quantization, Miyashita et al. 2016)."""

BINARY_VALUES = (-1.0, 1.0)
"""Signs (XNOR-Net, Rastegari et al. 2016)."""

_SCALE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_SCALE_DTYPES = {name: dtype for dtype, name in _SCALE_NAMES.items()}


@dataclass(frozen=True)
class WeightType:
    """A row of the weight-type table.

    Attributes:
        name: how a scheme names it; linear types are spelled by their bits, as in `w4a16`.
        kind: how a code becomes a value: "linear" (the code itself), "codebook" (`values[code]`) or
            "float8" (the code is the bit pattern of `float_dtype`).
        values: the 2^bits values of a codebook.
        scale_from: what of a group its scale is fitted to: "largest" |w| or "mean" |w|.
    """

    name: str
    bits: int
    kind: str
    values: tuple[float, ...] | None = None
    float_dtype: torch.dtype | None = None
    scale_from: str = "largest"

    def __post_init__(self) -> None:
        assert self.kind in ("linear", "codebook", "float8"), self.kind
        assert self.scale_from in ("largest", "mean"), self.scale_from
        assert (self.kind == "codebook") == (self.values is not None)
        assert self.values is None or len(self.values) == 1 << self.bits, self.name

    @property
    def max_value(self) -> float:
        """The largest magnitude that a non-linear type can hold."""
        if self.values is not None:
            return max(abs(value) for value in self.values)
        assert self.float_dtype is not None, f"{self.name} has no largest value"
        return torch.finfo(self.float_dtype).max


WEIGHT_TYPES: dict[str, WeightType] = {
    row.name: row
    for row in (
        WeightType("int2", 2, "linear"),
        WeightType("int3", 3, "linear"),
        WeightType("int4", 4, "linear"),
        WeightType("int8", 8, "linear"),
        WeightType("nf4", 4, "codebook", values=NF4_VALUES),
        WeightType("fp4", 4, "codebook", values=FP4_E2M1_VALUES),
        WeightType("log3", 3, "codebook", values=LOG3_VALUES),
        WeightType("log4", 4, "codebook", values=LOG4_VALUES),
        WeightType("binary", 1, "codebook", values=BINARY_VALUES, scale_from="mean"),
        WeightType("fp8e4m3", 8, "float8", float_dtype=torch.float8_e4m3fn),
        WeightType("fp8e5m2", 8, "float8", float_dtype=torch.float8_e5m2),
    )
}


NAMED_SCHEMES = {
    "smoothquant-o1": "w8a8-gtensor",
    "smoothquant-o2": "w8a8-gtensor-tensor",
    "smoothquant-o3": "w8a8-gtensor-static",
}
"""Schemes by names that others gave them (SmoothQuant, Xiao et al. 2023, table 2)."""


def table_type(values: tuple[float, ...]) -> WeightType:
    """The weight type of a user's own 16 values, stored as the index of the nearest value."""
    values = tuple(float(value) for value in values)
    if len(values) != 16:
        raise SchemeError(f"a table has 16 values, got {len(values)}")
    if not all(math.isfinite(value) for value in values) or not any(values):
        raise SchemeError(f"a table needs finite values that are not all zero, got {values}")
    return WeightType("table", 4, "codebook", values=values)


def largest_number(dtype: torch.dtype) -> float:
    """What max|x| is scaled to in int8 (127, so that both signs reach it) or a float8 type."""
    return 127.0 if dtype == torch.int8 else torch.finfo(dtype).max


GRANULARITIES = (
    *("token", "tensor", "static", "position"),
    *("tokenasym", "staticasym", "positionasym"),
)
"""What shares a scale of activations."""

ACTIVATION_DTYPES: dict[str, torch.dtype] = {
    "int8": torch.int8,
    "int4": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
"""What holds them. Those of 4 bits are simulated: nothing packs them."""

_ACTIVATION_BITS = {"none": 16, "int8": 8, "int4": 4, "fp8": 8}


@dataclass(frozen=True)
class Activation:
    """How activations are quantized before the product.

    `dtype` is "none" (16-bit), "int8", "int4" (integers of 4 bits, held and multiplied as int8) or
    "fp8" (E4M3); `granularity` is "token" (one scale a row, computed at run time), "tensor" (one
    scale, computed at run time), "static" (one scale, calibrated beforehand) or, of integers,
    "position" (one scale for each position of a sequence, calibrated beforehand). All of these are
    symmetric; of integers, "tokenasym", "staticasym" and "positionasym" have a zero point beside
    each scale. With `outliers`, columns of x that hold a magnitude of that and more are left out of
    what is quantized, and multiplied in 16 bits (LLM.int8(), Dettmers et al. 2022); 0 leaves none
    out.
    """

    dtype: str = "none"
    granularity: str = "token"
    outliers: float = 0.0

    @property
    def torch_dtype(self) -> torch.dtype:
        return ACTIVATION_DTYPES[self.dtype]

    @property
    def bits(self) -> int:
        return _ACTIVATION_BITS[self.dtype]

    @property
    def is_integer(self) -> bool:
        return self.dtype in ("int8", "int4")

    @property
    def is_static(self) -> bool:
        """Whether its scales are calibrated beforehand."""
        return self.granularity in ("static", "staticasym") or self.by_position

    @property
    def by_position(self) -> bool:
        """Whether each position of a sequence has a scale, calibrated beforehand."""
        return self.granularity in ("position", "positionasym")

    @property
    def has_zeros(self) -> bool:
        """Whether quantized activations have zero points."""
        return self.granularity in ("tokenasym", "staticasym", "positionasym")

    @property
    def largest(self) -> float:
        """The largest magnitude that a quantized activation takes: 127, 7 or 448."""
        if self.is_integer:
            return float((1 << (self.bits - 1)) - 1)
        return largest_number(self.torch_dtype)


@dataclass(frozen=True)
class QuantScheme:
    """What stored numbers mean. Frozen, hashable; `str` gives the canonical spelling.

    Attributes:
        weight: the weight type.
        group_size: columns of K that share a scale; None for per channel. It need not divide K: the
            last group is then shorter. Kernels fill groups up to multiples of 16 columns.
        per_tensor: one scale for the whole weight (excludes `group_size`).
        symmetric: no zero points. Codebook and float8 types are always symmetric.
        activation: how activations are quantized.
        scale_dtype: storage type of floating scales.
        scale_levels: "one", "two" (uint8 group multipliers times an fp32 channel scale, for int8
            products; QServe, Lin et al. 2024), "double" (scales quantized to 8 bits; QLoRA) or
            "blocks" (scales and zero points quantized to 4 bits, with the steps and the least of
            16 rows; SpQR, Dettmers et al. 2023).

    Raises:
        SchemeError: for parts that exclude each other.
    """

    weight: WeightType
    group_size: int | None = None
    per_tensor: bool = False
    symmetric: bool = True
    activation: Activation = Activation()
    scale_dtype: torch.dtype = torch.float16
    scale_levels: str = "one"

    def __post_init__(self) -> None:
        reason = _why_invalid(self)
        if reason is not None:
            raise SchemeError(reason)

    @property
    def bits(self) -> int:
        return self.weight.bits

    @property
    def integer_activation(self) -> bool:
        """Whether products are those of integers: x is held as int8, in 8 bits or in 4."""
        return self.activation.is_integer

    @property
    def weight_only(self) -> bool:
        return self.activation.dtype == "none"

    @property
    def dynamic(self) -> QuantScheme:
        """The same with activations per token, where theirs would be calibrated."""
        if not self.activation.is_static:
            return self
        return replace(self, activation=Activation(self.activation.dtype))

    @property
    def implied_zero(self) -> int:
        """The zero point of linear codes that store none, half their range; else 0."""
        is_shifted = self.weight.kind == "linear" and self.symmetric
        return 1 << (self.bits - 1) if is_shifted else 0

    def group_length(self, k: int) -> int:
        """Columns a scale covers in a weight with `k` columns."""
        return self.group_size if self.group_size is not None else max(k, 1)

    def groups(self, k: int) -> int:
        """Number of scales a row has in a weight with `k` columns."""
        return max(1, -(-k // self.group_length(k)))

    @staticmethod
    def parse(text: str | QuantScheme) -> QuantScheme:
        """The scheme that `text` spells; a scheme is returned as it is.

        Raises:
            SchemeError: naming the part that does not parse, with the accepted forms.
        """
        return text if isinstance(text, QuantScheme) else _parse(text)

    def __str__(self) -> str:
        return _spell(self)


def _why_invalid(scheme: QuantScheme) -> str | None:
    weight, act = scheme.weight, scheme.activation
    linear = weight.kind == "linear"
    if scheme.group_size is not None and scheme.group_size < 1:
        return f"group size {scheme.group_size} is too small: use 1 or more"
    if scheme.group_size is not None and scheme.group_size >= 1 << 31:
        return f"group size {scheme.group_size} is too large: use less than 2^31"
    if scheme.group_size is not None and scheme.per_tensor:
        return f"per-tensor scales exclude a group size, got {scheme.group_size}"
    if not linear and not scheme.symmetric:
        return f"{weight.name} has no zero points: its values already are signed"
    if act.dtype not in ("none", *ACTIVATION_DTYPES):
        return f"activation type {act.dtype!r} is not one of none, {', '.join(ACTIVATION_DTYPES)}"
    if act.granularity not in GRANULARITIES:
        return (
            f"activation granularity {act.granularity!r} is not one of {', '.join(GRANULARITIES)}"
        )
    if act.outliers and not (act.is_integer and act.granularity == "token"):
        return "columns with outliers are kept apart from int8 or int4 activations per token"
    if not 0 <= act.outliers < math.inf:
        return f"outliers are magnitudes above 0, got {act.outliers:g}"
    if act.by_position and not act.is_integer:
        return f"scales per position ({act.granularity}) are for int8 and int4 activations"
    if act.has_zeros and not act.is_integer:
        return f"zero points of activations ({act.granularity}) are for int8 and int4"
    if act.is_integer and not linear:
        return (
            f"{act.dtype} activations need linear integer weights, not {weight.name}: use a16 or "
            "fp8"
        )
    if act.is_integer and weight.bits == 8 and not scheme.symmetric:
        return "8-bit weights with zero points do not fit an int8 product: use symmetric weights"
    if scheme.scale_dtype not in _SCALE_NAMES:
        return f"scale type {scheme.scale_dtype} is not one of fp16, bf16, fp32"
    if scheme.scale_levels not in ("one", "two", "double", "blocks"):
        return f"scale levels {scheme.scale_levels!r} is not one of one, two, double, blocks"
    if scheme.scale_levels == "two" and (
        not act.is_integer or weight.bits == 8 or scheme.group_size is None
    ):
        return "two-level scales are for grouped weights under 8 bits with integer activations"
    if scheme.scale_levels == "double" and (act.dtype != "none" or scheme.per_tensor):
        return "double-quantized scales are for 16-bit activations and several scales"
    if scheme.scale_levels == "blocks" and (
        scheme.symmetric or act.dtype != "none" or scheme.group_size is None
    ):
        return (
            "scales and zero points in blocks (-spqr) are for groups of integers with zero points, "
            "and 16-bit activations"
        )
    return None


def _default_symmetric(weight: WeightType, activation: Activation) -> bool:
    return weight.kind != "linear" or activation.is_integer


def _default_levels(weight: WeightType, group_size: int | None, activation: Activation) -> str:
    two_level = activation.is_integer and weight.bits < 8 and group_size is not None
    return "two" if two_level else "one"


def _default_scale_dtype(activation: Activation, levels: str) -> torch.dtype:
    # Scales that meet integer or fp8 products are few (or integers), so full precision costs
    # nothing; double-quantized ones are expanded from fp32 tables.
    if activation.dtype != "none" or levels in ("two", "double"):
        return torch.float32
    return torch.float16


_LINEAR_HEAD = re.compile(r"w(\d+)a(16|8|4|fp8)")
_ALIASES = {"fp8": "fp8e4m3"}


def accepted_forms() -> str:
    """What a scheme may look like, for messages and help; made from `WEIGHT_TYPES`."""
    linear = [str(row.bits) for row in WEIGHT_TYPES.values() if row.kind == "linear"]
    named = [name for name, row in WEIGHT_TYPES.items() if row.kind != "linear"]
    return (
        f"accepted are w{{{','.join(linear)}}}a{{16,8,4,fp8}}, {', '.join(named)} or "
        "table(v0,...,v15), then any of -a16 -a8 -afp8 -g<N> -gtensor -sym -asym -tensor -static "
        "-position -tokenasym -staticasym -positionasym -outliers<M> -flat -dq -spqr -sfp16 "
        "-sbf16 -sfp32, for example w4a16-g128"
    )


def _parse_head(head: str) -> tuple[WeightType, str | None]:
    """The weight type that a scheme begins with and, where that names it, the activation.

    Raises:
        SchemeError: saying what is wrong with it.
    """
    linear = _LINEAR_HEAD.fullmatch(head)
    if linear is not None:
        bits, activation = linear.groups()
        if f"int{bits}" not in WEIGHT_TYPES:
            raise SchemeError(f"{bits}-bit weights are not supported")
        return WEIGHT_TYPES[f"int{bits}"], activation
    if head.startswith("table(") and head.endswith(")"):
        try:
            values = tuple(float(value) for value in head[len("table(") : -1].split(","))
        except ValueError as error:
            raise SchemeError(str(error)) from None
        return table_type(values), None
    weight = WEIGHT_TYPES.get(_ALIASES.get(head, head))
    if weight is None or weight.kind == "linear":
        raise SchemeError(f"{head!r} is not a weight type")
    return weight, None


@lru_cache(maxsize=1024)
def _parse(text: str) -> QuantScheme:
    def fail(why: str) -> SchemeError:
        return SchemeError(f"scheme {text!r} does not parse: {why}; {accepted_forms()}")

    if not isinstance(text, str):
        raise fail("it is not a string")
    text = NAMED_SCHEMES.get(text.strip(), text)
    table, _, rest = text.strip().partition(")")
    # The values of a table may hold the separator of the suffixes.
    parts = [table + ")", *rest.split("-")[1:]] if ")" in text else text.strip().split("-")
    try:
        weight, named_activation = _parse_head(parts[0])
    except SchemeError as error:
        raise fail(str(error)) from None
    act_name = named_activation or "16"

    group_size: int | None = None
    granularity, flags, scale_name, outliers = "token", set(), None, 0.0
    seen: set[str] = set()
    for part in parts[1:]:
        if part in ("a16", "a8", "a4", "afp8") and named_activation is None:
            kind, act_name = "activation", part[1:]
        elif part == "gtensor":
            kind = "granularity"
            flags.add("gtensor")
        elif re.fullmatch(r"g\d+", part):
            kind, group_size = "granularity", int(part[1:])
        elif part in ("sym", "asym"):
            kind = "symmetry"
            flags.add(part)
        elif part in GRANULARITIES[1:]:
            kind, granularity = "activation granularity", part
        elif re.fullmatch(r"outliers\d+(\.\d+)?", part):
            kind, outliers = "outliers", float(part.removeprefix("outliers"))
        elif part in ("flat", "dq", "spqr"):
            kind = "scale levels"
            flags.add(part)
        elif part[:1] == "s" and part[1:] in _SCALE_DTYPES:
            kind, scale_name = "scale type", part[1:]
        else:
            raise fail(f"{part!r} is not known")
        if kind in seen:
            raise fail(f"{part!r} names the {kind} a second time")
        seen.add(kind)

    eight_bits = "fp8" if weight.kind == "float8" else "int8"
    act_dtype = {"16": "none", "8": eight_bits, "4": "int4", "fp8": "fp8"}[act_name]
    if act_dtype == "none" and granularity != "token":
        raise fail(f"{granularity!r} is about quantized activations, and these have 16 bits")
    activation = Activation(act_dtype, granularity, outliers)
    symmetric = "sym" in flags or ("asym" not in flags and _default_symmetric(weight, activation))
    levels = _default_levels(weight, group_size, activation)
    if "flat" in flags:
        levels = "one"
    elif "dq" in flags:
        levels = "double"
    elif "spqr" in flags:
        levels = "blocks"
    scale_dtype = _default_scale_dtype(activation, levels)
    try:
        return QuantScheme(
            weight=weight,
            group_size=group_size,
            per_tensor="gtensor" in flags,
            symmetric=symmetric,
            activation=activation,
            scale_dtype=scale_dtype if scale_name is None else _SCALE_DTYPES[scale_name],
            scale_levels=levels,
        )
    except SchemeError as error:
        raise fail(str(error)) from None


@lru_cache(maxsize=1024)
def _spell(scheme: QuantScheme) -> str:
    weight, act = scheme.weight, scheme.activation
    act_bits = "fp8" if act.dtype == "fp8" else str(act.bits)
    parts: list[str] = []
    if weight.kind == "linear":
        parts.append(f"w{weight.bits}a{act_bits}")
    elif weight.name == "table":
        assert weight.values is not None
        parts.append("table(" + ",".join(repr(value) for value in weight.values) + ")")
    elif weight.name == "fp8e4m3" and act.dtype == "fp8":
        parts.append("fp8")
    else:
        parts.append(weight.name)
    if weight.kind == "float8":
        parts.append("a16" if act.dtype == "none" else "a8")
    elif weight.kind == "codebook" and act.dtype != "none":
        parts.append("a" + act_bits)
    if scheme.group_size is not None:
        parts.append(f"g{scheme.group_size}")
    elif scheme.per_tensor:
        parts.append("gtensor")
    if scheme.symmetric != _default_symmetric(weight, act):
        parts.append("sym" if scheme.symmetric else "asym")
    if act.granularity != "token":
        parts.append(act.granularity)
    if act.outliers:
        parts.append(f"outliers{act.outliers:g}")
    default_levels = _default_levels(weight, scheme.group_size, act)
    if scheme.scale_levels == "double":
        parts.append("dq")
    elif scheme.scale_levels == "blocks":
        parts.append("spqr")
    elif scheme.scale_levels != default_levels:
        parts.append("flat")
    if scheme.scale_dtype != _default_scale_dtype(act, scheme.scale_levels):
        parts.append("s" + _SCALE_NAMES[scheme.scale_dtype])
    return "-".join(parts)
