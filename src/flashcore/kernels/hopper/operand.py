"""Operand: a tensor's tiles in shared memory, and the TMA copies between them and global memory."""

from flashcore.kernels.hopper.gluon_api import gl, gluon, tma


@gluon.aggregate
class Operand:
    """`slots` tiles [ROWS, DIM + TAIL_DIM] of a (B, H, S, D) tensor, swizzled for wgmma.

    A head dim that is no power of two (96, 192) is kept as two tiles of such widths: `main` [ROWS, DIM] and `tail`
    [ROWS, TAIL_DIM]. Where there is no tail, TAIL_DIM is 0 and `tail` repeats `main`.
    """

    map: tma.tensor_descriptor
    tail_map: tma.tensor_descriptor
    main: gl.shared_memory_descriptor
    tail: gl.shared_memory_descriptor
    ROWS: gl.constexpr
    DIM: gl.constexpr
    TAIL_DIM: gl.constexpr
    # main and, where there is one, tail: also the number of matrix products that one with this operand takes
    PARTS: gl.constexpr
    NUM_BYTES: gl.constexpr

    @gluon.jit
    def create(map, tail_map, SLOTS: gl.constexpr):
        """Allocate the slots; `tail_map` is None where the head dim is a power of two."""
        main = gl.allocate_shared_memory(map.dtype, [SLOTS] + map.block_shape, map.layout)
        tail = main
        if tail_map is not None:
            tail = gl.allocate_shared_memory(map.dtype, [SLOTS] + tail_map.block_shape, tail_map.layout)
        return Operand.over(map, tail_map, main, tail)

    @gluon.jit
    def over(map, tail_map, main, tail):
        """An operand in memory that is there already."""
        ROWS: gl.constexpr = map.block_shape[2]
        DIM: gl.constexpr = map.block_shape[3]
        if tail_map is None:
            return Operand(map, map, main, main, ROWS, DIM, 0, 1, map.nbytes_per_cta)
        else:
            TAIL_DIM: gl.constexpr = tail_map.block_shape[3]
            NUM_BYTES: gl.constexpr = map.nbytes_per_cta + tail_map.nbytes_per_cta
            return Operand(map, tail_map, main, tail, ROWS, DIM, TAIL_DIM, 2, NUM_BYTES)

    @gluon.jit
    def tile(self, slot):
        """(main, tail) of a slot, as matrices."""
        main = self.main.index(slot).reshape([self.ROWS, self.DIM])
        if self.TAIL_DIM > 0:
            tail = self.tail.index(slot).reshape([self.ROWS, self.TAIL_DIM])
        else:
            tail = main
        return main, tail

    @gluon.jit
    def load(self, slot, batch, head, row, barrier):
        """Start copying rows [row, row + ROWS) of a head into a slot, zeros where there are none; `barrier` counts bytes."""
        tma.async_load(self.map, [batch, head, row, 0], barrier, self.main.index(slot))
        if self.TAIL_DIM > 0:
            tma.async_load(self.tail_map, [batch, head, row, self.DIM], barrier, self.tail.index(slot))

    @gluon.jit
    def store(self, slot, batch, head, row):
        """Start copying a slot to rows [row, row + ROWS) of a head; what is outside the tensor is left out."""
        tma.async_store(self.map, [batch, head, row, 0], self.main.index(slot))
        if self.TAIL_DIM > 0:
            tma.async_store(self.tail_map, [batch, head, row, self.DIM], self.tail.index(slot))
