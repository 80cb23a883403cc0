"""The consumers: warpgroups of 64 query rows each, which turn keys and values into outputs.

Online softmax over blocks of keys (FlashAttention-2, Dao 2023, section 3.1), with the scores of the next block computed while
the values of this one are multiplied (FlashAttention-3, Shah et al. 2024, section 3.2). With the scores in base 2,
s = q k^T * scale * log2(e), and running maximum m, sum l and output o of a row:

    m' = max(m, max(s)),   p = 2^(s - m'),   alpha = 2^(m - m')
    l' = alpha l + sum(p),   o' = alpha o + p v;   in the end o / l and (m + log2(l)) * ln(2)
"""

from flashcore.kernels.hopper.gluon_api import fence_async_shared, gl, gluon, tma, warpgroup_mma, warpgroup_mma_wait
from flashcore.kernels.hopper.launches import wait_for_earlier_launch
from flashcore.kernels.hopper.layouts import accumulator, left_operand
from flashcore.kernels.hopper.mask import mask_scores
from flashcore.kernels.hopper.shared import Shared
from flashcore.kernels.hopper.softmax import cap_scores, finish, first_block, hold_until_summed, next_block
from flashcore.kernels.hopper.view import view_output, view_scores, view_statistics, view_weights


@gluon.constexpr_function
def any_not_one(outputs, inputs):
    """PTX: whether any number that the warp holds differs from 1."""
    ((result,),), (numbers,) = outputs, inputs
    lines = ["{ .reg .pred p, any;", "setp.ne.b32 any, 0, 0;"]
    for number in numbers:
        lines.append(f"setp.neu.f32 p, {number}, 0f3F800000; or.pred any, any, p;")
    lines.append(f"vote.sync.any.pred any, any, 0xffffffff; selp.b32 {result}, 1, 0, any; }}")
    return "\n".join(lines)


@gluon.jit
def _queries(s, slot):
    """(main, tail) of a slot of queries, in registers or where they are."""
    main, tail = s.q.tile(slot)
    if s.options.Q_REGISTERS:
        main_values = main.load(left_operand(s.k.ROWS))
        tail_values = main_values
        if s.q.TAIL_DIM > 0:
            tail_values = tail.load(left_operand(s.k.ROWS))
        return main_values, tail_values
    else:
        return main, tail


@gluon.jit
def _start_scores(s, q, q_tail, slot):
    """Start q k^T with the keys of a slot: [64, BLOCK_N]."""
    k, k_tail = s.k.tile(slot)
    scores = gl.zeros([s.q.ROWS, s.k.ROWS], gl.float32, accumulator(s.k.ROWS))
    scores = warpgroup_mma(q, k.permute((1, 0)), scores, use_acc=False, is_async=True)
    if s.k.TAIL_DIM > 0:
        scores = warpgroup_mma(q_tail, k_tail.permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def _zero_output(s):
    """(main, tail) of an output of zeros: [64, DIM] and, where there is a tail, [64, TAIL_DIM]."""
    acc = gl.zeros([s.q.ROWS, s.v.DIM], gl.float32, accumulator(s.v.DIM))
    acc_tail = acc
    if s.v.TAIL_DIM > 0:
        acc_tail = gl.zeros([s.q.ROWS, s.v.TAIL_DIM], gl.float32, accumulator(s.v.TAIL_DIM))
    return acc, acc_tail


@gluon.jit
def _start_output(s, p, acc, acc_tail, slot):
    """Start acc += p v with the values of a slot."""
    v, v_tail = s.v.tile(slot)
    acc = warpgroup_mma(p, v, acc, is_async=True)
    if s.v.TAIL_DIM > 0:
        acc_tail = warpgroup_mma(p, v_tail, acc_tail, is_async=True)
    else:
        acc_tail = acc
    return acc, acc_tail


@gluon.jit
def _wait_output(s, acc, acc_tail, PENDING: gl.constexpr):
    """Wait for the output, with PENDING products started later still under way."""
    if s.v.TAIL_DIM > 0:
        acc, acc_tail = warpgroup_mma_wait(PENDING, deps=(acc, acc_tail))
    else:
        acc = warpgroup_mma_wait(PENDING, deps=(acc,))
        acc_tail = acc
    return acc, acc_tail


@gluon.jit
def _scale_output(s, acc, acc_tail, factor):
    """Multiply each row by its factor."""
    acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))[:, None]
    if s.v.TAIL_DIM > 0:
        acc_tail = acc_tail * gl.convert_layout(factor, gl.SliceLayout(1, acc_tail.type.layout))[:, None]
    else:
        acc_tail = acc
    return acc, acc_tail


