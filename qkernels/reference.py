"""The truth that every kernel is tested against, in plain PyTorch, on any device.

    weight-only   y = x @ W.T + b, accumulated in fp32
    integer       y = (s_x * s_w) * ((x_q - z_x) @ w_q.T) + b, with an exact int32 product;
                  x_q is int8, of -127..127 or, with activations of 4 bits, of -7..7
    fp8           y = s_x * (x_q @ W.T) + b

x comes with its columns already in the order of the codes (see `WeightParameters.perm`). Where each
position has a scale, row m of x is at position m.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from qkernels import positions
from qkernels.layouts import PackedWeight
from qkernels.scheme import largest_number
from qkernels.weight import WeightParameters, integer_rows, row_slices


def quantize_rows(
    x: Tensor, dtype: torch.dtype, scale: Tensor | None = None, *, largest: float | None = None
) -> tuple[Tensor, Tensor]:
    """Quantizes the rows of x symmetrically, with a scale a row, found or given, or one given.

    s = max|x| / largest; s = 1 for an all-zero row. q = x / s, rounded half to even, saturated at
    -largest and largest. A row with NaN or infinity gets a scale of NaN or infinity, so that its
    output shows it.

    Args:
        x: [M, K], fp16, bf16 or fp32.
        dtype: torch.int8, torch.float8_e4m3fn or torch.float8_e5m2.
        scale: fp32 [] or [M], or None to compute one for each row.
        largest: `Activation.largest` of a scheme, 7 with 4 bits; None for 127 in int8 and the
            largest number of a float8 type.

    Returns:
        q [M, K] of `dtype`, s fp32 [M] or the given one.
    """
    largest = largest_number(dtype) if largest is None else largest
    values = x.float()
    if scale is None:
        top = values.abs().amax(dim=-1) if x.shape[-1] else values.new_zeros(x.shape[0])
        scale = torch.where(top == 0, torch.ones_like(top), top / largest)
    scaled = values / scale[..., None]
    if dtype == torch.int8:
        # An int8 cannot hold NaN or infinity; the scale tells of them where it is dynamic.
        rounded = torch.nan_to_num(scaled.round(), nan=0.0).clamp_(-largest, largest)
        return rounded.to(torch.int8), scale
    return scaled.clamp(-largest, largest).to(dtype), scale


def tensor_scale(x: Tensor, largest: float) -> Tensor:
    """The one scale of a whole activation tensor, max|x| / largest: fp32 []."""
    top = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    return torch.where(top == 0, torch.ones_like(top), top / largest)


def quantize_activations(x: Tensor, packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """x [M, K] as the scheme of `packed` wants it: q [M, K] and the scale of each row, fp32 [M]."""
    activation = packed.scheme.activation
    assert not activation.has_zeros, packed.scheme
    dtype, largest = activation.torch_dtype, activation.largest
    if activation.granularity == "token":
        return quantize_rows(x, dtype, largest=largest)
    if activation.granularity == "tensor":
        scale = tensor_scale(x, largest)
        quantized, _ = quantize_rows(x, dtype, scale, largest=largest)
        return quantized, scale.expand(x.shape[0]).contiguous()
    scale = packed.buffers["activation_scale"]
    if activation.by_position:
        scale = positions.at(scale, positions.of_rows(x.shape, x.device))
    quantized, _ = quantize_rows(x, dtype, scale, largest=largest)
    return quantized, where_finite(x, scale)


def where_finite(x: Tensor, scale: Tensor) -> Tensor:
    """The scale of each row [M], NaN for one with NaN or infinity.

    A static scale knows nothing of a row, whose numbers saturate: they are told here.
    """
    finite = x.isfinite().all(dim=-1)
    return torch.where(finite, scale, torch.full_like(scale, float("nan")))


def quantize_with_zero(
    x: Tensor, scale: Tensor, zero: Tensor | int, largest: float = 127.0
) -> Tensor:
    """x as int8 of -largest - 1..largest, under scales and zero points that are known beforehand
    and broadcast with x; NaN is the zero point."""
    rounded = torch.nan_to_num((x.float() / scale).round(), nan=0.0) + zero
    return rounded.clamp(-largest - 1, largest).to(torch.int8)


def quantize_output(
    y: Tensor, scale: Tensor, zero: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor]:
    """y [..., N], or relu(y), as the layer that reads it quantizes it: int8 under a static scale
    fp32 [] and, where it has one, a zero point int32 [].

    Returns:
        q int8 [..., N], and the scale of each row fp32 [..., 1]: `scale`, or NaN where the row
        holds NaN or infinity.
    """
    y = y.relu() if relu else y
    if zero is None:
        quantized, _ = quantize_rows(y, torch.int8, scale)
    else:
        quantized = quantize_with_zero(y, scale, zero)
    return quantized, where_finite(y, scale)[..., None]


def _quantize_with_zeros(x: Tensor, packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] as int8 with a scale fp32 [M] and a zero point int32 [M] for each row."""
    activation = packed.scheme.activation
    if not activation.is_static:
        return quantize_rows_asymmetric(x, activation.largest)
    scale, zero = packed.buffers["activation_scale"], packed.buffers["activation_zero"]
    if activation.by_position:
        places = positions.of_rows(x.shape, x.device)
        scale, zero = positions.at(scale, places), positions.at(zero, places)
    quantized = quantize_with_zero(x, scale[..., None], zero[..., None], activation.largest)
    return quantized, where_finite(x, scale), zero.expand(x.shape[0])


