"""The portable backward kernels for an additive mask: the gradient of each element, summed over what it is broadcast to.

A program owns a tile of the mask in the mask's own shape, BLOCK_M rows by BLOCK_N keys of one batch entry and head of it,
and walks over all tiles of scores to which the mask lends that tile: every batch entry, head, tile of rows and tile of keys
along which it is broadcast. So each element is summed by one program in one order, bitwise the same run to run, and no
memory is needed beside the gradient. The price is paid by masks of few elements: they have few programs.

ds is of the biased score, after a softcap (backward_tile.py). A mask that is one number for all keys of a row moves every
score of the row alike: the output does not see it, and the log-sum-exp moves with it. So its gradient is that of the
log-sum-exp, exactly, where a sum of ds would be the rounding errors of numbers that cancel.
"""

import triton
import triton.language as tl

from flashcore.kernels.portable.backward_tile import biased_scores, load_statistics, score_gradients, weights
from flashcore.kernels.portable.forward import _chunked_scores, _load_rows


@triton.jit
def portable_backward_dmask(
    q_ptr, k_ptr, v_ptr, mask_ptr, do_ptr, lse_ptr, delta_ptr, rest_ptr, dmask_ptr,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_mb, stride_mh, stride_mq, stride_mk,
    stride_dob, stride_doh, stride_dos,
    batch, heads_q, heads_per_kv, seqlen_q, seqlen_k, head_dim, head_dim_v,
    mask_batch, mask_heads, mask_rows,
    band_lo, band_hi, scale, softcap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, PARTIAL_D: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, SUM_M: tl.constexpr,
):  # fmt: skip
    """dmask, contiguous (mask_batch, mask_heads, mask_rows, Sk); grid = their product, the last two in blocks.

    Each of the three is 1 or the size that it is broadcast to. SUM_M: mask_rows is 1, and a tile of the mask stands for all
    rows. scale is the plain one.
    """
    num_m = tl.cdiv(seqlen_q, BLOCK_M)
    num_n = tl.cdiv(seqlen_k, BLOCK_N)
    pid = tl.program_id(0)
    n0 = (pid % num_n) * BLOCK_N
    pid = pid // num_n
    first_m = 0
    tiles_m = num_m
    if not SUM_M:
        first_m = pid % num_m
        tiles_m = 1
        pid = pid // num_m
    head_of_mask = pid % mask_heads
    batch_of_mask = pid // mask_heads
    heads = heads_q // mask_heads
    count = (batch // mask_batch) * heads * tiles_m
    if not SUM_M:
        # a tile outside the band of every row
        if HAS_LO:
            count = tl.where(n0 + BLOCK_N <= first_m * BLOCK_M + band_lo, 0, count)
        if HAS_HI:
            count = tl.where(n0 > tl.minimum((first_m + 1) * BLOCK_M, seqlen_q) - 1 + band_hi, 0, count)

    offs_d = tl.arange(0, BLOCK_D)
    keys = n0 + tl.arange(0, BLOCK_N)
    k_offsets = keys.to(tl.int64) * stride_ks
    v_offsets = keys.to(tl.int64) * stride_vs
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in tl.range(0, count, num_stages=STAGES):
        head = head_of_mask + i // tiles_m % heads
        b = (batch_of_mask + i // tiles_m // heads).to(tl.int64)
        h = head.to(tl.int64)
        h_k = (head // heads_per_kv).to(tl.int64)
        rows = (first_m + i % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
        q_base = q_ptr + b * stride_qb + h * stride_qh
        k_base = k_ptr + b * stride_kb + h_k * stride_kh
        v_base = v_ptr + b * stride_vb + h_k * stride_vh
        do_base = do_ptr + b * stride_dob + h * stride_doh
        q_offsets = rows.to(tl.int64) * stride_qs
        do_offsets = rows.to(tl.int64) * stride_dos
        # [BLOCK_M, BLOCK_N]
        if CHUNK_D > 0:
            s = _chunked_scores(
                q_base, k_base, q_offsets, k_offsets, rows, keys, seqlen_q, 0, seqlen_k, head_dim, scale,
                BLOCK_M, BLOCK_N, CHUNK_D, PRECISION,
            )  # fmt: skip
            dp = _chunked_scores(
                do_base, v_base, do_offsets, v_offsets, rows, keys, seqlen_q, 0, seqlen_k, head_dim_v, 1.0,
                BLOCK_M, BLOCK_N, CHUNK_D, PRECISION,
            )  # fmt: skip
        else:
            cols = offs_d[None, :]
            q = _load_rows(q_base, q_offsets[:, None] + cols, rows, offs_d, 0, seqlen_q, head_dim, True, PARTIAL_D)
            k = _load_rows(k_base, k_offsets[:, None] + cols, keys, offs_d, 0, seqlen_k, head_dim, True, PARTIAL_D)
            v = _load_rows(v_base, v_offsets[:, None] + cols, keys, offs_d, 0, seqlen_k, head_dim_v, True, PARTIAL_D)
            do = _load_rows(do_base, do_offsets[:, None] + cols, rows, offs_d, 0, seqlen_q, head_dim_v, True, PARTIAL_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        s, _, attended = biased_scores(
            s, rows[:, None], keys[None, :], (rows < seqlen_q)[:, None] & (keys < seqlen_k)[None, :],
            mask_ptr + b * stride_mb + h * stride_mh, stride_mq, stride_mk, band_lo, band_hi, scale, softcap,
            HAS_LO, HAS_HI, MASK, SOFTCAP, CHUNK_D > 0, True,
        )  # fmt: skip
        first = (b * heads_q + h) * seqlen_q
        lse = load_statistics(lse_ptr + first, rows, 0, seqlen_q, True)[:, None]
        rest = load_statistics(rest_ptr + first, rows, 0, seqlen_q, True)[:, None]
        delta = load_statistics(delta_ptr + first, rows, 0, seqlen_q, True)[:, None]
        p = weights(s, lse, rest, attended, scale, MASK, False, True)
        acc += score_gradients(p, dp, delta, 1.0, attended, False, True)

    base = dmask_ptr + (batch_of_mask * mask_heads + head_of_mask).to(tl.int64) * mask_rows * seqlen_k
    element = dmask_ptr.dtype.element_ty
    if SUM_M:
        tl.store(base + keys, tl.sum(acc, 0).to(element), mask=keys < seqlen_k)
    else:
        rows = first_m * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (rows < seqlen_q)[:, None] & (keys < seqlen_k)[None, :]
        tl.store(base + rows.to(tl.int64)[:, None] * seqlen_k + keys[None, :], acc.to(element), mask=inside)


@triton.jit
def portable_backward_dmask_rows(
    lse_ptr, dlse_ptr, dmask_ptr, batch, heads_q, seqlen_q, mask_batch, mask_heads, mask_rows, has_dlse,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dmask, contiguous (mask_batch, mask_heads, mask_rows, 1); grid = their product, the rows in blocks. dlse may be null."""
    num_m = tl.cdiv(mask_rows, BLOCK_M)
    pid = tl.program_id(0)
    first_row = (pid % num_m) * BLOCK_M
    head_of_mask = (pid // num_m) % mask_heads
    batch_of_mask = (pid // num_m) // mask_heads
    heads = heads_q // mask_heads
    # A mask of one row stands for all rows, which are then BLOCK_M partial sums; else a row is its own.
    tiles = tl.where(mask_rows == seqlen_q, 1, tl.cdiv(seqlen_q, BLOCK_M))
    offs_m = tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M], tl.float32)
    if has_dlse != 0:
        for i in tl.range(0, (batch // mask_batch) * heads * tiles, num_stages=1):
            rows = first_row + i % tiles * BLOCK_M + offs_m
            b = (batch_of_mask + i // tiles // heads).to(tl.int64)
            first = (b * heads_q + head_of_mask + i // tiles % heads) * seqlen_q
            lse = load_statistics(lse_ptr + first, rows, 0, seqlen_q, True)
            dlse = load_statistics(dlse_ptr + first, rows, 0, seqlen_q, True)
            acc += tl.where(lse == float("-inf"), 0.0, dlse)
    base = dmask_ptr + (batch_of_mask * mask_heads + head_of_mask).to(tl.int64) * mask_rows
    element = dmask_ptr.dtype.element_ty
    if mask_rows != seqlen_q:
        tl.store(base, tl.sum(acc, 0).to(element))
    else:
        rows = first_row + offs_m
        tl.store(base + rows, acc.to(element), mask=rows < seqlen_q)
