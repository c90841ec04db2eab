"""`WeightView`: what code that reads `layer.weight` of a quantized layer gets.

It has the shape, the type and the device of the weight that the layer stands for. A product with it
runs on the layer's own kernels; everything else that needs its values gets them dequantized, in
memory of their own. To write to it is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from qkernels.errors import LayerError


class Source(Protocol):
    """What a view is of: one weight [N, K], or a stack of them [E, N, K]."""

    def view_values(self) -> Tensor:
        """The weight as fp32, or as a layer that is not quantized has it."""

    def view_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K] @ W.T + bias, for one weight."""

    def view_entry(self, number: int) -> Source:
        """One weight of a stack."""

    def view_scale(self, factor: float) -> None:
        """Multiplies the weight in place."""


class StackSource(Source, Protocol):
    """What a view [E, N, K] is of."""

    def view_grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [M, K], rows sorted by their weight: those up to ends[e] are of weight e and of those
        before it; zeros behind the last of the ends [E]."""

    def view_batched(self, x: Tensor) -> Tensor:
        """x [E, T, K], rows of each weight: [E, T, N]."""

    def view_gathered(self, numbers: Tensor) -> StackSource:
        """The weights of these numbers [S], one after the other."""


class WeightView(torch.Tensor):
    """See the module. `transposed` views are [K, N], or [E, K, N]."""

    source: Source
    transposed: bool

    @staticmethod
    def __new__(
        cls,
        source: Source,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        transposed: bool = False,
    ) -> WeightView:
        """A view of `source`, whose weight is `shape`: [N, K] or [E, N, K]."""
        *stack, n, k = shape
        view: WeightView = torch.Tensor._make_wrapper_subclass(
            cls,
            (*stack, k, n) if transposed else (*stack, n, k),
            dtype=dtype,
            device=device,
            requires_grad=False,
        )
        view.source, view.transposed = source, transposed
        return view

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Everything is done in `__new__`."""

    def values(self) -> Tensor:
        """The weight as an ordinary tensor of this view's shape, type and device."""
        values = self.source.view_values().to(self.dtype)
        return values.mT.contiguous() if self.transposed else values

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] @ W.T + bias on the layer's kernels, whichever way this view lies."""
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            # The operator has a gradient for x alone.
            return self.source.view_product(x, None) + bias
        return self.source.view_product(x, bias)

    def turned(self) -> WeightView:
        """The same weight, transposed."""
        return self._like(not self.transposed, self.dtype)

    def as_type(self, dtype: torch.dtype) -> WeightView:
        """The same weight as another type has it."""
        return self._like(self.transposed, dtype)

    def entry(self, number: int) -> WeightView:
        """One weight of a stack."""
        stack = self.shape[0]
        if not -stack <= number < stack:
            raise IndexError(f"index {number} is out of range for {stack} weights")
        *_, n, k = self._stored_shape()
        source = self.source.view_entry(number % stack)
        return WeightView(source, (n, k), self.dtype, self.device, self.transposed)

    def gathered(self, numbers: Tensor) -> WeightView:
        """Weights of a stack, by numbers [S]."""
        _, n, k = self._stored_shape()
        source = self.stack.view_gathered(numbers)
        return WeightView(source, (len(numbers), n, k), self.dtype, self.device, self.transposed)

    @property
    def stack(self) -> StackSource:
        """What a view of a stack is of."""
        assert self.ndim == 3
        return cast(StackSource, self.source)

    def _stored_shape(self) -> tuple[int, ...]:
        *stack, rows, columns = self.shape
        return (*stack, columns, rows) if self.transposed else (*stack, rows, columns)

    def _like(self, transposed: bool, dtype: torch.dtype) -> WeightView:
        return WeightView(self.source, self._stored_shape(), dtype, self.device, transposed)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"WeightView({list(self.shape)}, {self.dtype}, {self.device})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.values()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = _handler_of(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        _check_reads_only(func, args, kwargs)
        return func(*_with_values(args), **_with_values(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # What comes past __torch_function__: operators called from C++.
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0].as_type(args[0].dtype)
        if func._schema.is_mutable:
            _check_reads_only(func, args, kwargs or {}, writes=True)
        return func(*_with_values(args), **_with_values(kwargs or {}))


def _handler_of(func: Callable[..., Any]) -> Callable[..., Any] | None:
    if isinstance(func, torch._ops.OpOverloadPacket):
        # Found by name, since whoever defines it may not be imported.
        return _grouped_mm if str(func) == "transformers.grouped_mm_fallback" else None
    return _HANDLERS.get(func)


def _with_values(arguments: Any) -> Any:
    return tree_map(lambda a: a.values() if isinstance(a, WeightView) else a, arguments)


def _check_reads_only(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], writes: bool = False
) -> None:
    """Raises where `func` writes to a view."""
    name = getattr(func, "__name__", str(func))
    in_place = name.endswith("_") and not name.endswith("__")
    augmented = name.startswith("__i") and name.endswith("__") and name[3:-2] in _AUGMENTED
    writes = writes or in_place or augmented or name in ("__set__", "__setitem__")
    # torch.nn.init hands its tensor on by name.
    target = args[:1] or (kwargs.get("tensor"), kwargs.get("input"))
    written = [*(target if writes else ()), kwargs.get("out")]
    if any(isinstance(argument, WeightView) for argument in written):
        raise LayerError(
            f"{name} writes to the weight of a quantized layer, which is made from its codes: "
            "change the original layer, and quantize it again"
        )


