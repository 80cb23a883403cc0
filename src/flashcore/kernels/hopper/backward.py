"""The Hopper backward kernel: gradients of keys, values and queries on TMA and wgmma, warp-specialised and persistent (sm_90a).

A block takes tiles of 128 keys of one kv head until there are none left: one producer warp copies query blocks into shared
memory and two consumer warpgroups of 64 keys each sum up dk and dv, over every query head that shares the keys. dq is summed
by all blocks in float32 memory, by atomics, in one order where results must be bitwise the same. The parts are in files of
their own: backward_shared.py, backward_producer.py, backward_consumer.py, backward_softcap.py, backward_sums.py,
backward_turns.py, progress.py, and the forward kernel's ring.py, operand.py, tiles.py, mask.py.
"""

from flashcore.kernels.hopper.backward_consumer import consume
from flashcore.kernels.hopper.backward_producer import produce
from flashcore.kernels.hopper.backward_shared import BackwardShared, Progress, Rows
from flashcore.kernels.hopper.backward_turns import Turns, usher
from flashcore.kernels.hopper.gluon_api import fence_async_shared, gl, gluon, mbarrier
from flashcore.kernels.hopper.operand import Operand
from flashcore.kernels.hopper.ring import Ring
from flashcore.kernels.hopper.tiles import Tiles


@gluon.jit
def hopper_backward(
    q_map, do_map, k_map, v_map, dk_map, dv_map, dq_map, row_lse_ptr, delta_ptr, dq_sum_ptr, dkv_sum_ptr, progress_ptr,
    kv_heads, heads_k, heads_per_kv, seqlen_q, seqlen_k, blocks_per_head, first_query, first_key, band_lo, band_hi,
    group_heads, lag, pairs_per_tile, shared_tiles, sharers, exponent_scale, scale, cap_scale, SLOTS: gl.constexpr, DQ:
    gl.constexpr, ORDERED: gl.constexpr, OWN_LAST: gl.constexpr, SHARE_TILES: gl.constexpr, HAS_LO: gl.constexpr,
    HAS_HI: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dk and dv of every key, and with DQ dq_sum += dq / scale, of which some of dq is made; grid = one block a
    multiprocessor, at most one for each tile of 128 keys of a kv head, or part of one.

    The maps are over (B, H, S, D) with any strides: q and do in tiles [1, 1, BLOCK_M, DIM], the others in tiles
    [1, 1, 64, DIM]. Those of q and do begin at row first_query and those of k and v at first_key, and end where nothing follows
    that takes part. row_lse, delta, the sums and progress are as backward_prepare.py leaves them. `kv_heads` is B * Hk,
    blocks_per_head the number of blocks of BLOCK_M rows of a padded head. Key j is attended by row i iff j + band_lo <= i <=
    j + band_hi. lag, pairs_per_tile, shared_tiles and sharers are BackwardShared's. exponent_scale and cap_scale are
    backward_factors.py's; cap_scale is None, a constant, without a softcap. With ORDERED all sums are made in one order
    (backward_turns.py).
    """
    BLOCK_M: gl.constexpr = q_map.block_shape[2]
    KEYS: gl.constexpr = k_map.block_shape[2]
    q = Operand.create(q_map, None, SLOTS)
    do = Operand.create(do_map, None, SLOTS)
    k = Operand.create(k_map, None, 2)
    v = Operand.create(v_map, None, 2)
    dv = Operand.create(dv_map, None, 2)
    dk = Operand.over(dk_map, None, dv.main, dv.main)
    dq = dk
    ds = q.main
    if DQ:
        dq = Operand.over(dq_map, None, dv.main, dv.main)
        ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, BLOCK_M], q_map.dtype)
        ds = gl.allocate_shared_memory(q_map.dtype, [4, KEYS, BLOCK_M], ds_layout)
    rows = Rows.create(row_lse_ptr, delta_ptr, BLOCK_M, SLOTS)
    q_ring = Ring.create(SLOTS, 2 * gl.num_warps())
    kv_ring = Ring.create(2, 2 * gl.num_warps() + (2 if ORDERED else 0))
    turns = None
    if ORDERED:
        turns = Turns.create(2, 2 * gl.num_warps())
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(2):
        mbarrier.init(ds_full.index(buffer), count=2 * gl.num_warps())
    fence_async_shared()

    tiles_per_head = (seqlen_k + 2 * KEYS - 1) // (2 * KEYS)
    tiles = Tiles(
        kv_heads * tiles_per_head, tiles_per_head, group_heads, heads_k, kv_heads, seqlen_k, seqlen_q, band_lo, band_hi,
        2 * KEYS, BLOCK_M, HAS_LO, HAS_HI,
    )  # fmt: skip
    progress = Progress(progress_ptr, kv_heads, kv_heads * heads_per_kv * blocks_per_head * (BLOCK_M // 64))
    announcement = gl.allocate_shared_memory(gl.int32, [8, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    s = BackwardShared(
        q, do, k, v, dk, dv, dq, rows, ds, q_ring, kv_ring, ds_full, tiles, heads_per_kv, blocks_per_head, first_query,
        first_key, dq_sum_ptr, dkv_sum_ptr, shared_tiles, sharers, lag, pairs_per_tile, progress, turns, announcement,
        exponent_scale, scale, cap_scale, DQ, DQ and cap_scale is None, OWN_LAST, SHARE_TILES,
    )  # fmt: skip
    if ORDERED:
        gl.warp_specialize(
            [
                (consume, (gl.constexpr(0), s)),
                (consume, (gl.constexpr(1), s)),
                (produce, (s,)),
                (usher, (gl.constexpr(False), s)),
                (usher, (gl.constexpr(True), s)),
            ],
            [4, 1, 1, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [(consume, (gl.constexpr(0), s)), (consume, (gl.constexpr(1), s)), (produce, (s,))],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
