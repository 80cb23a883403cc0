"""Step 1, unfused: attention as the formula has it, in three kernels that hand each other the whole score matrix.

The idea. S = q k^T, P = softmax(S), O = P v. Each is a well-known kernel: a matrix product, a row-wise softmax, a matrix
product. The products run on the matrix units, as those of a library would.

What it brings. A right answer, and the cost that every later step is measured against. The scores have S x S elements a head
where q, k, v and o have S x D. They pass through memory five times in float32 (written, read twice by the softmax, written
back, read again), so for long sequences memory traffic should set the time while the matrix units wait, and the workspace
grows with the square of the length.

What it brought is in docs/ladder.md, made from the recorded run.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from flashcore.kernels.program import Launch, Program, Workspace
from flashcore.kernels.specialisation import Parameter
from flashcore.kernels.view import view_output, view_scores, view_statistics, view_weights
from flashcore.ladder.harness import LOG2_E, VECTOR_BYTES, Tile, launch, load_rows, store_rows, tile_of_program
from flashcore.ladder.problem import Problem

TILE = Tile(64, 32, 8)
SOFTMAX_BLOCK = 1024


@triton.jit
def unfused_scores(
    q_ptr, k_ptr, workspace_ptr, seqlen_q, seqlen_k, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, view_ptr=None,
):  # fmt: skip
    """S = scale * q k^T for BLOCK_M queries of one head, into the workspace (B, H, Sq, Sk)."""
    m0, head = tile_of_program(seqlen_q, BLOCK_M)
    rows = m0 + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr + head * seqlen_q * HEAD_DIM, rows, seqlen_q, HEAD_DIM)
    # 64 bits, because the scores of one head may be more than 2^31; within the tile's rows 32 are enough
    s_base = workspace_ptr + (head * seqlen_q + m0) * seqlen_k
    s_rows = tl.arange(0, BLOCK_M) * seqlen_k
    for n0 in range(0, seqlen_k, BLOCK_N):
        keys = n0 + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr + head * seqlen_k * HEAD_DIM, keys, seqlen_k, HEAD_DIM)
        # [BLOCK_M, BLOCK_N]
        s = tl.dot(q, tl.trans(k)) * scale
        view_scores(view_ptr, head * seqlen_q, rows, seqlen_q, n0, seqlen_k, s)
        tl.store(s_base + s_rows[:, None] + keys[None, :], s, mask=(rows < seqlen_q)[:, None] & (keys < seqlen_k)[None, :])


@triton.jit
def unfused_softmax(workspace_ptr, seqlen_k, BLOCK_N: tl.constexpr, view_ptr=None):
    """P = softmax(S) of one row, in place: once along it for the maximum and the sum, once more to divide."""
    row = workspace_ptr + tl.program_id(0).to(tl.int64) * seqlen_k
    one = tl.arange(0, 1)
    m_i = float("-inf")
    l_i = 0.0
    for n0 in range(0, seqlen_k, BLOCK_N):
        keys = n0 + tl.arange(0, BLOCK_N)
        s = tl.load(row + keys, mask=keys < seqlen_k, other=float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 0))
        l_i = l_i * tl.exp2(m_i - m_new) + tl.sum(tl.exp2(s - m_new), 0)
        m_i = m_new
    for n0 in range(0, seqlen_k, BLOCK_N):
        keys = n0 + tl.arange(0, BLOCK_N)
        s = tl.load(row + keys, mask=keys < seqlen_k, other=float("-inf"))
        p = tl.exp2(s - m_i) / l_i
        view_weights(view_ptr, tl.program_id(0), one, 1, n0, seqlen_k, p[None, :], m_i + one)
        tl.store(row + keys, p, mask=keys < seqlen_k)
    view_statistics(view_ptr, tl.program_id(0), one, 1, seqlen_k, m_i + one, l_i + one)


@triton.jit
def unfused_output(
    workspace_ptr, v_ptr, o_ptr, seqlen_q, seqlen_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, view_ptr=None,
):  # fmt: skip
    """O = P v for BLOCK_M queries of one head."""
    m0, head = tile_of_program(seqlen_q, BLOCK_M)
    rows = m0 + tl.arange(0, BLOCK_M)
    p_base = workspace_ptr + (head * seqlen_q + m0) * seqlen_k
    p_rows = tl.arange(0, BLOCK_M) * seqlen_k
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for n0 in range(0, seqlen_k, BLOCK_N):
        keys = n0 + tl.arange(0, BLOCK_N)
        inside = (rows < seqlen_q)[:, None] & (keys < seqlen_k)[None, :]
        p = tl.load(p_base + p_rows[:, None] + keys[None, :], mask=inside, other=0.0)
        v = load_rows(v_ptr + head * seqlen_k * HEAD_DIM, keys, seqlen_k, HEAD_DIM)
        acc = tl.dot(p.to(v.dtype), v, acc)
    view_output(view_ptr, head * seqlen_q, rows, seqlen_q, seqlen_k, acc)
    store_rows(o_ptr + head * seqlen_q * HEAD_DIM, rows, seqlen_q, acc, HEAD_DIM)


def program(problem: Problem, arch: str, sm_count: int) -> Program:
    """Three launches, with the scores between them."""
    half = {tensor: Parameter(f"{tensor}_ptr", "*fp16", VECTOR_BYTES) for tensor in "qkvo"}
    scores = Parameter("workspace_ptr", "*fp32", VECTOR_BYTES)
    seqlen_q, seqlen_k = ("seqlen_q", "i32", problem.seqlen_q), ("seqlen_k", "i32", problem.seqlen_k)
    scale = ("scale", "fp32", problem.scale * LOG2_E)
    blocks = {"BLOCK_M": TILE.block_m, "BLOCK_N": TILE.block_n, "HEAD_DIM": problem.head_dim}
    tiles = math.ceil(problem.seqlen_q / TILE.block_m) * problem.batch * problem.heads

    def one(function: str, tensors: list[Parameter], numbers: list[tuple[str, str, int | float]]) -> Launch:
        return launch(function, function, tensors, problem, TILE, constants=blocks, numbers=numbers, grid=tiles)

    softmax = launch(
        "unfused_softmax",
        "unfused_softmax",
        [scores],
        problem,
        Tile(1, SOFTMAX_BLOCK, 4),
        constants={"BLOCK_N": SOFTMAX_BLOCK},
        numbers=[seqlen_k],
        grid=problem.rows,
    )
    return Program(
        (
            one("unfused_scores", [half["q"], half["k"], scores], [seqlen_q, seqlen_k, scale]),
            softmax,
            one("unfused_output", [scores, half["v"], half["o"]], [seqlen_q, seqlen_k]),
        ),
        (Workspace("workspace", (problem.rows, problem.seqlen_k), torch.float32),),
    )
