"""bitsandbytes' operators on our kernels, behind its entry point (`qkernels_bitsandbytes.py`).

    gemm_4bit         x and 4-bit words, with scales that may be quantized themselves: Linear4bit
    int8_scaled_mm    x in int8 and int8 weights; int8_mixed_scaled_mm calls it: Linear8bitLt
    dequantize_4bit   on the CPU, where blocks cross the ends of rows: there its own kernel takes
                      the scales of other blocks. The backward pass of Linear4bit goes through it

The words stay where and as they are. At the first product they are packed for this machine's
kernels, and the packed twin is kept as long as they are (`modules/twins.py`): weights take twice
their memory. What our kernels do not take, or are slower at, goes the way of bitsandbytes' default
implementation, by its own operators.

On CPUs with AVX512_BF16, Linear4bit would put its words into another order at the first forward,
with scales rounded to bf16, and could not give a state dict back exactly what it was. It asks an
attribute of each layer whether to, and here that is False for all.
Source: the bitsandbytes package (MIT), for the operators.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qkernels.activations import QuantizedActivation
from qkernels.checkpoints.held import HeldStore
from qkernels.checkpoints.table import FORMATS
from qkernels.errors import LayerError, QuantizationError
from qkernels.modules import twins
from qkernels.modules.linear import WQLinear
from qkernels.scheme import QuantScheme
from qkernels.select import layout_for, make_problem, select
from qkernels.weight import QuantizedWeight

_LAYER = "weight"
_NESTED_BLOCK = 256
"""The block of scales that are quantized themselves, which gemm_4bit takes for granted."""

_INT8 = QuantScheme.parse("w8a8")
_REPACKS = "support_avx512bf16_for_cpu"
_DEVICES = ("cpu", "cuda")

_MOST_ROWS = {("cpu_avx512_float", torch.bfloat16): 64}
"""By kernel and type of y: for more rows of x, torch's product is faster, in bf16 behind writing
the weight out for it. Measured by `python -m bench.bitsandbytes_layers`, one thread of an AMD EPYC
with AVX-512 and without AMX; the others are faster for any number there."""

_undo: list[Callable[[], None]] = []


def register(devices: Collection[str] = ("cpu",)) -> None:
    """Takes bitsandbytes' operators over on `devices`, of `cpu` and `cuda`; once.

    Raises:
        LayerError: for another device.
        ModuleNotFoundError: where there is no bitsandbytes.
    """
    for device in devices:
        if device not in _DEVICES:
            raise LayerError(f"device {device!r} is not one of {', '.join(_DEVICES)}")
    if _undo:
        return
    try:
        _register(frozenset(devices))
    except BaseException:
        unregister()
        raise


def _register(devices: Collection[str]) -> None:
    modules = importlib.import_module("bitsandbytes.nn.modules")
    library = torch.library.Library("bitsandbytes", "FRAGMENT")
    _undo.append(library._destroy)
    # Older versions have fewer operators.
    products = {"gemm_4bit": _gemm_4bit, "int8_scaled_mm": _int8_scaled_mm}
    present = [name for name in products if hasattr(torch.ops.bitsandbytes, name)]
    with warnings.catch_warnings():
        # Of an operator that has a kernel already.
        warnings.simplefilter("ignore", UserWarning)
        for device in devices:
            for name in present:
                library.impl(name, products[name], device.upper())
        # Older torch gives no way back to the kernel that is there.
        if "cpu" in devices and hasattr(torch.library, "get_kernel"):
            stock = torch.library.get_kernel("bitsandbytes::dequantize_4bit", "CPU")
            dequantize = partial(_dequantize_4bit, stock)
            library.impl("dequantize_4bit", dequantize, "CPU", with_keyset=True)
    if "cpu" in devices and "gemm_4bit" in present:
        layers: Any = modules.Linear4bit
        setattr(layers, _REPACKS, property(lambda self: False, _keep))
        _undo.append(partial(delattr, layers, _REPACKS))


def unregister() -> None:
    """Gives the operators back, and has layers repack again."""
    while _undo:
        _undo.pop()()


def _keep(layer: Any, value: Any) -> None:
    """What the layer says of itself, for when it is asked again."""
    layer.__dict__[_REPACKS] = value


def _gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    words = [B, absmax, absmax_8bit, absmax_code, absmax_offset]
    layer = _four_bits(words, tuple(shapeB), blocksize, quant_type)
    with _without_autocast(A):
        if layer is not None and _is_faster(layer, A):
            return layer.view_product(A, bias)
        operators = torch.ops.bitsandbytes
        if absmax_8bit is not None:
            assert absmax_offset is not None
            absmax = operators.dequantize_blockwise(
                absmax_8bit, absmax, absmax_code, _NESTED_BLOCK, torch.float32
            )
            absmax = absmax + absmax_offset
        weight = operators.dequantize_4bit(B, absmax, blocksize, quant_type, shapeB, A.dtype)
        return functional.linear(A, weight, bias)


def _int8_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    dtype = dtype or torch.float16
    layer = _eight_bits(B, col_stats, bias)
    with _without_autocast(A):
        if layer is not None and _is_faster(layer, A, dtype):
            scale = (row_stats.float() / 127).view(*A.shape[:-1], 1)
            y: Tensor = layer(QuantizedActivation(A, scale, dtype))
            return y
        operators = torch.ops.bitsandbytes
        sums = operators.int8_linear_matmul(A, B)
        return operators.int8_mm_dequant(sums, row_stats, col_stats, dtype=dtype, bias=bias)


def _dequantize_4bit(
    stock: Any,
    keys: Any,
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    if shape[-1] % blocksize == 0:
        return stock.call_boxed(keys, A, absmax, blocksize, quant_type, shape, dtype)
    count = math.prod(shape)
    stored = A.contiguous().view(torch.uint8).flatten()
    codes = torch.stack((stored >> 4, stored & 15), dim=1).flatten()[:count]
    values = _values(quant_type, A.device)[codes.int()]
    scales = absmax.float().repeat_interleave(blocksize)[:count]
    return (values * scales).to(dtype).view(*shape)


def _values(quant_type: str, device: torch.device) -> Tensor:
    bitsandbytes: Any = importlib.import_module("bitsandbytes.functional")
    values: Tensor = bitsandbytes.get_4bit_type(quant_type, device=device)
    return values


def _four_bits(
    words: list[Tensor | None], shape: tuple[int, ...], blocksize: int, quant_type: str
) -> WQLinear | None:
    """The packed twin; None for what our kernels do not take."""
    make = partial(_pack_four_bits, words, shape, blocksize, quant_type)
    try:
        return twins.of(words, make, meaning=(shape, blocksize, quant_type))
    except QuantizationError:
        return None


def _pack_four_bits(
    words: list[Tensor | None], shape: tuple[int, ...], blocksize: int, quant_type: str
) -> WQLinear:
    stored, absmax, codes, table, offset = words
    assert stored is not None and absmax is not None
    state = {"quant_type": quant_type, "blocksize": blocksize, "shape": list(shape)}
    tensors = {"weight": stored, "weight.quant_map": _values(quant_type, stored.device)}
    if codes is None:
        tensors["weight.absmax"] = absmax
    else:
        assert table is not None and offset is not None
        state |= {"nested_blocksize": _NESTED_BLOCK, "nested_offset": offset.item()}
        tensors |= {
            "weight.absmax": codes,
            "weight.nested_absmax": absmax,
            "weight.nested_quant_map": table,
        }
    about = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f"weight.quant_state.bitsandbytes__{quant_type}"] = about
    held = {f"{_LAYER}.{name}": tensor for name, tensor in tensors.items()}
    store, row = HeldStore(held, where="bitsandbytes"), FORMATS["bitsandbytes"]
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    weight = row.read_layer(store, _LAYER, row.read_plan(config, store)[_LAYER])
    return WQLinear.from_weight(weight, device=stored.device)


def _eight_bits(weight: Tensor, largest: Tensor, bias: Tensor | None) -> WQLinear | None:
    """The packed twin; None for a product of a backward pass, whose "weight" is a view of x."""
    if not weight.is_contiguous():
        return None
    try:
        return twins.of([weight, largest, bias], partial(_pack_eight_bits, weight, largest, bias))
    except QuantizationError:
        return None


def _pack_eight_bits(weight: Tensor, largest: Tensor, bias: Tensor | None) -> WQLinear:
    return WQLinear.from_weight(
        QuantizedWeight(
            scheme=_INT8,
            codes=weight.view(torch.uint8) + 128,
            scales=(largest.float() / 127)[:, None],
            bias=None if bias is None else bias.detach(),
        )
    )


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """An operator of bitsandbytes has the type of x, whatever the caller's autocast says."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _is_faster(layer: WQLinear, x: Tensor, dtype: torch.dtype | None = None) -> bool:
    rows = x.numel() // max(layer.in_features, 1)
    return rows <= _most_rows(
        layer.scheme, layer.out_features, layer.in_features, rows, x.device, dtype or x.dtype
    )


@lru_cache(maxsize=1024)
def _most_rows(
    scheme: QuantScheme, n: int, k: int, rows: int, device: torch.device, dtype: torch.dtype
) -> int:
    """How many rows of x our kernel for `rows` of them is faster for than bitsandbytes."""
    layout = layout_for(scheme, n, k, device).name
    problem = make_problem(scheme, n=n, k=k, m=rows, device=device, layout=layout, x_dtype=dtype)
    kernel = select(problem)
    if kernel.backend == "reference":
        return 0
    return _MOST_ROWS.get((kernel.name, dtype), sys.maxsize)
