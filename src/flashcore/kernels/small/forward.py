"""The small forward kernel: attention at the lowest latency, for problems whose tiles do not fill a Hopper GPU (sm_90a).

A cluster of blocks computes one tile of 64 query rows. Each block takes a share of the keys, so few that all of them are in
shared memory and all scores in registers at once: every load is started at the outset, each row has one softmax and no
rescaling. Then each block sends the others their columns of its result, unnormalised, with the maxima and sums of its rows
(FlashDecoding's combination, within one launch and over distributed shared memory), and stores the columns that are its own:

    m = max(m_r),   l = sum(2^(m_r - m) l_r),   o = sum(2^(m_r - m) o_r) / l   over the blocks r

A block is one warpgroup. It may start while the launch before it still runs, and waits for that one's results before it reads
anything (programmatic dependent launch). docs/notes/small-forward.md has what each of these brings.
"""

from flashcore.kernels.hopper.gluon_api import fence_async_shared, gl, gluon, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from flashcore.kernels.hopper.launches import let_next_launch_start, wait_for_earlier_launch
from flashcore.kernels.hopper.layouts import accumulator, left_operand
from flashcore.kernels.hopper.mask import mask_scores
from flashcore.kernels.hopper.softmax import finite_pivot, inverse_and_lse, thread_sums
from flashcore.kernels.hopper.view import view_output, view_scores, view_statistics, view_weights
from flashcore.kernels.small.cluster import expect
from flashcore.kernels.small.layouts import stored
from flashcore.kernels.small.peers import ROWS, Peers


@gluon.jit
def _divided(n, factor):
    """n // d for a factor of ceil(2^30 / d) and n * d < 2^30: a tenth of a division's time."""
    return ((n.to(gl.int64) * factor) >> 30).to(gl.int32)


