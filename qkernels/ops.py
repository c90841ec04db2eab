"""The torch operators, namespace `qkernels`: opaque to torch.compile, with shapes and gradients.

`linear`, `linear_grouped`, `linear_quantized` and `linear_to_int8` are C++ where qkernels._C is
built (csrc/bindings/operator.h): they ask here for the kernel once, and what is here runs without
it. A call in Python costs more than a decode GEMV takes.

A packed weight crosses the operator boundary as its list of buffers and one string that says what
they are, so that choosing another kernel for another M recompiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from qkernels import compiled, preparation, reference
from qkernels.backends.cpu import isa_cap
from qkernels.backends.kernel import Kernel, Problem
from qkernels.errors import WeightError
from qkernels.fields import FIELDS
from qkernels.layouts import LAYOUTS, PackedWeight
from qkernels.layouts.padding import kernel_group
from qkernels.scheme import QuantScheme
from qkernels.select import choose, make_problem, select, select_grad_input
from qkernels.weight import code_values, nested_table, row_slices

X_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class PackedSpec:
    """What a list of buffers is, as one hashable value that spells itself as a string."""

    scheme: QuantScheme
    layout: str
    n: int
    k: int
    names: tuple[str, ...]
    backend: str | None = None
    batch_invariant: bool = False

    @staticmethod
    def of(
        packed: PackedWeight, backend: str | None = None, batch_invariant: bool = False
    ) -> PackedSpec:
        names = tuple(packed.buffers)
        return PackedSpec(
            packed.scheme, packed.layout.name, packed.n, packed.k, names, backend, batch_invariant
        )

    def __str__(self) -> str:
        return "|".join(
            (
                str(self.scheme),
                self.layout,
                str(self.n),
                str(self.k),
                ",".join(self.names),
                self.backend or "",
                "invariant" if self.batch_invariant else "",
            )
        )

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> PackedSpec:
        scheme, layout, n, k, names, backend, invariant = text.split("|")
        return PackedSpec(
            QuantScheme.parse(scheme),
            layout,
            int(n),
            int(k),
            tuple(names.split(",")),
            backend or None,
            bool(invariant),
        )

    def packed(self, buffers: list[Tensor]) -> PackedWeight:
        named = dict(zip(self.names, buffers, strict=True))
        return PackedWeight(self.scheme, LAYOUTS[self.layout], self.n, self.k, named)


_library = torch.library.Library("qkernels", "DEF")
_library.define("linear(Tensor x, Tensor[] buffers, Tensor? bias, str spec) -> Tensor")
_library.define("linear_grad_input(Tensor grad, Tensor[] buffers, str spec) -> Tensor")
_library.define("linear_grouped(Tensor x, Tensor ends, Tensor[] buffers, str spec) -> Tensor")
_library.define(
    "linear_grouped_grad_input(Tensor grad, Tensor ends, Tensor[] buffers, str spec) -> Tensor"
)
_library.define("dequantize(Tensor[] buffers, str spec) -> Tensor")
_library.define("embedding(Tensor indices, Tensor[] buffers, str spec, ScalarType dtype) -> Tensor")
_library.define(
    "linear_quantized(Tensor x, Tensor scale, Tensor[] buffers, Tensor? bias, str spec, "
    "ScalarType dtype) -> Tensor"
)
_library.define(
    "linear_to_int8(Tensor x, Tensor? x_scale, Tensor[] buffers, Tensor? bias, str spec, "
    "ScalarType? dtype, Tensor scale, Tensor? zero, bool relu) -> (Tensor, Tensor)"
)


def check_input(x: Tensor, width: int, name: str, words: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] != width:
        raise WeightError(f"{name} must have shape [..., {width}], got {list(x.shape)}")
    if x.dtype not in X_DTYPES:
        raise WeightError(f"{name} must be fp16, bf16 or fp32, got {x.dtype}")
    _check_device(x, name, words)


def _check_device(x: Tensor, name: str, words: Tensor) -> None:
    if x.device != words.device:
        raise WeightError(
            f"{name} is on {x.device} and the weight on {words.device}: move one of them"
        )


@lru_cache(maxsize=4096)
def _problem(what: PackedSpec, m: int, dtype: torch.dtype, device: torch.device) -> Problem:
    return make_problem(
        what.scheme,
        n=what.n,
        k=what.k,
        m=m,
        device=device,
        layout=what.layout,
        x_dtype=dtype,
        batch_invariant=what.batch_invariant,
        fields=what.names,
    )


def _select(what: PackedSpec, x: Tensor, dtype: torch.dtype) -> Kernel:
    """The kernel for a call that finds no qkernels._C."""
    kernel = select(_problem(what, x.numel() // what.k, dtype, x.device), what.backend)
    meant = what.backend is not None or isa_cap() == "portable"
    if kernel.backend == "reference" and x.device.type == "cpu" and not meant:
        compiled.warn_of_its_lack()
    return kernel


def _run(
    kernel: Kernel, what: PackedSpec, x: Tensor, buffers: list[Tensor], bias: Tensor | None
) -> Tensor:
    packed = what.packed(buffers)
    rows = preparation.rows_of(x, packed)
    packed = preparation.with_row_scales(packed, x.shape)
    y = kernel.run(rows, packed, bias, _problem(what, rows.shape[0], x.dtype, x.device))
    return y.view(*x.shape[:-1], what.n)


def _run_quantized(
    kernel: Kernel,
    what: PackedSpec,
    x: Tensor,
    scale: Tensor,
    buffers: list[Tensor],
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    assert kernel.run_quantized is not None, f"{kernel.name} takes no quantized x"
    packed = what.packed(buffers)
    rows, row_scale = preparation.rows_of(x, packed), scale.reshape(-1).contiguous()
    problem = _problem(what, rows.shape[0], dtype, x.device)
    y = kernel.run_quantized(rows, row_scale, packed, bias, problem)
    return y.view(*x.shape[:-1], what.n)


def _linear(x: Tensor, buffers: list[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    what = PackedSpec.parse(spec)
    check_input(x, what.k, "x", buffers[0])
    return _run(_select(what, x, x.dtype), what, x, buffers, bias)


def _linear_quantized(
    x: Tensor,
    scale: Tensor,
    buffers: list[Tensor],
    bias: Tensor | None,
    spec: str,
    dtype: torch.dtype,
) -> Tensor:
    what = PackedSpec.parse(spec)
    _check_quantized(x, scale, what, buffers[0])
    return _run_quantized(_select(what, x, dtype), what, x, scale, buffers, bias, dtype)


def why_not_per_token(what: PackedSpec) -> str | None:
    """Why layers of such a weight do not take x quantized per token, or None."""
    activation = what.scheme.activation
    if activation.dtype != "int8" or activation.granularity != "token":
        return (
            f"x is quantized to 8 bits per token, which layers of {what.scheme} do not take: pass "
            "x itself, or use a scheme such as w8a8 or w4a8-g128"
        )
    return _why_not_int8(what)


def why_not_static(what: PackedSpec) -> str | None:
    """Why layers of such a weight do not take x quantized under their own static scale, or
    None."""
    activation = what.scheme.activation
    if activation.dtype != "int8" or activation.granularity not in ("static", "staticasym"):
        return (
            f"layers of {what.scheme} have no one static scale of int8 activations: use a scheme "
            "such as w8a8-static or w8a8-staticasym"
        )
    return _why_not_int8(what)


def _why_not_quantized(what: PackedSpec) -> str | None:
    """Why layers of such a weight take no quantized x at all, or None."""
    return why_not_per_token(what) if why_not_static(what) is not None else None


def _why_not_int8(what: PackedSpec) -> str | None:
    if what.scheme.activation.outliers:
        return f"layers of {what.scheme} keep columns of x in 16 bits: pass x itself"
    for field in (FIELDS[name] for name in what.names if name in FIELDS):
        if field.transform_x is not None and not field.permutes_x:
            return f"x is quantized, and this layer's {field.name} comes before that: pass x itself"
    return None


def _check_quantized(x: Tensor, scale: Tensor, what: PackedSpec, words: Tensor) -> None:
    reason = _why_not_quantized(what)
    if reason is not None:
        raise WeightError(reason)
    if x.dtype != torch.int8 or x.dim() == 0 or x.shape[-1] != what.k:
        raise WeightError(
            f"quantized x must be int8 [..., {what.k}], got {x.dtype} {list(x.shape)}"
        )
    if scale.dtype != torch.float32 or scale.shape != (*x.shape[:-1], 1):
        raise WeightError(
            f"the scale of x must be float32 {[*x.shape[:-1], 1]}, got {scale.dtype} "
            f"{list(scale.shape)}"
        )
    _check_device(x, "x", words)


def _linear_quantized_fake(
    x: Tensor,
    scale: Tensor,
    buffers: list[Tensor],
    bias: Tensor | None,
    spec: str,
    dtype: torch.dtype,
) -> Tensor:
    what = PackedSpec.parse(spec)
    _check_quantized(x, scale, what, buffers[0])
    return x.new_empty((*x.shape[:-1], what.n), dtype=dtype)


def _linear_fake(x: Tensor, buffers: list[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    what = PackedSpec.parse(spec)
    check_input(x, what.k, "x", buffers[0])
    return x.new_empty((*x.shape[:-1], what.n))


def _check_reader(x: Tensor, scale: Tensor, zero: Tensor | None) -> None:
    for name, tensor, dtype in (("scale", scale, torch.float32), ("zero", zero, torch.int32)):
        if tensor is None:
            continue
        if tensor.dim() or tensor.dtype != dtype or tensor.device != x.device:
            raise WeightError(
                f"{name} must be {dtype} [] on {x.device}, got {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}"
            )


def _check_goes_together(x_scale: Tensor | None, dtype: torch.dtype | None) -> None:
    if (x_scale is None) != (dtype is None):
        raise WeightError(
            "x_scale and the dtype of y go together: both are of int8 x alone, got "
            f"{'no ' if x_scale is None else ''}x_scale and dtype {dtype}"
        )


def _linear_to_int8(
    x: Tensor,
    x_scale: Tensor | None,
    buffers: list[Tensor],
    bias: Tensor | None,
    spec: str,
    dtype: torch.dtype | None,
    scale: Tensor,
    zero: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    _check_goes_together(x_scale, dtype)
    _check_reader(x, scale, zero)
    if x_scale is None or dtype is None:
        y = _linear(x, buffers, bias, spec)
    else:
        y = _linear_quantized(x, x_scale, buffers, bias, spec, dtype)
    return reference.quantize_output(y, scale, zero, relu)


def _linear_to_int8_fake(
    x: Tensor,
    x_scale: Tensor | None,
    buffers: list[Tensor],
    bias: Tensor | None,
    spec: str,
    dtype: torch.dtype | None,
    scale: Tensor,
    zero: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    what = PackedSpec.parse(spec)
    _check_goes_together(x_scale, dtype)
    _check_reader(x, scale, zero)
    if x_scale is None:
        check_input(x, what.k, "x", buffers[0])
    else:
        _check_quantized(x, x_scale, what, buffers[0])
    rows = x.shape[:-1]
    return (
        x.new_empty((*rows, what.n), dtype=torch.int8),
        x.new_empty((*rows, 1), dtype=torch.float32),
    )


def _linear_grad_input(grad: Tensor, buffers: list[Tensor], spec: str) -> Tensor:
    what = PackedSpec.parse(spec)
    check_input(grad, what.n, "grad", buffers[0])
    rows, packed = grad.reshape(-1, what.n), what.packed(buffers)
    problem = _problem(what, rows.shape[0], grad.dtype, grad.device)
    kernel = select_grad_input(problem, what.backend)
    if kernel is None:
        grad_x = reference.grad_input(rows, packed)
    else:
        assert kernel.grad_input is not None
        grad_x = kernel.grad_input(rows, packed, problem)
        grad_x = preparation.restore_columns(grad_x, packed).to(grad.dtype)
    return grad_x.view(*grad.shape[:-1], what.k)


def _linear_grad_input_fake(grad: Tensor, buffers: list[Tensor], spec: str) -> Tensor:
    what = PackedSpec.parse(spec)
    check_input(grad, what.n, "grad", buffers[0])
    return grad.new_empty((*grad.shape[:-1], what.k))


def _check_grouped(
    x: Tensor, width: int, name: str, ends: Tensor, buffers: Sequence[Tensor]
) -> None:
    """Raises for what is wrong with anything but the values of `ends`."""
    if x.dim() != 2:
        raise WeightError(f"{name} must have shape [M, {width}], got {list(x.shape)}")
    check_input(x, width, name, buffers[0])
    if ends.dim() != 1 or ends.shape[0] == 0 or ends.dtype != torch.int32:
        raise WeightError(
            f"ends must be int32 [E], with a number for each expert, got {ends.dtype} "
            f"{list(ends.shape)}"
        )
    if ends.device != x.device:
        raise WeightError(f"ends is on {ends.device} and {name} on {x.device}: move one of them")
    for buffer in buffers:
        if buffer.dim() == 0 or buffer.shape[0] != ends.shape[0]:
            raise WeightError(
                f"ends has {ends.shape[0]} experts, and each buffer must have as many, got "
                f"{list(buffer.shape)}"
            )


def _rows_of_experts(ends: Tensor, m: int) -> Iterator[tuple[int, slice]]:
    """Of each expert that has rows, its number and these."""
    values = ends.tolist()
    for expert, (start, stop) in enumerate(zip([0, *values[:-1]], values, strict=True)):
        if not start <= stop <= m:
            raise WeightError(
                f"ends must not decrease, and be {m} at most, the rows of x; that of expert "
                f"{expert} is {stop} behind {start}"
            )
    for expert, (start, stop) in enumerate(zip([0, *values[:-1]], values, strict=True)):
        if start < stop:
            yield expert, slice(start, stop)


def _linear_grouped(x: Tensor, ends: Tensor, buffers: list[Tensor], spec: str) -> Tensor:
    what = PackedSpec.parse(spec)
    _check_grouped(x, what.k, "x", ends, buffers)
    y = x.new_zeros((x.shape[0], what.n))
    for expert, rows in _rows_of_experts(ends, x.shape[0]):
        y[rows] = _linear(x[rows], [buffer[expert] for buffer in buffers], None, spec)
    return y


def _linear_grouped_fake(x: Tensor, ends: Tensor, buffers: list[Tensor], spec: str) -> Tensor:
    what = PackedSpec.parse(spec)
    _check_grouped(x, what.k, "x", ends, buffers)
    return x.new_empty((x.shape[0], what.n))


def _linear_grouped_grad_input(
    grad: Tensor, ends: Tensor, buffers: list[Tensor], spec: str
) -> Tensor:
    what = PackedSpec.parse(spec)
    _check_grouped(grad, what.n, "grad", ends, buffers)
    out = grad.new_zeros((grad.shape[0], what.k))
    for expert, rows in _rows_of_experts(ends, grad.shape[0]):
        out[rows] = _linear_grad_input(grad[rows], [buffer[expert] for buffer in buffers], spec)
    return out


def _linear_grouped_grad_input_fake(
    grad: Tensor, ends: Tensor, buffers: list[Tensor], spec: str
) -> Tensor:
    what = PackedSpec.parse(spec)
    _check_grouped(grad, what.n, "grad", ends, buffers)
    return grad.new_empty((grad.shape[0], what.k))


def _dequantize(buffers: list[Tensor], spec: str) -> Tensor:
    return PackedSpec.parse(spec).packed(buffers).unpack().dequantize()


def _dequantize_fake(buffers: list[Tensor], spec: str) -> Tensor:
    what = PackedSpec.parse(spec)
    return torch.empty(what.n, what.k, dtype=torch.float32, device=buffers[0].device)


_INDICES = (torch.int64, torch.int32)
_LOOKED_UP = frozenset(("plain", "vnni"))
"""Layouts whose rows qkernels._C looks up."""
_FIELDS_LOOKED_UP = (
    "scales",
    "zeros",
    "offsets",
    "channel_scales",
    "nested_absmax",
    "nested_offset",
)
_FIELDS_OF_X = frozenset(("activation_scale", "activation_zero"))
"""Of inputs of a product: they change no row."""


def _check_indices(indices: Tensor, words: Tensor) -> None:
    if indices.dtype not in _INDICES:
        raise WeightError(f"indices must be int64 or int32, got {indices.dtype}")
    if indices.device != words.device:
        raise WeightError(
            f"indices are on {indices.device} and the weight on {words.device}: move one of them"
        )


@lru_cache(maxsize=64)
def _cpu_embedding(spec: str) -> Any:
    """What looks up rows in qkernels._C, or None where that does not know the weight."""
    what = PackedSpec.parse(spec)
    known = {"words", *_FIELDS_LOOKED_UP, *_FIELDS_OF_X}
    if _compiled is None or what.layout not in _LOOKED_UP or not known.issuperset(what.names):
        return None
    scheme, device = what.scheme, torch.device("cpu")
    codes = torch.arange(1 << scheme.bits, dtype=torch.uint8, device=device)
    values = code_values(scheme, codes)
    if scheme.bits < 4:
        # Words that no packing made may hold more than the scheme has.
        values = torch.nn.functional.pad(values, (0, 16 - len(values)))
    return _compiled.CpuEmbedding(
        n=what.n,
        k=what.k,
        bits=scheme.bits,
        group=scheme.group_length(what.k),
        padded_group=kernel_group(scheme, what.k),
        groups=scheme.groups(what.k),
        one_scale=scheme.per_tensor,
        panels=what.layout == "vnni",
        values=values,
        nested_table=nested_table(device) if scheme.scale_levels == "double" else None,
    )


def _embedding(indices: Tensor, buffers: list[Tensor], spec: str, dtype: torch.dtype) -> Tensor:
    _check_indices(indices, buffers[0])
    what, rows = PackedSpec.parse(spec), indices.reshape(-1).long().contiguous()
    compiled = rows.device.type == "cpu" and dtype in X_DTYPES
    table = _cpu_embedding(spec) if compiled else None
    if table is not None:
        named = dict(zip(what.names, buffers, strict=True))
        fields = map(named.get, _FIELDS_LOOKED_UP)
        out = table.look_up(rows, named["words"], *fields, dtype)
    else:
        out = _embedding_in_torch(rows, what.packed(buffers), dtype)
    return out.view(*indices.shape, what.k)


def _embedding_in_torch(rows: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Rows of any layout on any device, in launches that a CUDA graph can capture."""
    in_range = ((rows >= 0) & (rows < packed.n)).all()
    if rows.device.type == "cuda":
        torch._assert_async(in_range, f"an index is out of range for {packed.n} rows")
    elif not in_range:
        raise IndexError(f"an index is out of range for an embedding of {packed.n} rows")
    out = torch.empty(len(rows), packed.k, dtype=dtype, device=rows.device)
    for start, stop in row_slices(len(rows), packed.k):
        out[start:stop] = packed.look_up(rows[start:stop])
    return out