@gluon.jit
def _store_output(s, acc, acc_tail, slot, batch, head, m0):
    """Start copying the output to global memory by way of a slot in shared memory."""
    main, tail = s.o.tile(slot)
    main.store(acc.to(main.dtype))
    if s.o.TAIL_DIM > 0:
        tail.store(acc_tail.to(tail.dtype))
    fence_async_shared()
    s.o.store(slot, batch, head, m0)


@gluon.jit
def _store_lse(s, lse_ptr, lse, batch, head, m0):
    rows = m0 + gl.arange(0, s.q.ROWS, layout=lse.type.layout)
    head_lse_ptr = lse_ptr + (batch * s.tiles.heads_q + head).to(gl.int64) * s.tiles.seqlen_q
    gl.store(head_lse_ptr + rows, lse, mask=rows < s.tiles.seqlen_q)


@gluon.jit
def _view_tile(view_ptr, s, head, m0, m_i, l_i, acc, acc_tail):
    view_statistics(view_ptr, head, m0, s.tiles.seqlen_q, s.tiles.seqlen_k, m_i, l_i, acc)
    view_output(view_ptr, head, m0, s.tiles.seqlen_q, s.tiles.seqlen_k, acc, 0)
    if s.v.TAIL_DIM > 0:
        view_output(view_ptr, head, m0, s.tiles.seqlen_q, s.tiles.seqlen_k, acc_tail, s.v.DIM)


@gluon.jit
def _cap_and_mask(s, scores, m0, n, cap_scale, MASKED: gl.constexpr):
    tiles = s.tiles
    if s.options.SOFTCAP:
        scores = cap_scores(scores, cap_scale)
    if MASKED:
        n0 = n * tiles.BLOCK_N
        scores = mask_scores(scores, m0, n0, tiles.seqlen_k, tiles.band_lo, tiles.band_hi, tiles.HAS_LO, tiles.HAS_HI)
    return scores


@gluon.jit
def _step(s, use, n, m0, q, q_tail, p, acc, acc_tail, m_i, l_i, scale, cap_scale, MASKED: gl.constexpr, view):
    """Scores and softmax of block n, while the values of the block before are multiplied."""
    slot = s.kv_ring.wait(use)
    scores = _start_scores(s, q, q_tail, slot)
    acc, acc_tail = _start_output(s, p, acc, acc_tail, slot)
    scores = warpgroup_mma_wait(s.v.PARTS, deps=(scores,))
    scores = _cap_and_mask(s, scores, m0, n, cap_scale, MASKED)
    view_scores(view[0], view[1], m0, s.tiles.seqlen_q, n * s.k.ROWS, s.tiles.seqlen_k, scores)
    p_next, alpha, m_i, l_i = next_block(scores, m_i, l_i, scale, s.options.EMULATE_EXP2 and not MASKED)
    view_weights(view[0], view[1], m0, s.tiles.seqlen_q, n * s.k.ROWS, s.tiles.seqlen_k, p_next, m_i)
    p_next = p_next.to(p.dtype)
    if s.options.HOLD_WAIT:
        gl.inline_asm(hold_until_summed, ("f",), [l_i])
    acc, acc_tail = _wait_output(s, acc, acc_tail, 0)
    s.kv_ring.release(use)
    p = gl.convert_layout(p_next, p.type.layout)
    if s.options.SKIP_RESCALE:
        if gl.inline_asm(any_not_one, ("=r", "f"), [alpha], gl.int32, True) != 0:
            acc, acc_tail = _scale_output(s, acc, acc_tail, alpha)
    else:
        acc, acc_tail = _scale_output(s, acc, acc_tail, alpha)
    return p, acc, acc_tail, m_i, l_i


