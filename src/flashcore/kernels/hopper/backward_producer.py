"""The producer of the backward kernel: one warp that copies a block's keys and values, and keeps the ring of queries filled."""

from flashcore.kernels.hopper.backward_shared import BackwardShared
from flashcore.kernels.hopper.gluon_api import gl, gluon
from flashcore.kernels.hopper.launches import wait_for_earlier_launch


@gluon.jit
def _load_both(s, operand, use, n0, batch, kv_head):
    """Fill the slots of both warpgroups with the block's keys, or its values."""
    full = s.kv_ring.expect(s.kv_ring.reserve(use), 2 * operand.NUM_BYTES)
    for warpgroup in gl.static_range(2):
        operand.load(warpgroup, batch, kv_head, n0 + warpgroup * operand.ROWS - s.first_key, full)


@gluon.jit
def produce(s: BackwardShared):
    """Copy what the block's keys need: query rows of every head that shares them, head after head."""
    wait_for_earlier_launch()
    BLOCK_M: gl.constexpr = s.rows.BLOCK_M
    n0, batch, kv_head = s.tiles.locate(gl.program_id(0))
    begin, end = s.tiles.visited(n0)
    first_head = s.first_head(batch, kv_head)
    use = 0
    for member in range(0, s.heads_per_kv):
        first_number = (first_head + member) * s.blocks_per_head
        head = kv_head * s.heads_per_kv + member
        for block in range(begin, end):
            m0 = block * BLOCK_M
            slot = s.q_ring.reserve(use)
            full = s.q_ring.expect(slot, s.q.NUM_BYTES + s.do.NUM_BYTES + 2 * s.rows.NUM_BYTES)
            s.rows.load_lse(slot, first_number + block, full)
            s.q.load(slot, batch, head, m0 - s.first_query, full)
            if use == 0:
                _load_both(s, s.k, 0, n0, batch, kv_head)
            s.rows.load_delta(slot, first_number + block, full)
            s.do.load(slot, batch, head, m0 - s.first_query, full)
            if use == 0:
                _load_both(s, s.v, 1, n0, batch, kv_head)
            use += 1