_EXACT_COLUMNS = 1024
"""Columns over which fp32 sums of products of two int8 are exact: 128 * 128 * 1024 = 2^24."""


@lru_cache(maxsize=1)
def _cpu_multiplies_int8() -> bool:
    """Whether `_int_mm` has instructions for int8 products here, without which it crawls.

    And whether it uses them: kept to AVX2 (ONEDNN_MAX_CPU_ISA), it saturates sums of two products.
    """
    if not torch.cpu._is_vnni_supported():
        return False
    largest = torch.full((64, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest) == 64 * 127 * 127).all())


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """int8 [M, K] @ int8 [N, K].T -> int32 [M, N], exact."""
    # `_int_mm` leaves its result unwritten where strides do not tell rows from columns: those of 0,
    # and all of a single column.
    if a.device.type == "cpu" and a.shape[0] and a.shape[1] > 1 and _cpu_multiplies_int8():
        return torch._int_mm(_in_rows(a), _in_rows(b).t())
    return integer_product_in_floats(a, b)


def _in_rows(matrix: Tensor) -> Tensor:
    """`matrix` with the strides of a newly made one, also in dimensions of one."""
    if matrix.stride() == (matrix.shape[1], 1):
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def integer_product_in_floats(a: Tensor, b: Tensor) -> Tensor:
    """`integer_product` by fp32 products over few enough columns that every sum is exact."""
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], _EXACT_COLUMNS):
        columns = slice(start, start + _EXACT_COLUMNS)
        total += (a[:, columns].float() @ b[:, columns].float().t()).to(torch.int32)
    return total


