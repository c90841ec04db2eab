"""`quantize_model`: takes a quantization method through a model, block by block, with a report.

Every layer is checked before the first is replaced, so that an error leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from qkernels import rounding
from qkernels.errors import LayerError, QuantizationError
from qkernels.modules.awq import _AwqLinear
from qkernels.modules.linear import WQLinear
from qkernels.scheme import QuantScheme
from qkernels.select import check_backend
from qkernels.weight import row_slices

SAMPLE_ROWS = 256
"""Rows of calibration input kept a layer, for the relative output error."""

OUTPUT_HEADS = ("lm_head", "*.lm_head", "embed_out", "output_projection")
"""Names of output heads, which stay in 16 bits unless they are included by name: they are the most
sensitive layer, and their weight often is that of the embedding."""

METHODS: dict[str, str] = {"rtn": "round to nearest"}

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    Attributes:
        weight_error: |W - dequantized| / |W|, Frobenius.
        output_error: |y - quantized y| / |y| over calibration inputs, or None without calibration.
        bits_per_weight: all bytes of the packed weight but the bias, in bits over N * K.
    """

    name: str
    scheme: str
    n: int
    k: int
    weight_error: float
    output_error: float | None
    bits_per_weight: float


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize_model` did: `layers` in the model's order, `skipped` with the reasons."""

    method: str
    layers: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all quantized weights, their scales included."""
        return round(sum(r.bits_per_weight * r.n * r.k for r in self.layers) / 8)

    @property
    def bits_per_weight(self) -> float:
        """Mean over all quantized weights."""
        return 8 * self.weight_bytes / max(1, sum(r.n * r.k for r in self.layers))

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "method": self.method,
            "bits_per_weight": self.bits_per_weight,
            "weight_bytes": self.weight_bytes,
            "layers": [asdict(report) for report in self.layers],
            "skipped": dict(self.skipped),
        }


@dataclass
class _Inputs:
    """What calibration keeps of a layer's input."""

    largest: float = 0.0
    rows: list[Tensor] = field(default_factory=list)
    kept: int = 0

    def add(self, x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1])
        if flat.numel():
            self.largest = max(self.largest, float(flat.abs().max()))
        # Evenly spaced rows of each batch: the first tokens of a text are unlike the others.
        take = min(SAMPLE_ROWS - self.kept, SAMPLE_ROWS // 4, flat.shape[0])
        if take > 0:
            index = torch.linspace(0, flat.shape[0] - 1, take, device=flat.device).long()
            self.rows.append(flat[index].clone())
            self.kept += take


def quantize_model(
    model: nn.Module,
    method: str = "rtn",
    scheme: QuantScheme | str = "w4a16-g128",
    *,
    calibration: Iterable[Any] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    overrides: Mapping[str, QuantScheme | str | None] | None = None,
    backend: str | None = None,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Replaces the `nn.Linear` layers of `model`, in place, by `WQLinear`.

    Args:
        model: its linear layers hold fp16, bf16 or fp32 weights.
        method: "rtn".
        scheme: for all layers that no override names.
        calibration: batches to run through the model (tensors, tuples or dicts of its arguments),
            for the output errors and for static activation scales.
        include: patterns (`fnmatch`) of layer names to quantize; None for all but output heads.
        exclude: patterns of layers to leave alone.
        overrides: pattern -> scheme, or None to leave the layer alone; the first match counts. A
            pattern here includes an output head.
        progress: called as progress(done, total, layer name).

    Returns:
        A report of each layer's error and size, and why layers were skipped.

    Raises:
        LayerError: where nothing is left to quantize, a pattern matches no layer, or a layer is
            quantized already.
        SchemeError, WeightError, NoKernelError: naming the layer. The model is unchanged then.
    """
    if method not in METHODS:
        raise QuantizationError(f"method {method!r} is not one of {', '.join(METHODS)}")
    check_backend(backend)
    default = QuantScheme.parse(scheme)
    parsed = {
        pattern: None if value is None else QuantScheme.parse(value)
        for pattern, value in (overrides or {}).items()
    }
    report = QuantizationReport(method)
    plan = _plan(model, default, include, exclude, parsed, report)
    static = [name for name, s in plan.items() if s.activation.granularity == "static"]
    if static and calibration is None:
        raise LayerError(
            f"{static[0]} has static activations ({plan[static[0]]}): pass calibration batches"
        )
    layers = {name: cast(nn.Linear, model.get_submodule(name)) for name in plan}
    for name, layer in layers.items():
        rounding.check_weight(layer.weight.detach(), f"{name}.weight")
    inputs = _calibrate(model, layers, calibration) if calibration is not None else {}
    built: dict[int, WQLinear] = {}
    try:
        for done, (name, layer) in enumerate(layers.items()):
            if progress is not None:
                progress(done, len(layers), name)
            packed, seen = built.get(id(layer)), inputs.get(name)
            if packed is None:
                packed = _quantize_layer(name, layer, plan[name], seen, backend)
                built[id(layer)] = packed
            report.layers.append(_report(name, layer, packed, seen))
            model.set_submodule(name, packed)
    except BaseException:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        raise
    if progress is not None:
        progress(len(layers), len(layers), "")
    return report


def _plan(
    model: nn.Module,
    default: QuantScheme,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    overrides: Mapping[str, QuantScheme | None],
    report: QuantizationReport,
) -> dict[str, QuantScheme]:
    """Scheme of each layer to quantize; what is left alone goes into `report.skipped`."""
    names = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear)
    ]
    quantized = [
        name for name, module in model.named_modules() if isinstance(module, WQLinear | _AwqLinear)
    ]
    if quantized:
        raise LayerError(f"{quantized[0]} is quantized already: start from the original model")
    for pattern in (*(include or ()), *(exclude or ()), *overrides):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise LayerError(
                f"pattern {pattern!r} matches none of the {len(names)} linear layers, "
                f"for example {names[:3]}"
            )
    plan: dict[str, QuantScheme] = {}
    for name in names:
        override = next((p for p in overrides if fnmatchcase(name, p)), None)
        included = _matches(name, include or ())
        if _matches(name, exclude or ()):
            report.skipped[name] = "excluded"
        elif override is not None:
            chosen = overrides[override]
            if chosen is None:
                report.skipped[name] = f"left alone by the override {override!r}"
            else:
                plan[name] = chosen
        elif include is not None and not included:
            report.skipped[name] = "not included"
        elif include is None and _matches(name, OUTPUT_HEADS):
            report.skipped[name] = "output heads stay in 16 bits unless they are included by name"
        else:
            plan[name] = default
    if not plan:
        raise LayerError(f"no linear layer is left to quantize out of {len(names)}")
    return plan


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _calibrate(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any]
) -> dict[str, _Inputs]:
    inputs = {name: _Inputs() for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs[name].add(args[0]))
        for name, layer in layers.items()
    ]
    seen = 0
    try:
        with torch.no_grad():
            for batch in batches:
                seen += 1
                if isinstance(batch, Mapping):
                    model(**batch)
                elif isinstance(batch, tuple | list):
                    model(*batch)
                else:
                    model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise LayerError("calibration holds no batch")
    silent = [name for name, kept in inputs.items() if not kept.kept]
    if silent:
        raise LayerError(f"calibration never reached {silent[0]} and {len(silent) - 1} others")
    return inputs


def _quantize_layer(
    name: str, layer: nn.Linear, scheme: QuantScheme, inputs: _Inputs | None, backend: str | None
) -> WQLinear:
    activation_scale = None
    if scheme.activation.granularity == "static":
        assert inputs is not None
        activation_scale = inputs.largest / scheme.activation.largest or 1.0
    return WQLinear.from_linear(
        layer, scheme, backend=backend, activation_scale=activation_scale, name=name
    )


def _report(name: str, layer: nn.Linear, packed: WQLinear, inputs: _Inputs | None) -> LayerReport:
    weight, held = layer.weight.detach(), packed.packed
    parameters = held.parameters()
    wrong = total = 0.0
    for start, stop in row_slices(*weight.shape):
        original = weight[start:stop].float()
        rows = parameters.to_column_order(held.dequantize_rows(start, stop))
        wrong += float((rows - original).norm()) ** 2
        total += float(original.norm()) ** 2
    output_error = None
    if inputs is not None:
        x = torch.cat(inputs.rows)
        with torch.no_grad():
            exact = nn.functional.linear(x, layer.weight, layer.bias).double()
            got = packed(x).double()
        output_error = _relative(float((got - exact).norm()), float(exact.norm()))
    return LayerReport(
        name=name,
        scheme=str(packed.scheme),
        n=held.n,
        k=held.k,
        weight_error=_relative(wrong**0.5, total**0.5),
        output_error=output_error,
        bits_per_weight=8 * held.nbytes / (held.n * held.k),
    )


def _relative(difference: float, norm: float) -> float:
    return difference / norm if norm else difference
