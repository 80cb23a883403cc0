"""The Hopper backward kernel: gradients of keys, values and queries on TMA and wgmma, warp-specialised (sm_90a).

A block owns 128 keys of one kv head: one producer warp copies query blocks into shared memory and two consumer warpgroups of 64
keys each sum up dk and dv, over every query head that shares the keys. dq is summed by all blocks of a head in float32 memory,
by atomics, or left to another kernel where results must be bitwise the same. The parts are in files of their own:
backward_shared.py, backward_producer.py, backward_consumer.py, backward_softcap.py, and the forward kernel's ring.py,
operand.py, tiles.py, mask.py.
"""

from flashcore.kernels.hopper.backward_consumer import consume
from flashcore.kernels.hopper.backward_producer import produce
from flashcore.kernels.hopper.backward_shared import BackwardShared, Rows
from flashcore.kernels.hopper.gluon_api import fence_async_shared, gl, gluon, mbarrier
from flashcore.kernels.hopper.operand import Operand
from flashcore.kernels.hopper.ring import Ring
from flashcore.kernels.hopper.tiles import Tiles


@gluon.jit
def hopper_backward(
    q_map, do_map, k_map, v_map, dk_map, dv_map, row_lse_ptr, delta_ptr, dq_sum_ptr,
    kv_heads, heads_k, heads_per_kv, seqlen_q, seqlen_k, blocks_per_head, first_query, first_key, band_lo, band_hi, group_heads,
    exponent_scale, scale, cap_scale,
    SLOTS: gl.constexpr, DQ: gl.constexpr, HAS_LO: gl.constexpr, HAS_HI: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dk and dv of every key, and dq_sum += dq / scale with DQ; grid = a block for each 128 keys of each kv head.

    The maps are over (B, H, S, D) with any strides: q and do in tiles [1, 1, BLOCK_M, DIM], the others in tiles
    [1, 1, 64, DIM]. Those of q and do begin at row first_query and those of k and v at first_key, and end where nothing follows
    that takes part. row_lse, delta and dq_sum are as backward_prepare.py leaves them. `kv_heads` is B * Hk, blocks_per_head the
    number of blocks of BLOCK_M rows of a padded head. Key j is attended by row i iff j + band_lo <= i <= j + band_hi.
    exponent_scale and cap_scale are backward_factors.py's; cap_scale is None, a constant, without a softcap.
    """
    BLOCK_M: gl.constexpr = q_map.block_shape[2]
    KEYS: gl.constexpr = k_map.block_shape[2]
    q = Operand.create(q_map, None, SLOTS)
    do = Operand.create(do_map, None, SLOTS)
    k = Operand.create(k_map, None, 2)
    v = Operand.create(v_map, None, 2)
    dv = Operand.over(dv_map, None, v.main, v.main)
    if DQ:
        dk = Operand.over(dk_map, None, v.main, v.main)
        ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, BLOCK_M], q_map.dtype)
        ds = gl.allocate_shared_memory(q_map.dtype, [4, KEYS, BLOCK_M], ds_layout)
    else:
        dk = Operand.over(dk_map, None, k.main, k.main)
        ds = q.main
    rows = Rows.create(row_lse_ptr, delta_ptr, BLOCK_M, SLOTS)
    q_ring = Ring.create(SLOTS, 2 * gl.num_warps())
    kv_ring = Ring.create(2, 2 * gl.num_warps())
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(2):
        mbarrier.init(ds_full.index(buffer), count=2 * gl.num_warps())
    fence_async_shared()

    tiles_per_head = (seqlen_k + 2 * KEYS - 1) // (2 * KEYS)
    tiles = Tiles(
        kv_heads * tiles_per_head, tiles_per_head, group_heads, heads_k, kv_heads, seqlen_k, seqlen_q, band_lo, band_hi,
        2 * KEYS, BLOCK_M, HAS_LO, HAS_HI,
    )  # fmt: skip
    s = BackwardShared(
        q, do, k, v, dk, dv, rows, ds, q_ring, kv_ring, ds_full, tiles, heads_per_kv, blocks_per_head, first_query, first_key,
        dq_sum_ptr, exponent_scale, scale, cap_scale, DQ, DQ and cap_scale is None,
    )  # fmt: skip
    gl.warp_specialize(
        [(consume, (gl.constexpr(0), s)), (consume, (gl.constexpr(1), s)), (produce, (s,))],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
