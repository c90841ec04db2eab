"""`WQLinear`: nn.Linear with a quantized weight, on any device, for inference and LoRA training."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from qkernels import ops, rounding
from qkernels.activations import QuantizedActivation
from qkernels.errors import LayerError, WeightError
from qkernels.layouts import (
    LAYOUTS,
    PLAIN,
    Layout,
    PackedWeight,
    allocate,
    empty_like,
    pack,
    write_rows,
)
from qkernels.modules.kinds import is_linear_kind, linear_parts
from qkernels.modules.view import WeightView
from qkernels.proving import prove, proven_layout
from qkernels.scheme import QuantScheme
from qkernels.select import check_backend, layout_for
from qkernels.weight import QuantizedWeight, WeightParameters, row_slices


class WQLinear(nn.Linear):
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

    # Transformers draws weights, and zeros biases, of each layer that lacks this.
    _is_hf_initialized = True

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
            activation_scale: the scale of x, for schemes with static activations.
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
    def packed(self) -> PackedWeight:
        """The weight as it is held now."""
        held = zip(self._names, self._held, strict=True)
        buffers = {name: cast(Tensor, self._buffers[buffer]) for name, buffer in held}
        return PackedWeight(
            self.scheme, LAYOUTS[self._layout], self.out_features, self.in_features, buffers
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

    def view_values(self) -> Tensor:
        """For `WeightView`."""
        return self.dequantize()

    def view_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """For `WeightView`."""
        return ops.linear_operator(x, self._packed_buffers(), bias, self._spec)

    def view_entry(self, number: int) -> WQLinear:
        """For `WeightView`."""
        raise AssertionError("one weight has no entries")

    def view_scale(self, factor: float) -> None:
        """For `WeightView`: multiplies the weight by a power of two, which changes scales alone.

        Raises:
            LayerError: for a factor that the scales do not take exactly.
        """
        names = next(names for names in _OUTER_SCALES if names[0] in self._names)
        names = (*names, *(name for name in ("outlier_values",) if name in self._names))
        old = {name: cast(Tensor, self._buffers[name]) for name in names}
        new = {name: (scale.double() * factor).to(scale.dtype) for name, scale in old.items()}
        exact = factor != 0 and all(
            torch.equal(scale.double() / factor, old[name].double()) for name, scale in new.items()
        )
        if not exact:
            raise LayerError(
                f"the weight of a quantized layer is not multiplied in place by {factor}, which "
                "its scales do not take exactly: change the original layer, and quantize it again"
            )
        for name, scale in new.items():
            old[name].copy_(scale)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name in ("weight", "bias") and param is not None:
            raise LayerError(
                f"the {name} of a quantized layer cannot be set to a parameter: quantize an "
                "nn.Linear that has it"
            )
        super().register_parameter(name, param)

    def reset_parameters(self) -> None:
        """Not possible.

        Raises:
            LayerError: always.
        """
        raise LayerError("a quantized layer cannot be initialized: quantize an nn.Linear")

    def forward(self, input: Tensor | QuantizedActivation) -> Tensor:
        """y [..., N] for x [..., K] of fp16, bf16 or fp32, in x's dtype (autocast's under it).

        With a scheme of int8 activations per token, x may also come quantized, so that several
        layers share that work; y is the same.

        Args:
            input: x.

        Raises:
            WeightError: for a wrong shape, dtype or device of x.
        """
        held = self._buffers
        buffers = [held[name] for name in self._held]
        if isinstance(input, QuantizedActivation):
            return ops.linear_quantized_operator(
                input.values, input.scale, buffers, held["bias"], self._spec, input.dtype
            )
        return ops.linear_operator(input, buffers, held["bias"], self._spec)

    def dequantize(self) -> Tensor:
        """The weight as fp32 [N, K]."""
        return torch.ops.qkernels.dequantize(self._packed_buffers(), self._spec)

    def to_weight(self) -> QuantizedWeight:
        """The hub form, exactly the weight this layer was built from."""
        return self.packed.unpack(self.bias)

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme}, layout={self._layout}"
        )
        return text if self.backend is None else f"{text}, backend={self.backend}"

    @property
    def _words(self) -> Tensor:
        return cast(Tensor, self._buffers[self._held[0]])

    def _packed_buffers(self) -> list[Tensor]:
        return [cast(Tensor, self._buffers[name]) for name in self._held]

    def _install(self, packed: PackedWeight) -> None:
        """Takes the buffers of `packed` for its own and remembers what they are."""
        for name in getattr(self, "_held", ()):
            del self._buffers[name]
        self._layout = packed.layout.name
        spec = ops.PackedSpec.of(packed, self.backend, self.batch_invariant)
        self._names, self._spec = spec.names, str(spec)
        self._held = _held_names(packed.layout, self._names)
        for name, held in zip(self._names, self._held, strict=True):
            self.register_buffer(held, packed.buffers[name])

    def _apply(self, fn: Any, recurse: bool = True) -> WQLinear:
        words = self._words
        like = fn(torch.empty(0, dtype=self.dtype, device=words.device))
        device, self.dtype = like.device, like.dtype
        if self.bias is not None:
            self.bias = fn(self.bias)
        if "meta" in (device.type, words.device.type) and device != words.device:
            # Without values there is nothing to repack.
            self._install(empty_like(self.packed, self._layout_on(device), device))
        elif device.type != words.device.type:
            self._install(_moved(self.packed, self._layout_on(device), device))
        else:
            for name in self._held:
                buffer = cast(Tensor, self._buffers[name])
                changed = fn(buffer)
                # `half()` must not round scales: of another type, only the device counts.
                same = changed.dtype == buffer.dtype
                self._buffers[name] = changed if same else buffer.to(device)
        return self

    def _layout_on(self, device: torch.device) -> Layout:
        if device.type == "meta":
            return LAYOUTS[self._layout]
        return _layout_for(
            self.packed.parameters(), device, self.backend, self.batch_invariant, self.check_kernels
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for hook in self._load_state_dict_pre_hooks.values():
            hook(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        current = self.packed
        layout = self._layout_of(state_dict, prefix)
        expected = empty_like(current, layout, torch.device("meta")).buffers
        held = dict(zip(expected, _held_names(layout, tuple(expected)), strict=True))
        wanted = {held[name]: buffer for name, buffer in expected.items()}
        if self.bias is not None:
            wanted["bias"] = self.bias
        given = {name: state_dict.get(prefix + name) for name in wanted}
        missing_keys += [prefix + name for name, tensor in given.items() if tensor is None]
        if strict:
            known = {prefix + name for name in wanted}
            mine = (key for key in state_dict if key.startswith(prefix))
            unexpected_keys += [
                key for key in mine if key not in known and "." not in key[len(prefix) :]
            ]
        wrong = [
            f"{prefix}{name}: expected {wanted[name].dtype} {list(wanted[name].shape)}, "
            f"got {tensor.dtype} {list(tensor.shape)}"
            for name, tensor in given.items()
            if tensor is not None
            and (
                tensor.shape != wanted[name].shape
                or (name != "bias" and tensor.dtype != wanted[name].dtype)
            )
        ]
        error_msgs += wrong
        found = {name: tensor for name, tensor in given.items() if tensor is not None}
        if wrong or len(found) < len(wanted):
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        try:
            self._take(layout, {name: found[held[name]] for name in expected}, assign)
        except WeightError as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")
            return
        if self.bias is not None:
            bias = found["bias"]
            self.bias = bias if assign else bias.to(self.bias, copy=True)

    def _layout_of(self, state_dict: dict[str, Any], prefix: str) -> Layout:
        """The layout of the words in a state dict; the layer's own for none or several."""
        layouts = (LAYOUTS[self._layout], *LAYOUTS.values())
        found = (layout for layout in layouts if prefix + _words_name(layout) in state_dict)
        return next(found, layouts[0])

    def _take(self, layout: Layout, buffers: dict[str, Tensor], assign: bool) -> None:
        """Takes buffers of a state dict: themselves where they are assigned, else copies of them.

        Raises:
            WeightError: for values that are no weight of the scheme. Nothing is changed then.
        """
        current = self.packed
        if not assign:
            device = current.device
            buffers = {name: buffer.to(device, copy=True) for name, buffer in buffers.items()}
        given = PackedWeight(self.scheme, layout, current.n, current.k, buffers)
        copied = given.device == current.device and not assign
        target = current.layout if copied else self._layout_on(given.device)
        if given.device.type == "meta":
            self._install(empty_like(given, target, given.device))
            return
        packed = _moved(given, target, given.device)
        in_place = not assign and current.device.type != "meta"
        if in_place and not any(buffer.is_inference() for buffer in current.buffers.values()):
            # As nn.Module does: whoever shares the buffers sees the new values.
            for name, buffer in packed.buffers.items():
                current.buffers[name].copy_(buffer)
        else:
            self._install(packed)


_OUTER_SCALES = (("nested_absmax", "nested_offset"), ("channel_scales",), ("scales",))
"""The outermost level of scales, which is the only one that multiplies the whole weight."""


def _words_name(layout: Layout) -> str:
    """The buffer of the words: of its layout alone, so that no reader takes one for another."""
    return "words" if layout is PLAIN else f"words_{layout.name}"


def _held_names(layout: Layout, names: tuple[str, ...]) -> tuple[str, ...]:
    """The module's buffers of a packed weight's `names`."""
    return tuple(_words_name(layout) if name == "words" else name for name in names)


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


def _moved(packed: PackedWeight, layout: Layout, device: torch.device) -> PackedWeight:
    """`packed` in another layout or on another device, with one slice unpacked at a time."""
    if packed.layout is layout and packed.device == device:
        allocate(layout, packed.parameters(), torch.device("meta"))
        return packed
    out = allocate(layout, packed.parameters(), device)
    for start, stop in row_slices(packed.n, packed.k):
        write_rows(out, start, packed.codes(start, stop).to(device))
    return out