def _embedding_fake(
    indices: Tensor, buffers: list[Tensor], spec: str, dtype: torch.dtype
) -> Tensor:
    _check_indices(indices, buffers[0])
    return indices.new_empty((*indices.shape, PackedSpec.parse(spec).k), dtype=dtype)


def _answer(
    x: Tensor, scale: Tensor | None, buffers: list[Tensor], spec: str, dtype: torch.dtype
) -> tuple[Any, int, int | None]:
    """What qkernels._C asks where it knows no route: one, and the least and most rows it is for."""
    what = PackedSpec.parse(spec)
    if scale is None:
        check_input(x, what.k, "x", buffers[0])
    else:
        _check_quantized(x, scale, what, buffers[0])
    what.packed(buffers)  # raises where there are too few or too many
    problem = _problem(what, x.numel() // what.k, dtype, x.device)
    choice = choose(problem, what.backend)
    kernel = choice.kernel
    if kernel.route is not None:
        route = kernel.route(problem, x.device)
    else:
        assert _compiled is not None
        takes_quantized = kernel.run_quantized is not None and _why_not_quantized(what) is None
        quantized = partial(_run_quantized, kernel, what) if takes_quantized else None
        route = _compiled.PythonRoute(partial(_run, kernel, what), quantized)
    return route, choice.least_rows, choice.most_rows


def under_autocast(operator: Callable[..., Any]) -> Callable[..., Any]:
    """What an operator whose first argument is x does under autocast: x in autocast's dtype."""

    def call(x: Tensor, *rest: Any) -> Any:
        device = x.device.type
        if x.is_floating_point():
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return operator(x, *rest)

    return call


def _save_for_linear(ctx: Any, inputs: Any, output: Tensor) -> None:
    _, buffers, _, spec = inputs
    # Buffers are not saved as tensors for backward: they are no differentiable inputs, and keeping
    # the list keeps them alive just as well.
    ctx.buffers, ctx.spec = buffers, spec


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, list[None], None, None]:
    grad_x = torch.ops.qkernels.linear_grad_input(grad, ctx.buffers, ctx.spec)
    return grad_x, [None] * len(ctx.buffers), None, None


