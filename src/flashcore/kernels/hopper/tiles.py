"""Tiles: which rows of which head a tile number means, in what order, and which blocks of keys it visits."""

from flashcore.kernels.hopper.gluon_api import gl, gluon


@gluon.aggregate
class Tiles:
    """The work of a launch: `total` tiles of BLOCK_M rows of one head each, and the band that says which keys a row attends.

    Heads are taken in groups of `group_heads`, whose keys and values fit into L2 together; within a group the tiles with the
    most keys come first, so that short ones fill the tail.
    """

    total: gl.tensor
    tiles_per_head: gl.tensor
    group_heads: gl.tensor
    heads_q: gl.tensor
    heads: gl.tensor
    seqlen_q: gl.tensor
    seqlen_k: gl.tensor
    band_lo: gl.tensor
    band_hi: gl.tensor
    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr
    HAS_LO: gl.constexpr
    HAS_HI: gl.constexpr

    @gluon.jit
    def locate(self, tile):
        """(first row, batch, query head)"""
        group_tiles = self.group_heads * self.tiles_per_head
        group = tile // group_tiles
        within = tile - group * group_tiles
        first_head = group * self.group_heads
        size = gl.minimum(self.group_heads, self.heads - first_head)
        block = within // size
        if self.HAS_HI:
            m0 = (self.tiles_per_head - 1 - block) * self.BLOCK_M
        else:
            m0 = block * self.BLOCK_M
        head = first_head + within - block * size
        batch = head // self.heads_q
        return m0, batch, head - batch * self.heads_q

    @gluon.jit
    def visited(self, m0):
        """[begin, end) of the blocks of keys that the tile at m0 visits; at least one, so that every row has a softmax."""
        last = self.seqlen_k
        if self.HAS_HI:
            last = gl.minimum(last, gl.minimum(m0 + self.BLOCK_M, self.seqlen_q) + self.band_hi)
        end = gl.maximum((last + self.BLOCK_N - 1) // self.BLOCK_N, 1)
        begin = 0
        if self.HAS_LO:
            begin = gl.minimum(gl.maximum(m0 + self.band_lo, 0) // self.BLOCK_N, end - 1)
        return begin, end

    @gluon.jit
    def unmasked(self, m0, ROWS: gl.constexpr):
        """[begin, end) of the blocks that every one of rows [m0, m0 + ROWS) attends wholly."""
        last = self.seqlen_k
        if self.HAS_HI:
            last = gl.minimum(last, m0 + self.band_hi + 1)
        begin = 0
        if self.HAS_LO:
            begin = (gl.maximum(m0 + ROWS - 1 + self.band_lo, 0) + self.BLOCK_N - 1) // self.BLOCK_N
        return begin, gl.maximum(last, 0) // self.BLOCK_N
