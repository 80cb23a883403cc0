"""dq by itself, bitwise the same each time: each block owns its rows, and recomputes the scores (sm_90a).

    s = q k^T [banded],   p = 2^((s + row_lse) * scale * log2(e)),   ds = p * (do v^T + delta),   dq = scale * ds k

with row_lse and delta as hopper_backward_prepare leaves them; with a softcap p and ds are backward_softcap.py's.

A block is one producer warp and two or three consumer warpgroups of 64 query rows each, as in kernels/hopper/forward.py, and
has one tile. A step computes the scores of the next block of keys while it turns those of this one into dq: do v^T and the next
q k^T are under way together, and the exponentials run beside ds k (FlashAttention-3's overlap, Shah et al. 2024, section 3.2).
"""

from flashcore.kernels.hopper.backward_softcap import cap_scores, weights_and_slopes
from flashcore.kernels.hopper.gluon_api import fence_async_shared, gl, gluon, tma, warpgroup_mma, warpgroup_mma_wait
from flashcore.kernels.hopper.launches import wait_for_earlier_launch
from flashcore.kernels.hopper.layouts import accumulator, left_operand
from flashcore.kernels.hopper.mask import mask_scores
from flashcore.kernels.hopper.opaque import opaque
from flashcore.kernels.hopper.operand import Operand
from flashcore.kernels.hopper.ring import Ring
from flashcore.kernels.hopper.tiles import Tiles


@gluon.aggregate
class Shared:
    """What the producer and the consumers share: a slot of queries and of the output's gradient for each warpgroup, filled
    together through `row_ring`; keys and values of one block together through `key_ring`."""

    q: Operand
    do: Operand
    k: Operand
    v: Operand
    dq: Operand
    row_ring: Ring
    key_ring: Ring
    tiles: Tiles
    cap_scale: gl.tensor | gl.constexpr
    Q_REGISTERS: gl.constexpr
    DO_REGISTERS: gl.constexpr


@gluon.jit
def _left_operand(rows, slot, KEYS: gl.constexpr, REGISTERS: gl.constexpr):
    """(main, tail) of the rows of a slot, in registers or where they are, for a product with KEYS columns."""
    main, tail = rows.tile(slot)
    if REGISTERS:
        main_values = main.load(left_operand(KEYS))
        tail_values = main_values
        if rows.TAIL_DIM > 0:
            tail_values = tail.load(left_operand(KEYS))
        return main_values, tail_values
    else:
        return main, tail


