"""Sums in float32 memory that the blocks of the backward kernel share: of dq, and of dk and dv where blocks share their
keys."""

from flashcore.kernels.hopper.gluon_api import gl, gluon
from flashcore.kernels.hopper.layouts import accumulator

# Rows and columns of a tile of sums. A warpgroup's part of a block's dq is one: all columns of half of 128 rows, or half the
# columns of 64 rows.
DQ_TILE: gl.constexpr = gl.constexpr(64)
TILE_NUMBERS: gl.constexpr = gl.constexpr(4096)


@gluon.jit
def _in_fragments(tile):
    """A tile of 64 rows in the order in which a warpgroup's threads hold it, by group of 8 columns, warp, row of 8, pair of
    columns, half of 16 rows, column of the pair: the four numbers of a thread are neighbours, and go as one vector."""
    GROUPS: gl.constexpr = tile.shape[1] // 8
    return tile.reshape([4, 2, 8, GROUPS, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([8 * GROUPS * DQ_TILE])


@gluon.jit
def _from_fragments(numbers):
    return numbers.reshape([8, 4, 8, 4, 2, 2]).permute((1, 4, 2, 0, 3, 5)).reshape([DQ_TILE, DQ_TILE])


@gluon.jit
def add_tile(ptr, tile):
    """Add a tile of 64 rows to the sums at ptr, in tiles of 64 columns. Atomically, in no order."""
    fragments = _in_fragments(tile)
    offset = gl.arange(0, fragments.shape[0], layout=fragments.type.layout).to(gl.uint32)
    gl.atomic_add(ptr + offset, fragments, sem="relaxed")


@gluon.jit
def add_dq(s, WARPGROUP: gl.constexpr, dq, number, turn):
    """Add a warpgroup's part of dq to the sums of a block of query rows, counted through all heads: as use `turn` of `turns`,
    where all add in turn."""
    if s.turns is not None:
        s.turns.wait(turn)
    add_tile(s.dq_sum_ptr + (2 * number + WARPGROUP).to(gl.int64) * TILE_NUMBERS, dq)
    if s.turns is not None:
        s.turns.give(turn)


@gluon.jit
def add_dkv(s, WARPGROUP: gl.constexpr, slot, dk, dv):
    """Add a warpgroup's part of dk / scale and of dv to the sums of a tile of keys that blocks share: in memory they are
    (slots, 2 warpgroups, dk and dv, D / 64, 4096)."""
    PART: gl.constexpr = s.k.ROWS * s.k.DIM
    ptr = s.dkv_sum_ptr + (4 * slot + 2 * WARPGROUP).to(gl.int64) * PART
    add_tile(ptr, dk)
    add_tile(ptr + PART, dv)


@gluon.jit
def load_sums(s, number, wanted):
    """The sums of dq of 64 rows, `number` of them counted through all heads, in tiles of 64 columns: two, of which the second
    repeats the first where a head has no more columns. Nothing is read if they are not `wanted`."""
    LIKE: gl.constexpr = accumulator(DQ_TILE)
    COLUMN_TILES: gl.constexpr = s.k.DIM // DQ_TILE
    offset = gl.arange(0, TILE_NUMBERS, layout=_in_fragments(gl.zeros([DQ_TILE, DQ_TILE], gl.float32, LIKE)).type.layout)
    mask = (offset >= 0) & wanted
    first_ptr = s.dq_sum_ptr + number.to(gl.int64) * (COLUMN_TILES * TILE_NUMBERS)
    # past L1, which may hold what was there before
    first = _from_fragments(gl.load(first_ptr + offset, mask=mask, cache_modifier=".cg"))
    second = first
    if COLUMN_TILES == 2:
        second = _from_fragments(gl.load(first_ptr + TILE_NUMBERS + offset, mask=mask, cache_modifier=".cg"))
    return first, second
