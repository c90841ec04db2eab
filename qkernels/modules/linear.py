"""`WQLinear`: nn.Linear with a quantized weight, on any device, for inference and LoRA training."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

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
from qkernels.proving import prove, proven_layout
from qkernels.scheme import QuantScheme
from qkernels.select import check_backend, layout_for
from qkernels.weight import QuantizedWeight, WeightParameters, row_slices


class WQLinear(nn.Module):
    """y = x @ W.T + b with a quantized W, in place of `nn.Linear`.

    Built by `from_linear` or `from_weight`. The weight is held packed for the kernels of the device
    it is on and repacked when it moves to another type of device. `state_dict` always holds the
    plain layout, so that it loads on every device. The dtype of scales never changes with `half()`
    or `to(dtype)`: y has the dtype of x.

    Attributes:
        in_features, out_features: K and N.
        scheme: the `QuantScheme`.
        backend: the backend to use, or None for the first kernel that can run.
        batch_invariant: a row's result depends neither on the other rows nor on their number.
        check_kernels: a kernel is checked on a device before it runs there first: see `proving`.
        bias: [N] or None, a buffer.
    """

    bias: Tensor | None

    def __init__(
        self,
        packed: PackedWeight,
        bias: Tensor | None = None,
        *,
        backend: str | None = None,
        batch_invariant: bool = False,
        check_kernels: bool = True,
    ) -> None:
        super().__init__()
        check_backend(backend)
        self.in_features, self.out_features = packed.k, packed.n
        self.scheme = packed.scheme
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
        linear: nn.Linear,
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
            linear: an `nn.Linear` of fp16, bf16 or fp32; it is not changed.
            scheme: a `QuantScheme` or its spelling.
            check_kernels: check a kernel on this device before it runs there first.
            activation_scale: the scale of x, for schemes with static activations.
            name: what errors call the layer.

        Raises:
            LayerError: for anything but an `nn.Linear`.
            SchemeError, WeightError, NoKernelError: for a scheme that does not parse, a weight that
                is not finite or of another dtype, a backend that cannot run it.
        """
        if isinstance(linear, WQLinear):  # type: ignore[unreachable]
            raise LayerError(
                f"{name} is quantized already, as {linear.scheme}: start from the original layer"
            )
        if not isinstance(linear, nn.Linear):
            raise LayerError(f"{name} is a {type(linear).__name__}, not an nn.Linear")
        scheme = QuantScheme.parse(scheme)
        weight = linear.weight.detach()
        try:
            parameters = rounding.fit(weight, scheme, activation_scale=activation_scale)
            return cls.from_parameters(
                parameters,
                weight,
                linear.bias,
                backend=backend,
                batch_invariant=batch_invariant,
                check_kernels=check_kernels,
            )
        except WeightError as error:
            raise WeightError(f"{name}: {error}") from None

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

        Codes are made and packed a slice of rows at a time. The layer has a copy of the bias.

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
    ) -> WQLinear:
        """A layer of a weight that someone else quantized, on `device` or where the weight is.

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
        )

    @property
    def packed(self) -> PackedWeight:
        """The weight as it is held now."""
        buffers = {name: cast(Tensor, self._buffers[name]) for name in self._names}
        return PackedWeight(
            self.scheme, LAYOUTS[self._layout], self.out_features, self.in_features, buffers
        )

    def forward(self, x: Tensor | QuantizedActivation) -> Tensor:
        """y [..., N] for x [..., K] of fp16, bf16 or fp32, in x's dtype (autocast's under it).

        With a scheme of int8 activations per token, x may also come quantized, so that several
        layers share that work; y is the same.

        Raises:
            WeightError: for a wrong shape, dtype or device of x.
        """
        held = self._buffers
        buffers = [held[name] for name in self._names]
        if isinstance(x, QuantizedActivation):
            return ops.linear_quantized_operator(
                x.values, x.scale, buffers, held["bias"], self._spec, x.dtype
            )
        return ops.linear_operator(x, buffers, held["bias"], self._spec)

    def dequantize(self) -> Tensor:
        """The weight as fp32 [N, K]."""
        return torch.ops.qkernels.dequantize(
            [self._buffers[name] for name in self._names], self._spec
        )

    def to_weight(self) -> QuantizedWeight:
        """The hub form, exactly the weight this layer was built from."""
        return self.packed.unpack(self.bias)

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme}, layout={self._layout}"
        )
        return text if self.backend is None else f"{text}, backend={self.backend}"

    def _install(self, packed: PackedWeight) -> None:
        """Takes the buffers of `packed` for its own and remembers what they are."""
        for name, buffer in packed.buffers.items():
            self.register_buffer(name, buffer)
        self._layout = packed.layout.name
        spec = ops.PackedSpec.of(packed, self.backend, self.batch_invariant)
        self._names, self._spec = spec.names, str(spec)

    def _apply(self, fn: Any, recurse: bool = True) -> WQLinear:
        # Only the device of what `fn` returns matters: `half()` must not round scales.
        words = self._buffers["words"]
        assert words is not None
        device = fn(torch.empty(0, dtype=torch.float32, device=words.device)).device
        if self.bias is not None:
            self.bias = fn(self.bias)
        if device == words.device:
            return self
        if "meta" in (device.type, words.device.type):
            # Without values there is nothing to repack.
            self._install(empty_like(self.packed, self._layout_on(device), device))
        elif device.type == words.device.type:
            for name in self._names:
                buffer = self._buffers[name]
                assert buffer is not None
                self._buffers[name] = buffer.to(device)
        else:
            self._install(_moved(self.packed, self._layout_on(device), device))
        return self

    def _layout_on(self, device: torch.device) -> Layout:
        if device.type == "meta":
            return LAYOUTS[self._layout]
        return _layout_for(
            self.packed.parameters(), device, self.backend, self.batch_invariant, self.check_kernels
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        packed = self.packed
        if packed.layout is not PLAIN and packed.device.type != "meta":
            packed = _moved(packed, PLAIN, packed.device)
        for name, buffer in packed.buffers.items():
            destination[prefix + name] = buffer if keep_vars else buffer.detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

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
        current = self.packed
        expected = empty_like(current, PLAIN, torch.device("meta")).buffers
        wanted = dict(expected)
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
        device = current.device
        buffers = {name: found[name].to(device, copy=True) for name in expected}
        plain = PackedWeight(self.scheme, PLAIN, self.out_features, self.in_features, buffers)
        try:
            self._install(_moved(plain, LAYOUTS[self._layout], device))
        except WeightError as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")
            return
        if self.bias is not None:
            self.bias = found["bias"].to(device=device, dtype=self.bias.dtype, copy=True)


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
