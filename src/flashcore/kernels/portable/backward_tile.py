"""What the kernels of the portable backward pass share: one tile of weights and of their gradients, whichever way it lies.

With s the scaled, capped and biased score of row m and key n, and the log-sum-exp of the row as the forward pass left it:

    p = exp(s - lse),   ds = p * (dp - delta),   dp = do v^T,   delta = sum(do * o) - dlse

(FlashAttention-2, Dao 2023, section 3.1.2). A tile is [rows, keys] or [keys, rows]: the vectors of rows and of keys come as
columns and rows of it, `m[:, None]` and `n[None, :]` or the other way round, and nothing here asks which.

A pair that is not attended has p = ds = 0 by selection, whatever stands in q, k, v and do there. Operands of the products
that follow are the callers': a row or key that no pair of the tile attends is zero there.
"""

import triton
import triton.language as tl

from flashcore.kernels.portable.forward import LOG2_E, _tanh


@triton.jit
def biased_scores(
    s, m, n, inside, mask_base, stride_mq, stride_mk, band_lo, band_hi, scale, softcap,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """(scores, what a softcap leaves of a gradient, which pairs are attended) of a tile of products s = q k^T.

    `inside`: the pairs that are rows and keys at all, as far as that matters; under a mask, exactly they. SCALED: s is to be
    taken as it is. The last two are 1 and True where there is no softcap, and without MASKED.
    """
    slope = 1.0
    attended = True
    if not SCALED:
        s = s * scale
    if SOFTCAP:
        t = _tanh(s / softcap)
        s = t * softcap
        slope = 1 - t * t
    if MASKED:
        attended = inside
        if HAS_LO:
            attended = attended & (n >= m + band_lo)
        if HAS_HI:
            attended = attended & (n <= m + band_hi)
        if MASK != "none":
            bias = tl.load(mask_base + m.to(tl.int64) * stride_mq + n.to(tl.int64) * stride_mk, mask=attended, other=0)
            if MASK == "bool":
                attended = attended & (bias != 0)
            else:
                bias = bias.to(tl.float32)
                attended = attended & (bias != float("-inf"))
                s = s + bias
    return s, slope, attended


@triton.jit
def weights(s, lse, rest, attended, scale, MASK: tl.constexpr, FOLD_SCALE: tl.constexpr, MASKED: tl.constexpr):
    """p of a tile of scores; with FOLD_SCALE these are still unscaled, and scale holds log2(e)."""
    if FOLD_SCALE:
        p = tl.exp2(s * scale - lse * LOG2_E)
    elif MASK == "additive":
        p = tl.exp2((s - lse - rest) * LOG2_E)
    else:
        p = tl.exp2((s - lse) * LOG2_E)
    if MASKED:
        p = tl.where(attended, p, 0.0)
    return p


@triton.jit
def score_gradients(p, dp, delta, slope, attended, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """ds of a tile: of the biased scores, or with SOFTCAP of the scores before the cap."""
    ds = p * (dp - delta)
    if SOFTCAP:
        ds = ds * slope
    if MASKED:
        ds = tl.where(attended, ds, 0.0)
    return ds


@triton.jit
def keep_attended(tile, attended):
    """`tile` with zeros in the rows that no pair attends; `attended` has these along its second axis.

    By bits, because 0 * NaN is NaN, and because the compiler cannot bring a condition into the layout of some operands.
    """
    kept = -tl.max(attended.to(tl.int32), 0)[:, None]
    if tile.dtype.primitive_bitwidth == 32:
        tile = (tile.to(tl.int32, bitcast=True) & kept).to(tile.dtype, bitcast=True)
    else:
        tile = (tile.to(tl.int16, bitcast=True) & kept.to(tl.int16)).to(tile.dtype, bitcast=True)
    return tile


@triton.jit
def load_statistics(base, m, m_begin, m_end, MASKED: tl.constexpr):
    """A float32 number of each row."""
    if MASKED:
        found = tl.load(base + m, mask=(m >= m_begin) & (m < m_end), other=0.0)
    else:
        found = tl.load(base + m)
    return found


@triton.jit
def add_product(acc, a, b, factor, CHUNK_D: tl.constexpr, PRECISION: tl.constexpr):
    """acc + factor * (a b) in float32, whose sums stay blocked; acc + a b for halves, whose factor waits for the end."""
    if CHUNK_D > 0:
        # fma, not +: the compiler turns a sum with a product into the product's accumulator, one long chain again
        acc = tl.fma(tl.dot(a, b, input_precision=PRECISION), factor, acc)
    else:
        acc = tl.dot(a.to(b.dtype), b, acc, input_precision=PRECISION)
    return acc
