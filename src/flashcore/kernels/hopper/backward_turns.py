"""Turns: the blocks of the backward kernel add to the sums of dq in one order, so that gradients are bitwise the same from run
to run.

The tiles of a head's keys add to the sums of a block of query rows in the order in which they are drawn, and a count in global
memory says how many have. Two warps of a block, the ushers, see to it, because either waits for memory most of the time: one
waits until it is the block's turn, the other reports what has been added. A block waits only for tiles that were drawn before
its own, so that some block can always go on.
"""

from flashcore.kernels.hopper.exchange import arrive_together
from flashcore.kernels.hopper.gluon_api import gl, gluon, mbarrier
from flashcore.kernels.hopper.launches import wait_for_earlier_launch
from flashcore.kernels.hopper.progress import have_reported, report


@gluon.aggregate
class Turns:
    """`use` below numbers what the consumers of a block add, from 0 on; use `use` takes slot `use % SLOTS`.

    come: an arrival of the first usher; added: of each warp of the consumers; reported: of the second usher.
    """

    come: gl.shared_memory_descriptor
    added: gl.shared_memory_descriptor
    reported: gl.shared_memory_descriptor
    SLOTS: gl.constexpr

    @gluon.jit
    def create(SLOTS: gl.constexpr, CONSUMER_WARPS: gl.constexpr):
        come = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
        added = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
        reported = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
        for slot in gl.static_range(SLOTS):
            mbarrier.init(come.index(slot), count=1)
            mbarrier.init(added.index(slot), count=CONSUMER_WARPS)
            mbarrier.init(reported.index(slot), count=1)
        return Turns(come, added, reported, SLOTS)

    @gluon.jit
    def wait(self, use):
        """Consumer: wait until it is the block's turn."""
        mbarrier.wait(self.come.index(use % self.SLOTS), (use // self.SLOTS) & 1)

    @gluon.jit
    def give(self, use):
        """Consumer: a warp has added its part."""
        arrive_together(self.added.index(use % self.SLOTS))

    @gluon.jit
    def admit(self, use, count_ptr, turn):
        """First usher: wait until so many tiles have added to the sums, and let the consumers add."""
        mbarrier.wait(self.reported.index(use % self.SLOTS), ((use // self.SLOTS) & 1) ^ 1)
        come = have_reported(count_ptr, turn)
        while come == 0:
            come = have_reported(count_ptr, turn)
        arrive_together(self.come.index(use % self.SLOTS))

    @gluon.jit
    def report(self, use, count_ptr, counts):
        """Second usher: wait until the consumers have added, and if it `counts`, let the next tile."""
        mbarrier.wait(self.added.index(use % self.SLOTS), (use // self.SLOTS) & 1)
        if counts:
            report(count_ptr)
        arrive_together(self.reported.index(use % self.SLOTS))


@gluon.jit
def _turn(s, n0, block):
    """How many tiles of the head's keys add to the sums of a block of query rows before the tile at n0, which does."""
    tiles = s.tiles
    first = 0
    if tiles.HAS_HI:
        # the ends of what tiles visit rise with their keys: the first that ends behind the block. All visit some block, those
        # without any the first.
        reach = gl.maximum(block * tiles.BLOCK_N - tiles.band_hi, 0) // tiles.BLOCK_M
        first = gl.where(block == 0, 0, reach)
    return n0 // tiles.BLOCK_M - first


@gluon.jit
def usher(REPORTS: gl.constexpr, s):
    """One warp: wait for the block's turns, or with REPORTS report them, tile after tile, as the consumers walk."""
    wait_for_earlier_launch()
    use = 0
    kv_use = 0
    s.kv_ring.wait(kv_use)
    n0, batch, kv_head = s.announced_tile()
    while n0 >= 0:
        arrive_together(s.kv_ring.empty.index(kv_use % 2))
        s.kv_ring.release(kv_use + 1)
        begin, end = s.tiles.visited(n0)
        first_number = s.first_head(batch, kv_head) * s.blocks_per_head
        if s.CARRY_DQ:
            # the first step of a tile has no block before it, and adds zeros, which change nothing
            count_ptr = s.progress.turn(first_number + begin)
            if REPORTS:
                s.turns.report(use, count_ptr, False)
            else:
                s.turns.admit(use, count_ptr, 0)
            use += 1
        for _member in range(0, s.heads_per_kv):
            for block in range(begin, end):
                count_ptr = s.progress.turn(first_number + block)
                if REPORTS:
                    s.turns.report(use, count_ptr, True)
                else:
                    s.turns.admit(use, count_ptr, _turn(s, n0, block))
                use += 1
            first_number += s.blocks_per_head
        kv_use += 2
        s.kv_ring.wait(kv_use)
        n0, batch, kv_head = s.announced_tile()
