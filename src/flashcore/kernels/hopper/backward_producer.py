"""The producer of the backward kernel: one warp that draws tiles, copies their keys and values, and keeps the ring of queries
filled."""

from flashcore.kernels.hopper.backward_shared import BackwardShared
from flashcore.kernels.hopper.gluon_api import gl, gluon
from flashcore.kernels.hopper.launches import wait_for_earlier_launch
from flashcore.kernels.hopper.progress import finish_draw, have_reported, report, start_draw


@gluon.jit
def _load_both(s, operand, slot, n0, batch, kv_head):
    """Fill a reserved slot of `kv_ring` with the tile's keys, or its values: a part for each warpgroup."""
    full = s.kv_ring.expect(slot, 2 * operand.NUM_BYTES)
    for warpgroup in gl.static_range(2):
        operand.load(warpgroup, batch, kv_head, n0 + warpgroup * operand.ROWS - s.first_key, full)


@gluon.jit
def _rows_to_round(s, tile):
    """(first, pairs) of the query rows to be rounded after a tile, as announce_tile takes them; pairs <= 0 for none."""
    first = 0
    pairs = 0
    if s.DQ:
        if tile >= s.lag:
            n0, batch, kv_head = s.tiles.locate(s.in_order(tile - s.lag))
            kv_number = batch * s.tiles.heads_q + kv_head
            if have_reported(s.progress.added(kv_number), s.tiles.tiles_per_head):
                row_tiles = s.heads_per_kv * s.blocks_per_head * (s.rows.BLOCK_M // 64)
                first = n0 // s.tiles.BLOCK_M * 2 * s.pairs_per_tile
                pairs = gl.minimum(s.pairs_per_tile, (row_tiles - first) // 2)
                first += kv_number * row_tiles
    return first, pairs


@gluon.jit
def _part(s, item):
    """(tile, begin, end, slot) of the work that is taken so late: the tile, the query blocks of it, and the slot of its sums of
    dk and dv if blocks share it, else -1. The tile is -1 where there is no more work."""
    tile = item
    slot = -1
    part = 0
    if s.SHARE_TILES:
        whole = s.tiles.total - s.shared_tiles
        if item >= whole:
            slot = (item - whole) // s.sharers
            part = item - whole - slot * s.sharers
            tile = whole + slot
    begin = 0
    end = 0
    if tile < s.tiles.total:
        n0, _batch, _kv_head = s.tiles.locate(s.in_order(tile))
        begin, end = s.tiles.visited(n0)
        if s.SHARE_TILES:
            if slot >= 0:
                count = end - begin
                end = begin + count * (part + 1) // s.sharers
                begin += count * part // s.sharers
    else:
        tile = -1
    return tile, begin, end, slot


@gluon.jit
def produce(s: BackwardShared):
    """Walk through the work until there is none left: the block's own part of it, and then those that it draws.

    Copy what a tile's keys need: query rows of every head that shares them, head after head. A number is drawn a tile before it
    is needed: an atomic takes as long as the shortest tiles. But where tiles add in turn, they have to begin in that order:
    then a number is drawn when it is needed, and a block has no part of its own, because blocks may begin in any order. That a
    tile has been added to the sums of dq is reported here, because that waits for memory, which the consumers have no time for.
    """
    wait_for_earlier_launch()
    BLOCK_M: gl.constexpr = s.rows.BLOCK_M
    use = 0
    kv_use = 0
    added = -1
    tile, begin, end, slot = _part(s, gl.program_id(0))
    if s.turns is not None:
        # no work at first
        kv_use = -2
        tile, begin, end, slot = 0, 0, 0, 0
    while tile >= 0:
        if s.turns is None:
            drawn = start_draw(s.progress.drawn())
        n0, batch, kv_head = s.tiles.locate(s.in_order(tile))
        first_head = s.first_head(batch, kv_head)
        first, pairs = _rows_to_round(s, tile)
        step = 0
        for member in range(0, s.heads_per_kv):
            first_number = (first_head + member) * s.blocks_per_head
            head = kv_head * s.heads_per_kv + member
            for block in range(begin, end):
                m0 = block * BLOCK_M
                q_slot = s.q_ring.reserve(use)
                full = s.q_ring.expect(q_slot, s.q.NUM_BYTES + s.do.NUM_BYTES + 2 * s.rows.NUM_BYTES)
                s.rows.load_lse(q_slot, first_number + block, full)
                s.q.load(q_slot, batch, head, m0 - s.first_query, full)
                if step == 0:
                    keys = s.kv_ring.reserve(kv_use)
                    s.announce_tile(n0, batch, kv_head, begin, end, slot, first, pairs)
                    _load_both(s, s.k, keys, n0, batch, kv_head)
                s.rows.load_delta(q_slot, first_number + block, full)
                s.do.load(q_slot, batch, head, m0 - s.first_query, full)
                if step == 0:
                    _load_both(s, s.v, s.kv_ring.reserve(kv_use + 1), n0, batch, kv_head)
                step += 1
                use += 1
                if s.DQ:
                    if step == 2:
                        # the tile before: its keys have been given back
                        if added >= 0:
                            report(s.progress.added(added))
                            added = -1
        if s.DQ:
            if added >= 0:
                report(s.progress.added(added))
            added = -1
            if slot < 0:
                added = batch * s.tiles.heads_q + kv_head
        kv_use += 2
        if s.turns is None:
            item = gl.num_programs(0) + finish_draw(drawn)
        else:
            item = finish_draw(start_draw(s.progress.drawn()))
        tile, begin, end, slot = _part(s, item)
    keys = s.kv_ring.reserve(kv_use)
    s.announce_tile(-1, 0, 0, 0, 0, 0, 0, 0)
    s.kv_ring.expect(keys, 0)
