"""Which keys a row may attend, and how that is applied to a tile of scores."""

from flashcore.kernels.hopper.gluon_api import gl, gluon


@gluon.jit
def mask_scores(s, m0, n0, seqlen_k, band_lo, band_hi, HAS_LO: gl.constexpr, HAS_HI: gl.constexpr):
    """Scores of keys outside the band or past the end become -inf. Row i attends key j iff i + lo <= j <= i + hi.

    s: [ROWS, KEYS], in the layout of a wgmma accumulator, where a thread holds two of every eight keys. Keys are counted as
    8 * group + key: the group is then a constant in each register and what it is compared with the same for all of them,
    where comparing whole key numbers takes a register for each and spills.
    """
    ROWS: gl.constexpr = s.shape[0]
    KEYS: gl.constexpr = s.shape[1]
    grouped = gl.reshape(s, [ROWS, KEYS // 8, 8])
    LAYOUT: gl.constexpr = grouped.type.layout
    row = m0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    group = 8 * gl.arange(0, KEYS // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    key = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    last = seqlen_k - 1 - n0 - key
    if HAS_HI:
        last = gl.minimum(row + (band_hi - n0) - key, last)
    attended = group <= last
    if HAS_LO:
        attended = attended & (group >= row + (band_lo - n0) - key)
    grouped = gl.where(attended, grouped, float("-inf"))
    return gl.convert_layout(gl.reshape(grouped, [ROWS, KEYS]), s.type.layout)
