"""The first launch of a Hopper backward pass: what its other kernels need of each row of the output.

With o the output, do its gradient and lse the natural log-sum-exp of a row (out of the forward pass, as dlse may be):

    delta = dlse - sum(do * o),   row_lse = -lse / scale

The products that the scores and do v^T are start from them (kernels/hopper/backward.py), so that p = 2^((q k^T + row_lse) *
scale * log2(e)) and ds = p * (do v^T + delta); with a softcap row_lse is -lse * log2(e) (backward_softcap.py). A row that
attended nothing has row_lse = -inf, which gives it p = 0, and delta = 0, whatever is in do.
"""

import triton
import triton.language as tl


@triton.jit
def hopper_backward_prepare(
    o_ptr, do_ptr, lse_ptr, dlse_ptr, row_lse_ptr, delta_ptr, dq_sum_ptr, dkv_sum_ptr, progress_ptr,
    stride_ob, stride_oh, stride_os, stride_dob, stride_doh, stride_dos,
    heads_q, seqlen_q, padded_rows, head_dim_v, lse_factor, has_dlse, zero_dq_sum, dkv_sum_tiles, progress_size,
    ROWS: tl.constexpr, BLOCK_DV: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """row_lse and delta of ROWS rows of one head; zeros for their COLUMNS sums of dq, where asked to, and, each program a
    part, for the sums of dk and dv and for progress.

    o and do are (B, H, S, Dv) by their strides, lse and dlse (B, H, S) contiguous; row_lse and delta are (B * H, padded_rows),
    dq_sum (B * H, padded_rows, COLUMNS), COLUMNS a multiple of 64, dkv_sum dkv_sum_tiles times 4096, progress int32
    (progress_size). `lse_factor` is backward_factors.py's.
    padded_rows is a multiple of ROWS; rows from seqlen_q on are as rows that attended nothing.
    grid = B * H * padded_rows / ROWS.
    """
    blocks = padded_rows // ROWS
    program = tl.program_id(0)
    head_of_all = program // blocks
    m0 = (program - head_of_all * blocks) * ROWS
    batch = head_of_all // heads_q
    head = head_of_all - batch * heads_q
    padded = head_of_all.to(tl.int64) * padded_rows + m0
    for first in range(program * 4, progress_size, tl.num_programs(0) * 4):
        counts = first + tl.arange(0, 4)
        tl.store(progress_ptr + counts, tl.zeros([4], tl.int32), mask=counts < progress_size)
    # first, because nothing waits for stores, and these would wait for loads before them
    if zero_dq_sum != 0:
        for part in tl.static_range(COLUMNS // 64):
            zeroed = padded * COLUMNS + part * ROWS * 64 + tl.arange(0, ROWS * 64)
            tl.store(dq_sum_ptr + zeroed, tl.zeros([ROWS * 64], tl.float32))
    for tile in range(program, dkv_sum_tiles, tl.num_programs(0)):
        zeroed_ptr = dkv_sum_ptr + tl.cast(tile, tl.int64) * 4096
        tl.store(zeroed_ptr + tl.arange(0, 4096), tl.zeros([4096], tl.float32))

    rows = m0 + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_DV)
    # [ROWS, BLOCK_DV]
    inside = (rows < seqlen_q)[:, None] & (columns < head_dim_v)[None, :]
    o_row = batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh + rows.to(tl.int64) * stride_os
    do_row = batch.to(tl.int64) * stride_dob + head.to(tl.int64) * stride_doh + rows.to(tl.int64) * stride_dos
    o = tl.load(o_ptr + o_row[:, None] + columns[None, :], mask=inside, other=0.0)
    do = tl.load(do_ptr + do_row[:, None] + columns[None, :], mask=inside, other=0.0)
    statistics = head_of_all.to(tl.int64) * seqlen_q + rows
    lse = tl.load(lse_ptr + statistics, mask=rows < seqlen_q, other=float("-inf"))
    delta = -tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if has_dlse != 0:
        delta += tl.load(dlse_ptr + statistics, mask=rows < seqlen_q, other=0.0)
    attended = lse != float("-inf")  # true of NaN, which must reach the gradients
    tl.store(row_lse_ptr + padded + tl.arange(0, ROWS), tl.where(attended, lse * lse_factor, float("-inf")))
    tl.store(delta_ptr + padded + tl.arange(0, ROWS), tl.where(attended, delta, 0.0))
