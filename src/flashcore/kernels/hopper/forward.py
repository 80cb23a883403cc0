"""The Hopper forward kernel: fused attention on TMA and wgmma, warp-specialised and persistent (sm_90a).

A block is one producer warp, which copies queries, keys and values into shared memory, and two or three consumer warpgroups of
64 query rows each. There is one block a multiprocessor; it draws tiles from a counter until there are none left. The parts are
in files of their own: ring.py (barriers), operand.py (tiles and copies), tiles.py (which rows, which keys, in what order),
producer.py, consumer.py, softmax.py, mask.py.
"""

from flashcore.kernels.hopper.consumer import consume
from flashcore.kernels.hopper.gluon_api import fence_async_shared, gl, gluon
from flashcore.kernels.hopper.operand import Operand
from flashcore.kernels.hopper.producer import produce
from flashcore.kernels.hopper.ring import Ring
from flashcore.kernels.hopper.shared import Options, Shared
from flashcore.kernels.hopper.tiles import Tiles


@gluon.jit
def hopper_forward(
    q_map, k_map, v_map, o_map, q_tail_map, k_tail_map, v_tail_map, o_tail_map, lse_ptr, counter_ptr,
    heads, heads_q, heads_per_kv, seqlen_q, seqlen_k, band_lo, band_hi, group_heads, scale, cap_scale, store_lse,
    WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr, Q_SLOTS: gl.constexpr, KV_SLOTS: gl.constexpr,
    Q_REGISTERS: gl.constexpr, O_SHARES_Q: gl.constexpr, JOIN_TILES: gl.constexpr, SKIP_RESCALE: gl.constexpr,
    EMULATE_EXP2: gl.constexpr, HOLD_WAIT: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    HAS_LO: gl.constexpr, HAS_HI: gl.constexpr, SOFTCAP: gl.constexpr, view_ptr=None,
):  # fmt: skip
    """o = softmax(scale * q k^T [capped, banded]) v; grid = one block a multiprocessor, at most one a tile.

    The maps are over (B, H, S, D) with any strides: q and o in tiles [1, 1, 64, DIM], k and v in tiles [1, 1, BLOCK_N, DIM].
    The tails are the columns from DIM on. `heads` is B * Hq; lse is (B, Hq, Sq) contiguous; the counter holds 0.
    view_ptr: what view.py records goes there.
    """
    BLOCK_M: gl.constexpr = WARPGROUPS * q_map.block_shape[2]
    q = Operand.create(q_map, q_tail_map, Q_SLOTS * WARPGROUPS)
    k = Operand.create(k_map, k_tail_map, KV_SLOTS)
    v = Operand.create(v_map, v_tail_map, KV_SLOTS)
    if O_SHARES_Q:
        # a tile's queries are done with before its output is stored
        o = Operand.over(o_map, o_tail_map, q.main, q.tail)
    else:
        o = Operand.create(o_map, o_tail_map, WARPGROUPS)
    q_ring = Ring.create(Q_SLOTS * WARPGROUPS, gl.num_warps())
    kv_ring = Ring.create(KV_SLOTS, WARPGROUPS * gl.num_warps())
    announcements = gl.allocate_shared_memory(gl.int32, [3 * Q_SLOTS * WARPGROUPS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    fence_async_shared()

    tiles_per_head = (seqlen_q + BLOCK_M - 1) // BLOCK_M
    tiles = Tiles(
        heads * tiles_per_head, tiles_per_head, group_heads, heads_q, heads, seqlen_q, seqlen_k, band_lo, band_hi,
        BLOCK_M, BLOCK_N, HAS_LO, HAS_HI,
    )  # fmt: skip
    options = Options(WARPGROUPS, Q_REGISTERS, O_SHARES_Q, JOIN_TILES, SKIP_RESCALE, EMULATE_EXP2, HOLD_WAIT, SOFTCAP)
    s = Shared(q, k, v, o, q_ring, kv_ring, announcements, tiles, options)

    feed = (s, counter_ptr, heads_per_kv)
    first = (gl.constexpr(0), s, lse_ptr, scale, cap_scale, store_lse, view_ptr)
    second = (gl.constexpr(1), s, lse_ptr, scale, cap_scale, store_lse, view_ptr)
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [(consume, first), (consume, second), (produce, feed)],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        third = (gl.constexpr(2), s, lse_ptr, scale, cap_scale, store_lse, view_ptr)
        gl.warp_specialize(
            [(consume, first), (consume, second), (consume, third), (produce, feed)],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
