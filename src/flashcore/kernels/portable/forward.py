"""The portable forward kernel: fused attention with an online softmax (FlashAttention-2, Dao 2023, section 3.1).

One program owns BLOCK_M query rows of one head and walks over the keys they may attend, BLOCK_N at a time. With the
scores in base 2, s = (q k^T) * scale * log2(e), and running maximum m, sum l and output acc of a row:

    m' = max(m, max(s)),   p = 2^(s - m'),   a = 2^(m - m')
    l' = a * l + sum(p),   acc' = a * acc + p v,   o = acc / l,   lse = (m + log2(l)) * ln(2)

Where scale * log2(e) cannot be folded into the exponent (a cap, a mask, a scale that is not positive), s and m stay in
natural units and log2(e) multiplies s - m: a finite additive mask, however low, then never overflows to -inf.

float32 is computed on the CUDA cores, and its sums are blocked as a matrix library's are, CHUNK_D products of a score and
BLOCK_N of an output at a time: one sequential sum over a long head dim loses several times more. Its scores are scaled
chunk by chunk, so FOLD_SCALE is off.

Causality, windows and both alignments are one thing here, a *band*: row i attends key j iff
`i + band_lo <= j <= i + band_hi`. Tiles wholly inside the band need no mask; only those on its edges (and the last,
partial one) pay for it: one loop body, called with MASKED on and off.

What reaches the output: a key outside the band of every row of the tile is never loaded, and under a mask a value that no
row of the tile attends is replaced by zero, so NaN in padding cannot leak through 0 * NaN. A NaN in a value that *some*
row of the same tile attends does reach the other rows of that tile.

This file, with kernels/view.py, is all that a binary is made of; it imports nothing but Triton. `binding.py` beside it chooses
the constants and lays out the arguments, because that must work where Triton is not installed.
"""

import triton
import triton.language as tl

from flashcore.kernels.view import view_output, view_scores, view_statistics, view_weights

LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _tanh(x):
    # exp-based tanh loses relative accuracy near zero, where the odd series is exact to float32.
    u = x * x
    series = x * (1 + u * (-1 / 3 + u * (2 / 15 + u * (-17 / 315 + u * (62 / 2835)))))
    e = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    magnitude = (1 - e) / (1 + e)
    return tl.where(u < 0.0625, series, tl.where(x < 0, -magnitude, magnitude))


@triton.jit
def _load_rows(base, offsets, rows, cols, row_begin, row_end, col_end, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr):
    if MASK_ROWS:
        inside = (rows >= row_begin) & (rows < row_end)
        if MASK_COLS:
            tile = tl.load(base + offsets, mask=inside[:, None] & (cols < col_end)[None, :], other=0.0)
        else:
            tile = tl.load(base + offsets, mask=inside[:, None], other=0.0)
    elif MASK_COLS:
        tile = tl.load(base + offsets, mask=(cols < col_end)[None, :], other=0.0)
    else:
        tile = tl.load(base + offsets)
    return tile


