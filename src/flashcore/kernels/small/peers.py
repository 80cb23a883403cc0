"""Peers: the partial results that the blocks of a cluster send one another, and what becomes of them."""

from flashcore.kernels.hopper.gluon_api import gl, gluon, mbarrier
from flashcore.kernels.hopper.layouts import accumulator
from flashcore.kernels.hopper.softmax import finite_pivot
from flashcore.kernels.small.cluster import (
    ROW_BYTES,
    WARP_ROWS,
    arrive_in_cluster,
    cluster_rank,
    expect,
    send_rows,
    send_tile,
    wait_for_cluster,
)
from flashcore.kernels.small.layouts import exchanged

ROWS: gl.constexpr = gl.constexpr(64)


@gluon.aggregate
class Peers:
    """What a block gets from the others of its cluster: (maximum, sum) of each row, and the part of the output that is its own.

    Slot t - 1 of an inbox is for what comes from the block t ranks before this one.
    """

    rank: gl.tensor
    row_inbox: gl.shared_memory_descriptor
    tile_inbox: gl.shared_memory_descriptor
    outbox: gl.shared_memory_descriptor
    rows_arrived: gl.shared_memory_descriptor
    tile_arrived: gl.shared_memory_descriptor
    SIZE: gl.constexpr
    COLUMNS: gl.constexpr

    @gluon.jit
    def create(SIZE: gl.constexpr, COLUMNS: gl.constexpr):
        row_inbox = gl.allocate_shared_memory(gl.float32, [2 * (SIZE - 1), ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        tile_inbox = gl.allocate_shared_memory(gl.float32, [SIZE - 1, ROWS, COLUMNS], exchanged(COLUMNS, COLUMNS))
        outbox = gl.allocate_shared_memory(gl.float32, [SIZE, ROWS, COLUMNS], exchanged(COLUMNS, COLUMNS))
        rows_arrived = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        tile_arrived = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(rows_arrived, count=1)
        mbarrier.init(tile_arrived, count=1)
        return Peers(cluster_rank(), row_inbox, tile_inbox, outbox, rows_arrived, tile_arrived, SIZE, COLUMNS)

    @gluon.jit
    def announce(self):
        """Expect the others' results, and let them come."""
        expect(self.rows_arrived, (self.SIZE - 1) * ROW_BYTES)
        expect(self.tile_arrived, (self.SIZE - 1) * ROWS * self.COLUMNS * 4)
        arrive_in_cluster(True)

    @gluon.jit
    def send_rows(self, m_i, l_i):
        """Send each row's maximum and sum to the others."""
        wait_for_cluster()
        for distance in gl.static_range(1, self.SIZE):
            peer = (self.rank + distance) % self.SIZE
            send_rows(m_i, l_i, self.row_inbox.index(2 * (distance - 1)), self.rows_arrived, peer)

    @gluon.jit
    def send_output(self, acc):
        """Send each of the others its columns of the output."""
        COLUMNS: gl.constexpr = self.SIZE * self.COLUMNS
        self.outbox.reinterpret(gl.float32, [ROWS, COLUMNS], exchanged(COLUMNS, self.COLUMNS)).store(acc)
        for distance in gl.static_range(1, self.SIZE):
            peer = (self.rank + distance) % self.SIZE
            inbox = self.tile_inbox.index(distance - 1)
            send_tile(self.outbox.index(peer), inbox, self.tile_arrived, self.rank, peer, WARP_ROWS * self.COLUMNS * 4)

    @gluon.jit
    def receive_rows(self, m_i, l_i, scale):
        """(m_i, l_i, weights) over all keys: a weight for this block's output, then for each slot of the inbox."""
        mbarrier.wait(self.rows_arrived, 0)
        m_all = m_i
        for slot in gl.static_range(self.SIZE - 1):
            m_all = gl.maximum(m_all, self.row_inbox.index(2 * slot).load(m_i.type.layout))
        pivot = finite_pivot(m_all)
        weights = (gl.exp2((m_i - pivot) * scale),)
        l_all = l_i * weights[0]
        for slot in gl.static_range(self.SIZE - 1):
            weight = gl.exp2((self.row_inbox.index(2 * slot).load(m_i.type.layout) - pivot) * scale)
            l_all += self.row_inbox.index(2 * slot + 1).load(m_i.type.layout) * weight
            weights = weights + (weight,)
        return m_all, l_all, weights

    @gluon.jit
    def receive_output(self, weights, inverse):
        """This block's columns of the output over all keys."""
        layout: gl.constexpr = accumulator(self.COLUMNS)
        rows: gl.constexpr = gl.SliceLayout(1, layout)
        o = self.outbox.index(self.rank).load(layout) * gl.convert_layout(weights[0] * inverse, rows)[:, None]
        factors = ()
        for slot in gl.static_range(self.SIZE - 1):
            factors = factors + (gl.convert_layout(weights[slot + 1] * inverse, rows)[:, None],)
        mbarrier.wait(self.tile_arrived, 0)
        arrive_in_cluster(False)
        for slot in gl.static_range(self.SIZE - 1):
            o += self.tile_inbox.index(slot).load(layout) * factors[slot]
        return o

    @gluon.jit
    def leave(self):
        """Wait until the others have what they copy from this block's memory: before that, it must not end."""
        wait_for_cluster()
        # To the compiler the outbox ends with the block's own last look at it, and it would put other things there, which
        # copies still under way would send. A use after the wait keeps the memory; it makes no instruction.
        self.outbox._keep_alive()
