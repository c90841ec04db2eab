"""Blocks of GGUF against the gguf package, for any bytes."""

import numpy as np
import pytest
import torch

from qkernels.bits.gguf import GGUF_TYPES
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight

gguf = pytest.importorskip("gguf", reason="gguf says what the blocks are")

HALVES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}
"""Where a block has 16-bit numbers, which must be finite."""


def random_blocks(name: str, rows: int, blocks: int) -> np.ndarray:
    kind, rng = GGUF_TYPES[name], np.random.default_rng(0)
    raw = rng.integers(0, 256, (rows, blocks, kind.nbytes), dtype=np.uint8)
    for start in HALVES[name]:
        numbers = (rng.normal(size=(rows, blocks, 1)) / 8).astype(np.float16)
        raw[..., start : start + 2] = numbers.view(np.uint8)
    return raw


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_the_numbers_are_those_of_the_package(name):
    kind, number = GGUF_TYPES[name], gguf.GGMLQuantizationType[name]
    assert gguf.GGML_QUANT_SIZES[number] == (kind.size, kind.nbytes)
    raw = random_blocks(name, 5, 3)
    want = torch.from_numpy(gguf.dequantize(raw.reshape(5, -1), number))
    found = kind.decode(torch.from_numpy(raw))
    scheme = QuantScheme.parse(kind.scheme)
    zeros = None if scheme.symmetric else torch.zeros(found.scales.shape, dtype=torch.uint8)
    weight = QuantizedWeight(
        scheme=scheme, codes=found.codes, scales=found.scales, zeros=zeros, offsets=found.offsets
    )
    assert torch.equal(weight.dequantize(), want)
    assert (found.offsets is None) == scheme.symmetric


def test_every_type_is_tried():
    assert HALVES.keys() == GGUF_TYPES.keys()
