"""`WQLinear`: nn.Linear with a quantized weight, on any device, for inference and LoRA training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from qkernels import ops, rounding
from qkernels.activations import QuantizedActivation
from qkernels.errors import LayerError, WeightError
from qkernels.layouts import (
    LAYOUTS,
    Layout,
    PackedWeight,
    allocate,
    pack,
    write_rows,
)
from qkernels.modules.kinds import is_linear_kind, linear_parts
from qkernels.modules.packed import PackedModule
from qkernels.modules.view import WeightView
from qkernels.proving import prove, proven_layout
from qkernels.scheme import QuantScheme
from qkernels.select import check_backend, layout_for
from qkernels.weight import QuantizedWeight, WeightParameters, row_slices


class WQLinear(PackedModule, nn.Linear):
    """y = x @ W.T + b with a quantized W, in place of `nn.Linear`.

    Built by `from_linear` or `from_weight`. The weight is held packed for the kernels of the device
    it is on and repacked when it moves to another type of device. `state_dict` holds the buffers as
    they are, and names the layout that the words have; it loads on every device, and is repacked
    there. The dtype of scales never changes with `half()` or `to(dtype)`: y has the dtype of x.

    It is an `nn.Linear` to whoever asks, and has no parameters: `weight` is a `WeightView`.

    Attributes:
        in_features, out_features: K and N.
        scheme: the `QuantScheme`.
        dtype: of the weight that the layer stands for, which `weight` has; nothing is computed
            in it.
        transposed: it stands for a layer whose weight is [K, N], and `weight` is.
        backend: the backend to use, or None for the first kernel that can run.
        batch_invariant: a row's result depends neither on the other rows nor on their number.
        check_kernels: a kernel is checked on a device before it runs there first: see `proving`.
        bias: [N] or None, a buffer.
    """

    bias: Tensor | None  # type: ignore[assignment]

    def __init__(
        self,
        packed: PackedWeight,
        bias: Tensor | None = None,
        *,
        backend: str | None = None,
        batch_invariant: bool = False,
        check_kernels: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Not that of nn.Linear, which makes a weight.
        super(nn.Linear, self).__init__()
        check_backend(backend)
        self.in_features, self.out_features = packed.k, packed.n
        self.scheme = packed.scheme
        self.dtype = _dtype_of(packed, bias) if dtype is None else dtype
        self.transposed = False
        self.backend, self.batch_invariant = backend, batch_invariant
        self.check_kernels = check_kernels
        self.register_buffer("bias", bias)
        self._install(packed)
        if check_kernels:
            prove(
                packed.scheme,
                packed.n,
                packed.k,
                packed.device,
                packed.layout.name,
                backend=backend,
                batch_invariant=batch_invariant,
                fields=self._names,
            )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        scheme: QuantScheme | str,
        *,
        backend: str | None = None,
        batch_invariant: bool = False,
        check_kernels: bool = True,
        activation_scale: float | Tensor | None = None,
        name: str = "layer",
    ) -> WQLinear:
        """Rounds the weight of `linear` to nearest and packs it, a slice of rows at a time.

        Args:
            linear: an `nn.Linear`, or a Conv1D of Transformers, of fp16, bf16 or fp32; it is not
                changed. Of a subclass with a forward of its own, the weight and the bias are taken.
            scheme: a `QuantScheme` or its spelling.
            check_kernels: check a kernel on this device before it runs there first.
            activation_scale: the scale of x, for schemes with static activations; a number or, with
                scales per position, fp32 [P].
            name: what errors call the layer.

        Raises:
            LayerError: for anything else.
            SchemeError, WeightError, NoKernelError: for a scheme that does not parse, a weight that
                is not finite or of another dtype, a backend that cannot run it.
        """
        if isinstance(linear, WQLinear):
            raise LayerError(
                f"{name} is quantized already, as {linear.scheme}: start from the original layer"
            )
        if not is_linear_kind(linear):
            raise LayerError(f"{name} is a {type(linear).__name__}, not an nn.Linear")
        if isinstance(linear._parameters.get("weight"), UninitializedParameter):
            raise LayerError(f"{name} has no weight before its first forward: run it once")
        scheme = QuantScheme.parse(scheme)
        parts = linear_parts(linear)
        try:
            parameters = rounding.fit(parts.weight, scheme, activation_scale=activation_scale)
            layer = cls.from_parameters(
                parameters,
                parts.weight,
                parts.bias,
                backend=backend,
                batch_invariant=batch_invariant,
                check_kernels=check_kernels,
            )
        except WeightError as error:
            raise WeightError(f"{name}: {error}") from None
        layer.transposed = parts.transposed
        return layer

    @classmethod
    def from_parameters(
        cls,
        parameters: WeightParameters,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        backend: str | None = None,
        batch_invariant: bool = False,
        check_kernels: bool = True,
    ) -> WQLinear:
        """A layer of the values nearest to `weight` [N, K] under parameters that someone found.

        Codes are made and packed a slice of rows at a time. The layer has a copy of the bias, and
        stands for a weight of the type of this one.

        Raises:
            WeightError: for parameters that do not fit their scheme.
            NoKernelError: where `backend` cannot run it.
        """
        layout = _layout_for(parameters, weight.device, backend, batch_invariant, check_kernels)
        packed = allocate(layout, parameters, weight.device)
        for start, stop in row_slices(*weight.shape):
            write_rows(packed, start, rounding.encode_rows(weight[start:stop], parameters, start))
        return cls(
            packed,
            None if bias is None else bias.detach().clone(),
            backend=backend,
            batch_invariant=batch_invariant,
            check_kernels=check_kernels,
            dtype=weight.dtype,
        )

    @classmethod
    def from_weight(
        cls,
        weight: QuantizedWeight,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        batch_invariant: bool = False,
        check_kernels: bool = True,
        dtype: torch.dtype | None = None,
    ) -> WQLinear:
        """A layer of a weight that someone else quantized, on `device` or where the weight is.

        Args:
            dtype: of the weight that it stands for; None for that of the bias, or of the scales.

        Raises:
            NoKernelError: where `backend` cannot run it.
        """
        target = weight.codes.device if device is None else torch.device(device)
        layout = _layout_for(weight, target, backend, batch_invariant, check_kernels)
        bias = None if weight.bias is None else weight.bias.to(target, copy=True)
        return cls(
            pack(weight, layout, target),
            bias,
            backend=backend,
            batch_invariant=batch_invariant,
            check_kernels=check_kernels,
            dtype=dtype,
        )

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight that the layer stands for: [N, K], or [K, N] where it is `transposed`.

        A `WeightView`: products with it run on the kernels, and its values are dequantized where
        they are asked for. While torch.compile traces, the values; they are computed where the
        traced code has a use for them.
        """
        if torch.compiler.is_compiling():
            values = self.dequantize().to(self.dtype)
            return values.T if self.transposed else values
        shape = (self.out_features, self.in_features)
        return WeightView(self, shape, self.dtype, self._words.device, self.transposed)

    def view_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """For `WeightView`."""
        return ops.linear_operator(x, self._product_buffers(), bias, self._spec)

    def forward(self, input: Tensor | QuantizedActivation) -> Tensor:
        """y [..., N] for x [..., K] of fp16, bf16 or fp32, in x's dtype (autocast's under it).

        With scales of activations per position, x is [..., T, K] or [K], and T follows what a cache
        of Transformers holds. With a scheme of int8 activations per token, x may also come
        quantized, so that several layers share that work, and with a static scale as another layer
        has quantized it (`quantized_for`); y is the same.

        Args:
            input: x.

        Raises:
            WeightError: for a wrong shape, dtype or device of x, or x quantized under another
                scale.
        """
        held = self._buffers
        buffers = (
            self._product_buffers() if self._by_position else [held[name] for name in self._held]
        )
        if isinstance(input, QuantizedActivation):
            self._check_scale_of(input)
            return ops.linear_quantized_operator(
                input.values, input.scale, buffers, held["bias"], self._spec, input.dtype
            )
        return ops.linear_operator(input, buffers, held["bias"], self._spec)

    def quantized_for(
        self, input: Tensor | QuantizedActivation, reader: WQLinear, *, relu: bool = False
    ) -> QuantizedActivation:
        """y [..., N] for x, or relu(y), as `reader` quantizes it, whose static int8 activations it
        is: reader(layer.quantized_for(x, reader, relu=True)) is reader(layer(x).relu()), bit for
        bit.

        Where a CPU kernel runs the layer, it quantizes what it has just computed, and y itself is
        never written. No gradient goes through int8.

        Args:
            input: x, as `forward` takes it.

        Raises:
            WeightError: for a reader without one static scale of int8 activations, or whose
                in_features are not N; and as `forward`.
        """
        if self.out_features != reader.in_features:
            raise WeightError(
                f"a layer of {self.out_features} outputs gives no x for one that reads "
                f"{reader.in_features}"
            )
        reason = ops.why_not_static(ops.PackedSpec.parse(reader._spec))
        if reason is not None:
            raise WeightError(reason)
        held, read = self._buffers, reader._buffers
        scale, zero = read["activation_scale"], read.get("activation_zero")
        assert scale is not None
        if isinstance(input, QuantizedActivation):
            self._check_scale_of(input)
            x, x_scale, dtype = input.values, input.scale, input.dtype
        else:
            x, x_scale, dtype = _as_in_autocast(input), None, None
        values, scales = ops.linear_to_int8_operator(
            *(x, x_scale, self._product_buffers(), held["bias"], self._spec, dtype),
            *(scale, zero, relu),
        )
        return QuantizedActivation(values, scales, dtype or x.dtype, scale, zero)

    def _check_scale_of(self, x: QuantizedActivation) -> None:
        """Raises where x is quantized as this layer would not."""
        if self.scheme.activation.by_position:
            return  # the operator refuses all quantized x
        own = self._buffers.get("activation_scale"), self._buffers.get("activation_zero")
        for name, mine, given in zip(
            ("scale", "zero point"), own, (x.static_scale, x.static_zero), strict=True
        ):
            if mine is given:
                continue
            if mine is None or given is None or not torch.equal(mine, given):
                raise WeightError(
                    f"x is quantized with the static {name} {_spelled(given)}, and this layer of "
                    f"{self.scheme} has {_spelled(mine)}: pass x itself, or what `quantized_for` "
                    "gives for this layer"
                )

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme}, layout={self._layout}"
        )
        return text if self.backend is None else f"{text}, backend={self.backend}"

    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _layout_on(self, device: torch.device) -> Layout:
        if device.type == "meta":
            return LAYOUTS[self._layout]
        return _layout_for(
            self.packed.parameters(), device, self.backend, self.batch_invariant, self.check_kernels
        )


def _spelled(value: Tensor | None) -> str:
    return "none" if value is None else f"{value.tolist()}"


def _as_in_autocast(x: Tensor) -> Tensor:
    """x as `linear` takes it under autocast."""
    device = x.device.type
    if not x.is_floating_point() or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def _dtype_of(packed: PackedWeight, bias: Tensor | None) -> torch.dtype:
    """The type of a layer whose original is not known."""
    return packed.scheme.scale_dtype if bias is None else bias.dtype


def _layout_for(
    weight: WeightParameters,
    device: torch.device,
    backend: str | None,
    batch_invariant: bool,
    check_kernels: bool,
) -> Layout:
    """The layout to hold a weight in on a device, its kernels checked where that is wanted."""
    if not check_kernels:
        return layout_for(weight.scheme, weight.n, weight.k, device, backend, weight.fields)
    return proven_layout(
        weight.scheme,
        weight.n,
        weight.k,
        device,
        backend=backend,
        batch_invariant=batch_invariant,
        fields=weight.fields,
    )
