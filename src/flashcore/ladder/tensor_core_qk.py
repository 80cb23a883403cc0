"""Step 4, tensor-core QK^T: the scores by the matrix units.

The idea. A matrix unit multiplies small matrices: one instruction of a warp does 16 x 8 x 16 products and sums them in
float32. To feed it, keys come in tiles now, not one by one, and q stays in halves. The scores of a tile of queries with a
tile of keys are one `tl.dot`. The sum over the values is as before on the CUDA cores, for all keys of the tile.

What it should bring. Half the arithmetic leaves the CUDA cores, and the maximum and the rescaling are paid once a tile instead
of once a key. What a tile brings with it: the last one may have keys past the end, which score -inf and so weigh nothing.

What it brought is in docs/ladder.md, made from the recorded run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashcore.kernels.program import Program
from flashcore.kernels.view import view_output, view_scores, view_statistics, view_weights
from flashcore.ladder.harness import Tile, fused, load_rows, online_softmax, store_rows, tile_of_program
from flashcore.ladder.problem import Problem

TILE = Tile(16, 16, 4)


@triton.jit
def tensor_core_qk(
    q_ptr, k_ptr, v_ptr, o_ptr, seqlen_q, seqlen_k, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, view_ptr=None,
):  # fmt: skip
    """o for BLOCK_M queries of one head, BLOCK_N keys at a time."""
    m0, head = tile_of_program(seqlen_q, BLOCK_M)
    rows = m0 + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr + head * seqlen_q * HEAD_DIM, rows, seqlen_q, HEAD_DIM)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for n0 in range(0, seqlen_k, BLOCK_N):
        keys = n0 + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr + head * seqlen_k * HEAD_DIM, keys, seqlen_k, HEAD_DIM)
        # [BLOCK_M, BLOCK_N]
        s = tl.where((keys < seqlen_k)[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        view_scores(view_ptr, head * seqlen_q, rows, seqlen_q, n0, seqlen_k, s)
        p, alpha, m_i, l_i = online_softmax(s, m_i, l_i)
        view_weights(view_ptr, head * seqlen_q, rows, seqlen_q, n0, seqlen_k, p, m_i)
        v = load_rows(v_ptr + head * seqlen_k * HEAD_DIM, keys, seqlen_k, HEAD_DIM)
        # [BLOCK_M, BLOCK_N, HEAD_DIM], summed over the keys
        acc = acc * alpha[:, None] + tl.sum(p[:, :, None] * v.to(tl.float32)[None, :, :], 1)
    view_statistics(view_ptr, head * seqlen_q, rows, seqlen_q, seqlen_k, m_i, l_i)
    view_output(view_ptr, head * seqlen_q, rows, seqlen_q, seqlen_k, acc)
    store_rows(o_ptr + head * seqlen_q * HEAD_DIM, rows, seqlen_q, acc / l_i[:, None], HEAD_DIM)


def program(problem: Problem, arch: str, sm_count: int) -> Program:
    """One launch."""
    return fused("tensor_core_qk", "tensor_core_qk", problem, TILE)
