"""Ring: the barriers of shared-memory slots that one producer fills and several consumers drain, in order."""

from flashcore.kernels.hopper.gluon_api import gl, gluon, mbarrier


@gluon.aggregate
class Ring:
    """`use` below numbers the uses of the ring from 0 on; use `use` takes slot `use % SLOTS`.

    full: completed by the bytes that the producer announced; empty: by an arrival of each warp of the consumers.
    """

    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    SLOTS: gl.constexpr

    @gluon.jit
    def create(SLOTS: gl.constexpr, CONSUMER_WARPS: gl.constexpr):
        full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
        for slot in gl.static_range(SLOTS):
            mbarrier.init(full.index(slot), count=1)
            mbarrier.init(empty.index(slot), count=CONSUMER_WARPS)
        return Ring(full, empty, SLOTS)

    @gluon.jit
    def reserve(self, use):
        """Producer: wait until the slot is free; returns it."""
        slot = use % self.SLOTS
        mbarrier.wait(self.empty.index(slot), ((use // self.SLOTS) & 1) ^ 1)
        return slot

    @gluon.jit
    def expect(self, slot, NUM_BYTES: gl.constexpr):
        """Producer: announce how many bytes will be copied into a reserved slot; returns the barrier that counts them."""
        full = self.full.index(slot)
        mbarrier.expect(full, NUM_BYTES)
        return full

    @gluon.jit
    def wait(self, use):
        """Consumer: wait until the slot is filled; returns it."""
        slot = use % self.SLOTS
        mbarrier.wait(self.full.index(slot), (use // self.SLOTS) & 1)
        return slot

    @gluon.jit
    def release(self, use):
        """Consumer: give the slot back. One lane of each warp arrives, so that no warp waits for another, as all of them would
        in Gluon's own arrive."""
        gl.inline_asm(
            "{ .reg .pred p; elect.sync _|p, 0xffffffff; @p mbarrier.arrive.shared::cta.b64 _, [$0]; }",
            "r",
            [self.empty.index(use % self.SLOTS)],
        )