@gluon.jit
def consume(WARPGROUP: gl.constexpr, s: Shared, lse_ptr, scale, cap_scale, store_lse, view_ptr):
    """The rows of one warpgroup, tile after tile.

    `scale` holds log2(e), and with SOFTCAP the cap in place of the scale (softmax.cap_scores).
    """
    wait_for_earlier_launch()
    WARPGROUPS: gl.constexpr = s.options.WARPGROUPS
    Q_REGISTERS: gl.constexpr = s.options.Q_REGISTERS
    O_SHARES_Q: gl.constexpr = s.options.O_SHARES_Q
    JOIN_TILES: gl.constexpr = s.options.JOIN_TILES
    tiles = s.tiles
    q_use = WARPGROUP
    kv_use = 0
    q_slot = s.q_ring.wait(q_use)
    tile_m0, batch, head = s.announced_tile(q_slot)
    q, q_tail = _queries(s, q_slot)
    if JOIN_TILES:
        scores = warpgroup_mma_wait(0, deps=(_start_scores(s, q, q_tail, s.kv_ring.wait(kv_use)),))
        s.kv_ring.release(kv_use)
        kv_use += 1
    while tile_m0 >= 0:
        if not JOIN_TILES:
            q, q_tail = _queries(s, q_slot)
            scores = warpgroup_mma_wait(0, deps=(_start_scores(s, q, q_tail, s.kv_ring.wait(kv_use)),))
            s.kv_ring.release(kv_use)
            kv_use += 1
        if Q_REGISTERS:
            # the copy engine may write the slot once these reads are done
            fence_async_shared()
            s.q_ring.release(q_use)
        m0 = tile_m0 + WARPGROUP * s.q.ROWS
        begin, end = tiles.visited(tile_m0)
        n = end - 1
        scores = _cap_and_mask(s, scores, m0, n, cap_scale, True)
        view = (view_ptr, batch * tiles.heads_q + head)
        view_scores(view[0], view[1], m0, tiles.seqlen_q, n * s.k.ROWS, tiles.seqlen_k, scores)
        p, m_i, l_i = first_block(scores, scale)
        view_weights(view[0], view[1], m0, tiles.seqlen_q, n * s.k.ROWS, tiles.seqlen_k, p, m_i)
        p = gl.convert_layout(p.to(s.v.main.dtype), left_operand(s.v.DIM))
        acc, acc_tail = _zero_output(s)

        # Blocks from the last to the first: those that the band's upper edge crosses, those wholly attended, the lower edge's.
        plain_begin, plain_end = tiles.unmasked(m0, s.q.ROWS)
        if tiles.HAS_HI:
            while n > gl.maximum(plain_end, begin):
                n -= 1
                p, acc, acc_tail, m_i, l_i = _step(
                    s, kv_use, n, m0, q, q_tail, p, acc, acc_tail, m_i, l_i, scale, cap_scale, True, view
                )
                kv_use += 1
        last_plain = begin
        if tiles.HAS_LO:
            last_plain = gl.minimum(n, gl.maximum(plain_begin, begin))
        for i in range(last_plain, n):
            p, acc, acc_tail, m_i, l_i = _step(
                s, kv_use, last_plain + n - 1 - i, m0, q, q_tail, p, acc, acc_tail, m_i, l_i, scale, cap_scale, False, view
            )
            kv_use += 1
        if tiles.HAS_LO:
            n = last_plain
            while n > begin:
                n -= 1
                p, acc, acc_tail, m_i, l_i = _step(
                    s, kv_use, n, m0, q, q_tail, p, acc, acc_tail, m_i, l_i, scale, cap_scale, True, view
                )
                kv_use += 1

        slot = s.kv_ring.wait(kv_use)
        acc, acc_tail = _start_output(s, p, acc, acc_tail, slot)
        if not Q_REGISTERS:
            # read again rather than held through the loops, where every register counts
            q_slot = q_use % s.q_ring.SLOTS
            tile_m0, batch, head = s.announced_tile(q_slot)
            m0 = tile_m0 + WARPGROUP * s.q.ROWS
            if not O_SHARES_Q:
                s.q_ring.release(q_use)
        next_q_slot = q_slot
        next_m0, next_batch, next_head = tile_m0, batch, head
        if JOIN_TILES:
            # After the last tile this multiplies whatever the slot holds, and nothing uses the result.
            q_use += WARPGROUPS
            next_q_slot = s.q_ring.wait(q_use)
            next_m0, next_batch, next_head = s.announced_tile(next_q_slot)
            q, q_tail = _queries(s, next_q_slot)
            scores = _start_scores(s, q, q_tail, slot)
        inverse, lse = finish(m_i, l_i, scale)
        if store_lse != 0:
            _store_lse(s, lse_ptr, lse, batch, head, m0)
        acc, acc_tail = _wait_output(s, acc, acc_tail, s.k.PARTS if JOIN_TILES else 0)
        _view_tile(view_ptr, s, batch * tiles.heads_q + head, m0, m_i, l_i, acc, acc_tail)
        acc, acc_tail = _scale_output(s, acc, acc_tail, inverse)
        if O_SHARES_Q:
            _store_output(s, acc, acc_tail, q_slot, batch, head, m0)
        else:
            tma.store_wait(0)
            _store_output(s, acc, acc_tail, WARPGROUP, batch, head, m0)
        if JOIN_TILES:
            scores = warpgroup_mma_wait(0, deps=(scores,))
        s.kv_ring.release(kv_use)
        kv_use += 1
        if not JOIN_TILES:
            if O_SHARES_Q:
                tma.store_wait(0)
                s.q_ring.release(q_use)
            q_use += WARPGROUPS
            next_q_slot = s.q_ring.wait(q_use)
            next_m0, next_batch, next_head = s.announced_tile(next_q_slot)
        q_slot = next_q_slot
        tile_m0, batch, head = next_m0, next_batch, next_head
    tma.store_wait(0)
