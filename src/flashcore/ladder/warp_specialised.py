"""Step 8, warp-specialised: one warp that only copies, and warps that only compute.

The idea. In the step before, every warp asks for the tile that it will need later, waits for the one that it needs now, and
computes, in turn. Here a warp of its own, the producer, walks along the keys and does nothing but ask for copies. The
consumers do nothing but compute. Between them lies a ring of slots in shared memory, each for the keys and values of one tile,
with two barriers that count (mbarrier, sm_80 and later). A slot is full when the copies of every thread of the producer have
arrived: cp.async reports to the barrier by itself, and no one waits for it but who needs the tile. It is empty when the
consumers have said that they are done with it.

What it should bring. Addresses, bounds and copies leave the consumers' instruction stream, which is the one that feeds the
matrix unit; and how far copies run ahead is the producer's matter, decided by free slots and not by where the compiler put the
wait. What it should cost: the producer holds registers. Triton gives warps in fours (three of the producer's sleep), and
before sm_90 each thread of a block holds as many registers as the most that any needs. The step lays the ground for the next
one, where one thread's instruction copies a tile (TMA) and registers move from the producer to the consumers.

The tiles (but at head dim 128), the number of slots and the maths are async_copies.py's. The kernel is in Gluon (of Triton
3.9), Triton's lower level, because Triton itself decides who copies. There the layouts are ours to state: which thread holds
what, and how a tile lies in shared memory. The matrix unit is the one that Triton takes for the steps before on sm_80, sm_89
and sm_90a: mma, and wgmma on sm_90a, which reads the tiles where they are.

The launch is in warp_specialised_launch.py: other releases of Triton cannot import Gluon's names, and a binary needs none.

What it brought is in docs/ladder.md, made from the recorded run.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mbarrier, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from flashcore.kernels.hopper.view import view_output, view_scores, view_statistics, view_weights
from flashcore.ladder.harness import online_softmax, tile_of_program

PRODUCER_WARPS: gl.constexpr = gl.constexpr(1)


@gluon.constexpr_function
def rows_layout(head_dim, num_warps):
    """Rows of [rows, HEAD_DIM] as device memory has them: 16 bytes a thread, neighbours along the row."""
    return gl.BlockedLayout([1, 8], [256 // head_dim, head_dim // 8], [num_warps, 1], [1, 0])


@gluon.constexpr_function
def tile_layout(block_n, head_dim, wgmma):
    """A tile of keys or values in shared memory, swizzled so that neither copies nor reads meet in a bank."""
    if wgmma:
        return gl.NVMMASharedLayout.get_default_for([block_n, head_dim], gl.float16)
    return gl.SwizzledSharedLayout(vec=8, per_phase=max(1, 64 // head_dim), max_phase=min(8, head_dim // 8), order=[1, 0])


@gluon.constexpr_function
def accumulator_layout(columns, num_warps, wgmma):
    """A result [BLOCK_M, columns] of the matrix unit. Each warp has whole rows, so that none meets another in a softmax."""
    if wgmma:
        return gl.NVMMADistributedLayout([3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, columns, 16])
    return gl.NVMMADistributedLayout([2, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, 8])


@gluon.aggregate
class Ring:
    """Slots for a tile of keys and one of values. Use `use` (0, 1, ...) of the ring takes slot `use % STAGES`.

    full: completed by an arrival for each thread of the producer; empty: by one of the consumers. A barrier has a phase that
    flips whenever it is completed, and a wait names the phase that it wants to see over: use 0 and the others of a first
    round wait for phase 0 to be full, and find phase 1 of empty over, as that of any new barrier.
    """

    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr

    @gluon.jit
    def create(dtype: gl.constexpr, layout: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr):
        k = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], layout)
        v = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], layout)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for slot in gl.static_range(STAGES):
            mbarrier.init(full.index(slot), count=32 * PRODUCER_WARPS)
            mbarrier.init(empty.index(slot), count=1)
        return Ring(k, v, full, empty, STAGES)  # type: ignore[call-arg]  # mypy does not know what an aggregate is made of

    @gluon.jit
    def reserve(self, use):
        """Producer: wait until the slot is empty; returns it."""
        slot = use % self.STAGES
        mbarrier.wait(self.empty.index(slot), ((use // self.STAGES) & 1) ^ 1)
        return slot

    @gluon.jit
    def fill(self, slot):
        """Producer: let each thread arrive once the copies that it has asked for are there. Does not wait."""
        async_copy.mbarrier_arrive(self.full.index(slot), increment_count=False)

    @gluon.jit
    def wait(self, use):
        """Consumers: wait until the slot is full; returns it."""
        slot = use % self.STAGES
        mbarrier.wait(self.full.index(slot), (use // self.STAGES) & 1)
        return slot

    @gluon.jit
    def release(self, slot):
        """Consumers: give the slot back. Their warps meet first, and one thread arrives for all."""
        mbarrier.arrive(self.empty.index(slot))


@gluon.jit
def produce(ring, k_ptr, v_ptr, seqlen_k, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Copy the keys and values of one head, tile by tile; zeros past its end."""
    layout: gl.constexpr = rows_layout(HEAD_DIM, gl.num_warps())
    rows = gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
    # [BLOCK_N, HEAD_DIM]
    offsets = rows[:, None] * HEAD_DIM + gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))[None, :]
    for n0 in range(0, seqlen_k, BLOCK_N):
        inside = (n0 + rows < seqlen_k)[:, None]
        slot = ring.reserve(n0 // BLOCK_N)
        async_copy.async_load(ring.k.index(slot), k_ptr + n0 * HEAD_DIM + offsets, inside)
        async_copy.async_load(ring.v.index(slot), v_ptr + n0 * HEAD_DIM + offsets, inside)
        ring.fill(slot)


@gluon.jit
def multiply(a, b, acc, WGMMA: gl.constexpr):
    """acc + a b, with a in registers and b in shared memory."""
    if WGMMA:
        return warpgroup_mma_wait(0, deps=(warpgroup_mma(a, b, acc, is_async=True),))
    else:
        return mma_v2(a, b.load(gl.DotOperandLayout(1, acc.type.layout, 2)), acc)


@gluon.jit
def consume(
    ring, q_ptr, o_ptr, view_ptr, head, m0, seqlen_q, seqlen_k, scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, WGMMA: gl.constexpr,
):  # fmt: skip
    """o for BLOCK_M queries of one head, from the tiles as they come."""
    layout: gl.constexpr = rows_layout(HEAD_DIM, gl.num_warps())
    s_layout: gl.constexpr = accumulator_layout(BLOCK_N, gl.num_warps(), WGMMA)
    o_layout: gl.constexpr = accumulator_layout(HEAD_DIM, gl.num_warps(), WGMMA)
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_row: gl.constexpr = gl.SliceLayout(1, o_layout)
    rows = m0 + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    # [BLOCK_M, HEAD_DIM]
    offsets = rows[:, None] * HEAD_DIM + gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))[None, :]
    inside = (rows < seqlen_q)[:, None]
    q = gl.convert_layout(gl.load(q_ptr + offsets, inside, 0.0), gl.DotOperandLayout(0, s_layout, 2))
    m_i = gl.full([BLOCK_M], float("-inf"), gl.float32, s_row)
    l_i = gl.zeros([BLOCK_M], gl.float32, s_row)
    acc = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, o_layout)
    for n0 in range(0, seqlen_k, BLOCK_N):
        slot = ring.wait(n0 // BLOCK_N)
        if WGMMA:
            # wgmma reads shared memory by another way than the one that copies of threads are written by
            fence_async_shared()
        # [BLOCK_M, BLOCK_N]
        s = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, s_layout)
        s = multiply(q, ring.k.index(slot).permute((1, 0)), s, WGMMA)
        keys = n0 + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
        s = gl.where((keys < seqlen_k)[None, :], s * scale, float("-inf"))
        view_scores(view_ptr, head, m0, seqlen_q, n0, seqlen_k, s)
        p, alpha, m_i, l_i = online_softmax(s, m_i, l_i)
        view_weights(view_ptr, head, m0, seqlen_q, n0, seqlen_k, p, m_i)
        p = gl.convert_layout(p.to(ring.v.dtype), gl.DotOperandLayout(0, o_layout, 2))
        # [BLOCK_M, HEAD_DIM]
        acc = multiply(p, ring.v.index(slot), acc * gl.convert_layout(alpha, o_row)[:, None], WGMMA)
        ring.release(slot)
    view_statistics(view_ptr, head, m0, seqlen_q, seqlen_k, m_i, l_i[:, None], acc)
    view_output(view_ptr, head, m0, seqlen_q, seqlen_k, acc, 0)
    o = gl.convert_layout(acc / gl.convert_layout(l_i, o_row)[:, None], layout)
    gl.store(o_ptr + offsets, o.to(o_ptr.dtype.element_ty), inside)