@triton.jit
def _chunked_scores(
    q_base, k_base, q_offsets, k_offsets, rows, n, row_end, n_begin, n_end, head_dim, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_d in tl.range(0, head_dim, CHUNK_D, num_stages=1):
        d = start_d + tl.arange(0, CHUNK_D)
        q = _load_rows(q_base, q_offsets[:, None] + d[None, :], rows, d, 0, row_end, head_dim, True, True)
        k = _load_rows(k_base, k_offsets[:, None] + d[None, :], n, d, n_begin, n_end, head_dim, True, True)
        # fma, not +: the compiler turns a sum with a product into the product's accumulator, one long chain again
        s = tl.fma(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, s)
    return s


@triton.jit
def _attend_range(
    acc, l_i, m_i, q, q_base, k_base, v_base, mask_base,
    stride_qs, stride_ks, stride_vs, stride_mq, stride_mk,
    offs_m, start, stop, n_begin, n_end, seqlen_q, head_dim, head_dim_v,
    band_lo, band_hi, scale, softcap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHUNK_D: tl.constexpr, PARTIAL_D: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, FOLD_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr, view,
):  # fmt: skip
    """Attend the key tiles in [start, stop); with MASKED, keys outside [n_begin, n_end) and outside the band are excluded."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    # Loop-invariant tile offsets over a moving scalar base: 64-bit adds stay out of the loop.
    k_offsets = offs_n.to(tl.int64)[:, None] * stride_ks + offs_d[None, :]
    v_offsets = offs_n.to(tl.int64)[:, None] * stride_vs + offs_dv[None, :]

    for start_n in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        n = start_n + offs_n
        n_base = tl.cast(start_n, tl.int64)
        # [BLOCK_M, BLOCK_N]
        if CHUNK_D > 0:
            s = _chunked_scores(
                q_base, k_base + n_base * stride_ks, offs_m.to(tl.int64) * stride_qs, offs_n.to(tl.int64) * stride_ks,
                offs_m, n, seqlen_q, n_begin, n_end, head_dim, scale, BLOCK_M, BLOCK_N, CHUNK_D, PRECISION,
            )  # fmt: skip
        else:
            k = _load_rows(k_base + n_base * stride_ks, k_offsets, n, offs_d, n_begin, n_end, head_dim, MASKED, PARTIAL_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if not FOLD_SCALE:
                s = s * scale
        if SOFTCAP:
            s = _tanh(s / softcap) * softcap

        v_kept = n < n_end
        if MASKED:
            attended = ((n >= n_begin) & (n < n_end))[None, :] & (offs_m < seqlen_q)[:, None]
            if HAS_LO:
                attended = attended & (n[None, :] >= offs_m[:, None] + band_lo)
            if HAS_HI:
                attended = attended & (n[None, :] <= offs_m[:, None] + band_hi)
            if MASK != "none":
                m_offsets = offs_m.to(tl.int64)[:, None] * stride_mq + n.to(tl.int64)[None, :] * stride_mk
                bias = tl.load(mask_base + m_offsets, mask=attended, other=0)
                if MASK == "bool":
                    attended = attended & (bias != 0)
                else:
                    bias = bias.to(tl.float32)
                    attended = attended & (bias != float("-inf"))
                    s = s + bias
                v_kept = tl.max(attended.to(tl.int32), 0) > 0
            s = tl.where(attended, s, float("-inf"))
        view_scores(view[0], view[1], offs_m, seqlen_q, start_n, view[2], s)

        if FOLD_SCALE:
            m_new = tl.maximum(m_i, tl.max(s, 1) * scale)
        else:
            m_new = tl.maximum(m_i, tl.max(s, 1))
        pivot = m_new
        if MASKED:
            # A row that has attended nothing yet has m = -inf; any finite pivot gives p = a = 0.
            pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
        if FOLD_SCALE:
            p = tl.exp2(s * scale - pivot[:, None])
            alpha = tl.exp2(m_i - pivot)
        else:
            p = tl.exp2((s - pivot[:, None]) * LOG2_E)
            alpha = tl.exp2((m_i - pivot) * LOG2_E)
        l_i = l_i * alpha + tl.sum(p, 1)
        view_weights(view[0], view[1], offs_m, seqlen_q, start_n, view[2], p, m_new)
        v = _load_rows(v_base + n_base * stride_vs, v_offsets, n, offs_dv, n_begin, n_end, head_dim_v, MASKED, PARTIAL_D)
        if MASK != "none":
            v = tl.where(v_kept[:, None], v, 0.0)
        if CHUNK_D > 0:
            acc = tl.fma(acc, alpha[:, None], tl.dot(p.to(v.dtype), v, input_precision=PRECISION))
        else:
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m_i = m_new
    return acc, l_i, m_i


@triton.jit
def portable_forward(
    q_ptr, k_ptr, v_ptr, mask_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_mb, stride_mh, stride_mq, stride_mk,
    stride_ob, stride_oh, stride_os,
    heads_q, heads_per_kv, seqlen_q, seqlen_k, head_dim, head_dim_v,
    band_lo, band_hi, scale, softcap, store_lse,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHUNK_D: tl.constexpr, PARTIAL_D: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, FOLD_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, EDGE_STAGES: tl.constexpr, view_ptr=None,
):  # fmt: skip
    """o = softmax(scale * q k^T [capped, biased, banded]) v for BLOCK_M rows of one head; grid = cdiv(Sq, BLOCK_M) * B * H.

    With FOLD_SCALE, `scale` already holds log2(e) and is positive; otherwise it is the plain scale. Strides are in
    elements, 64 bits; the last dimension of q, k, v and o has stride 1; lse is (B, H, Sq) contiguous.
    view_ptr: what kernels/view.py records goes there.
    """
    num_m = tl.cdiv(seqlen_q, BLOCK_M)
    pid = tl.program_id(0)
    block_m = pid % num_m
    if HAS_HI:
        # Rows further down attend more keys: start the longest tiles first, so that the short ones fill the tail.
        block_m = num_m - 1 - block_m
    head = (pid // num_m) % heads_q
    batch = (pid // num_m) // heads_q
    b = batch.to(tl.int64)
    h = head.to(tl.int64)
    h_kv = (head // heads_per_kv).to(tl.int64)

    m0 = block_m * BLOCK_M
    offs_m = m0 + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    q_base = q_ptr + b * stride_qb + h * stride_qh
    if CHUNK_D > 0:
        q = 0.0  # read again for each tile of keys, a chunk at a time
    else:
        q_offsets = offs_m.to(tl.int64)[:, None] * stride_qs + offs_d[None, :]
        q = _load_rows(q_base, q_offsets, offs_m, offs_d, 0, seqlen_q, head_dim, True, PARTIAL_D)
    k_base = k_ptr + b * stride_kb + h_kv * stride_kh
    v_base = v_ptr + b * stride_vb + h_kv * stride_vh
    mask_base = mask_ptr + b * stride_mb + h * stride_mh

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
        edge_begin = n_begin // BLOCK_N * BLOCK_N  # every tile may hold a masked key: one loop over all

    view = (view_ptr, (b * heads_q + h) * seqlen_q, seqlen_k)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if HAS_LO and MASK == "none":
        acc, l_i, m_i = _attend_range(
            acc, l_i, m_i, q, q_base, k_base, v_base, mask_base, stride_qs, stride_ks, stride_vs, stride_mq, stride_mk,
            offs_m, n_begin // BLOCK_N * BLOCK_N, tl.minimum(full_begin, n_end), n_begin, n_end, seqlen_q, head_dim, head_dim_v,
            band_lo, band_hi, scale, softcap, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, CHUNK_D, PARTIAL_D,
            HAS_LO, HAS_HI, MASK, SOFTCAP, FOLD_SCALE, PRECISION, EDGE_STAGES, True, view,
        )  # fmt: skip
    if MASK == "none":
        acc, l_i, m_i = _attend_range(
            acc, l_i, m_i, q, q_base, k_base, v_base, mask_base, stride_qs, stride_ks, stride_vs, stride_mq, stride_mk,
            offs_m, full_begin, full_end, n_begin, n_end, seqlen_q, head_dim, head_dim_v,
            band_lo, band_hi, scale, softcap, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, CHUNK_D, PARTIAL_D,
            HAS_LO, HAS_HI, MASK, SOFTCAP, FOLD_SCALE, PRECISION, STAGES, False, view,
        )  # fmt: skip
    acc, l_i, m_i = _attend_range(
        acc, l_i, m_i, q, q_base, k_base, v_base, mask_base, stride_qs, stride_ks, stride_vs, stride_mq, stride_mk,
        offs_m, edge_begin, n_end, n_begin, n_end, seqlen_q, head_dim, head_dim_v,
        band_lo, band_hi, scale, softcap, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, CHUNK_D, PARTIAL_D,
        HAS_LO, HAS_HI, MASK, SOFTCAP, FOLD_SCALE, PRECISION, EDGE_STAGES, True, view,
    )  # fmt: skip

    view_statistics(view[0], view[1], offs_m, seqlen_q, seqlen_k, m_i, l_i)
    view_output(view[0], view[1], offs_m, seqlen_q, seqlen_k, acc)
    # A row that attended nothing: output 0, lse -inf.
    o = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    o_ptrs = o_ptr + b * stride_ob + h * stride_oh + offs_m.to(tl.int64)[:, None] * stride_os + offs_dv[None, :]
    rows = offs_m < seqlen_q
    if PARTIAL_D:
        tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=rows[:, None] & (offs_dv < head_dim_v)[None, :])
    else:
        tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=rows[:, None])
    if store_lse != 0:
        if FOLD_SCALE:
            m_i = m_i * LN_2
        lse = tl.where(l_i == 0.0, float("-inf"), m_i + tl.log2(l_i) * LN_2)
        tl.store(lse_ptr + (b * heads_q + h) * seqlen_q + offs_m, lse, mask=rows)
