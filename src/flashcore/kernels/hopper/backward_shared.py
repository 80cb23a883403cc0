"""What the producer and the consumers of a block of the backward kernel share: tiles in shared memory, barriers, the work."""

from flashcore.kernels.hopper.backward_turns import Turns
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
class Progress:
    """How far a launch is, int32 numbers that start at 0: tiles that blocks have drawn; for each kv head, tiles of its keys
    that have been added to the sums of dq; for each 64 query rows of a padded head, whether dq was rounded from the sums; and
    where tiles add in turn, for each block of query rows, how many have."""

    ptr: gl.tensor
    kv_heads: gl.tensor
    row_tiles: gl.tensor

    @gluon.jit
    def drawn(self):
        return self.ptr

    @gluon.jit
    def added(self, kv_number):
        return self.ptr + 1 + kv_number

    @gluon.jit
    def rounded(self, row_tile):
        return self.ptr + 1 + self.kv_heads + row_tile

    @gluon.jit
    def turn(self, block):
        return self.ptr + 1 + self.kv_heads + self.row_tiles + block


@gluon.aggregate
class BackwardShared:
    """Keys and values of a tile lie in a slot for each warpgroup; of `kv_ring`, use 2 i brings the keys of the block's tile i,
    and what is announced of the tile, and use 2 i + 1 its values. A use of `q_ring` brings the queries of one block of BLOCK_M
    rows, their output's gradient and their row numbers. `ds` holds dS^T of both warpgroups, [64 keys, BLOCK_M] each, for two
    query blocks in turn: `ds_full` completes when all warps have written theirs. No barrier says that it is free again: who
    writes block i + 2 has waited for ds_full of i + 1, where the others arrive only when they have done with block i. Every
    gradient leaves by the slot that dk, dv and dq have for each warpgroup.

    `tiles` has the roles exchanged: its rows are keys and its keys are query rows. Coordinates in the maps begin at the first
    key and the first query row that take part in anything. `blocks_per_head` counts blocks of BLOCK_M padded rows.
    `exponent_scale` and `cap_scale` are those of the kernel.

    Query rows are rounded by pairs of 64, `pairs_per_tile` of them after each tile of keys: those that fall to the tile `lag`
    before it, if by then all of their head's tiles have been added to the sums. What was not is left to the launch that
    follows."""

    q: Operand
    do: Operand
    k: Operand
    v: Operand
    dk: Operand
    dv: Operand
    dq: Operand
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
    # the last `shared_tiles` tiles are shared by `sharers` blocks each: every one takes a part of the query blocks
    dkv_sum_ptr: gl.tensor | gl.constexpr
    shared_tiles: gl.tensor | gl.constexpr
    sharers: gl.tensor | gl.constexpr
    lag: gl.tensor | gl.constexpr
    pairs_per_tile: gl.tensor | gl.constexpr
    progress: Progress
    # of the form whose sums are made in one order
    turns: Turns | gl.constexpr
    announcement: gl.shared_memory_descriptor
    exponent_scale: gl.tensor
    scale: gl.tensor
    cap_scale: gl.tensor | gl.constexpr
    DQ: gl.constexpr
    # a block's dq is added while the next block's gradients are computed, and kept until then
    CARRY_DQ: gl.constexpr
    # the last query block of a tile has a step of its own, in which nothing is computed in vain
    OWN_LAST: gl.constexpr
    SHARE_TILES: gl.constexpr

    @gluon.jit
    def first_head(self, batch, kv_head):
        """The first of the query heads that share a kv head, counted through the batch."""
        return (batch * self.tiles.heads_q + kv_head) * self.heads_per_kv

    @gluon.jit
    def in_order(self, tile):
        """The tile that is taken so late: counted from the last where some keys have more query rows than others, because the
        first keys have the most if attention is causal, and what takes longest has to begin first."""
        if self.tiles.HAS_HI:
            return self.tiles.total - 1 - tile
        else:
            return tile

    @gluon.jit
    def announce_tile(self, n0, batch, kv_head, begin, end, slot, first, pairs):
        """Producer: say of the keys that come next which tile they are, n0 < 0 if there are no more; which query blocks the
        block takes; the slot of the tile's sums of dk and dv, < 0 if no other block has a part of it; and which query rows are
        to be rounded after it: so many pairs of 64, `first` the first of these, counted through all heads."""
        self._announce(0, n0)
        self._announce(1, batch)
        self._announce(2, kv_head)
        self._announce(3, begin)
        self._announce(4, end)
        self._announce(5, slot)
        self._announce(6, first)
        self._announce(7, pairs)

    @gluon.jit
    def announced_tile(self):
        """Consumer: (n0, batch, kv head) of the tile whose keys have come."""
        return self._announced(0), self._announced(1), self._announced(2)

    @gluon.jit
    def announced_blocks(self):
        """Consumer: [begin, end) of its query blocks."""
        return self._announced(3), self._announced(4)

    @gluon.jit
    def announced_slot(self):
        """Consumer: the slot of the tile's sums of dk and dv, < 0 if it has none."""
        return self._announced(5)

    @gluon.jit
    def announced_rows(self):
        """Consumer: (first, pairs) of the rows that are to be rounded after the tile."""
        return self._announced(6), self._announced(7)

    @gluon.jit
    def _announce(self, index, number):
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        self.announcement.index(index).store(gl.full([1], number, gl.int32, layout))

    @gluon.jit
    def _announced(self, index):
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        return gl.max(self.announcement.index(index).load(layout), 0)