@gluon.jit
def warp_specialised(
    q_ptr, k_ptr, v_ptr, o_ptr, seqlen_q, seqlen_k, scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, WGMMA: gl.constexpr,
    view_ptr=None,
):  # fmt: skip
    """o for BLOCK_M queries of one head, BLOCK_N keys at a time."""
    m0, head = tile_of_program(seqlen_q, BLOCK_M)
    q_ptr += head * seqlen_q * HEAD_DIM
    k_ptr += head * seqlen_k * HEAD_DIM
    v_ptr += head * seqlen_k * HEAD_DIM
    o_ptr += head * seqlen_q * HEAD_DIM
    ring = Ring.create(k_ptr.dtype.element_ty, tile_layout(BLOCK_N, HEAD_DIM, WGMMA), STAGES, BLOCK_N, HEAD_DIM)
    # No counts of registers: to move them from warp to warp takes sm_90, and for any other arch the compiler aborts.
    gl.warp_specialize(
        [
            (consume, (ring, q_ptr, o_ptr, view_ptr, head, m0, seqlen_q, seqlen_k, scale, BLOCK_M, BLOCK_N, HEAD_DIM, WGMMA)),
            (produce, (ring, k_ptr, v_ptr, seqlen_k, BLOCK_N, HEAD_DIM)),
        ],
        [PRODUCER_WARPS],
    )
