"""What the portable backward kernels need of each row beforehand: one number always, and another under an additive mask.

    delta = sum(do * o) - dlse      which ds subtracts from each dp, and through which a gradient of the log-sum-exp comes in
    rest = log(sum(exp(s - lse)))   what float32 lost of the log-sum-exp: none, or log(n) where n keys share one huge score

A finite mask may be as low as the dtype goes, and its row is then a plain softmax: but beside 1e30 there is no log(n), so
that exp(s - lse) is 1 for each of n keys. `rest` makes them sum to 1 again.
"""

import triton
import triton.language as tl

from flashcore.kernels.portable.backward_tile import biased_scores, load_statistics, weights
from flashcore.kernels.portable.forward import LN_2, _chunked_scores, _load_rows

# Up to here a log-sum-exp loses no more of a weight than two parts in 100,000.
EXACT: tl.constexpr = tl.constexpr(256.0)


@triton.jit
def portable_backward_delta(
    o_ptr, do_ptr, dlse_ptr, delta_ptr,
    stride_ob, stride_oh, stride_os,
    stride_dob, stride_doh, stride_dos,
    heads_q, seqlen_q, head_dim_v, has_dlse,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PARTIAL_D: tl.constexpr,
):  # fmt: skip
    """delta (B, Hq, Sq) of BLOCK_M rows of one head; grid = cdiv(Sq, BLOCK_M) * B * Hq. dlse is as delta, and may be null."""
    num_m = tl.cdiv(seqlen_q, BLOCK_M)
    pid = tl.program_id(0)
    h = ((pid // num_m) % heads_q).to(tl.int64)
    b = ((pid // num_m) // heads_q).to(tl.int64)
    rows = (pid % num_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    o_offsets = rows.to(tl.int64)[:, None] * stride_os + cols[None, :]
    do_offsets = rows.to(tl.int64)[:, None] * stride_dos + cols[None, :]
    o_base = o_ptr + b * stride_ob + h * stride_oh
    do_base = do_ptr + b * stride_dob + h * stride_doh
    o = _load_rows(o_base, o_offsets, rows, cols, 0, seqlen_q, head_dim_v, True, PARTIAL_D)
    do = _load_rows(do_base, do_offsets, rows, cols, 0, seqlen_q, head_dim_v, True, PARTIAL_D)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    first = (b * heads_q + h) * seqlen_q
    if has_dlse != 0:
        delta -= load_statistics(dlse_ptr + first, rows, 0, seqlen_q, True)
    tl.store(delta_ptr + first + rows, delta, mask=rows < seqlen_q)


@triton.jit
def portable_backward_rest(
    q_ptr, k_ptr, mask_ptr, lse_ptr, rest_ptr,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_mb, stride_mh, stride_mq, stride_mk,
    heads_q, heads_per_kv, seqlen_q, seqlen_k, head_dim, band_lo, band_hi, scale, softcap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, PARTIAL_D: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """rest (B, Hq, Sq) of BLOCK_M rows of one head; grid = cdiv(Sq, BLOCK_M) * B * Hq. scale is the plain one.

    Walks over the keys only where a log-sum-exp is so large that there may be a rest.
    """
    num_m = tl.cdiv(seqlen_q, BLOCK_M)
    pid = tl.program_id(0)
    head = (pid // num_m) % heads_q
    b = ((pid // num_m) // heads_q).to(tl.int64)
    h = head.to(tl.int64)
    h_k = (head // heads_per_kv).to(tl.int64)
    m0 = (pid % num_m) * BLOCK_M
    offs_m = m0 + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    q_base = q_ptr + b * stride_qb + h * stride_qh
    k_base = k_ptr + b * stride_kb + h_k * stride_kh
    mask_base = mask_ptr + b * stride_mb + h * stride_mh
    first = (b * heads_q + h) * seqlen_q
    lse = load_statistics(lse_ptr + first, offs_m, 0, seqlen_q, True)
    large = (tl.abs(lse) >= EXACT) & (lse != float("-inf"))

    total = tl.zeros([BLOCK_M], tl.float32)
    if tl.max(large.to(tl.int32), 0) > 0:
        if CHUNK_D > 0:
            q = 0.0
        else:
            q_offsets = offs_m.to(tl.int64)[:, None] * stride_qs + offs_d[None, :]
            q = _load_rows(q_base, q_offsets, offs_m, offs_d, 0, seqlen_q, head_dim, True, PARTIAL_D)
        k_offsets = offs_n.to(tl.int64)[:, None] * stride_ks + offs_d[None, :]
        n_begin = 0
        n_end = seqlen_k
        if HAS_LO:
            n_begin = tl.maximum(0, m0 + band_lo)
        if HAS_HI:
            n_end = tl.maximum(0, tl.minimum(seqlen_k, tl.minimum(m0 + BLOCK_M, seqlen_q) + band_hi))
        for start_n in tl.range(n_begin // BLOCK_N * BLOCK_N, n_end, BLOCK_N, num_stages=1):
            keys = start_n + offs_n
            k_tile = k_base + tl.cast(start_n, tl.int64) * stride_ks
            # [BLOCK_M, BLOCK_N]
            if CHUNK_D > 0:
                s = _chunked_scores(
                    q_base, k_tile, offs_m.to(tl.int64) * stride_qs, offs_n.to(tl.int64) * stride_ks,
                    offs_m, keys, seqlen_q, n_begin, n_end, head_dim, scale, BLOCK_M, BLOCK_N, CHUNK_D, PRECISION,
                )  # fmt: skip
            else:
                k = _load_rows(k_tile, k_offsets, keys, offs_d, n_begin, n_end, head_dim, True, PARTIAL_D)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            s, _, attended = biased_scores(
                s, offs_m[:, None], keys[None, :], (offs_m < seqlen_q)[:, None] & (keys < seqlen_k)[None, :],
                mask_base, stride_mq, stride_mk, band_lo, band_hi, scale, softcap,
                HAS_LO, HAS_HI, MASK, SOFTCAP, CHUNK_D > 0, True,
            )  # fmt: skip
            total += tl.sum(weights(s, lse[:, None], 0.0, attended, scale, MASK, False, True), 1)
    rest = tl.where(large & (total > 0), tl.log2(total) * LN_2, 0.0)
    tl.store(rest_ptr + first + offs_m, rest, mask=offs_m < seqlen_q)
