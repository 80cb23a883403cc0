"""What the producer and the consumers of a block share: the tiles in shared memory, their barriers, the work and its form."""

from flashcore.kernels.hopper.gluon_api import gl, gluon
from flashcore.kernels.hopper.operand import Operand
from flashcore.kernels.hopper.ring import Ring
from flashcore.kernels.hopper.tiles import Tiles


@gluon.aggregate
class Options:
    """The form of the kernel; kernels/hopper/config.py says what each is for and which is taken when."""

    WARPGROUPS: gl.constexpr
    Q_REGISTERS: gl.constexpr
    O_SHARES_Q: gl.constexpr
    JOIN_TILES: gl.constexpr
    SKIP_RESCALE: gl.constexpr
    EMULATE_EXP2: gl.constexpr
    HOLD_WAIT: gl.constexpr
    SOFTCAP: gl.constexpr


@gluon.aggregate
class Shared:
    """Queries come through `q_ring`, a slot for each warpgroup of a tile; keys and values through `kv_ring`.

    A use of kv_ring brings the keys of one block and the values of the block before: what one step of the main loop takes. With
    JOIN_TILES the first keys of a tile come with the last values of the tile before, else each comes alone.
    """

    q: Operand
    k: Operand
    v: Operand
    o: Operand
    q_ring: Ring
    kv_ring: Ring
    announcements: gl.shared_memory_descriptor
    tiles: Tiles
    options: Options

    @gluon.jit
    def announce_tile(self, slot, m0, batch, head):
        """Producer: say which tile the queries in a slot belong to; m0 < 0 says that there are no more."""
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        self.announcements.index(3 * slot).store(gl.full([1], m0, gl.int32, layout))
        self.announcements.index(3 * slot + 1).store(gl.full([1], batch, gl.int32, layout))
        self.announcements.index(3 * slot + 2).store(gl.full([1], head, gl.int32, layout))

    @gluon.jit
    def announced_tile(self, slot):
        """Consumer: (m0, batch, head) of the tile whose queries a slot holds."""
        return self._announced(3 * slot), self._announced(3 * slot + 1), self._announced(3 * slot + 2)

    @gluon.jit
    def _announced(self, index):
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        return gl.max(self.announcements.index(index).load(layout), 0)
