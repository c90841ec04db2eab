"""AWQ beside that of AutoAWQ and of llm-compressor: the same model, the same text.

Each multiplies columns by s = a^t / w^(1 - t) and looks for the t of the least error, in steps of
about a twentieth. They differ in what they measure it on: the packages run the attention or the MLP
behind the columns, or a layer where it is alone, on the inputs themselves; ours goes by x^T x of
each layer. a is the mean of |x| in the packages and the root of the mean of x^2 in ours, which also
tries each t without w. AutoAWQ clips ranges by the largest weight; ours are searched.
"""

import pytest

from tests.oracles.block_quantizers import (
    AUTOAWQ,
    LLMCOMPRESSOR_AWQ,
    block_errors,
    ours,
    theirs,
)
from tests.oracles.packages import require


def test_beside_autoawq(tmp_path):
    require("awq")
    (tmp_path / "scaled").mkdir()
    (tmp_path / "clipped").mkdir()
    settings = {"bits": 4, "group_size": 32}
    scaled = block_errors(theirs(AUTOAWQ, tmp_path / "scaled", **settings, clip=False))
    clipped = block_errors(theirs(AUTOAWQ, tmp_path / "clipped", **settings, clip=True))
    assert all_less(block_errors(ours("awq(grid=minmax)", 4)), scaled)
    assert all_less(block_errors(ours("awq", 4)), clipped)


@pytest.mark.parametrize(("bits", "duo"), [(4, True), (3, "both")])
def test_beside_llmcompressor(tmp_path, bits, duo):
    require("llmcompressor")
    made = theirs(LLMCOMPRESSOR_AWQ, tmp_path, bits=bits, group_size=32, duo=duo)
    assert all_less(block_errors(ours("awq(grid=minmax)", bits)), block_errors(made))


def all_less(errors, others):
    return all(error < other for error, other in zip(errors, others, strict=True))
