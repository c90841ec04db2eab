"""Weights of torchao's classes, and its numbers for them.

Words of tinygemm and of XPUs are made on these devices alone, so they are put together here as
PyTorch's kernels do, one lane after the other; everything else is torchao's own code.
"""

import torch
from torch import nn
from torchao.prototype.gptq.api import _int4_row_quantize_zp_precomputed_qparams
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from torchao.quantization import (
    Float8Tensor,
    Int4PlainInt32Tensor,
    Int4Tensor,
    Int4TilePackedTo4dTensor,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8Tensor,
    IntxUnpackedToInt8Tensor,
    MappingType,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.granularity import PerBlock
from torchao.quantization.quant_primitives import (
    _choose_qparams_affine_tinygemm,
    _dequantize_affine_tinygemm,
    _quantize_affine_tinygemm,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)
from torchao.quantization.utils import pack_tinygemm_scales_and_zeros

N, K, GROUP = 24, 96, 32


def layers():
    """Name -> (weight, what it stands for in fp32)."""
    torch.manual_seed(11)
    made = {
        "tiles": _tiles(torch.randn(N, K).bfloat16(), GROUP),
        "tiles_ragged": _tiles(torch.randn(9, 200).bfloat16(), 128),
        "plain": _plain(torch.randn(N, K).bfloat16(), torch.bfloat16, symmetric=False),
        "plain_half": _plain(torch.randn(N, K).half(), torch.bfloat16, symmetric=False),
        "plain_fp8": _plain(torch.randn(N, K).bfloat16(), torch.float8_e4m3fn, symmetric=True),
        "words": _words(torch.randn(N, K).half()),
        "intx_inputs": _quantized(
            Int8DynamicActivationIntxWeightConfig(
                weight_dtype=torch.int4, weight_granularity=PerGroup(GROUP)
            )
        ),
        "intx_real_zeros": _real_zeros(),
        "int8_asym_inputs": _quantized(
            Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC)
        ),
        "int8_static": _quantized(
            Int8StaticActivationInt8WeightConfig(
                act_quant_scale=torch.tensor([[0.02]]), granularity=PerTensor()
            )
        ),
        "int8_static_asym": _quantized(
            Int8StaticActivationInt8WeightConfig(
                act_quant_scale=torch.tensor([[0.02]]),
                act_quant_zero_point=torch.tensor([[-17]], dtype=torch.int8),
                granularity=PerTensor(),
                act_mapping_type=MappingType.ASYMMETRIC,
            )
        ),
        "fp8_blocks": _dequantized(
            Float8Tensor.from_hp(torch.randn(256, 128).bfloat16(), granularity=PerBlock([128, 128]))
        ),
        "fp8_e5m2": _dequantized(
            Float8Tensor.from_hp(torch.randn(N, K), torch.float8_e5m2, granularity=PerRow())
        ),
    }
    for swizzled in (False, True):
        w, end = torch.randn(132, 160), "_swizzled" if swizzled else ""
        made[f"nvfp4{end}"] = _dequantized(
            NVFP4Tensor.to_nvfp4(
                w[:, :96].contiguous(),
                per_tensor_scale=torch.tensor(0.011),
                is_swizzled_scales=swizzled,
            )
        )
        for dtype in (torch.float4_e2m1fn_x2, torch.float8_e4m3fn):
            name = "mxfp4" if dtype == torch.float4_e2m1fn_x2 else "mxfp8"
            made[name + end] = _dequantized(
                MXTensor.to_mx(w, dtype, 32, is_swizzled_scales=swizzled)
            )
    made["nvfp4_alone"] = _dequantized(NVFP4Tensor.to_nvfp4(torch.randn(N, K)))
    for name, classes in (("int8_scaled", Int8Tensor), ("tiles_scaled", Int4TilePackedTo4dTensor)):
        weight, numbers = made["int8_asym_inputs"] if classes is Int8Tensor else made["tiles"]
        factor = torch.rand(K) + 0.5
        again = _with_input_scale(weight, factor)
        made[name] = (again, numbers * factor)
    return made


def _with_input_scale(weight, factor):
    tensors = {name: getattr(weight, name) for name in weight.tensor_data_names}
    more = {"act_pre_scale": factor}
    if isinstance(weight, Int8Tensor):
        return Int8Tensor(**tensors, block_size=weight.block_size, dtype=weight.dtype, **more)
    return type(weight)(**tensors, block_size=weight.block_size, shape=weight.shape, **more)


def _dequantized(weight):
    return weight, weight.dequantize(torch.float32)