@gluon.jit
def _start_scores(rows, keys, slot):
    """Start rows keys^T, which is q k^T or do v^T: [64, BLOCK_N]. `rows` is (main, tail)."""
    main, tail = keys.tile(slot)
    scores = gl.zeros([rows[0].shape[0], keys.ROWS], gl.float32, accumulator(keys.ROWS))
    scores = warpgroup_mma(rows[0], main.permute((1, 0)), scores, use_acc=False, is_async=True)
    if keys.TAIL_DIM > 0:
        scores = warpgroup_mma(rows[1], tail.permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def _weights(s, scores, m0, n, row_lse, scale, MASKED: gl.constexpr):
    """p of the scores of block n, with a softcap p * slope, in 16 bits, in which it takes half the registers."""
    tiles = s.tiles
    if s.cap_scale is not None:
        scores = cap_scores(scores, s.cap_scale, 1.0)
    if MASKED:
        n0 = n * tiles.BLOCK_N
        scores = mask_scores(scores, m0, n0, tiles.seqlen_k, tiles.band_lo, tiles.band_hi, tiles.HAS_LO, tiles.HAS_HI)
    if s.cap_scale is None:
        p = gl.exp2(scores * scale + row_lse[:, None])
    else:
        _, p = weights_and_slopes(scores, scale, row_lse[:, None])
    return p.to(s.q.main.dtype)


@gluon.jit
def _step(
    s, WARPGROUP: gl.constexpr, use, n, m0, q, do, p, dq, dq_tail, row_lse, delta, scale,
    MASKED: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """dq of the block that a use of the ring brought and, unless it is the LAST, p of the next one, which is block n."""
    slot = use % s.key_ring.SLOTS
    if s.k.DIM + s.k.TAIL_DIM > 128:
        # beside dq there are no registers to keep where their slices are
        q = s.q.tile(opaque(WARPGROUP))
        do = s.do.tile(opaque(WARPGROUP))
    dp = _start_scores(do, s.v, slot)
    if LAST:
        dp = warpgroup_mma_wait(0, deps=(dp,))
    else:
        scores = _start_scores(q, s.k, s.key_ring.wait(use + 1))
        dp = warpgroup_mma_wait(s.k.PARTS, deps=(dp,))
    ds = (p.to(gl.float32) * (dp + delta[:, None])).to(p.dtype)
    k, k_tail = s.k.tile(slot)
    ds = gl.convert_layout(ds, left_operand(s.k.DIM))
    dq = warpgroup_mma(ds, k, dq, is_async=True)
    if s.k.TAIL_DIM > 0:
        dq_tail = warpgroup_mma(ds, k_tail, dq_tail, is_async=True)
    if not LAST:
        scores = warpgroup_mma_wait(s.k.PARTS, deps=(scores,))
        p = _weights(s, scores, m0, n, row_lse, scale, MASKED)
    if s.k.TAIL_DIM > 0:
        dq, dq_tail = warpgroup_mma_wait(0, deps=(dq, dq_tail))
    else:
        dq = warpgroup_mma_wait(0, deps=(dq,))
        dq_tail = dq
    s.key_ring.release(use)
    return p, dq, dq_tail


@gluon.jit
def _store(tile, dq, row_lse, scale):
    """Put rows of dq into shared memory. A row that attends nothing has p = 0, but what is in do may have made NaN of it."""
    attended = gl.convert_layout(row_lse != float("-inf"), gl.SliceLayout(1, dq.type.layout))
    tile.store(gl.where(attended[:, None], dq * scale, 0.0).to(tile.dtype))


@gluon.jit
def _consume(WARPGROUP: gl.constexpr, s: Shared, row_lse_ptr, delta_ptr, padded_rows, exponent_scale, scale):
    """The rows of one warpgroup."""
    wait_for_earlier_launch()
    tiles = s.tiles
    tile_m0, batch, head = tiles.locate(gl.program_id(0))
    m0 = tile_m0 + WARPGROUP * s.q.ROWS
    begin, end = tiles.visited(tile_m0)
    LAYOUT: gl.constexpr = gl.SliceLayout(1, accumulator(s.k.ROWS))
    rows = m0 + gl.arange(0, s.q.ROWS, layout=LAYOUT)
    statistics = (batch * tiles.heads_q + head).to(gl.int64) * padded_rows + rows
    # tiles of 192 rows may end beyond the padded ones
    row_lse = gl.load(row_lse_ptr + statistics, mask=rows < padded_rows, other=float("-inf"))
    if s.cap_scale is None:
        row_lse *= exponent_scale
    delta = gl.load(delta_ptr + statistics, mask=rows < padded_rows, other=0.0)
    dq = gl.zeros([s.q.ROWS, s.k.DIM], gl.float32, accumulator(s.k.DIM))
    dq_tail = dq
    if s.k.TAIL_DIM > 0:
        dq_tail = gl.zeros([s.q.ROWS, s.k.TAIL_DIM], gl.float32, accumulator(s.k.TAIL_DIM))
    s.row_ring.wait(WARPGROUP)
    q = _left_operand(s.q, WARPGROUP, s.k.ROWS, s.Q_REGISTERS)
    do = _left_operand(s.do, WARPGROUP, s.v.ROWS, s.DO_REGISTERS)
    n = end - 1
    scores = warpgroup_mma_wait(0, deps=(_start_scores(q, s.k, s.key_ring.wait(0)),))
    p = _weights(s, scores, m0, n, row_lse, exponent_scale, True)

    # Blocks from the last to the first: those that the band's upper edge crosses, those wholly attended, the lower edge's.
    use = 0
    plain_begin, plain_end = tiles.unmasked(m0, s.q.ROWS)
    if tiles.HAS_HI:
        while n > gl.maximum(plain_end, begin):
            n -= 1
            p, dq, dq_tail = _step(s, WARPGROUP, use, n, m0, q, do, p, dq, dq_tail, row_lse, delta, exponent_scale, True, False)
            use += 1
    last_plain = begin
    if tiles.HAS_LO:
        last_plain = gl.minimum(n, gl.maximum(plain_begin, begin))
    for _ in range(last_plain, n):
        p, dq, dq_tail = _step(s, WARPGROUP, use, 0, m0, q, do, p, dq, dq_tail, row_lse, delta, exponent_scale, False, False)
        use += 1
    if tiles.HAS_LO:
        n = last_plain
        while n > begin:
            n -= 1
            p, dq, dq_tail = _step(s, WARPGROUP, use, n, m0, q, do, p, dq, dq_tail, row_lse, delta, exponent_scale, True, False)
            use += 1
    p, dq, dq_tail = _step(s, WARPGROUP, use, 0, m0, q, do, p, dq, dq_tail, row_lse, delta, exponent_scale, False, True)

    tile, tail = s.dq.tile(WARPGROUP)
    _store(tile, dq, row_lse, scale)
    if s.dq.TAIL_DIM > 0:
        _store(tail, dq_tail, row_lse, scale)
    fence_async_shared()
    s.dq.store(WARPGROUP, batch, head, m0)
    tma.store_wait(0)


@gluon.jit
def _produce(s: Shared, heads_per_kv):
    """Fill the slots of the tile's rows, and the ring with its blocks of keys, from the last to the first."""
    wait_for_earlier_launch()
    tiles = s.tiles
    m0, batch, head = tiles.locate(gl.program_id(0))
    begin, end = tiles.visited(m0)
    for warpgroup in gl.static_range(s.row_ring.SLOTS):
        full = s.row_ring.expect(warpgroup, s.q.NUM_BYTES + s.do.NUM_BYTES)
        s.q.load(warpgroup, batch, head, m0 + warpgroup * s.q.ROWS, full)
        s.do.load(warpgroup, batch, head, m0 + warpgroup * s.q.ROWS, full)
    for use in range(0, end - begin):
        slot = s.key_ring.reserve(use)
        full = s.key_ring.expect(slot, s.k.NUM_BYTES + s.v.NUM_BYTES)
        row = (end - 1 - use) * s.k.ROWS
        s.k.load(slot, batch, head // heads_per_kv, row, full)
        s.v.load(slot, batch, head // heads_per_kv, row, full)


@gluon.jit
def hopper_backward_dq(
    q_map, do_map, k_map, v_map, dq_map, row_lse_ptr, delta_ptr,
    heads, heads_q, heads_per_kv, seqlen_q, seqlen_k, padded_rows, band_lo, band_hi, group_heads, exponent_scale, scale,
    cap_scale,
    WARPGROUPS: gl.constexpr, SLOTS: gl.constexpr, Q_REGISTERS: gl.constexpr, DO_REGISTERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    HAS_LO: gl.constexpr, HAS_HI: gl.constexpr, q_tail_map=None, k_tail_map=None, dq_tail_map=None,
):  # fmt: skip
    """dq of WARPGROUPS * 64 rows; grid = the number of such tiles.

    The maps are over (B, H, S, D) with any strides: q, do and dq in tiles [1, 1, 64, DIM], k and v in tiles [1, 1, BLOCK_N,
    DIM]; the tails are the columns from DIM on. row_lse and delta are (B * H, padded_rows), padded_rows a multiple of 128.
    `heads` is B * Hq; exponent_scale and cap_scale are backward_factors.py's, and cap_scale is None, a constant, without a
    softcap.
    """
    q = Operand.create(q_map, q_tail_map, WARPGROUPS)
    do = Operand.create(do_map, None, WARPGROUPS)
    k = Operand.create(k_map, k_tail_map, SLOTS)
    v = Operand.create(v_map, None, SLOTS)
    # a warpgroup's queries are done with before its dq is stored
    dq = Operand.over(dq_map, dq_tail_map, q.main, q.tail)
    row_ring = Ring.create(WARPGROUPS, gl.num_warps())
    key_ring = Ring.create(SLOTS, WARPGROUPS * gl.num_warps())
    fence_async_shared()

    BLOCK_M: gl.constexpr = WARPGROUPS * q_map.block_shape[2]
    tiles_per_head = (seqlen_q + BLOCK_M - 1) // BLOCK_M
    tiles = Tiles(
        heads * tiles_per_head, tiles_per_head, group_heads, heads_q, heads, seqlen_q, seqlen_k, band_lo, band_hi,
        BLOCK_M, k_map.block_shape[2], HAS_LO, HAS_HI,
    )  # fmt: skip
    s = Shared(q, do, k, v, dq, row_ring, key_ring, tiles, cap_scale, Q_REGISTERS, DO_REGISTERS)
    work = (s, row_lse_ptr, delta_ptr, padded_rows, exponent_scale, scale)
    first = (gl.constexpr(0),) + work
    second = (gl.constexpr(1),) + work
    feed = (s, heads_per_kv)
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [(_consume, first), (_consume, second), (_produce, feed)],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        third = (gl.constexpr(2),) + work
        gl.warp_specialize(
            [(_consume, first), (_consume, second), (_consume, third), (_produce, feed)],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
