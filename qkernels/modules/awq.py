"""`WQLinear_GEMM`, `_GEMV` and `_GEMVFast` with the buffers and signatures that AutoAWQ's have.

    GEMM  qweight int32 [K, N/8]: nibble i of word c holds column 8c + [0,2,4,6,1,3,5,7][i]
          qzeros  int32 [K/g, N/8] in the same order, scales fp16 [K/g, N]
    GEMV  qweight int32 [N, K/8], nibble i holds column 8c + i of K
          qzeros  int32 [N, Z], nibble i holds group 8c + i; scales fp16 [N, 8Z], zero padded;
          Z = ceil(ceil(K/g / 8) / m) * m with m = 1, 2, 4 for g >= 128, 64, 32
    GEMVFast  qweight int16 [N/4, K], in the order of `bits/awq.py`
          qzeros  fp16 [8Z, N], the products -s*z, rounded; scales fp16 [8Z, N], zero padded

w = (q - z) * s, in GEMVFast q * s + qzeros. Source: AutoAWQ (Casper Hansen, MIT licence),
awq/modules/linear, for the layouts.

The buffers are what is stored, and all that a module has. `forward` is the operator
`qkernels.awq_linear`, which packs them for this machine's kernels at the first call and keeps the
packed twin beside them: see `twins`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qkernels import ops, rounding
from qkernels.bits import (
    divide_awq_fast,
    pack_awq,
    pack_awq_fast,
    pack_dense,
    unpack_awq,
    unpack_awq_fast,
    unpack_dense,
)
from qkernels.errors import LayerError
from qkernels.layouts import FRAGMENT, allocate, pack_words
from qkernels.modules import twins
from qkernels.modules.linear import WQLinear
from qkernels.scheme import QuantScheme
from qkernels.select import layout_for
from qkernels.weight import QuantizedWeight, WeightParameters


class _AwqLinear(nn.Module):
    """What the classes share: attributes, checks, and the packed layer behind `forward`."""

    version: ClassVar[str]
    transposed_scales: ClassVar[bool]
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        w_bit: int,
        group_size: int,
        in_features: int,
        out_features: int,
        bias: bool,
        dev: torch.device | str,
        training: bool = False,
    ) -> None:
        super().__init__()
        if w_bit != 4:
            raise LayerError(f"AWQ weights have 4 bits, got w_bit={w_bit}")
        self.in_features, self.out_features = in_features, out_features
        self.w_bit = w_bit
        self.group_size = group_size if group_size != -1 else in_features
        self.split_k_iters = 8
        self.training = training
        self._check_sizes()
        for name, shape, dtype in self._buffer_shapes():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=dev))
        values = torch.zeros(out_features, dtype=torch.float16, device=dev) if bias else None
        self.register_buffer("bias", values)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        w_bit: int,
        group_size: int,
        init_only: bool = False,
        scales: Tensor | None = None,
        zeros: Tensor | None = None,
    ) -> Any:
        """Packs the weight of `linear` under given scales and zero points.

        Args:
            linear: its weight [N, K] is what the scales and zeros were found for.
            init_only: allocate the buffers, to be filled by `load_state_dict`.
            scales, zeros: [K/g, N] for GEMM, [N, K/g] for the others; zeros integers in 0..15.
                Where both are left out, they are found by rounding to nearest.

        Raises:
            LayerError: for bits or sizes the layout cannot hold, or scales of a wrong shape.
        """
        if not isinstance(linear, nn.Linear):
            raise LayerError(f"expected an nn.Linear, got a {type(linear).__name__}")
        module = cls(
            w_bit,
            group_size,
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            linear.weight.device,
        )
        if init_only:
            return module
        if (scales is None) != (zeros is None):
            raise LayerError("give both scales and zeros, or neither")
        weight, scheme = linear.weight.detach(), module.scheme
        fitted = rounding.fit(weight, scheme)
        if scales is not None and zeros is not None:
            if cls.transposed_scales:
                scales, zeros = scales.t(), zeros.t()
            shape = (linear.out_features, scheme.groups(linear.in_features))
            for name, tensor in (("scales", scales), ("zeros", zeros)):
                if tuple(tensor.shape) != shape:
                    wanted = shape[::-1] if cls.transposed_scales else shape
                    got = tensor.t().shape if cls.transposed_scales else tensor.shape
                    raise LayerError(f"{name} must be {list(wanted)}, got {list(got)}")
            if zeros.min() < 0 or zeros.max() > 15:
                raise LayerError(
                    f"zeros must be in 0..15, got {float(zeros.min())} to {float(zeros.max())}"
                )
            fitted = WeightParameters(
                scheme=scheme,
                n=fitted.n,
                k=fitted.k,
                scales=scales.to(weight.device, torch.float16).contiguous(),
                zeros=zeros.to(weight.device).round().to(torch.uint8).contiguous(),
            )
        assert fitted.zeros is not None
        codes = rounding.encode_rows(weight, fitted, 0)
        bias = None if linear.bias is None else linear.bias.detach().to(torch.float16)
        quantized = QuantizedWeight(
            scheme=scheme, codes=codes, scales=fitted.scales, zeros=fitted.zeros, bias=bias
        )
        module._store(quantized)
        return module

    @property
    def scheme(self) -> QuantScheme:
        """`w4a16-g<group_size>`, or per channel where one group spans K."""
        grouped = self.group_size < self.in_features
        return QuantScheme.parse(f"w4a16-g{self.group_size}" if grouped else "w4a16")

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] for x [..., K], in x's dtype (autocast's under it).

        Raises:
            WeightError: for a wrong shape, dtype or device of x.
        """
        buffers = [self.qweight, self.qzeros, self.scales]
        sizes = [self.in_features, self.out_features, self.group_size]
        return torch.ops.qkernels.awq_linear(x, buffers, self.bias, type(self).version, sizes)

    def to_weight(self) -> QuantizedWeight:
        """The buffers as the hub's form."""
        codes, fields = self._load()
        return QuantizedWeight(scheme=self.scheme, codes=codes, bias=self.bias, **fields)

    def packed_layer(self) -> WQLinear:
        """A layer of the same weight, packed for the kernels of its device."""
        return WQLinear.from_weight(self.to_weight())

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, w_bit={self.w_bit}, group_size={self.group_size}"
        )

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if not self.qweight.is_meta:
            twins.forget(self.qweight)

    def _check_sizes(self) -> None:
        raise AssertionError("a subclass checks its sizes")

    def _buffer_shapes(self) -> list[tuple[str, tuple[int, int], torch.dtype]]:
        raise AssertionError("a subclass has buffers")

    def _store(self, weight: QuantizedWeight) -> None:
        raise AssertionError("a subclass stores weights")

    def _load(self) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Codes, and the fields of the weight."""
        raise AssertionError("a subclass loads weights")

    def _divides(self, what: str, value: int, divisor: int) -> None:
        if value % divisor:
            raise LayerError(
                f"{type(self).__name__} needs {what} divisible by {divisor}, got {value}: use "
                "WQLinear, which takes any shape"
            )


class WQLinear_GEMM(_AwqLinear):
    """AutoAWQ's `version="gemm"` layer."""

    version = "gemm"
    transposed_scales = True

    def _check_sizes(self) -> None:
        self._divides("out_features", self.out_features, 8)
        self._divides("in_features", self.in_features, self.group_size)

    def _buffer_shapes(self) -> list[tuple[str, tuple[int, int], torch.dtype]]:
        n, k, groups = self.out_features, self.in_features, self.in_features // self.group_size
        return [
            ("qweight", (k, n // 8), torch.int32),
            ("qzeros", (groups, n // 8), torch.int32),
            ("scales", (groups, n), torch.float16),
        ]

    def _store(self, weight: QuantizedWeight) -> None:
        assert weight.zeros is not None
        self.qweight = pack_awq(weight.codes.t())
        self.qzeros = pack_awq(weight.zeros.t())
        self.scales, self.bias = weight.scales.t().contiguous(), weight.bias

    def _load(self) -> tuple[Tensor, dict[str, Tensor | None]]:
        zeros, scales = self._load_groups()
        return unpack_awq(self.qweight).t().contiguous(), {"scales": scales, "zeros": zeros}

    def _load_groups(self) -> tuple[Tensor, Tensor]:
        zeros = unpack_awq(self.qzeros)
        return zeros.t().contiguous(), self.scales.to(torch.float16).t().contiguous()

    def packed_layer(self) -> WQLinear:
        scheme, n, k = self.scheme, self.out_features, self.in_features
        if layout_for(scheme, n, k, self.qweight.device) is not FRAGMENT:
            return super().packed_layer()
        zeros, scales = self._load_groups()
        parameters = WeightParameters(scheme=scheme, n=n, k=k, scales=scales, zeros=zeros)
        packed = allocate(FRAGMENT, parameters, self.qweight.device)
        # The words go straight to the kernels' order, and are never unpacked.
        pack_words(packed, self.qweight, "awq")
        return WQLinear(packed, self.bias)


class _PaddedGroups(_AwqLinear):
    """What pads its groups to whole words."""

    transposed_scales = False
    _PAD_MULTIPLE: ClassVar[dict[int, int]] = {64: 2, 32: 4}

    def _check_sizes(self) -> None:
        self._divides("in_features", self.in_features, self.group_size)
        if self.group_size < 128 and self.group_size not in self._PAD_MULTIPLE:
            raise LayerError(
                f"{type(self).__name__} holds groups of 32, 64, or 128 and more, got "
                f"{self.group_size}"
            )

    @property
    def _zero_words(self) -> int:
        multiple = self._PAD_MULTIPLE.get(self.group_size, 1)
        words = -(-(self.in_features // self.group_size) // 8)
        return -(-words // multiple) * multiple

    @property
    def _groups(self) -> int:
        return self.in_features // self.group_size

    def _padded(self, tensor: Tensor) -> Tensor:
        """[N, G] -> [N, 8Z]."""
        return nn.functional.pad(tensor, (0, 8 * self._zero_words - tensor.shape[1]))


class WQLinear_GEMV(_PaddedGroups):
    """AutoAWQ's `version="gemv"` layer."""

    version = "gemv"

    def _check_sizes(self) -> None:
        self._divides("in_features", self.in_features, 8)
        super()._check_sizes()

    def _buffer_shapes(self) -> list[tuple[str, tuple[int, int], torch.dtype]]:
        n = self.out_features
        return [
            ("qweight", (n, self.in_features // 8), torch.int32),
            ("qzeros", (n, self._zero_words), torch.int32),
            ("scales", (n, 8 * self._zero_words), torch.float16),
        ]

    def _store(self, weight: QuantizedWeight) -> None:
        assert weight.zeros is not None
        self.qweight = pack_dense(weight.codes, 4)
        self.qzeros = pack_dense(self._padded(weight.zeros), 4)
        self.scales, self.bias = self._padded(weight.scales), weight.bias

    def _load(self) -> tuple[Tensor, dict[str, Tensor | None]]:
        zeros = unpack_dense(self.qzeros, 8 * self._zero_words, 4)[:, : self._groups]
        scales = self.scales[:, : self._groups].to(torch.float16).contiguous()
        codes = unpack_dense(self.qweight, self.in_features, 4)
        return codes, {"scales": scales, "zeros": zeros.contiguous()}


class WQLinear_GEMVFast(_PaddedGroups):
    """AutoAWQ's `version="gemv_fast"` layer."""

    version = "gemv_fast"

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.interleave = 4

    def _check_sizes(self) -> None:
        self._divides("in_features", self.in_features, 64)
        self._divides("out_features", self.out_features, 8)
        super()._check_sizes()

    def _buffer_shapes(self) -> list[tuple[str, tuple[int, int], torch.dtype]]:
        n = self.out_features
        return [
            ("qweight", (n // 4, self.in_features), torch.int16),
            ("qzeros", (8 * self._zero_words, n), torch.float16),
            ("scales", (8 * self._zero_words, n), torch.float16),
        ]

    def _store(self, weight: QuantizedWeight) -> None:
        assert weight.zeros is not None
        products = -(weight.scales * weight.zeros.float()).to(torch.float16)
        self.qweight = pack_awq_fast(weight.codes)
        self.qzeros = self._padded(products).t().contiguous()
        self.scales, self.bias = self._padded(weight.scales).t().contiguous(), weight.bias

    def _load(self) -> tuple[Tensor, dict[str, Tensor | None]]:
        def groups(stored: Tensor) -> Tensor:
            return stored[: self._groups].to(torch.float16).t().contiguous()

        products, scales = groups(self.qzeros), groups(self.scales)
        zeros, offsets = divide_awq_fast(products, scales), None
        if zeros is None:
            zeros, offsets = torch.zeros_like(scales, dtype=torch.uint8), products
        fields = {"scales": scales, "zeros": zeros, "offsets": offsets}
        return unpack_awq_fast(self.qweight), fields


_VERSIONS: dict[str, type[_AwqLinear]] = {
    cls.version: cls for cls in (WQLinear_GEMM, WQLinear_GEMV, WQLinear_GEMVFast)
}


def _pack(version: str, sizes: list[int], buffers: list[Tensor], bias: Tensor | None) -> WQLinear:
    """The packed twin of a module of those buffers."""
    k, n, group_size = sizes
    module = _VERSIONS[version](4, group_size, k, n, bias is not None, "meta")
    module.qweight, module.qzeros, module.scales = buffers
    module.bias = bias
    return module.packed_layer()


def _linear(
    x: Tensor, buffers: list[Tensor], bias: Tensor | None, version: str, sizes: list[int]
) -> Tensor:
    ops.check_input(x, sizes[0], "x", buffers[0])
    twin = twins.of([*buffers, bias], partial(_pack, version, sizes, buffers, bias))
    y: Tensor = twin(x)
    return y


def _linear_fake(
    x: Tensor, buffers: list[Tensor], bias: Tensor | None, version: str, sizes: list[int]
) -> Tensor:
    ops.check_input(x, sizes[0], "x", buffers[0])
    return x.new_empty((*x.shape[:-1], sizes[1]))


def _grad_input(
    grad: Tensor, buffers: list[Tensor], bias: Tensor | None, version: str, sizes: list[int]
) -> Tensor:
    twin = twins.of([*buffers, bias], partial(_pack, version, sizes, buffers, bias))
    packed = twin.packed
    spec = str(ops.PackedSpec.of(packed))
    return torch.ops.qkernels.linear_grad_input(grad, list(packed.buffers.values()), spec)


def _grad_input_fake(
    grad: Tensor, buffers: list[Tensor], bias: Tensor | None, version: str, sizes: list[int]
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], sizes[0]))


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:
    # Not as variables, which inference tensors cannot be.
    ctx.weight = inputs[1:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, list[None], None, None, None]:
    grad_x = torch.ops.qkernels.awq_linear_grad_input(grad, *ctx.weight)
    return grad_x, [None] * len(ctx.weight[0]), None, None, None


_library = torch.library.Library("qkernels", "FRAGMENT")
_library.define(
    "awq_linear(Tensor x, Tensor[] buffers, Tensor? bias, str version, int[] sizes) -> Tensor"
)
_library.define(
    "awq_linear_grad_input(Tensor grad, Tensor[] buffers, Tensor? bias, str version, int[] sizes) "
    "-> Tensor"
)
for _key in ("CPU", "CUDA"):
    _library.impl("awq_linear", _linear, _key)
    _library.impl("awq_linear_grad_input", _grad_input, _key)
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("awq_linear", ops.under_autocast(torch.ops.qkernels.awq_linear.default), _key)
torch.library.register_fake("qkernels::awq_linear", _linear_fake, lib=_library)
torch.library.register_fake("qkernels::awq_linear_grad_input", _grad_input_fake, lib=_library)
torch.library.register_autograd(
    "qkernels::awq_linear", _backward, setup_context=_save, lib=_library
)