def _quantized(config):
    linear = nn.Linear(K, N, bias=False)
    quantize_(linear, config)
    weight = linear.weight
    return weight, weight.dequantize().float()


def _tiles(w, group):
    """As Int4TilePackedTo4dTensor.from_hp, with the packing of CUDA in Python."""
    n, k = w.shape
    padded = nn.functional.pad(w, (0, -k % 1024, 0, -n % 8))
    arguments = ((1, group), torch.int32, 0, 15)
    scale, zero = _choose_qparams_affine_tinygemm(
        padded,
        MappingType.ASYMMETRIC,
        *arguments,
        scale_dtype=torch.bfloat16,
        zero_point_dtype=torch.bfloat16,
    )
    codes = _quantize_affine_tinygemm(padded, (1, group), scale, zero, *arguments[1:])
    numbers = _dequantize_affine_tinygemm(
        codes, (1, group), scale, zero, torch.int32, 0, 15, output_dtype=torch.float32
    )
    rows = [part.reshape(len(padded), -1) for part in (scale, zero)]
    both = pack_tinygemm_scales_and_zeros(*rows, torch.bfloat16)
    weight = Int4TilePackedTo4dTensor(_tinygemm_words(codes), both, [1, group], w.shape)
    return weight, numbers[:n, :k].contiguous()


def _tinygemm_words(codes):
    """int32 codes [N, K] -> words [N/8, K/128, 32, 4], as lane after lane of int4mm.cu packs."""
    n, k = codes.shape
    columns = [codes[:, i].tolist() for i in range(k)]
    words = torch.zeros(n // 8, k // 128, 32, 4, dtype=torch.int64)
    for tile_row in range(n // 8):
        for outer in range(k // 128):
            for lane in range(32):
                row = 8 * tile_row + lane // 4
                for word in range(4):
                    first = (8 * outer + 2 * word) * 16 // 2 + lane % 4
                    word_of = 0
                    for i, pair in enumerate((first, first + 4, first + 8, first + 12)):
                        word_of |= columns[2 * pair][row] << 4 * i
                        word_of |= columns[2 * pair + 1][row] << 4 * (i + 4)
                    words[tile_row, outer, lane, word] = word_of
    return words.to(torch.uint32).view(torch.int32)


def _plain(w, activation, symmetric):
    """As Int4Tensor.from_hp, with scales and zero points in place of mslk's."""
    groups = w.float().unflatten(1, (-1, GROUP))
    least, most = groups.amin(2), groups.amax(2)
    scale = groups.abs().amax(2) / 7.5 if symmetric else (most - least) / 15
    zero = torch.zeros_like(scale) if symmetric else least + 8 * scale
    scale, zero = (part.t().contiguous().to(w.dtype) for part in (scale, zero))
    codes = _int4_row_quantize_zp_precomputed_qparams(w, scale, zero, GROUP)
    packed = (codes[:, 1::2] << 4) | (codes[:, ::2] & 15)
    numbers = codes.unflatten(1, (-1, GROUP)) * scale.t().float()[..., None]
    numbers = numbers + zero.t().float()[..., None]
    weight = Int4Tensor(packed, scale, zero, [1, GROUP], w.shape, activation_dtype=activation)
    return weight, numbers.flatten(1)


def _words(w):
    """As Int4PlainInt32Tensor.from_hp on an XPU."""
    block, bounds = (1, GROUP), (torch.int32, 0, 15)
    scale, zero = choose_qparams_affine(
        w, MappingType.ASYMMETRIC, block, *bounds, 1e-6, None, torch.int32
    )
    codes = quantize_affine(w, block, scale, zero, *bounds)
    numbers = dequantize_affine(
        codes, block, scale.float(), zero, *bounds, output_dtype=torch.float32
    )
    pairs = (codes[:, 1::2] << 4 | codes[:, ::2]).to(torch.uint8)
    scale, zero = (part.reshape(N, -1).t().contiguous() for part in (scale, zero))
    words = pairs.contiguous().view(torch.int32)
    return Int4PlainInt32Tensor(words, scale, zero.to(torch.int8), list(block), w.shape), numbers


def _real_zeros():
    scale, zero = torch.rand(N, K // GROUP) + 0.1, torch.randn(N, K // GROUP).half().float()
    # Multiples of 2^-10 stay exact beside 8.
    weight = IntxUnpackedToInt8Tensor.from_hp(
        torch.randn(N, K),
        (1, GROUP),
        torch.int4,
        intx_choose_qparams_algorithm=None,
        custom_scale=scale,
        custom_zero_point=(zero * 1024).round() / 1024,
    )
    return weight, weight.dequantize()
