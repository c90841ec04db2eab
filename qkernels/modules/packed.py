"""What modules with a packed weight have in common: its buffers, devices and state dicts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from qkernels import ops, positions
from qkernels.errors import LayerError, WeightError
from qkernels.fields import has_positions
from qkernels.layouts import (
    LAYOUTS,
    PLAIN,
    Layout,
    PackedWeight,
    allocate,
    empty_like,
    write_rows,
)
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight, row_slices


class PackedModule(nn.Module):
    """A module whose weight [N, K] is packed, and held as buffers.

    A subclass says what its shape is, which layout it has on a device, and calls `_install`.

    Attributes:
        scheme: the `QuantScheme`.
        dtype: of the weight that the module stands for, which `weight` has.
    """

    scheme: QuantScheme
    dtype: torch.dtype
    backend: str | None = None
    batch_invariant: bool = False

    _layout: str
    _names: tuple[str, ...]
    _held: tuple[str, ...] = ()
    # Which of these have values of positions.
    _by_position: tuple[int, ...] = ()
    _spec: str

    # Transformers draws weights, and zeros biases, of each layer that lacks this.
    _is_hf_initialized = True

    def _shape(self) -> tuple[int, int]:
        """N and K."""
        raise NotImplementedError

    def _layout_on(self, device: torch.device) -> Layout:
        """The layout to hold the weight in on a device."""
        raise NotImplementedError

    @property
    def packed(self) -> PackedWeight:
        """The weight as it is held now."""
        held = zip(self._names, self._held, strict=True)
        buffers = {name: cast(Tensor, self._buffers[buffer]) for name, buffer in held}
        return PackedWeight(self.scheme, LAYOUTS[self._layout], *self._shape(), buffers)

    def view_values(self) -> Tensor:
        """For `WeightView`."""
        return self.dequantize()

    def view_entry(self, number: int) -> PackedModule:
        """For `WeightView`."""
        raise AssertionError("one weight has no entries")

    def view_scale(self, factor: float) -> None:
        """For `WeightView`: see `scale_all`."""
        scale_all((self,), factor)

    def scales_times(self, factor: float) -> dict[str, Tensor]:
        """The buffers that multiply the whole weight, times `factor`, by name.

        Raises:
            LayerError: for a factor that they do not take exactly.
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
        return new

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
        raise LayerError("a quantized layer cannot be initialized: quantize a dense one")

    def dequantize(self) -> Tensor:
        """The weight as fp32 [N, K]."""
        return torch.ops.qkernels.dequantize(self._packed_buffers(), self._spec)

    def to_weight(self) -> QuantizedWeight:
        """The hub form, exactly the weight this layer was built from."""
        return self.packed.unpack(self._buffers.get("bias"))

    @property
    def _words(self) -> Tensor:
        return cast(Tensor, self._buffers[self._held[0]])

    def _packed_buffers(self) -> list[Tensor]:
        return [cast(Tensor, self._buffers[name]) for name in self._held]

    def _product_buffers(self) -> list[Tensor]:
        """What a product is given: of values of positions, those from the first that x holds on."""
        buffers = self._packed_buffers()
        for number in self._by_position:
            buffers[number] = positions.behind_cache(buffers[number])
        return buffers

    def _install(self, packed: PackedWeight) -> None:
        """Takes the buffers of `packed` for its own and remembers what they are."""
        for name in getattr(self, "_held", ()):
            del self._buffers[name]
        self._layout = packed.layout.name
        spec = ops.PackedSpec.of(packed, self.backend, self.batch_invariant)
        self._names, self._spec = spec.names, str(spec)
        self._held = _held_names(packed.layout, self._names)
        self._by_position = ()
        if packed.scheme.activation.by_position:
            own = (number for number, name in enumerate(self._names) if has_positions(name))
            self._by_position = tuple(own)
        for name, held in zip(self._names, self._held, strict=True):
            self.register_buffer(held, packed.buffers[name])

    def _apply(self, fn: Any, recurse: bool = True) -> PackedModule:
        words = self._words
        like = fn(torch.empty(0, dtype=self.dtype, device=words.device))
        device, self.dtype = like.device, like.dtype
        bias = self._buffers.get("bias")
        if bias is not None:
            self._buffers["bias"] = fn(bias)
        if "meta" in (device.type, words.device.type) and device != words.device:
            # Without values there is nothing to repack.
            self._install(empty_like(self.packed, self._layout_on(device), device))
        elif device.type != words.device.type:
            self._install(moved(self.packed, self._layout_on(device), device))
        else:
            for name in self._held:
                buffer = cast(Tensor, self._buffers[name])
                changed = fn(buffer)
                # `half()` must not round scales: of another type, only the device counts.
                same = changed.dtype == buffer.dtype
                self._buffers[name] = changed if same else buffer.to(device)
        return self

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
        self._load_packed(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _load_packed(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
        *,
        with_bias: bool = True,
    ) -> None:
        """As `_load_from_state_dict`; without the bias where what is under `prefix` has none."""
        current = self.packed
        layout = self._layout_of(state_dict, prefix)
        expected = empty_like(current, layout, torch.device("meta")).buffers
        held = dict(zip(expected, _held_names(layout, tuple(expected)), strict=True))
        wanted = {held[name]: buffer for name, buffer in expected.items()}
        own_bias = self._buffers.get("bias") if with_bias else None
        if own_bias is not None:
            wanted["bias"] = own_bias
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
        if own_bias is not None:
            bias = found["bias"]
            self._buffers["bias"] = bias if assign else bias.to(own_bias, copy=True)

    def _layout_of(self, state_dict: dict[str, Any], prefix: str) -> Layout:
        """The layout of the words in a state dict; the module's own for none or several."""
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
        packed = moved(given, target, given.device)
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


def scale_all(layers: Iterable[nn.Module], factor: float) -> None:
    """Multiplies the weights of all layers in place, or of none.

    Of quantized ones, scales are what changes: a power of two is taken by most.

    Raises:
        LayerError: for a factor that the scales of one do not take exactly.
    """
    layers = list(layers)
    quantized = [layer for layer in layers if isinstance(layer, PackedModule)]
    scaled = [layer.scales_times(factor) for layer in quantized]
    for dense in layers:
        if not isinstance(dense, PackedModule):
            cast(Tensor, dense.weight).mul_(factor)
    for layer, scales in zip(quantized, scaled, strict=True):
        for name, scale in scales.items():
            cast(Tensor, layer._buffers[name]).copy_(scale)


def moved(packed: PackedWeight, layout: Layout, device: torch.device) -> PackedWeight:
    """`packed` in another layout or on another device, with one slice unpacked at a time."""
    if packed.layout is layout and packed.device == device:
        allocate(layout, packed.parameters(), torch.device("meta"))
        return packed
    out = allocate(layout, packed.parameters(), device)
    for start, stop in row_slices(packed.n, packed.k):
        write_rows(out, start, packed.codes(start, stop).to(device))
    return out