_AUGMENTED = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")

_DESCRIPTIONS: frozenset[Any] = frozenset(
    (
        *(
            getattr(torch.Tensor, name).__get__
            for name in (
                *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf"),
                *("is_cuda", "is_meta", "is_sparse", "is_quantized", "is_cpu", "is_mps", "is_xpu"),
                *("names", "grad", "grad_fn", "_version", "itemsize", "nbytes", "output_nr"),
                *("retains_grad", "is_nested", "is_mkldnn", "is_mtia", "is_vulkan"),
            )
            if hasattr(torch.Tensor, name)
        ),
        *(
            getattr(torch.Tensor, name)
            for name in (
                *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset"),
                *("element_size", "is_contiguous", "is_floating_point", "is_complex", "data_ptr"),
                *("get_device", "is_signed", "is_inference", "__len__", "__hash__", "type"),
            )
        ),
        torch.numel,
        torch.is_floating_point,
        torch.is_complex,
        torch.is_inference,
        torch.is_signed,
    )
)
"""What is known of a view without its values."""


NUMBERS = (torch.int64, torch.int32)
"""Types of tensors that pick weights of a stack."""


def _linear(input: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, WeightView) or weight.transposed or weight.ndim != 2:
        return NotImplemented
    return weight.product(input, bias)


def _matmul(input: Any, other: Any, **options: Any) -> Any:
    if options or (isinstance(input, WeightView) and isinstance(other, WeightView)):
        return NotImplemented
    if isinstance(input, WeightView):
        if input.transposed or input.ndim != 2:
            return NotImplemented
        return input.product(other) if other.ndim == 1 else input.product(other.mT).mT
    if not other.transposed or other.ndim != 2 or input.ndim < 1:
        return NotImplemented
    return other.product(input)


def _addmm(input: Tensor, mat1: Any, mat2: Any, **options: Any) -> Any:
    one_bias = not options and not isinstance(mat1, WeightView) and input.ndim == 1
    if not one_bias or not isinstance(mat2, WeightView) or not mat2.transposed:
        return NotImplemented
    return mat2.product(mat1, input)


def _bmm(input: Any, mat2: Any, **options: Any) -> Any:
    """[E, T, K] by a stack [E, K, N], or a stack [E, N, K] by [E, K, T]."""
    view_first = isinstance(input, WeightView)
    view, x = (input, mat2.mT) if view_first else (mat2, input)
    if options or isinstance(x, WeightView) or view.transposed is view_first:
        return NotImplemented
    if view.ndim != 3 or x.ndim != 3 or len(x) != len(view):
        return NotImplemented
    y = view.stack.view_batched(x)
    return y.mT if view_first else y


def _grouped_mm(input: Any, mat2: Any, offs: Tensor | None = None, **options: Any) -> Any:
    """Rows [offs[e - 1], offs[e]) of [S, K] by weight e of a stack [E, K, N]."""
    if not isinstance(mat2, WeightView) or not mat2.transposed or offs is None:
        return NotImplemented
    if isinstance(input, WeightView) or any(value is not None for value in options.values()):
        return NotImplemented
    if mat2.ndim != 3 or input.ndim != 2 or offs.shape != mat2.shape[:1]:
        return NotImplemented
    return mat2.stack.view_grouped(input, offs)


