"""dk and dv of wide heads: of the two consumer warpgroups one sums dv and the other dk, of the same 64 keys (sm_90a).

With row_lse and delta as hopper_backward_prepare leaves them, all transposed, [64 keys, BLOCK_M query rows]:

    p = 2^((k q^T + row_lse) * scale * log2(e)),   dv = p do,   ds = p * (v do^T + delta),   dk = scale ds q

and with a softcap p and ds as backward_softcap.py has them.

The threads that hold 64 keys' dv have no registers for their dk as well. So the first warpgroup computes p, takes it from
registers for dv, and hands it on in 16 bits, with a softcap times the slope, to the second, which makes ds of it and takes that
from registers for dk. Each has one product of D columns and one of Dv, and is at most a few query blocks ahead of the other.
"""

from flashcore.kernels.hopper.backward_shared import Rows
from flashcore.kernels.hopper.backward_softcap import cap_scores, weights_and_slopes
from flashcore.kernels.hopper.exchange import Exchange
from flashcore.kernels.hopper.gluon_api import fence_async_shared, gl, gluon, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from flashcore.kernels.hopper.launches import wait_for_earlier_launch
from flashcore.kernels.hopper.layouts import accumulator, left_operand
from flashcore.kernels.hopper.mask import mask_scores
from flashcore.kernels.hopper.operand import Operand
from flashcore.kernels.hopper.ring import Ring
from flashcore.kernels.hopper.tiles import Tiles

# Rows past the end need no mask: their scores start at -inf.
NO_END: gl.constexpr = gl.constexpr(2**30)


@gluon.aggregate
class Shared:
    """What the producer and the consumers share. A use of `q_ring` brings the queries of one block of BLOCK_M rows, their
    output's gradient and their row numbers; use 0 of `kv_ring` the block's keys, use 1 its values.

    `tiles` has the roles exchanged: its rows are keys and its keys are query rows. Coordinates in the maps begin at the first
    key and the first query row that take part in anything. `blocks_per_head` counts blocks of BLOCK_M padded rows.
    `exponent_scale` and `cap_scale` are those of the kernel.
    """

    q: Operand
    do: Operand
    k: Operand
    v: Operand
    dk: Operand
    dv: Operand
    rows: Rows
    weights: Exchange
    q_ring: Ring
    kv_ring: Ring
    tiles: Tiles
    heads_per_kv: gl.tensor
    blocks_per_head: gl.tensor
    first_query: gl.tensor
    first_key: gl.tensor
    exponent_scale: gl.tensor
    scale: gl.tensor
    cap_scale: gl.tensor | gl.constexpr


@gluon.jit
def _tile():
    """The tile of this block, counted from the last: where attention is causal the first keys have the most query rows, and
    what takes longest has to begin first."""
    return gl.num_programs(0) - 1 - gl.program_id(0)


@gluon.jit
def _start(left, right, acc, slot, ADD: gl.constexpr):
    """Start left right^T, of the block's keys or values and a slot's queries or gradients: [64, BLOCK_M]. With ADD, + acc."""
    a, a_tail = left.tile(0)
    b, b_tail = right.tile(slot)
    acc = warpgroup_mma(a, b.permute((1, 0)), acc, use_acc=ADD, is_async=True)
    if left.TAIL_DIM > 0:
        acc = warpgroup_mma(a_tail, b_tail.permute((1, 0)), acc, is_async=True)
    return acc


@gluon.jit
def _start_from_rows(s, left, right, numbers, slot):
    """Start left right^T + numbers."""
    LAYOUT: gl.constexpr = accumulator(s.rows.BLOCK_M)
    row = numbers.index(slot).load(gl.SliceLayout(0, LAYOUT))
    return _start(left, right, row[None, :].broadcast_to([left.ROWS, s.rows.BLOCK_M]), slot, True)


@gluon.jit
def _start_products(s, DK: gl.constexpr, slot):
    """Start what the next factor is made of: k q^T - lse / scale, with a softcap k q^T, or, for dk, v do^T - delta."""
    if DK:
        return _start_from_rows(s, s.v, s.do, s.rows.delta, slot)
    elif s.cap_scale is None:
        return _start_from_rows(s, s.k, s.q, s.rows.lse, slot)
    else:
        zeros = gl.zeros([s.k.ROWS, s.rows.BLOCK_M], gl.float32, accumulator(s.rows.BLOCK_M))
        return _start(s.k, s.q, zeros, slot, False)


