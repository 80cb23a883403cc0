"""Step 2, scalar: one kernel in place of three, and no score ever leaves the chip.

The idea. The softmax of a row can be built as its scores come (FlashAttention-2, Dao 2023, section 3.1): keep the maximum m so
far, the sum l of 2^(s - m), and the weighted sum acc of the values; when a larger score comes, multiply l and acc by
2^(m - m'). At the end o = acc / l. So a program owns a few queries, walks along the keys, and needs of the score matrix only
what it is working on.

What it should bring. The workspace and its traffic are gone: memory holds q, k, v and o and nothing else. What it costs is
that all the arithmetic is done here in the plainest way, which makes this step the floor that the next ones climb from: each
key is met by products and sums on the CUDA cores, and each load fetches two bytes, because the compiler is told nothing of
where the tensors begin. An instruction to load for each instruction to multiply: the multiplier waits.

What it brought is in docs/ladder.md, made from the recorded run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashcore.kernels.program import Program
from flashcore.kernels.view import view_output, view_scores, view_statistics, view_weights
from flashcore.ladder.harness import Tile, fused, load_rows, online_softmax, store_rows, tile_of_program
from flashcore.ladder.problem import Problem

TILE = Tile(16, 1, 4)
# of the addresses: an element's own
DIVISOR = 2


@triton.jit
def scalar(
    q_ptr, k_ptr, v_ptr, o_ptr, seqlen_q, seqlen_k, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, view_ptr=None,
):  # fmt: skip
    """o for BLOCK_M queries of one head, key by key."""
    tl.static_assert(BLOCK_N == 1)
    m0, head = tile_of_program(seqlen_q, BLOCK_M)
    rows = m0 + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr + head * seqlen_q * HEAD_DIM, rows, seqlen_q, HEAD_DIM).to(tl.float32) * scale
    # Every query's threads read the key for themselves (the cache serves them), so no thread waits for another.
    # [BLOCK_M, HEAD_DIM]
    row = tl.zeros([BLOCK_M, 1], tl.int32) + tl.arange(0, HEAD_DIM)[None, :]
    k_row = k_ptr + head * seqlen_k * HEAD_DIM + row
    v_row = v_ptr + head * seqlen_k * HEAD_DIM + row
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for key in range(0, seqlen_k):
        k = tl.load(k_row)
        v = tl.load(v_row)
        # [BLOCK_M, 1]
        s = tl.sum(q * k.to(tl.float32), 1, keep_dims=True)
        view_scores(view_ptr, head * seqlen_q, rows, seqlen_q, key, seqlen_k, s)
        p, alpha, m_i, l_i = online_softmax(s, m_i, l_i)
        view_weights(view_ptr, head * seqlen_q, rows, seqlen_q, key, seqlen_k, p, m_i)
        acc = acc * alpha[:, None] + p * v.to(tl.float32)
        k_row += HEAD_DIM
        v_row += HEAD_DIM
    view_statistics(view_ptr, head * seqlen_q, rows, seqlen_q, seqlen_k, m_i, l_i)
    view_output(view_ptr, head * seqlen_q, rows, seqlen_q, seqlen_k, acc)
    store_rows(o_ptr + head * seqlen_q * HEAD_DIM, rows, seqlen_q, acc / l_i[:, None], HEAD_DIM)


def program(problem: Problem, arch: str, sm_count: int) -> Program:
    """One launch."""
    return fused("scalar", "scalar", problem, TILE, divisor=DIVISOR)
