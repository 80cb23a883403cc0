"""Step 5, tensor-core PV: the second product by the matrix units too.

The idea. P v is a matrix product as well, of weights that have just been computed. They are rounded to halves, which they can
afford (they lie between 0 and 1, and the sums stay float32), and one `tl.dot` adds the tile's values to the rescaled sum.
No atomics and no second pass: a program owns its queries' results from the first key to the last.

What it should bring. The last large sum leaves the CUDA cores; what they still do is the softmax, an exponential a score. The
registers that held products of weights and values are free, for larger tiles: the next step's matter.

What it brought is in docs/ladder.md, made from the recorded run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashcore.kernels.program import Program
from flashcore.kernels.view import view_output, view_scores, view_statistics, view_weights
from flashcore.ladder.harness import fused, load_rows, online_softmax, store_rows, tile_of_program
from flashcore.ladder.problem import Problem
from flashcore.ladder.tensor_core_qk import TILE


@triton.jit
def tensor_core_pv(
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
        # [BLOCK_M, HEAD_DIM]
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    view_statistics(view_ptr, head * seqlen_q, rows, seqlen_q, seqlen_k, m_i, l_i)
    view_output(view_ptr, head * seqlen_q, rows, seqlen_q, seqlen_k, acc)
    store_rows(o_ptr + head * seqlen_q * HEAD_DIM, rows, seqlen_q, acc / l_i[:, None], HEAD_DIM)


def program(problem: Problem, arch: str, sm_count: int) -> Program:
    """One launch."""
    return fused("tensor_core_pv", "tensor_core_pv", problem, TILE)