def quantize_rows_asymmetric(x: Tensor, largest: float = 127.0) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes the rows of x to integers with zero points: x is about s * (q - zero).

    With the numbers least..largest, least = -largest - 1 (-128..127, or -8..7 with 4 bits):
    s = (max - min) / (largest - least) over a range that includes 0; zero = least - round(min / s).
    Rows that hold NaN or infinity get s = NaN and zero = 0.

    Args:
        x: [M, K], fp16, bf16 or fp32.
        largest: `Activation.largest` of a scheme.

    Returns:
        q int8 [M, K], s fp32 [M], zero int32 [M].
    """
    values, least = x.float(), -largest - 1
    finite = values.isfinite().all(dim=-1)
    padded = torch.nn.functional.pad(values, (0, 1))  # the 0 that the range includes
    low, high = padded.amin(dim=-1), padded.amax(dim=-1)
    scale = torch.where(high == low, torch.ones_like(low), (high - low) / (largest - least))
    scale = torch.where(finite, scale, torch.full_like(scale, float("nan")))
    zero = (least - (low / scale).round()).nan_to_num(0.0).clamp(least, largest)
    zero = torch.where(finite, zero, torch.zeros_like(zero))
    rounded = torch.nan_to_num((values / scale[:, None]).round(), nan=0.0)
    quantized = (rounded + zero[:, None]).clamp(least, largest).to(torch.int8)
    return quantized, scale, zero.int()


def rms_norm(
    x: Tensor, gain: Tensor | None, epsilon: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x (+ residual) over its root mean square, times `gain` [K]: fp32 [M, K], and the sum.

    The sum of x and residual is rounded to x's type, in which it goes on; without a residual it is
    x itself.
    """
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    values = total.float()
    factor = 1 / (values.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()
    values = values * factor
    return (values if gain is None else values * gain.float()), total


def layer_norm(
    x: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (+ residual) without its mean, over its standard deviation, times `gain` [K], and `bias`
    [K]: fp32 [M, K], and the sum as `rms_norm` gives it."""
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    values = total.float()
    values = values - values.mean(dim=-1, keepdim=True)
    values = values * (1 / (values.square().mean(dim=-1, keepdim=True) + epsilon).sqrt())
    values = values if gain is None else values * gain.float()
    return (values if bias is None else values + bias.float()), total


def gelu_mul(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    """gelu(gate) * up, with the error function ("none") or with "tanh": fp32 [M, K]."""
    return torch.nn.functional.gelu(gate.float(), approximate=approximate) * up.float()


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate / (1 + exp(-gate)) * up: fp32 [M, K]."""
    return torch.nn.functional.silu(gate.float()) * up.float()


def rounded_norm(
    x: Tensor, gain: Tensor, epsilon: float, *, rounds_first: bool, adds_one: bool
) -> Tensor:
    """x over its root mean square, times `gain` [K], rounded to x's type as models round it.

    Args:
        rounds_first: x over its root mean square is rounded before it is multiplied by the gain,
            as in Llama.
        adds_one: the gain is 1 + `gain`, in fp32, as in Gemma.
    """
    values = x.float()
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + epsilon)
    if rounds_first:
        values = values.to(x.dtype).float()
    factor = 1 + gain.float() if adds_one else gain.float()
    return (values * factor).to(x.dtype)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products in fp32, also where torch is set to bf16 or TF32 for them."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by each backend's own name, which has no one answer
        before = "highest"
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@full_precision()
def linear(
    x: Tensor, packed: PackedWeight, bias: Tensor | None, *, batch_invariant: bool = False
) -> Tensor:
    """y [M, N] = x [M, K] times the packed weight, in x's dtype.

    With `batch_invariant`, rows are multiplied one at a time, since a matrix product may round a
    row differently depending on how many rows there are.
    """
    scheme = packed.scheme
    row_scale = None
    if scheme.activation.outliers:
        return _linear_with_outliers(x, packed, bias, batch_invariant)
    if scheme.activation.has_zeros:
        quantized, scale, zero = _quantize_with_zeros(x, packed)
        return linear_quantized(quantized, scale, packed, bias, x.dtype, zero)
    if not scheme.weight_only:
        quantized, scale = quantize_activations(x, packed)
        if scheme.integer_activation:
            return linear_quantized(quantized, scale, packed, bias, x.dtype)
        row_scale = scale[:, None]
    y = torch.empty(x.shape[0], packed.n, dtype=x.dtype, device=x.device)
    parameters = packed.parameters()
    left = (x if row_scale is None else quantized).float()
    for start, stop in row_slices(packed.n, packed.k):
        weight = parameters.dequantize_rows(packed.codes(start, stop), start).t()
        if batch_invariant:
            part = torch.empty(x.shape[0], stop - start, dtype=torch.float32, device=x.device)
            for i in range(x.shape[0]):
                # A copy: products round a row differently where it begins elsewhere in memory.
                part[i] = left[i].clone(memory_format=torch.contiguous_format) @ weight
        else:
            part = left @ weight
        if row_scale is not None:
            part *= row_scale
        if bias is not None:
            part += bias[start:stop].float()
        y[:, start:stop] = part
    return y


def linear_grouped(x: Tensor, ends: Tensor, packed: Sequence[PackedWeight]) -> Tensor:
    """y [M, N] of rows x [M, K]: those from ends[e - 1] to ends[e] times weight e, zeros behind the
    last of the ends int32 [E]."""
    y = x.new_zeros(x.shape[0], packed[0].n)
    start = 0
    for weight, stop in zip(packed, ends.tolist(), strict=True):
        if stop > start:
            y[start:stop] = linear(x[start:stop], weight, None)
        start = stop
    return y


def outlier_columns(x: Tensor, threshold: float) -> Tensor:
    """The columns of x [M, K] with a magnitude of `threshold` or more, int64 [C]; such as are not
    finite are among them."""
    return (~(x.abs() < threshold)).any(dim=0).nonzero()[:, 0]


def without_columns(x: Tensor, columns: Tensor) -> Tensor:
    """x [M, K] with zeros in some columns."""
    return x.index_fill(1, columns, 0)


def _linear_with_outliers(
    x: Tensor, packed: PackedWeight, bias: Tensor | None, batch_invariant: bool
) -> Tensor:
    activation = packed.scheme.activation
    if batch_invariant and x.shape[0] > 1:
        rows = (_linear_with_outliers(row[None], packed, bias, False) for row in x)
        return torch.cat(list(rows))
    columns = outlier_columns(x, activation.outliers)
    left = without_columns(x, columns)
    quantized, scale = quantize_rows(left, torch.int8, largest=activation.largest)
    y = linear_quantized(quantized, scale, packed, bias, torch.float32)
    if columns.numel():
        y += x[:, columns].float() @ packed.columns(columns).t()
    return y.to(x.dtype)


@full_precision()
def linear_quantized(
    quantized: Tensor,
    scale: Tensor,
    packed: PackedWeight,
    bias: Tensor | None,
    dtype: torch.dtype,
    zero: Tensor | None = None,
) -> Tensor:
    """y [M, N] in `dtype` of int8 rows [M, K], their scales fp32 [M] and zero points int32 [M]."""
    y = torch.empty(quantized.shape[0], packed.n, dtype=dtype, device=quantized.device)
    parameters = packed.parameters()
    for start, stop in row_slices(packed.n, packed.k):
        codes = packed.codes(start, stop)
        part = _integer_columns(quantized, scale[:, None], zero, parameters, codes, start)
        beyond = parameters.beyond_codes(start, stop)
        if beyond is not None:
            shifted = quantized.float() if zero is None else quantized.float() - zero[:, None]
            part += scale[:, None] * (shifted @ beyond.t())
        if bias is not None:
            part += bias[start:stop].float()
        y[:, start:stop] = part
    return y


def _integer_columns(
    quantized: Tensor,
    row_scale: Tensor,
    zero: Tensor | None,
    parameters: WeightParameters,
    codes: Tensor,
    start: int,
) -> Tensor:
    """fp32 [M, rows] for the weight rows of `codes`, before the bias."""
    scheme = parameters.scheme
    stop, k = start + codes.shape[0], parameters.k
    integers = integer_rows(parameters, codes, start).to(torch.int8)
    if scheme.scale_levels == "two" or scheme.groups(k) == 1:
        if parameters.channel_scales is not None:
            column_scale = parameters.channel_scales[start:stop]
        else:
            column_scale = parameters.group_scales(start, stop)[:, 0]
        return (row_scale * column_scale) * _shifted_product(quantized, zero, integers).float()
    length = scheme.group_length(k)
    scales = parameters.group_scales(start, stop)
    total = torch.zeros(
        quantized.shape[0], stop - start, dtype=torch.float32, device=quantized.device
    )
    for g in range(scheme.groups(k)):
        columns = slice(g * length, min(k, (g + 1) * length))
        product = _shifted_product(
            quantized[:, columns].contiguous(), zero, integers[:, columns].contiguous()
        )
        total += scales[:, g] * product.float()
    return row_scale * total


def _shifted_product(a: Tensor, zero: Tensor | None, b: Tensor) -> Tensor:
    """(int8 a [M, K] - zero [M]) @ int8 b [N, K].T -> int32 [M, N], exact."""
    product = integer_product(a, b)
    if zero is None:
        return product
    sums = b.sum(dim=1, dtype=torch.int32)
    return product - zero[:, None] * sums


@full_precision()
def grad_input(grad: Tensor, packed: PackedWeight) -> Tensor:
    """grad_x [M, K] = grad [M, N] @ W, in the weight's own column order and grad's dtype.

    Quantized activations pass the gradient straight through.
    """
    total = torch.zeros(grad.shape[0], packed.k, dtype=torch.float32, device=grad.device)
    for start, stop in row_slices(packed.n, packed.k):
        total += grad[:, start:stop].float() @ packed.dequantize_rows(start, stop)
    return packed.parameters().to_column_order(total).to(grad.dtype)
