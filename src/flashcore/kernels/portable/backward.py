"""The portable backward kernels for q, k and v: two passes over the scores, neither of which needs an atomic.

    dv = p^T do,   dk = scale * ds^T q      a program owns BLOCK_N keys and walks over the rows that may attend them
    dq = scale * ds k                       a program owns BLOCK_M rows and walks over the keys that they may attend

with p and ds as backward_tile.py has them. The first is laid out [keys, rows], so that p and ds, which come out of a product,
go into the next from registers. It sums over the query heads of its key head (GQA) in the same accumulators. So every
gradient is written once, by one program, and is bitwise the same run to run; the price is 7 products where a single pass
with atomics has 5.

Bands, MASKED and what float32 does are as in forward.py. The loops that mask walk in tiles of EDGE, which may be smaller:
masking takes registers. A row past the end, one outside the band of every key of the tile, and under a mask one that attends
no key of the tile is replaced by zero where products sum over rows; keys likewise.
"""

import triton
import triton.language as tl

from flashcore.kernels.portable.backward_tile import (
    add_product,
    biased_scores,
    keep_attended,
    load_statistics,
    score_gradients,
    weights,
)
from flashcore.kernels.portable.forward import LN_2, _chunked_scores, _load_rows


@triton.jit
def _store_rows(base, offsets, rows, cols, row_end, col_end, tile, PARTIAL_D: tl.constexpr):
    inside = (rows < row_end)[:, None]
    if PARTIAL_D:
        inside = inside & (cols < col_end)[None, :]
    tl.store(base + offsets + cols[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _walk_rows(
    dk, dv, k, v, q_base, k_base, v_base, do_base, lse_base, delta_base, rest_base, mask_base,
    stride_qh, stride_qs, stride_ks, stride_vs, stride_dh, stride_ds, stride_mh, stride_mq, stride_mk,
    heads, offs_n, start, stop, m_begin, m_end, seqlen_q, seqlen_k, head_dim, head_dim_v,
    band_lo, band_hi, scale, softcap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, PARTIAL_D: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, FOLD_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the tiles of rows in [start, stop) of each of `heads` query heads, of which the bases are those of the first.

    With MASKED, rows outside [m_begin, m_end) and outside the band are excluded.
    """
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    # Loop-invariant tile offsets over a moving scalar base: 64-bit adds stay out of the loop.
    q_offsets = offs_m.to(tl.int64)[:, None] * stride_qs + offs_d[None, :]
    do_offsets = offs_m.to(tl.int64)[:, None] * stride_ds + offs_d[None, :]
    n = offs_n[:, None]

    # One loop over heads and tiles: nested, it would keep what each head needs in registers as well.
    tiles = tl.cdiv(tl.maximum(stop - start, 0), BLOCK_M)
    for i in tl.range(0, heads * tiles, num_stages=STAGES):
        head = i // tiles
        start_m = start + (i - head * tiles) * BLOCK_M
        rows = start_m + offs_m
        m = rows[None, :]
        h = tl.cast(head, tl.int64)
        first = tl.cast(start_m, tl.int64)
        q_tile = q_base + (h * stride_qh + first * stride_qs)
        do_tile = do_base + (h * stride_dh + first * stride_ds)
        mask_tile = mask_base + h * stride_mh
        statistics = h * seqlen_q
        q = _load_rows(q_tile, q_offsets, rows, offs_d, m_begin, m_end, head_dim, MASKED, PARTIAL_D)
        do = _load_rows(do_tile, do_offsets, rows, offs_d, m_begin, m_end, head_dim_v, MASKED, PARTIAL_D)
        # [BLOCK_N, BLOCK_M]
        if CHUNK_D > 0:
            s = _chunked_scores(
                k_base, q_tile, offs_n.to(tl.int64) * stride_ks, offs_m.to(tl.int64) * stride_qs,
                offs_n, rows, seqlen_k, m_begin, m_end, head_dim, scale, BLOCK_N, BLOCK_M, CHUNK_D, PRECISION,
            )  # fmt: skip
        else:
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        inside = m < m_end
        if MASK != "none":
            inside = inside & (n < seqlen_k)
        s, slope, attended = biased_scores(
            s, m, n, inside, mask_tile, stride_mq, stride_mk, band_lo, band_hi, scale, softcap,
            HAS_LO, HAS_HI, MASK, SOFTCAP, FOLD_SCALE or CHUNK_D > 0, MASKED,
        )  # fmt: skip
        rest = 0.0
        if MASK == "additive":
            rest = load_statistics(rest_base + statistics, rows, m_begin, m_end, MASKED)[None, :]
        lse = load_statistics(lse_base + statistics, rows, m_begin, m_end, MASKED)
        p = weights(s, lse[None, :], rest, attended, scale, MASK, FOLD_SCALE, MASKED)
        if MASK != "none":
            q = keep_attended(q, attended)
            do = keep_attended(do, attended)
        # Issued after the weights are: they are computed while it runs, and fewer registers are alive at a time.
        if CHUNK_D > 0:
            dp = _chunked_scores(
                v_base, do_tile, offs_n.to(tl.int64) * stride_vs, offs_m.to(tl.int64) * stride_ds,
                offs_n, rows, seqlen_k, m_begin, m_end, head_dim_v, 1.0, BLOCK_N, BLOCK_M, CHUNK_D, PRECISION,
            )  # fmt: skip
        else:
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        # [BLOCK_N, BLOCK_D]
        dv = add_product(dv, p, do, 1.0, CHUNK_D, PRECISION)
        delta = load_statistics(delta_base + statistics, rows, m_begin, m_end, MASKED)
        # [BLOCK_N, BLOCK_M]
        ds = score_gradients(p, dp, delta[None, :], slope, attended, SOFTCAP, MASKED)
        # [BLOCK_N, BLOCK_D]
        dk = add_product(dk, ds, q, scale, CHUNK_D, PRECISION)
    return dk, dv


@triton.jit
def portable_backward_dkdv(
    q_ptr, k_ptr, v_ptr, mask_ptr, do_ptr, lse_ptr, delta_ptr, rest_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_mb, stride_mh, stride_mq, stride_mk,
    stride_dob, stride_doh, stride_dos,
    stride_dkb, stride_dkh, stride_dks,
    stride_dvb, stride_dvh, stride_dvs,
    heads_q, heads_per_kv, seqlen_q, seqlen_k, head_dim, head_dim_v,
    band_lo, band_hi, scale, softcap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, PARTIAL_D: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, FOLD_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key head; grid = cdiv(Sk, BLOCK_N) * B * Hkv.

    Scale and strides as portable_forward has them; lse, delta and rest are (B, Hq, Sq) contiguous float32.
    """
    num_n = tl.cdiv(seqlen_k, BLOCK_N)
    heads_k = heads_q // heads_per_kv
    pid = tl.program_id(0)
    # Keys at the beginning are attended by most rows under causality: the longest tiles start first.
    n0 = (pid % num_n) * BLOCK_N
    head_k = (pid // num_n) % heads_k
    b = ((pid // num_n) // heads_k).to(tl.int64)
    h_k = head_k.to(tl.int64)

    offs_n = n0 + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    k_base = k_ptr + b * stride_kb + h_k * stride_kh
    v_base = v_ptr + b * stride_vb + h_k * stride_vh
    if CHUNK_D > 0:
        k = 0.0  # read again for each tile of rows, a chunk at a time
        v = 0.0
    else:
        k_offsets = offs_n.to(tl.int64)[:, None] * stride_ks + offs_d[None, :]
        v_offsets = offs_n.to(tl.int64)[:, None] * stride_vs + offs_d[None, :]
        k = _load_rows(k_base, k_offsets, offs_n, offs_d, 0, seqlen_k, head_dim, True, PARTIAL_D)
        v = _load_rows(v_base, v_offsets, offs_n, offs_d, 0, seqlen_k, head_dim_v, True, PARTIAL_D)

    # Rows that attend any key of this tile: [m_begin, m_end); rows that attend every key of it: [full_begin, full_end).
    n_last = tl.minimum(n0 + BLOCK_N, seqlen_k) - 1
    m_begin = 0
    m_end = seqlen_q
    full_begin = 0
    full_end = seqlen_q
    if HAS_HI:
        m_begin = tl.maximum(0, n0 - band_hi)
        full_begin = tl.cdiv(tl.maximum(0, n_last - band_hi), BLOCK_M) * BLOCK_M
    if HAS_LO:
        m_end = tl.maximum(0, tl.minimum(seqlen_q, n_last - band_lo + 1))
        full_end = tl.maximum(0, tl.minimum(seqlen_q, n0 - band_lo + 1))
    full_end = full_end // BLOCK_M * BLOCK_M
    edge_begin = tl.maximum(full_begin, full_end)
    if MASK != "none":
        edge_begin = m_begin // EDGE * EDGE  # every tile may hold a masked pair: one loop over all

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    h = h_k * heads_per_kv
    q_base = q_ptr + b * stride_qb + h * stride_qh
    do_base = do_ptr + b * stride_dob + h * stride_doh
    mask_base = mask_ptr + b * stride_mb + h * stride_mh
    first = (b * heads_q + h) * seqlen_q
    if HAS_HI and MASK == "none":
        dk, dv = _walk_rows(
            dk, dv, k, v, q_base, k_base, v_base, do_base, lse_ptr + first, delta_ptr + first, rest_ptr + first, mask_base,
            stride_qh, stride_qs, stride_ks, stride_vs, stride_doh, stride_dos, stride_mh, stride_mq, stride_mk,
            heads_per_kv, offs_n, m_begin // EDGE * EDGE, tl.minimum(full_begin, m_end), m_begin, m_end, seqlen_q, seqlen_k,
            head_dim, head_dim_v, band_lo, band_hi, scale, softcap, EDGE, BLOCK_N, BLOCK_D, CHUNK_D, PARTIAL_D,
            HAS_LO, HAS_HI, MASK, SOFTCAP, FOLD_SCALE, PRECISION, STAGES, True,
        )  # fmt: skip
    if MASK == "none":
        dk, dv = _walk_rows(
            dk, dv, k, v, q_base, k_base, v_base, do_base, lse_ptr + first, delta_ptr + first, rest_ptr + first, mask_base,
            stride_qh, stride_qs, stride_ks, stride_vs, stride_doh, stride_dos, stride_mh, stride_mq, stride_mk,
            heads_per_kv, offs_n, full_begin, full_end, m_begin, m_end, seqlen_q, seqlen_k,
            head_dim, head_dim_v, band_lo, band_hi, scale, softcap, BLOCK_M, BLOCK_N, BLOCK_D, CHUNK_D, PARTIAL_D,
            HAS_LO, HAS_HI, MASK, SOFTCAP, FOLD_SCALE, PRECISION, STAGES, False,
        )  # fmt: skip
    dk, dv = _walk_rows(
        dk, dv, k, v, q_base, k_base, v_base, do_base, lse_ptr + first, delta_ptr + first, rest_ptr + first, mask_base,
        stride_qh, stride_qs, stride_ks, stride_vs, stride_doh, stride_dos, stride_mh, stride_mq, stride_mk,
        heads_per_kv, offs_n, edge_begin, m_end, m_begin, m_end, seqlen_q, seqlen_k,
        head_dim, head_dim_v, band_lo, band_hi, scale, softcap, EDGE, BLOCK_N, BLOCK_D, CHUNK_D, PARTIAL_D,
        HAS_LO, HAS_HI, MASK, SOFTCAP, FOLD_SCALE, PRECISION, STAGES, True,
    )  # fmt: skip

    if CHUNK_D == 0:
        if FOLD_SCALE:
            dk = dk * (scale * LN_2)
        else:
            dk = dk * scale
    dk_base = dk_ptr + b * stride_dkb + h_k * stride_dkh
    dv_base = dv_ptr + b * stride_dvb + h_k * stride_dvh
    _store_rows(dk_base, offs_n.to(tl.int64)[:, None] * stride_dks, offs_n, offs_d, seqlen_k, head_dim, dk, PARTIAL_D)
    _store_rows(dv_base, offs_n.to(tl.int64)[:, None] * stride_dvs, offs_n, offs_d, seqlen_k, head_dim_v, dv, PARTIAL_D)


@triton.jit
def _walk_keys(
    dq, q, do, lse, delta, rest, q_base, k_base, v_base, do_base, mask_base,
    stride_qs, stride_ks, stride_vs, stride_ds, stride_mq, stride_mk,
    offs_m, start, stop, n_begin, n_end, seqlen_q, head_dim, head_dim_v,
    band_lo, band_hi, scale, softcap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, PARTIAL_D: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, FOLD_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the tiles of keys in [start, stop); with MASKED, keys outside [n_begin, n_end) and outside the band are excluded."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    k_offsets = offs_n.to(tl.int64)[:, None] * stride_ks + offs_d[None, :]
    v_offsets = offs_n.to(tl.int64)[:, None] * stride_vs + offs_d[None, :]
    m = offs_m[:, None]

    for start_n in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        keys = start_n + offs_n
        n = keys[None, :]
        k_tile = k_base + tl.cast(start_n, tl.int64) * stride_ks
        v_tile = v_base + tl.cast(start_n, tl.int64) * stride_vs
        k = _load_rows(k_tile, k_offsets, keys, offs_d, n_begin, n_end, head_dim, MASKED, PARTIAL_D)
        # [BLOCK_M, BLOCK_N]
        if CHUNK_D > 0:
            s = _chunked_scores(
                q_base, k_tile, offs_m.to(tl.int64) * stride_qs, offs_n.to(tl.int64) * stride_ks,
                offs_m, keys, seqlen_q, n_begin, n_end, head_dim, scale, BLOCK_M, BLOCK_N, CHUNK_D, PRECISION,
            )  # fmt: skip
        else:
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        inside = n < n_end
        if MASK != "none":
            inside = inside & (m < seqlen_q)
        s, slope, attended = biased_scores(
            s, m, n, inside, mask_base, stride_mq, stride_mk, band_lo, band_hi, scale, softcap,
            HAS_LO, HAS_HI, MASK, SOFTCAP, FOLD_SCALE or CHUNK_D > 0, MASKED,
        )  # fmt: skip
        p = weights(s, lse, rest, attended, scale, MASK, FOLD_SCALE, MASKED)
        if CHUNK_D > 0:
            dp = _chunked_scores(
                do_base, v_tile, offs_m.to(tl.int64) * stride_ds, offs_n.to(tl.int64) * stride_vs,
                offs_m, keys, seqlen_q, n_begin, n_end, head_dim_v, 1.0, BLOCK_M, BLOCK_N, CHUNK_D, PRECISION,
            )  # fmt: skip
        else:
            v = _load_rows(v_tile, v_offsets, keys, offs_d, n_begin, n_end, head_dim_v, MASKED, PARTIAL_D)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = score_gradients(p, dp, delta, slope, attended, SOFTCAP, MASKED)
        if MASK != "none":
            k = keep_attended(k, attended)
        # [BLOCK_M, BLOCK_D]
        dq = add_product(dq, ds, k, scale, CHUNK_D, PRECISION)
    return dq


@triton.jit
def portable_backward_dq(
    q_ptr, k_ptr, v_ptr, mask_ptr, do_ptr, lse_ptr, delta_ptr, rest_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_mb, stride_mh, stride_mq, stride_mk,
    stride_dob, stride_doh, stride_dos,
    stride_dqb, stride_dqh, stride_dqs,
    heads_q, heads_per_kv, seqlen_q, seqlen_k, head_dim, head_dim_v,
    band_lo, band_hi, scale, softcap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, PARTIAL_D: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, FOLD_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M rows of one head; grid = cdiv(Sq, BLOCK_M) * B * Hq. Scale, strides and statistics as in dkdv."""
    num_m = tl.cdiv(seqlen_q, BLOCK_M)
    pid = tl.program_id(0)
    block_m = pid % num_m
    if HAS_HI:
        # Rows further down attend more keys: start the longest tiles first, so that the short ones fill the tail.
        block_m = num_m - 1 - block_m
    head = (pid // num_m) % heads_q
    b = ((pid // num_m) // heads_q).to(tl.int64)
    h = head.to(tl.int64)
    h_k = (head // heads_per_kv).to(tl.int64)

    m0 = block_m * BLOCK_M
    offs_m = m0 + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    q_base = q_ptr + b * stride_qb + h * stride_qh
    do_base = do_ptr + b * stride_dob + h * stride_doh
    k_base = k_ptr + b * stride_kb + h_k * stride_kh
    v_base = v_ptr + b * stride_vb + h_k * stride_vh
    mask_base = mask_ptr + b * stride_mb + h * stride_mh
    if CHUNK_D > 0:
        q = 0.0  # read again for each tile of keys, a chunk at a time
        do = 0.0
    else:
        q_offsets = offs_m.to(tl.int64)[:, None] * stride_qs + offs_d[None, :]
        do_offsets = offs_m.to(tl.int64)[:, None] * stride_dos + offs_d[None, :]
        q = _load_rows(q_base, q_offsets, offs_m, offs_d, 0, seqlen_q, head_dim, True, PARTIAL_D)
        do = _load_rows(do_base, do_offsets, offs_m, offs_d, 0, seqlen_q, head_dim_v, True, PARTIAL_D)
    first = (b * heads_q + h) * seqlen_q
    lse = load_statistics(lse_ptr + first, offs_m, 0, seqlen_q, True)[:, None]
    delta = load_statistics(delta_ptr + first, offs_m, 0, seqlen_q, True)[:, None]
    rest = 0.0
    if MASK == "additive":
        rest = load_statistics(rest_ptr + first, offs_m, 0, seqlen_q, True)[:, None]

    # Keys that any row of this tile attends: [n_begin, n_end); keys that every row attends: [full_begin, full_end).
    m_last = tl.minimum(m0 + BLOCK_M, seqlen_q) - 1
    n_begin = 0
    n_end = seqlen_k
    full_begin = 0
    full_end = seqlen_k
    if HAS_LO:
        n_begin = tl.maximum(0, m0 + band_lo)
        full_begin = tl.cdiv(tl.maximum(0, m_last + band_lo), BLOCK_N) * BLOCK_N
    if HAS_HI:
        n_end = tl.maximum(0, tl.minimum(seqlen_k, m_last + band_hi + 1))
        full_end = tl.maximum(0, tl.minimum(seqlen_k, m0 + band_hi + 1))
    full_end = full_end // BLOCK_N * BLOCK_N
    edge_begin = tl.maximum(full_begin, full_end)
    if MASK != "none":
        edge_begin = n_begin // EDGE * EDGE

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_LO and MASK == "none":
        dq = _walk_keys(
            dq, q, do, lse, delta, rest, q_base, k_base, v_base, do_base, mask_base,
            stride_qs, stride_ks, stride_vs, stride_dos, stride_mq, stride_mk,
            offs_m, n_begin // EDGE * EDGE, tl.minimum(full_begin, n_end), n_begin, n_end, seqlen_q,
            head_dim, head_dim_v, band_lo, band_hi, scale, softcap, BLOCK_M, EDGE, BLOCK_D, CHUNK_D, PARTIAL_D,
            HAS_LO, HAS_HI, MASK, SOFTCAP, FOLD_SCALE, PRECISION, STAGES, True,
        )  # fmt: skip
    if MASK == "none":
        dq = _walk_keys(
            dq, q, do, lse, delta, rest, q_base, k_base, v_base, do_base, mask_base,
            stride_qs, stride_ks, stride_vs, stride_dos, stride_mq, stride_mk,
            offs_m, full_begin, full_end, n_begin, n_end, seqlen_q,
            head_dim, head_dim_v, band_lo, band_hi, scale, softcap, BLOCK_M, BLOCK_N, BLOCK_D, CHUNK_D, PARTIAL_D,
            HAS_LO, HAS_HI, MASK, SOFTCAP, FOLD_SCALE, PRECISION, STAGES, False,
        )  # fmt: skip
    dq = _walk_keys(
        dq, q, do, lse, delta, rest, q_base, k_base, v_base, do_base, mask_base,
        stride_qs, stride_ks, stride_vs, stride_dos, stride_mq, stride_mk,
        offs_m, edge_begin, n_end, n_begin, n_end, seqlen_q,
        head_dim, head_dim_v, band_lo, band_hi, scale, softcap, BLOCK_M, EDGE, BLOCK_D, CHUNK_D, PARTIAL_D,
        HAS_LO, HAS_HI, MASK, SOFTCAP, FOLD_SCALE, PRECISION, STAGES, True,
    )  # fmt: skip

    if CHUNK_D == 0:
        if FOLD_SCALE:
            dq = dq * (scale * LN_2)
        else:
            dq = dq * scale
    dq_base = dq_ptr + b * stride_dqb + h * stride_dqh
    _store_rows(dq_base, offs_m.to(tl.int64)[:, None] * stride_dqs, offs_m, offs_d, seqlen_q, head_dim, dq, PARTIAL_D)
