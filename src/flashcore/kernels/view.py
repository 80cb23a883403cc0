"""What a kernel in Triton records of its stages where it is asked to: scores, weights with maxima, statistics, output.

A kernel calls these where each is at hand. Without a view_ptr they are nothing at all: the product's binaries are the same to
the byte as without the calls. flashcore.debug asks for it, and judges what was recorded.

The record is float32, a row for each query of each head, (B, H, Sq, ROW_NUMBERS + 3 * Sk):

    0: m    1: l    2 to 257: the output, as many columns as it has
    then three numbers for each key: all scores, all weights, and the maximum of each tile's weights at the tile's first key

Numbers are recorded as the kernel holds them: before rounding, in its own units (debug/conventions.py says which). What no tile
reaches is not written.
"""

import triton
import triton.language as tl

ROW_NUMBERS: tl.constexpr = tl.constexpr(258)


@triton.jit
def _rows(view_ptr, first, rows, seqlen_k):
    """The record of each row. [rows]"""
    return view_ptr + (first + rows).to(tl.int64) * (3 * seqlen_k + ROW_NUMBERS)


@triton.jit
def _store_keys(view_ptr, first, rows, seqlen_q, n0, seqlen_k, PART: tl.constexpr, x):
    """One number for each key of a tile."""
    keys = n0 + tl.arange(0, x.shape[1])
    to = _rows(view_ptr, first, rows, seqlen_k) + ROW_NUMBERS + PART * seqlen_k
    tl.store(to[:, None] + keys[None, :], x, mask=(rows < seqlen_q)[:, None] & (keys < seqlen_k)[None, :])


@triton.jit
def view_scores(view_ptr, first, rows, seqlen_q, n0, seqlen_k, s):
    """Scores s [rows, keys from n0 on]. `rows` are of the head, whose first is row `first` of all heads."""
    if view_ptr is not None:
        _store_keys(view_ptr, first, rows, seqlen_q, n0, seqlen_k, 0, s)


@triton.jit
def view_weights(view_ptr, first, rows, seqlen_q, n0, seqlen_k, p, m_i):
    """Weights p [rows, keys] of a tile and the maximum m_i [rows] that they are relative to."""
    if view_ptr is not None:
        _store_keys(view_ptr, first, rows, seqlen_q, n0, seqlen_k, 1, p)
        to = _rows(view_ptr, first, rows, seqlen_k) + ROW_NUMBERS + 2 * seqlen_k + n0
        tl.store(to, m_i, mask=rows < seqlen_q)


@triton.jit
def view_statistics(view_ptr, first, rows, seqlen_q, seqlen_k, m_i, l_i):
    """The maximum and the sum of each row, over all keys. [rows]"""
    if view_ptr is not None:
        to = _rows(view_ptr, first, rows, seqlen_k)
        tl.store(to, m_i, mask=rows < seqlen_q)
        tl.store(to + 1, l_i, mask=rows < seqlen_q)


@triton.jit
def view_output(view_ptr, first, rows, seqlen_q, seqlen_k, acc):
    """The weighted sum of the values, [rows, at most 256]."""
    if view_ptr is not None:
        d = tl.arange(0, acc.shape[1])
        to = _rows(view_ptr, first, rows, seqlen_k) + 2
        tl.store(to[:, None] + d[None, :], acc, mask=(rows < seqlen_q)[:, None])
