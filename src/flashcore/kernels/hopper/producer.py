"""The producer: one warp that draws tiles and keeps the rings of queries, keys and values filled by TMA."""

from flashcore.kernels.hopper.gluon_api import gl, gluon
from flashcore.kernels.hopper.launches import let_next_launch_start, wait_for_earlier_launch
from flashcore.kernels.hopper.shared import Shared


@gluon.jit
def _start_draw(counter_ptr):
    """Draw a number from the counter without waiting for it. One lane gets it, the others 0; 0 where there is no counter."""
    return gl.inline_asm(
        "{ .reg .pred p, q; mov.b32 $0, 0; setp.ne.u64 q, $1, 0; elect.sync _|p, 0xffffffff; and.pred p, p, q; "
        "@p atom.global.add.u32 $0, [$1], 1; }",
        "=r,l",
        [counter_ptr],
        gl.int32,
    )


@gluon.jit
def _finish_draw(drawn):
    """The number drawn, in all lanes."""
    return gl.inline_asm("redux.sync.add.u32 $0, $1, 0xffffffff;", "=r,r", [drawn], gl.int32)


@gluon.jit
def _load_queries(s, use, m0, batch, head):
    """Fill a slot of queries for each warpgroup; returns the next use of the ring."""
    for warpgroup in gl.static_range(s.options.WARPGROUPS):
        slot = s.q_ring.reserve(use + warpgroup)
        s.announce_tile(slot, m0, batch, head)
        s.q.load(slot, batch, head, m0 + warpgroup * s.q.ROWS, s.q_ring.expect(slot, s.q.NUM_BYTES))
    return use + s.options.WARPGROUPS


@gluon.jit
def _load_keys(s, use, batch, head, n):
    """Fill a slot with one block of keys alone."""
    slot = s.kv_ring.reserve(use)
    s.k.load(slot, batch, head, n * s.k.ROWS, s.kv_ring.expect(slot, s.k.NUM_BYTES))


@gluon.jit
def _load_values(s, use, batch, head, n):
    """Fill a slot with one block of values alone."""
    slot = s.kv_ring.reserve(use)
    s.v.load(slot, batch, head, n * s.v.ROWS, s.kv_ring.expect(slot, s.v.NUM_BYTES))


@gluon.jit
def _load_pair(s, use, k_batch, k_head, k_n, v_batch, v_head, v_n):
    """Fill a slot with a block of keys and the block of values that is used with them."""
    slot = s.kv_ring.reserve(use)
    full = s.kv_ring.expect(slot, s.k.NUM_BYTES + s.v.NUM_BYTES)
    s.k.load(slot, k_batch, k_head, k_n * s.k.ROWS, full)
    s.v.load(slot, v_batch, v_head, v_n * s.v.ROWS, full)


@gluon.jit
def produce(s: Shared, counter_ptr, heads_per_kv):
    """Walk through tiles until there are none left.

    The first is the block's own. The others are drawn from the counter or, where there is none, lie a grid's length apart.

    A number is drawn a tile before it is needed: an atomic takes as long as the shortest tiles.
    """
    wait_for_earlier_launch()
    q_use = 0
    kv_use = 0
    drawn = _start_draw(counter_ptr)
    tile = gl.program_id(0)
    counted = counter_ptr.to(gl.int64) != 0
    m0, batch, head = s.tiles.locate(tile)
    begin, end = s.tiles.visited(m0)
    kv_head = head // heads_per_kv
    _load_keys(s, kv_use, batch, kv_head, end - 1)
    kv_use += 1
    q_use = _load_queries(s, q_use, m0, batch, head)
    while m0 >= 0:
        n = end - 1
        while n > begin:
            _load_pair(s, kv_use, batch, kv_head, n - 1, batch, kv_head, n)
            kv_use += 1
            n -= 1

        v_batch = batch
        v_head = kv_head
        tile = gl.num_programs(0) + gl.where(counted, _finish_draw(drawn), tile)
        drawn = _start_draw(counter_ptr)
        m0 = -1
        if tile < s.tiles.total:
            m0, batch, head = s.tiles.locate(tile)
            begin, end = s.tiles.visited(m0)
            kv_head = head // heads_per_kv
        if s.options.JOIN_TILES:
            if m0 >= 0:
                q_use = _load_queries(s, q_use, m0, batch, head)
                _load_pair(s, kv_use, batch, kv_head, end - 1, v_batch, v_head, n)
            else:
                _load_values(s, kv_use, v_batch, v_head, n)
        else:
            _load_values(s, kv_use, v_batch, v_head, n)
            if m0 >= 0:
                kv_use += 1
                _load_keys(s, kv_use, batch, kv_head, end - 1)
                q_use = _load_queries(s, q_use, m0, batch, head)
        kv_use += 1

    let_next_launch_start()
    for warpgroup in gl.static_range(s.options.WARPGROUPS):
        slot = s.q_ring.reserve(q_use + warpgroup)
        s.announce_tile(slot, -1, 0, 0)
        s.q_ring.expect(slot, 0)
