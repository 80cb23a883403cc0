"""What a kernel in Gluon records of its stages where it is asked to: as kernels/view.py, which has the record's layout.

Tiles are in the layout of a wgmma accumulator. `head` counts over the batch too, and `m0` is the tile's first row in the head.
"""

from flashcore.kernels.hopper.gluon_api import gl, gluon

ROW_NUMBERS: gl.constexpr = gl.constexpr(258)


@gluon.jit
def _rows(view_ptr, head, m0, seqlen_q, seqlen_k, x):
    """(the record of each of the rows of a tile x, whether there is such a row)"""
    rows = m0 + gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, x.type.layout))
    return view_ptr + (head.to(gl.int64) * seqlen_q + rows) * (3 * seqlen_k + ROW_NUMBERS), rows < seqlen_q


@gluon.jit
def _store_keys(view_ptr, head, m0, seqlen_q, n0, seqlen_k, PART: gl.constexpr, x):
    """One number for each key of a tile."""
    to, inside = _rows(view_ptr, head, m0, seqlen_q, seqlen_k, x)
    keys = n0 + gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, x.type.layout))
    to += ROW_NUMBERS + PART * seqlen_k
    gl.store(to[:, None] + keys[None, :], x, mask=inside[:, None] & (keys < seqlen_k)[None, :])


@gluon.jit
def view_scores(view_ptr, head, m0, seqlen_q, n0, seqlen_k, s):
    """Scores s [64, keys from n0 on]."""
    if view_ptr is not None:
        _store_keys(view_ptr, head, m0, seqlen_q, n0, seqlen_k, 0, s)


@gluon.jit
def view_weights(view_ptr, head, m0, seqlen_q, n0, seqlen_k, p, m_i):
    """Weights p [64, keys] of a tile and the maximum m_i [64] that they are relative to."""
    if view_ptr is not None:
        _store_keys(view_ptr, head, m0, seqlen_q, n0, seqlen_k, 1, p)
        to, inside = _rows(view_ptr, head, m0, seqlen_q, seqlen_k, p)
        to += ROW_NUMBERS + 2 * seqlen_k + n0
        gl.store(to, gl.convert_layout(m_i, to.type.layout), mask=inside & (n0 < seqlen_k))


@gluon.jit
def view_statistics(view_ptr, head, m0, seqlen_q, seqlen_k, m_i, l_i, x):
    """The maximum m_i [64] and the sum of each row of a tile x, over all keys; l_i [64, any]: the sum's parts."""
    if view_ptr is not None:
        to, inside = _rows(view_ptr, head, m0, seqlen_q, seqlen_k, x)
        gl.store(to, gl.convert_layout(m_i, to.type.layout), mask=inside)
        gl.store(to + 1, gl.convert_layout(gl.sum(l_i, 1), to.type.layout), mask=inside)


@gluon.jit
def view_output(view_ptr, head, m0, seqlen_q, seqlen_k, acc, column):
    """Columns from `column` on of the weighted sum of the values, [64, columns]."""
    if view_ptr is not None:
        to, inside = _rows(view_ptr, head, m0, seqlen_q, seqlen_k, acc)
        d = column + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, acc.type.layout))
        gl.store((to + 2)[:, None] + d[None, :], acc, mask=inside[:, None])
