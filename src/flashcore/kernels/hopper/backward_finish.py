"""The last launch of a Hopper backward pass that summed by atomics: from float32 sums in fragment order to gradients.

A tile of 64 rows and 64 columns lies in the order in which a warpgroup's threads hold it as a wgmma accumulator, so that each
of them adds 16 bytes at once and a warp 512 bytes in a row: by group of 8 columns, warp, row of 8, pair of columns, half of 16
rows, column of the pair."""

import triton
import triton.language as tl


@triton.jit
def _round(sums_ptr, head_ptr, stride_s, m0, seqlen, head_dim, scale, COLUMNS: tl.constexpr):
    """Rows [m0, m0 + 64) of a head = scale * sums."""
    sums = tl.load(sums_ptr + tl.arange(0, 64 * COLUMNS))
    rounded = (sums * scale).to(head_ptr.dtype.element_ty)
    # [tile, group of 8 columns, warp, row of 8, pair of columns, half of 16 rows, column of the pair]
    rounded = tl.reshape(rounded, [COLUMNS // 64, 8, 4, 8, 4, 2, 2])
    # [64, COLUMNS]
    rounded = tl.reshape(tl.permute(rounded, (2, 5, 3, 0, 1, 4, 6)), [64, COLUMNS])
    rows = m0 + tl.arange(0, 64)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < seqlen)[:, None] & (columns < head_dim)[None, :]
    tl.store(head_ptr + rows.to(tl.int64)[:, None] * stride_s + columns[None, :], rounded, mask=inside)


@triton.jit
def hopper_backward_finish(
    dq_sum_ptr, dkv_sum_ptr, progress_ptr, dq_ptr, dk_ptr, dv_ptr,
    dq_stride_b, dq_stride_h, dq_stride_s, dk_stride_b, dk_stride_h, dk_stride_s, dv_stride_b, dv_stride_h, dv_stride_s,
    heads_q, heads_k, kv_heads, seqlen_q, seqlen_k, row_tiles, query_programs, first_shared, head_dim, head_dim_v, scale,
    COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """dq = scale * dq_sum for TILES times 64 rows of one head, but for what the main kernel has rounded; then, a program each,
    dk and dv of the 64 keys of a warpgroup, of the tiles of 128 keys from first_shared on, counted through all heads.

    dq_sum is (B * Hq, row_tiles, COLUMNS / 64, 4096) and dkv_sum (tiles, 2 warpgroups, dk and dv, COLUMNS / 64, 4096); the
    gradients are (B, H, S, D) by their strides, D <= COLUMNS. progress is as backward_shared.py has it. row_tiles is a multiple
    of TILES. grid = query_programs + 4 for each shared tile, query_programs = B * Hq * row_tiles / TILES.
    """
    program = tl.program_id(0)
    if program < query_programs:
        for i in range(TILES):
            number = program * TILES + i
            if tl.load(progress_ptr + 1 + kv_heads + number) == 0:
                head_of_all = number // row_tiles
                batch = head_of_all // heads_q
                head = head_of_all - batch * heads_q
                dq_ptr_of_head = dq_ptr + batch.to(tl.int64) * dq_stride_b + head.to(tl.int64) * dq_stride_h
                m0 = (number - head_of_all * row_tiles) * 64
                sums_ptr = dq_sum_ptr + number.to(tl.int64) * (64 * COLUMNS)
                _round(sums_ptr, dq_ptr_of_head, dq_stride_s, m0, seqlen_q, head_dim, scale, COLUMNS)
    else:
        part = program - query_programs
        tiles_per_head = (seqlen_k + 127) // 128
        tile = first_shared + part // 4
        head_of_all = tile // tiles_per_head
        batch = head_of_all // heads_k
        head = head_of_all - batch * heads_k
        n0 = (tile - head_of_all * tiles_per_head) * 128 + part % 4 // 2 * 64
        sums_ptr = dkv_sum_ptr + part.to(tl.int64) * (64 * COLUMNS)
        if part % 2 == 0:
            dk_ptr_of_head = dk_ptr + batch.to(tl.int64) * dk_stride_b + head.to(tl.int64) * dk_stride_h
            _round(sums_ptr, dk_ptr_of_head, dk_stride_s, n0, seqlen_k, head_dim, scale, COLUMNS)
        else:
            dv_ptr_of_head = dv_ptr + batch.to(tl.int64) * dv_stride_b + head.to(tl.int64) * dv_stride_h
            _round(sums_ptr, dv_ptr_of_head, dv_stride_s, n0, seqlen_k, head_dim_v, 1.0, COLUMNS)
