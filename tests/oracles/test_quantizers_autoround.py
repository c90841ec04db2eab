"""auto-round's own rounding of a block, on the same model and text as ours."""

from tests.oracles.block_quantizers import AUTOROUND, block_errors, ours, theirs
from tests.oracles.packages import require


def test_it_loses_less_than_by_rounding_to_nearest(tmp_path):
    require("auto_round")
    made = theirs(AUTOROUND, tmp_path, bits=4, group_size=32, iters=50)
    (error,), (nearest,) = block_errors(made), block_errors(ours("rtn", 4))
    print(f"auto-round {error:.4f}, to nearest {nearest:.4f}, gptq {block_errors(ours('gptq', 4))}")
    assert error < 0.9 * nearest