@gluon.jit
def small_forward(
    q_map, k_map, v_map, o_ptr, lse_ptr, tiles_factor, tiles, heads_factor, heads_q, group_factor,
    seqlen_q, seqlen_k, band_hi, head_dim_v, o_stride_b, o_stride_h, o_stride_s, scale, store_lse,
    CLUSTER: gl.constexpr, KEYS: gl.constexpr, HAS_HI: gl.constexpr, view_ptr=None,
):  # fmt: skip
    """o = softmax(scale * q k^T [banded]) v; grid = CLUSTER * tiles * heads_q * B, a cluster for each tile of 64 rows.

    The maps are over (B, H, S, D) with any strides: q in tiles [1, 1, 64, DIM], k and v in tiles [1, 1, BLOCK_N, DIM], of which
    a block takes KEYS / BLOCK_N. seqlen_k <= CLUSTER * KEYS. The factors are for division by tiles, heads_q and the query heads
    that share keys. `scale` holds log2(e); o and lse are contiguous in their last dimension. view_ptr: what
    hopper/view.py records goes there.
    """
    dtype: gl.constexpr = q_map.dtype
    DIM: gl.constexpr = q_map.block_shape[3]
    BLOCK_N: gl.constexpr = k_map.block_shape[2]
    BLOCKS: gl.constexpr = KEYS // BLOCK_N
    COLUMNS: gl.constexpr = DIM // CLUSTER
    q = gl.allocate_shared_memory(dtype, q_map.block_shape, q_map.layout)
    # separate allocations: the compiler puts barriers between copies to parts of one
    k, v, k_arrived, v_arrived = (), (), (), ()
    for _ in gl.static_range(BLOCKS):
        k = k + (gl.allocate_shared_memory(dtype, k_map.block_shape, k_map.layout),)
        v = v + (gl.allocate_shared_memory(dtype, v_map.block_shape, v_map.layout),)
        k_arrived = k_arrived + (gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),)
        v_arrived = v_arrived + (gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),)
    for block in gl.static_range(BLOCKS):
        mbarrier.init(k_arrived[block], count=1)
        mbarrier.init(v_arrived[block], count=1)
    rank = 0
    if CLUSTER > 1:
        peers = Peers.create(CLUSTER, COLUMNS)
        rank = peers.rank
    fence_async_shared()

    tile_of_all = gl.program_id(0) // CLUSTER
    head_of_all = _divided(tile_of_all, tiles_factor)
    m0 = (tile_of_all - head_of_all * tiles) * ROWS
    batch = _divided(head_of_all, heads_factor)
    head = head_of_all - batch * heads_q
    kv_head = _divided(head, group_factor)
    last = seqlen_k
    attended_by_all = seqlen_k
    if HAS_HI:
        last = gl.minimum(seqlen_k, gl.minimum(m0 + ROWS, seqlen_q) + band_hi)
        attended_by_all = gl.minimum(seqlen_k, m0 + band_hi + 1)

    wait_for_earlier_launch()
    for block in gl.static_range(BLOCKS):
        n0 = rank * KEYS + block * BLOCK_N
        # keys that no row of the tile attends are read from past the end, where there are zeros
        row = gl.where(n0 < last, n0, seqlen_k)
        expect(k_arrived[block], k_map.nbytes_per_cta + (q_map.nbytes_per_cta if block == 0 else 0))
        tma.async_load(k_map, [batch, kv_head, row, 0], k_arrived[block], k[block])
        if block == 0:
            tma.async_load(q_map, [batch, head, m0, 0], k_arrived[0], q)
    for block in gl.static_range(BLOCKS):
        n0 = rank * KEYS + block * BLOCK_N
        row = gl.where(n0 < last, n0, seqlen_k)
        expect(v_arrived[block], v_map.nbytes_per_cta)
        tma.async_load(v_map, [batch, kv_head, row, 0], v_arrived[block], v[block])
    if CLUSTER > 1:
        peers.announce()

    q = q.reshape([ROWS, DIM])
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, accumulator(BLOCK_N))
    started, scores = (), ()
    for block in gl.static_range(BLOCKS):
        mbarrier.wait(k_arrived[block], 0)
        keys = k[block].reshape([BLOCK_N, DIM]).permute((1, 0))
        started = started + (warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True),)
    for block in gl.static_range(BLOCKS):
        s = warpgroup_mma_wait(BLOCKS - 1 - block, deps=(started[block],))
        n0 = rank * KEYS + block * BLOCK_N
        if n0 + BLOCK_N > attended_by_all:
            s = mask_scores(s, m0, n0, seqlen_k, 0, band_hi, False, HAS_HI)
        view_scores(view_ptr, head_of_all, m0, seqlen_q, n0, seqlen_k, s)
        scores = scores + (s,)
    # Early enough that the next launch's blocks are there when this one ends, and late enough not to be in its way.
    let_next_launch_start()

    top = scores[0]
    for block in gl.static_range(1, BLOCKS):
        top = gl.maximum(top, scores[block])
    m_i = gl.max(top, 1)
    pivot = finite_pivot(m_i) * scale
    acc = gl.zeros([ROWS, DIM], gl.float32, accumulator(DIM))
    for block in gl.static_range(BLOCKS):
        p = gl.exp2(scores[block] * scale - pivot[:, None])
        view_weights(view_ptr, head_of_all, m0, seqlen_q, rank * KEYS + block * BLOCK_N, seqlen_k, p, m_i)
        if block == 0:
            l_partial = thread_sums(p)
        else:
            l_partial += thread_sums(p)
        mbarrier.wait(v_arrived[block], 0)
        p = gl.convert_layout(p.to(dtype), left_operand(DIM))
        acc = warpgroup_mma(p, v[block].reshape([BLOCK_N, DIM]), acc, use_acc=block > 0, is_async=True)
    l_i = gl.convert_layout(gl.sum(l_partial, 1), m_i.type.layout)
    if CLUSTER > 1:
        peers.send_rows(m_i, l_i)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    if CLUSTER > 1:
        peers.send_output(acc)
        m_i, l_i, weights = peers.receive_rows(m_i, l_i, scale)
    view_statistics(view_ptr, head_of_all, m0, seqlen_q, seqlen_k, m_i, l_i[:, None], acc)
    inverse, lse = inverse_and_lse(m_i, l_i, scale)
    if (store_lse != 0) & (rank == 0):
        rows = m0 + gl.arange(0, ROWS, layout=lse.type.layout)
        gl.store(lse_ptr + head_of_all.to(gl.int64) * seqlen_q + rows, lse, mask=rows < seqlen_q)
    layout: gl.constexpr = stored(COLUMNS)
    rows = m0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = rank * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    o_ptrs = o_ptr + batch * o_stride_b + head * o_stride_h + (rows * o_stride_s)[:, None] + columns[None, :]
    if CLUSTER > 1:
        o = peers.receive_output(weights, inverse)
    else:
        o = acc * gl.convert_layout(inverse, gl.SliceLayout(1, acc.type.layout))[:, None]
    view_output(view_ptr, head_of_all, m0, seqlen_q, seqlen_k, o, rank * COLUMNS)
    inside = (rows < seqlen_q)[:, None] & (columns < head_dim_v)[None, :]
    gl.store(o_ptrs, gl.convert_layout(o.to(dtype), layout), mask=inside)
    if CLUSTER > 1:
        peers.leave()