@gluon.jit
def _factor(s, DK: gl.constexpr, products, use, block, masked, first_row, last_row, past_end):
    """p^T of a query block, 0 for keys past the end, or ds^T, as a left operand. Key i is attended by rows [i + first_row,
    i + last_row]."""
    if DK:
        p = s.weights.take(use, products.type.layout)
        factor = (p.to(gl.float32) * products).to(p.dtype)
    else:
        tiles = s.tiles
        if s.cap_scale is not None:
            products = cap_scores(products, s.cap_scale, 1.0 + past_end[:, None])
        if tiles.HAS_LO or tiles.HAS_HI:
            if masked:
                m0 = block * s.rows.BLOCK_M
                products = mask_scores(products, 0, m0, NO_END, first_row, last_row, tiles.HAS_LO, tiles.HAS_HI)
        if s.cap_scale is None:
            factor = gl.exp2(products * s.exponent_scale + past_end[:, None]).to(s.q.main.dtype)
            s.weights.give(use, factor)
        else:
            row_lse = s.rows.lse.index(use % s.q_ring.SLOTS).load(gl.SliceLayout(0, products.type.layout))
            p, sloped = weights_and_slopes(products, s.exponent_scale, row_lse[None, :])
            factor = p.to(s.q.main.dtype)
            s.weights.give(use, sloped.to(factor.dtype))
    COLUMNS: gl.constexpr = s.q.DIM if DK else s.do.DIM
    return gl.convert_layout(factor, left_operand(COLUMNS))


@gluon.jit
def _zeros(operand, ROWS: gl.constexpr):
    """(main, tail) of a gradient of zeros: [ROWS, DIM] and, where there is a tail, [ROWS, TAIL_DIM]."""
    acc = gl.zeros([ROWS, operand.DIM], gl.float32, accumulator(operand.DIM))
    acc_tail = acc
    if operand.TAIL_DIM > 0:
        acc_tail = gl.zeros([ROWS, operand.TAIL_DIM], gl.float32, accumulator(operand.TAIL_DIM))
    return acc, acc_tail


@gluon.jit
def _step(
    s, DK: gl.constexpr, use, has_next, next_block, masked, first_row, last_row, factor, acc, acc_tail, past_end
):  # fmt: skip
    """The gradient's part of the query block of `use`, whose factor is given, and the factor of the next.

    Where there is no next block, its factor is of whatever lies in shared memory, and nothing uses it.
    """
    moving = s.q if DK else s.do
    next_slot = (use + 1) % s.q_ring.SLOTS
    mbarrier.wait(s.q_ring.full.index(next_slot), ((use + 1) // s.q_ring.SLOTS) & 1, pred=has_next)
    products = _start_products(s, DK, next_slot)
    main, tail = moving.tile(use % s.q_ring.SLOTS)
    acc = warpgroup_mma(factor, main, acc, is_async=True)
    if moving.TAIL_DIM > 0:
        acc_tail = warpgroup_mma(factor, tail, acc_tail, is_async=True)
    products = warpgroup_mma_wait(moving.PARTS, deps=(products,))
    factor = _factor(s, DK, products, use + 1, next_block, masked, first_row, last_row, past_end)
    if moving.TAIL_DIM > 0:
        acc, acc_tail = warpgroup_mma_wait(0, deps=(acc, acc_tail))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
        acc_tail = acc
    s.q_ring.release(use)
    return factor, acc, acc_tail


@gluon.jit
def _consume(DK: gl.constexpr, s: Shared):
    """The gradient of the block's keys (DK), or of its values."""
    wait_for_earlier_launch()
    tiles = s.tiles
    ROWS: gl.constexpr = s.k.ROWS
    n0, batch, kv_head = tiles.locate(_tile())
    begin, end = tiles.visited(n0)
    plain_begin, plain_end = tiles.unmasked(n0, ROWS)
    key = n0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, accumulator(s.rows.BLOCK_M)))
    past_end = gl.where(key < tiles.seqlen_q, 0.0, float("-inf"))
    first_row = n0 + tiles.band_lo
    last_row = n0 + tiles.band_hi
    gradient = s.dk if DK else s.dv
    acc, acc_tail = _zeros(gradient, ROWS)

    s.kv_ring.wait(DK)
    products = warpgroup_mma_wait(0, deps=(_start_products(s, DK, s.q_ring.wait(0)),))
    factor = _factor(s, DK, products, 0, begin, True, first_row, last_row, past_end)
    count = end - begin
    for member in range(0, s.heads_per_kv):
        for i in range(0, count):
            use = member * count + i
            next_block = gl.where(i + 1 == count, begin, begin + i + 1)
            masked = (next_block < plain_begin) | (next_block >= plain_end)
            has_next = (i + 1 < count) | (member + 1 < s.heads_per_kv)
            factor, acc, acc_tail = _step(
                s, DK, use, has_next, next_block, masked, first_row, last_row, factor, acc, acc_tail, past_end
            )

    # Each leaves through the memory of the operand that the other warpgroup has read: dk through k's, dv through v's.
    s.kv_ring.release(DK)
    s.kv_ring.reserve(3 - DK)
    main, tail = gradient.tile(0)
    factor_of_all = s.scale if DK else 1.0
    main.store((acc * factor_of_all).to(main.dtype))
    if gradient.TAIL_DIM > 0:
        tail.store((acc_tail * factor_of_all).to(tail.dtype))
    fence_async_shared()
    gradient.store(0, batch, kv_head, n0)
    tma.store_wait(0)


