"""The consumers of the backward kernel: two warpgroups of 64 keys each, which turn query blocks into gradients.

With s = q k^T, p = exp(scale s - lse) and delta = rowsum(do * o) - dlse (FlashAttention-2, Dao 2023, section 3.1):

    dv = p^T do,   dp = do v^T,   ds = p * (dp - delta),   dk = scale ds^T q,   dq = scale ds k

and with a softcap p and ds as backward_softcap.py has them.

Scores and dp are computed transposed, [64 keys, BLOCK_M query rows]: then p and ds are in registers what the products for dv
and dk take as their left operand. Their accumulators start at -lse / scale and -delta of each row, which costs nothing where
subtracting them later would; scores that are to be capped start at 0. ds goes to shared memory for dq, of which each warpgroup
computes half, over all 128 keys.
"""

from flashcore.kernels.hopper.backward_shared import BackwardShared
from flashcore.kernels.hopper.backward_softcap import cap_scores, weights_and_slopes
from flashcore.kernels.hopper.backward_sums import DQ_TILE, add_dkv, add_dq, load_sums
from flashcore.kernels.hopper.exchange import arrive_together
from flashcore.kernels.hopper.gluon_api import fence_async_shared, gl, gluon, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from flashcore.kernels.hopper.launches import wait_for_earlier_launch
from flashcore.kernels.hopper.layouts import accumulator, left_operand
from flashcore.kernels.hopper.mask import mask_scores
from flashcore.kernels.hopper.opaque import opaque

# Rows past the end need no mask: their scores start at -inf.
NO_END: gl.constexpr = gl.constexpr(2**30)


@gluon.jit
def _start_from_rows(s, WARPGROUP: gl.constexpr, left, right, numbers, slot):
    """Start left right^T + numbers: [64, BLOCK_M], of the keys or values of a warpgroup and a slot's queries or gradients."""
    layout: gl.constexpr = accumulator(s.rows.BLOCK_M)
    row = numbers.index(slot).load(gl.SliceLayout(0, layout))
    start = row[None, :].broadcast_to([left.ROWS, s.rows.BLOCK_M])
    a, _ = left.tile(opaque(WARPGROUP))
    b, _ = right.tile(slot)
    return warpgroup_mma(a, b.permute((1, 0)), start, is_async=True)


@gluon.jit
def _start_scores(s, WARPGROUP: gl.constexpr, slot):
    """Start k q^T - lse / scale with the queries of a slot; with a softcap, k q^T."""
    if s.cap_scale is None:
        return _start_from_rows(s, WARPGROUP, s.k, s.q, s.rows.lse, slot)
    else:
        k, _ = s.k.tile(opaque(WARPGROUP))
        q, _ = s.q.tile(slot)
        start = gl.zeros([s.k.ROWS, s.rows.BLOCK_M], gl.float32, accumulator(s.rows.BLOCK_M))
        return warpgroup_mma(k, q.permute((1, 0)), start, use_acc=False, is_async=True)


@gluon.jit
def _cap_and_mask(s, scores, first_row, last_row, block, masked, past_end):
    """What `_weights` takes of the scores of a query block.

    Key i of the warpgroup is attended by rows [i + first_row, i + last_row].
    """
    tiles = s.tiles
    if s.cap_scale is not None:
        scores = cap_scores(scores, s.cap_scale, 1.0 + past_end[:, None])
    if tiles.HAS_LO or tiles.HAS_HI:
        if masked:
            m0 = block * s.rows.BLOCK_M
            scores = mask_scores(scores, 0, m0, NO_END, first_row, last_row, tiles.HAS_LO, tiles.HAS_HI)
    return scores


@gluon.jit
def _weights(s, scores, slot, past_end):
    """What dv and ds take of a slot's queries, as left operands: (p^T,), which both take, or with a softcap (p^T, p^T *
    slope).

    0 for keys past the end.
    """
    if s.cap_scale is None:
        p = gl.exp2(scores * s.exponent_scale + past_end[:, None])
        return (_as_left_operand(s, p),)
    else:
        row_lse = s.rows.lse.index(slot).load(gl.SliceLayout(0, scores.type.layout))
        p, sloped = weights_and_slopes(scores, s.exponent_scale, row_lse[None, :])
        return _as_left_operand(s, p), _as_left_operand(s, sloped)


@gluon.jit
def _as_left_operand(s, x):
    """A tile like p^T in 16 bits, as what it is multiplied with takes it."""
    return gl.convert_layout(x.to(s.q.main.dtype), left_operand(s.k.DIM))


