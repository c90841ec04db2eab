"""AutoRound beside the package of that name: the same block and tokens, as many steps.

The package draws other batches, and starts from ranges where ours starts from searched scales, so
that what is held against it is the error of the block's output.
"""

import pytest

from tests.oracles.block_quantizers import AUTOROUND, block_errors, ours, theirs
from tests.oracles.packages import require


@pytest.mark.parametrize("bits", [3, 4])
def test_a_block_loses_no_more_than_by_theirs(tmp_path, bits):
    require("auto_round")
    made = theirs(AUTOROUND, tmp_path, bits=bits, group_size=32, iters=50)
    (error,), (nearest,) = block_errors(made), block_errors(ours("rtn", bits))
    (own,) = block_errors(ours("autoround(steps=50, batch=8)", bits))
    (ranges,) = block_errors(ours("autoround(steps=50, batch=8, grid=minmax)", bits))
    print(f"{bits} bits: {error:.4f}, ours {own:.4f}, {ranges:.4f}, to nearest {nearest:.4f}")
    assert error < 0.9 * nearest
    assert own <= error