def _save_for_grouped(ctx: Any, inputs: Any, output: Tensor) -> None:
    _, ctx.ends, ctx.buffers, ctx.spec = inputs


def _grouped_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, list[None], None]:
    grad_x = torch.ops.qkernels.linear_grouped_grad_input(grad, ctx.ends, ctx.buffers, ctx.spec)
    return grad_x, None, [None] * len(ctx.buffers), None


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "linear": (_linear, _linear_fake),
    "linear_grad_input": (_linear_grad_input, _linear_grad_input_fake),
    "linear_grouped": (_linear_grouped, _linear_grouped_fake),
    "linear_grouped_grad_input": (_linear_grouped_grad_input, _linear_grouped_grad_input_fake),
    "dequantize": (_dequantize, _dequantize_fake),
    "embedding": (_embedding, _embedding_fake),
    "linear_quantized": (_linear_quantized, _linear_quantized_fake),
    "linear_to_int8": (_linear_to_int8, _linear_to_int8_fake),
}

_compiled = compiled.extension()
_IN_CPP = (
    () if _compiled is None else ("linear", "linear_grouped", "linear_quantized", "linear_to_int8")
)
"""Operators of qkernels._C, with their gradients and autocast: csrc/bindings/operator.h."""

for _name, (_implementation, _fake) in _IMPLEMENTATIONS.items():
    if _name not in _IN_CPP:
        for _key in ("CPU", "CUDA"):
            _library.impl(_name, _implementation, _key)
    torch.library.register_fake(f"qkernels::{_name}", _fake, lib=_library)