@gluon.jit
def _start_dq(s, WARPGROUP: gl.constexpr, buffer):
    """Start a warpgroup's part of ds k over the keys of both: [64, 64]."""
    k_first, _ = s.k.tile(0)
    k_second, _ = s.k.tile(1)
    ds_first = s.ds.index(2 * buffer)
    ds_second = s.ds.index(2 * buffer + 1)
    if s.rows.BLOCK_M == DQ_TILE:
        k_first = k_first.slice(WARPGROUP * DQ_TILE, DQ_TILE, dim=1)
        k_second = k_second.slice(WARPGROUP * DQ_TILE, DQ_TILE, dim=1)
    else:
        ds_first = ds_first.slice(WARPGROUP * DQ_TILE, DQ_TILE, dim=1)
        ds_second = ds_second.slice(WARPGROUP * DQ_TILE, DQ_TILE, dim=1)
    dq = gl.zeros([DQ_TILE, DQ_TILE], gl.float32, accumulator(DQ_TILE))
    dq = warpgroup_mma(ds_first.permute((1, 0)), k_first, dq, use_acc=False, is_async=True)
    return warpgroup_mma(ds_second.permute((1, 0)), k_second, dq, is_async=True)


@gluon.jit
def _step(
    s, WARPGROUP: gl.constexpr, NEXT: gl.constexpr, use, turn, has_next, number, first_row, last_row, next_block, masked, dk,
    dv, weights, dq, past_end,
):  # fmt: skip
    """The gradients of the query block of `use`, of which `weights` are, and with NEXT the weights of the next.

    dq is that of the block before and goes to memory while the matrix unit is at dp and dv of this one. With a softcap its
    registers are the weights': it is made and goes to memory within the step, beside the capping of the next block's scores.
    `number` is that of the block whose dq goes to memory, counted through all heads, `turn` the use of `turns` for it. Where
    there is no next block in spite of NEXT, its weights are of whatever lies in shared memory, and nothing uses them: most
    forms have no registers for a second kind of step.
    """
    slot = use % s.q_ring.SLOTS
    buffer = use % 2
    q, _ = s.q.tile(slot)
    do, _ = s.do.tile(slot)
    dp = _start_from_rows(s, WARPGROUP, s.v, s.do, s.rows.delta, slot)
    p = weights[0]
    dv = warpgroup_mma(p, do, dv, is_async=True)
    if s.CARRY_DQ:
        add_dq(s, WARPGROUP, dq, number, turn)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    ds = (gl.convert_layout(weights[-1], dp.type.layout).to(gl.float32) * dp).to(p.dtype)
    if s.DQ:
        s.ds.index(2 * buffer + WARPGROUP).store(ds)
        fence_async_shared()
        arrive_together(s.ds_full.index(buffer))
    dk = warpgroup_mma(gl.convert_layout(ds, p.type.layout), q, dk, is_async=True)
    if NEXT:
        next_slot = (use + 1) % s.q_ring.SLOTS
        mbarrier.wait(s.q_ring.full.index(next_slot), ((use + 1) // s.q_ring.SLOTS) & 1, pred=has_next)
        scores = _start_scores(s, WARPGROUP, next_slot)
        dk, dv = warpgroup_mma_wait(1, deps=(dk, dv))
        s.q_ring.release(use)
    if s.DQ:
        mbarrier.wait(s.ds_full.index(buffer), (use // 2) & 1)
        next_dq = _start_dq(s, WARPGROUP, buffer)
    if NEXT:
        scores = warpgroup_mma_wait(1 if s.DQ else 0, deps=(scores,))
        scores = _cap_and_mask(s, scores, first_row, last_row, next_block, masked, past_end)
    else:
        dk, dv = warpgroup_mma_wait(1 if s.DQ else 0, deps=(dk, dv))
        s.q_ring.release(use)
    if s.DQ and not s.CARRY_DQ:
        add_dq(s, WARPGROUP, warpgroup_mma_wait(0, deps=(next_dq,)), number, turn)
    if NEXT:
        weights = _weights(s, scores, next_slot, past_end)
    if s.CARRY_DQ:
        dq = warpgroup_mma_wait(0, deps=(next_dq,))
    return dk, dv, weights, dq


@gluon.jit
def _store_rows(acc, operand, slot, batch, head, row):
    """Start copying a gradient to global memory by way of a slot in shared memory, once what lay there has been copied."""
    tma.store_wait(0)
    tile, _ = operand.tile(slot)
    tile.store(acc.to(tile.dtype))
    fence_async_shared()
    operand.store(slot, batch, head, row)


@gluon.jit
def _turn(s, use, kv_use):
    """The use of `turns` in the step of `use`: each step has one, and where dq is carried each tile has one more at its end."""
    turn = use
    if s.CARRY_DQ:
        turn += kv_use // 2
    return turn


@gluon.jit
def _gradients(s, WARPGROUP: gl.constexpr, use, kv_use, n0, batch, kv_head):
    """(dk / scale, dv, use): the gradients of a warpgroup's keys of a tile, [64, DIM] each. Its part of dq is added to the
    sums.

    The tile's query blocks are in `q_ring` from `use` on, which becomes the first of the next tile, its keys and values in
    `kv_ring` from `kv_use` on. The values' slot is given back.
    """
    tiles = s.tiles
    ROWS: gl.constexpr = s.k.ROWS
    DIM: gl.constexpr = s.k.DIM
    begin, end = tiles.visited(n0)
    if s.SHARE_TILES:
        begin, end = s.announced_blocks()
    key0 = n0 + WARPGROUP * ROWS
    plain_begin, plain_end = tiles.unmasked(key0, ROWS)
    key = key0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, accumulator(s.rows.BLOCK_M)))
    past_end = gl.where(key < tiles.seqlen_q, 0.0, float("-inf"))
    first_row = key0 + tiles.band_lo
    last_row = key0 + tiles.band_hi
    dk = gl.zeros([ROWS, DIM], gl.float32, accumulator(DIM))
    dv = gl.zeros([ROWS, DIM], gl.float32, accumulator(DIM))
    dq = gl.zeros([DQ_TILE, DQ_TILE], gl.float32, accumulator(DQ_TILE))

    first_slot = s.q_ring.wait(use)
    scores = warpgroup_mma_wait(0, deps=(_start_scores(s, WARPGROUP, first_slot),))
    scores = _cap_and_mask(s, scores, first_row, last_row, begin, True, past_end)
    weights = _weights(s, scores, first_slot, past_end)
    s.kv_ring.wait(kv_use + 1)
    first_number = s.first_head(batch, kv_head) * s.blocks_per_head
    previous = first_number + begin
    for member in range(0, s.heads_per_kv):
        is_last = member + 1 == s.heads_per_kv
        steps = end
        if s.OWN_LAST:
            steps = gl.where(is_last, end - 1, end)
        for block in range(begin, steps):
            next_block = gl.where(block + 1 == end, begin, block + 1)
            masked = (next_block < plain_begin) | (next_block >= plain_end)
            has_next = (block + 1 < end) | (not is_last) | s.OWN_LAST
            number = previous
            if not s.CARRY_DQ:
                number = first_number + block
            dk, dv, weights, dq = _step(
                s, WARPGROUP, True, use, _turn(s, use, kv_use), has_next, number, first_row, last_row, next_block, masked, dk,
                dv, weights, dq, past_end,
            )  # fmt: skip
            use += 1
            previous = first_number + block
        first_number += s.blocks_per_head
    if s.OWN_LAST:
        last = first_number - s.blocks_per_head + end - 1
        number = previous
        if not s.CARRY_DQ:
            number = last
        dk, dv, weights, dq = _step(
            s, WARPGROUP, False, use, _turn(s, use, kv_use), False, number, first_row, last_row, end, False, dk, dv, weights,
            dq, past_end,
        )  # fmt: skip
        use += 1
        previous = last
    s.kv_ring.release(kv_use + 1)
    if s.CARRY_DQ:
        add_dq(s, WARPGROUP, dq, previous, _turn(s, use, kv_use))
    return dk, dv, use


@gluon.jit
def _round_rows(s, WARPGROUP: gl.constexpr, number, sums):
    """Start copying dq = scale * sums of 64 rows, counted through all heads, to global memory."""
    row_tiles = s.blocks_per_head * (s.rows.BLOCK_M // DQ_TILE)
    head_of_all = number // row_tiles
    heads_q = s.tiles.heads_q * s.heads_per_kv
    batch = head_of_all // heads_q
    tma.store_wait(0)
    stage, _ = s.dq.tile(WARPGROUP)
    for part in gl.static_range(s.k.DIM // DQ_TILE):
        stage.slice(part * DQ_TILE, DQ_TILE, dim=1).store((sums[part] * s.scale).to(stage.dtype))
    fence_async_shared()
    s.dq.store(WARPGROUP, batch, head_of_all - batch * heads_q, (number - head_of_all * row_tiles) * DQ_TILE)
    gl.store(s.progress.rounded(number), 1)


@gluon.jit
def consume(WARPGROUP: gl.constexpr, s: BackwardShared):
    """The gradients of one warpgroup's keys, and its part of dq, tile after tile."""
    wait_for_earlier_launch()
    use = 0
    kv_use = 0
    s.kv_ring.wait(kv_use)
    n0, batch, kv_head = s.announced_tile()
    while n0 >= 0:
        dk, dv, use = _gradients(s, WARPGROUP, use, kv_use, n0, batch, kv_head)
        key0 = n0 + WARPGROUP * s.k.ROWS
        slot = -1
        if s.SHARE_TILES:
            slot = s.announced_slot()
        if s.DQ:
            # on their way while dv and dk are stored
            first, pairs = s.announced_rows()
            sums = load_sums(s, first + WARPGROUP, pairs > 0)
        # which also tells the producer that all has been added to the sums
        arrive_together(s.kv_ring.empty.index(kv_use % 2))
        if slot < 0:
            _store_rows(dv, s.dv, WARPGROUP, batch, kv_head, key0)
            _store_rows(dk * s.scale, s.dk, WARPGROUP, batch, kv_head, key0)
        elif s.SHARE_TILES:
            add_dkv(s, WARPGROUP, slot, dk, dv)
        if s.DQ:
            if pairs > 0:
                _round_rows(s, WARPGROUP, first + WARPGROUP, sums)
                for pair in range(1, pairs):
                    number = first + 2 * pair + WARPGROUP
                    _round_rows(s, WARPGROUP, number, load_sums(s, number, True))
        kv_use += 2
        s.kv_ring.wait(kv_use)
        n0, batch, kv_head = s.announced_tile()
    tma.store_wait(0)