@gluon.jit
def _produce(s: Shared):
    """Copy what the block's keys need: query rows of every head that shares them, head after head."""
    wait_for_earlier_launch()
    BLOCK_M: gl.constexpr = s.rows.BLOCK_M
    n0, batch, kv_head = s.tiles.locate(_tile())
    begin, end = s.tiles.visited(n0)
    first_head = (batch * s.tiles.heads_q + kv_head) * s.heads_per_kv
    use = 0
    for member in range(0, s.heads_per_kv):
        first_number = (first_head + member) * s.blocks_per_head
        head = kv_head * s.heads_per_kv + member
        for block in range(begin, end):
            row = block * BLOCK_M - s.first_query
            slot = s.q_ring.reserve(use)
            full = s.q_ring.expect(slot, s.q.NUM_BYTES + s.do.NUM_BYTES + 2 * s.rows.NUM_BYTES)
            s.rows.load_lse(slot, first_number + block, full)
            s.rows.load_delta(slot, first_number + block, full)
            s.q.load(slot, batch, head, row, full)
            if use == 0:
                s.k.load(0, batch, kv_head, n0 - s.first_key, s.kv_ring.expect(0, s.k.NUM_BYTES))
            s.do.load(slot, batch, head, row, full)
            if use == 0:
                s.v.load(0, batch, kv_head, n0 - s.first_key, s.kv_ring.expect(1, s.v.NUM_BYTES))
            use += 1


@gluon.jit
def hopper_backward_wide(
    q_map, do_map, k_map, v_map, dk_map, dv_map, row_lse_ptr, delta_ptr,
    kv_heads, heads_k, heads_per_kv, seqlen_q, seqlen_k, blocks_per_head, first_query, first_key, band_lo, band_hi, group_heads,
    exponent_scale, scale, cap_scale,
    SLOTS: gl.constexpr, EXCHANGED: gl.constexpr, HAS_LO: gl.constexpr, HAS_HI: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    q_tail_map=None, do_tail_map=None, k_tail_map=None, v_tail_map=None, dk_tail_map=None, dv_tail_map=None,
):  # fmt: skip
    """dk and dv of every key; grid = a block for each 64 keys of each kv head.

    The maps are over (B, H, S, D) with any strides: q and do in tiles [1, 1, BLOCK_M, DIM], the others in tiles
    [1, 1, 64, DIM]; the tails are the columns from DIM on. The maps of q and do begin at row first_query and those of k and v
    at first_key, and end where nothing follows that takes part. row_lse and delta are as backward_prepare.py leaves them.
    `kv_heads` is B * Hk, blocks_per_head the number of blocks of BLOCK_M rows of a padded head. Key j is attended by row i iff
    j + band_lo <= i <= j + band_hi. exponent_scale and cap_scale are backward_factors.py's; cap_scale is None, a constant,
    without a softcap.
    """
    BLOCK_M: gl.constexpr = q_map.block_shape[2]
    KEYS: gl.constexpr = k_map.block_shape[2]
    q = Operand.create(q_map, q_tail_map, SLOTS)
    do = Operand.create(do_map, do_tail_map, SLOTS)
    k = Operand.create(k_map, k_tail_map, 1)
    v = Operand.create(v_map, v_tail_map, 1)
    dk = Operand.over(dk_map, dk_tail_map, k.main, k.tail)
    dv = Operand.over(dv_map, dv_tail_map, v.main, v.tail)
    rows = Rows.create(row_lse_ptr, delta_ptr, BLOCK_M, SLOTS)
    weights = Exchange.create(q_map.dtype, KEYS, BLOCK_M, EXCHANGED)
    q_ring = Ring.create(SLOTS, 2 * gl.num_warps())
    kv_ring = Ring.create(2, gl.num_warps())
    fence_async_shared()

    tiles_per_head = (seqlen_k + KEYS - 1) // KEYS
    tiles = Tiles(
        kv_heads * tiles_per_head, tiles_per_head, group_heads, heads_k, kv_heads, seqlen_k, seqlen_q, band_lo, band_hi,
        KEYS, BLOCK_M, HAS_LO, HAS_HI,
    )  # fmt: skip
    s = Shared(
        q, do, k, v, dk, dv, rows, weights, q_ring, kv_ring, tiles, heads_per_kv, blocks_per_head, first_query, first_key,
        exponent_scale, scale, cap_scale,
    )  # fmt: skip
    gl.warp_specialize(
        [(_consume, (gl.constexpr(0), s)), (_consume, (gl.constexpr(1), s)), (_produce, (s,))],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
