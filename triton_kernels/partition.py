"""The part of y and of K that a program of a product computes."""

import triton
import triton.language as tl


@triton.jit
def output_tile(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(m, n, m_mask, n_mask) of a program of a GEMM: rows [1, BLOCK_M], channels [BLOCK_N, 1].

    GROUP_M row blocks share their weights in L2 at a time.
    """
    m_blocks = tl.cdiv(M, BLOCK_M)
    n_blocks = tl.cdiv(N, BLOCK_N)
    first = program // (GROUP_M * n_blocks) * GROUP_M
    height = tl.minimum(m_blocks - first, GROUP_M)
    inside = program % (GROUP_M * n_blocks)
    m_block = first + inside % height
    n_block = inside // height
    m = m_block * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    return m, n, m < M, n < N


@triton.jit
def tiles_of(split, tiles_per_split, K, TILE: tl.constexpr):
    """(first, last) of the tiles of TILE columns in one of the parts of K; last is not in it."""
    first = split * tiles_per_split
    return first, tl.minimum(first + tiles_per_split, tl.cdiv(K, TILE))