def _getitem(view: Any, index: Any) -> Any:
    if not isinstance(view, WeightView) or view.ndim != 3:
        return NotImplemented
    if isinstance(index, Tensor) and index.dim() == 1 and index.dtype in NUMBERS:
        return view.gathered(index)
    if isinstance(index, Tensor) and index.numel() == 1 and index.dim() == 0:
        index = index.item()
    if isinstance(index, bool) or not isinstance(index, int):
        return NotImplemented
    return view.entry(index)


def _transpose(view: WeightView, dim0: int, dim1: int) -> Any:
    last = {view.ndim - 1, view.ndim - 2}
    return view.turned() if {dim0 % view.ndim, dim1 % view.ndim} == last else NotImplemented


def _turn(view: WeightView) -> Any:
    return view.turned() if view.ndim == 2 else NotImplemented


def _turn_last(view: WeightView) -> Any:
    return view.turned()


def _same(view: WeightView, *_: Any) -> Any:
    return view.as_type(view.dtype)


def _to(view: Any, *args: Any, **kwargs: Any) -> Any:
    """To another type, or where it is; to another device with its values."""
    if not isinstance(view, WeightView) or any(isinstance(a, Tensor) for a in args):
        return NotImplemented
    device, dtype, *_ = torch._C._nn._parse_to(
        *args, **{key: value for key, value in kwargs.items() if key != "copy"}
    )
    if device is not None and device != view.device:
        return NotImplemented
    return view.as_type(dtype or view.dtype)


def _to_type(dtype: torch.dtype) -> Callable[..., Any]:
    return lambda view, *args, **kwargs: NotImplemented if args else view.as_type(dtype)


def _multiply_in_place(view: Any, other: Any, *, divide: bool = False) -> Any:
    """By a number, as code does that keeps activations of deep models in range."""
    if not isinstance(view, WeightView) or isinstance(other, bool | Tensor):
        return NotImplemented
    view.source.view_scale(1 / other if divide else other)
    return view


def _set_requires_grad(view: Any, requires_grad: bool = True) -> Any:
    """Not to be trained, as it is already."""
    if requires_grad:
        raise LayerError(
            "the weight of a quantized layer cannot be trained: train an adapter on the layer, "
            "such as LoRA, or the original layer"
        )
    return view


def _set_grad(view: Any, grad: Any) -> Any:
    return NotImplemented if grad is not None else view


def _set_data(tensor: Any, data: Any) -> Any:
    """What tools do that move weights, or make them contiguous, one by one."""
    if not isinstance(tensor, WeightView):
        return NotImplemented
    if not isinstance(data, WeightView):
        # An embedding that gets another number of rows becomes dense.
        resize = getattr(tensor.source, "view_resize", None)
        return tensor if resize is not None and resize(data) else NotImplemented
    same = tensor.source is data.source and tensor.transposed == data.transposed
    return tensor if same and tensor.dtype == data.dtype else NotImplemented


def _divide_in_place(view: Any, other: Any) -> Any:
    return _multiply_in_place(view, other, divide=True)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    torch.nn.functional.linear: _linear,
    **dict.fromkeys(
        (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__),
        _matmul,
    ),
    torch.addmm: _addmm,
    torch.bmm: _bmm,
    torch.Tensor.bmm: _bmm,
    torch.Tensor.__getitem__: _getitem,
    torch.transpose: _transpose,
    torch.Tensor.transpose: _transpose,
    torch.swapaxes: _transpose,
    torch.Tensor.t: _turn,
    torch.t: _turn,
    torch.Tensor.T.__get__: _turn,  # type: ignore[attr-defined]
    torch.Tensor.mT.__get__: _turn_last,  # type: ignore[attr-defined]
    torch.Tensor.data.__get__: _same,  # type: ignore[attr-defined]
    torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    torch.Tensor.grad.__set__: _set_grad,  # type: ignore[union-attr]
    torch.Tensor.requires_grad.__set__: _set_requires_grad,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad_: _set_requires_grad,
    torch.Tensor.detach: _same,
    torch.detach: _same,
    torch.Tensor.contiguous: _same,
    torch.Tensor.to: _to,
    torch.Tensor.float: _to_type(torch.float32),
    torch.Tensor.half: _to_type(torch.float16),
    torch.Tensor.bfloat16: _to_type(torch.bfloat16),
    torch.Tensor.mul_: _multiply_in_place,
    torch.Tensor.div_: _divide_in_place,
}
for _namespace, _name in ((torch.nn.functional, "grouped_mm"), (torch, "_grouped_mm")):
    if hasattr(_namespace, _name):
        _HANDLERS[getattr(_namespace, _name)] = _grouped_mm
