"""What the producer and the consumers of a block of the backward kernel share: tiles in shared memory, barriers, the work."""

from flashcore.kernels.hopper.gluon_api import gl, gluon
from flashcore.kernels.hopper.operand import Operand
from flashcore.kernels.hopper.ring import Ring
from flashcore.kernels.hopper.tiles import Tiles


@gluon.aggregate
class Rows:
    """Numbers of query rows: -lse / scale (with a softcap -lse * log2(e)) and -delta, BLOCK_M of either in a slot of queries.

    In memory they are float32 (B * Hq, padded_rows), where rows past the end and rows that attend nothing hold -inf and 0.
    """

    lse_ptr: gl.tensor
    delta_ptr: gl.tensor
    lse: gl.shared_memory_descriptor
    delta: gl.shared_memory_descriptor
    BLOCK_M: gl.constexpr
    NUM_BYTES: gl.constexpr

    @gluon.jit
    def create(lse_ptr, delta_ptr, BLOCK_M: gl.constexpr, SLOTS: gl.constexpr):
        lse = gl.allocate_shared_memory(gl.float32, [SLOTS, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        delta = gl.allocate_shared_memory(gl.float32, [SLOTS, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        return Rows(lse_ptr, delta_ptr, lse, delta, BLOCK_M, 4 * BLOCK_M)

    @gluon.jit
    def load_lse(self, slot, number, barrier):
        """Start copying those of a block of rows, counted through all heads, into a slot."""
        copy_numbers(self.lse.index(slot), self.lse_ptr + number.to(gl.int64) * self.BLOCK_M, self.NUM_BYTES, barrier)

    @gluon.jit
    def load_delta(self, slot, number, barrier):
        """The same of delta."""
        copy_numbers(self.delta.index(slot), self.delta_ptr + number.to(gl.int64) * self.BLOCK_M, self.NUM_BYTES, barrier)


@gluon.jit
def copy_numbers(target, source_ptr, NUM_BYTES: gl.constexpr, barrier):
    """One warp: start a copy of NUM_BYTES, a multiple of 16 like both addresses, to shared memory; `barrier` counts them.

    A tensor map would do no more for what is contiguous, and takes a parameter of 128 bytes.
    """
    gl.inline_asm(
        """{ .reg .pred p; elect.sync _|p, 0xffffffff;
        @p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3]; }""",
        "r,l,n,r",
        [target, source_ptr, NUM_BYTES, barrier],
    )


@gluon.aggregate
class BackwardShared:
    """Keys and values of the block lie in a slot for each warpgroup, and use 0 of `kv_ring` brings the keys, use 1 the values.

    A use of `q_ring` brings the queries of one block of BLOCK_M rows, their output's gradient and their row numbers. `ds` holds
    dS^T of both warpgroups, [64 keys, BLOCK_M] each, for two query blocks in turn: `ds_full` completes when all warps have
    written theirs. No barrier says that it is free again: who writes block i + 2 has waited for ds_full of i + 1, where the
    others arrive only when they have done with block i.

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
    ds: gl.shared_memory_descriptor
    q_ring: Ring
    kv_ring: Ring
    ds_full: gl.shared_memory_descriptor
    tiles: Tiles
    heads_per_kv: gl.tensor
    blocks_per_head: gl.tensor
    first_query: gl.tensor
    first_key: gl.tensor
    dq_sum_ptr: gl.tensor
    exponent_scale: gl.tensor
    scale: gl.tensor
    cap_scale: gl.tensor | gl.constexpr
    DQ: gl.constexpr
    # a block's dq is added while the next block's gradients are computed, and kept until then
    CARRY_DQ: gl.constexpr

    @gluon.jit
    def first_head(self, batch, kv_head):
        """The first of the query heads that share a kv head, counted through the batch."""
        return (batch * self.tiles.heads_q + kv_head) * self.heads_per_kv