if _compiled is not None:
    _compiled.answer_with(_answer)
else:
    for _key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl("linear", under_autocast(torch.ops.qkernels.linear.default), _key)
        _grouped = under_autocast(torch.ops.qkernels.linear_grouped.default)
        _library.impl("linear_grouped", _grouped, _key)
    torch.library.register_autograd(
        "qkernels::linear", _linear_backward, setup_context=_save_for_linear, lib=_library
    )
    torch.library.register_autograd(
        "qkernels::linear_grouped",
        _grouped_backward,
        setup_context=_save_for_grouped,
        lib=_library,
    )


linear_operator = torch.ops.qkernels.linear.default
linear_grouped_operator = torch.ops.qkernels.linear_grouped.default
embedding_operator = torch.ops.qkernels.embedding.default
linear_quantized_operator = torch.ops.qkernels.linear_quantized.default
linear_to_int8_operator = torch.ops.qkernels.linear_to_int8.default
"""Looked up once: a lookup takes as long as a small layer's product."""


def linear(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """y [..., N] = x [..., K] @ W.T + bias for a packed weight, in x's dtype.

    Args:
        x: fp16, bf16 or fp32, any leading shape and strides; on the weight's device.
        packed: the weight.
        bias: [N] or None. The gradient goes to x alone.
        backend: name of the backend to use instead of the first that can run this.
        batch_invariant: make each row's result independent of the other rows and of their number.

    Raises:
        WeightError: for a wrong shape, dtype or device of x.
        NoKernelError: where `backend` cannot run this.
    """
    spec = PackedSpec.of(packed, backend, batch_invariant)
    buffers = [packed.buffers[name] for name in spec.names]
    return linear_operator(x, buffers, bias, str(spec))


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """[E, ...] of tensors that are alike. Under autocast, `torch.stack` refuses some types."""
    stack = parts[0].new_empty((len(parts), *parts[0].shape))
    for number, part in enumerate(parts):
        stack[number].copy_(part)
    return stack


def linear_grouped(
    x: Tensor,
    ends: Tensor,
    packed: Sequence[PackedWeight],
    *,
    backend: str | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """y [M, N] of rows x [M, K] that are sorted by their expert, each times the weight of its own.

    The bits are those of `linear` for each expert's rows. An expert without rows costs nothing.
    `torch.ops.qkernels.linear_grouped` takes the buffers of all experts stacked, [E, ...], and
    copies none; here they are stacked first. Where no kernel takes all experts at once, as on the
    CPU, they run one after the other, and `ends` on a GPU are waited for once.

    Args:
        x: fp16, bf16 or fp32, on the weights' device.
        ends: int32 [E], on it too: the row behind the last one of each expert, as `offs` of
            `torch.nn.functional.grouped_mm`. They do not decrease, and are M at most. Rows behind
            the last of them get zeros, which `grouped_mm` does not promise, and no gradient.
        packed: the weight of each expert, alike in all but values. The gradient goes to x alone.
        backend: name of the backend to use instead of the first that can run this.
        batch_invariant: make each row's result independent of the other rows and of their number.

    Raises:
        WeightError: for a wrong shape, dtype or device of x or ends, or weights that differ.
        ValueError: for `ends` that decrease or lie behind x. On a GPU, where a kernel takes all
            experts at once, nobody looks: the result is undefined then.
        NoKernelError: where `backend` cannot run this.
    """
    specs = {str(PackedSpec.of(each, backend, batch_invariant)) for each in packed}
    if len(specs) != 1:
        raise WeightError(
            f"experts must have weights of one kind, got {', '.join(sorted(specs)) or 'none'}"
        )
    (spec,) = specs
    names = PackedSpec.parse(spec).names
    stacks = [stacked([each.buffers[name] for each in packed]) for name in names]
    return linear_grouped_operator(x, ends, stacks, spec)
