"""bitsandbytes (Dettmers et al.): NF4 weights, where it is installed.

Its FP4 is not a peer of `fp4-g<N>`: it has 16 values of its own, which are not those of E2M1.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from bench.subjects.base import Prepared, Problem, Subject, first_reason, no_group_of
from qkernels.weight import QuantizedWeight, codebook

_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_CPU_ROWS = 32
"""N is a multiple of this where its CPU kernel for 4-bit weights runs."""


def _why_not(problem: Problem) -> str | None:
    scheme = problem.scheme
    return first_reason(
        (
            importlib.util.find_spec("bitsandbytes") is not None,
            "the package bitsandbytes is not installed",
        ),
        (
            scheme.weight.name == "nf4" and scheme.weight_only and scheme.scale_levels == "one",
            f"runs nf4-g<N> here, not {scheme}",
        ),
    ) or no_group_of(problem, _BLOCKS)


def _prepare(problem: Problem, weight: QuantizedWeight) -> Prepared:
    # Else its operators would be ours.
    os.environ["QKERNELS_BITSANDBYTES"] = "0"
    import bitsandbytes as bnb
    from bitsandbytes import functional

    # Two codes a byte along K, the first in the high half; blocks follow each other row by row.
    packed = (weight.codes[:, ::2] << 4 | weight.codes[:, 1::2]).reshape(-1, 1).contiguous()
    state = functional.QuantState(
        absmax=weight.parameters.group_scales().flatten().contiguous(),
        shape=torch.Size(weight.shape),
        code=codebook(weight.scheme.weight, weight.codes.device),
        blocksize=problem.scheme.group_size,
        quant_type="nf4",
        dtype=problem.dtype,
    )
    for_cpu = problem.device == "cpu" and functional.has_avx512bf16() and problem.n % _CPU_ROWS == 0
    if for_cpu:
        # What its Linear4bit does before its first product on such a CPU: without, every product
        # would first write the weight out in 16 bits.
        packed, state = functional._convert_weight_packed_for_cpu(packed, state)

    def run(tensors: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        state.absmax = tensors[1]
        codes = tensors[0] if for_cpu else tensors[0].t()
        return bnb.matmul_4bit(x, codes, quant_state=state)

    return Prepared(state=(packed, state.absmax), run=run)


ROWS = (Subject("bitsandbytes", _why_not, _prepare, own_process=True),)
