"""The last launch of a Hopper backward pass that summed dq by atomics: from float32 sums in fragment order to dq.

A tile of 64 rows and 64 columns lies in `dq_sum` in the order in which a warpgroup's threads hold it as a wgmma accumulator, so
that each of them adds 16 bytes at once and a warp 512 bytes in a row: by group of 8 columns, warp, row of 8, pair of columns,
half of 16 rows, column of the pair.
"""

import triton
import triton.language as tl


@triton.jit
def hopper_backward_finish(
    dq_sum_ptr, dq_ptr, stride_b, stride_h, stride_s, heads_q, seqlen_q, padded_rows, head_dim, scale, COLUMNS: tl.constexpr
):  # fmt: skip
    """dq = scale * dq_sum for 64 rows of one head.

    dq_sum is (B * H, padded_rows / 64, COLUMNS / 64, 4096), dq (B, H, S, D) by its strides, D <= COLUMNS.
    grid = B * H * padded_rows / 64.
    """
    blocks = padded_rows // 64
    program = tl.program_id(0)
    head_of_all = program // blocks
    m0 = (program - head_of_all * blocks) * 64
    batch = head_of_all // heads_q
    head = head_of_all - batch * heads_q
    sums = tl.load(dq_sum_ptr + program.to(tl.int64) * (64 * COLUMNS) + tl.arange(0, 64 * COLUMNS))
    dq = (sums * scale).to(dq_ptr.dtype.element_ty)
    # [tile, group of 8 columns, warp, row of 8, pair of columns, half of 16 rows, column of the pair]
    dq = tl.reshape(dq, [COLUMNS // 64, 8, 4, 8, 4, 2, 2])
    # [64, COLUMNS]
    dq = tl.reshape(tl.permute(dq, (2, 5, 3, 0, 1, 4, 6)), [64, COLUMNS])
    rows = m0 + tl.arange(0, 64)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < seqlen_q)[:, None] & (columns < head_dim)[None, :]
    row = batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + rows.to(tl.int64) * stride_s
    tl.store(dq_ptr + row[:, None] + columns[None, :], dq, mask=inside)
