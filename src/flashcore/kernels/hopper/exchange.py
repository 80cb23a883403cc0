"""Exchange: what one warpgroup computes and another needs too, handed over in shared memory."""

from flashcore.kernels.hopper.gluon_api import gl, gluon, mbarrier


@gluon.jit
def arrive_together(barrier):
    """One lane of each warp arrives, for all that its warp has written and read until now."""
    gl.inline_asm(
        """{ .reg .pred p; bar.warp.sync 0xffffffff; elect.sync _|p, 0xffffffff;
        @p mbarrier.arrive.shared::cta.b64 _, [$0]; }""",
        "r",
        [barrier],
    )


@gluon.aggregate
class Exchange:
    """BUFFERS tiles in turn, from the threads of one warpgroup to those of another. `use` numbers the tiles from 0 on.

    full: an arrival of each warp that has written its part; empty: one of each that has read its own.
    """

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    BUFFERS: gl.constexpr

    @gluon.jit
    def create(dtype: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, BUFFERS: gl.constexpr):
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], dtype)
        tiles = gl.allocate_shared_memory(dtype, [BUFFERS, ROWS, COLUMNS], LAYOUT)
        full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
        for buffer in gl.static_range(BUFFERS):
            mbarrier.init(full.index(buffer), count=gl.num_warps())
            mbarrier.init(empty.index(buffer), count=gl.num_warps())
        return Exchange(tiles, full, empty, BUFFERS)

    @gluon.jit
    def give(self, use, tile):
        """Hand over tile number `use`, once the one that lay in its place has been taken."""
        buffer = use % self.BUFFERS
        mbarrier.wait(self.empty.index(buffer), ((use // self.BUFFERS) & 1) ^ 1)
        self.tiles.index(buffer).store(tile)
        arrive_together(self.full.index(buffer))

    @gluon.jit
    def take(self, use, LAYOUT: gl.constexpr):
        """Wait for tile number `use`; returns it."""
        buffer = use % self.BUFFERS
        mbarrier.wait(self.full.index(buffer), (use // self.BUFFERS) & 1)
        tile = self.tiles.index(buffer).load(LAYOUT)
        arrive_together(self.empty.index(buffer))
        return tile
