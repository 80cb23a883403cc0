"""Small Gluon kernels that tests compile, for what no kernel of the package shows alone. Not collected by pytest."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _load(x_desc, row, tile, full):
    mbarrier.expect(full, x_desc.block_type.nbytes)
    tma.async_load(x_desc, [row, 0], full, tile)


@gluon.jit
def _store(o_desc, row, tile, full):
    mbarrier.wait(full, 0)
    tma.async_store(o_desc, [row, 0], tile)
    tma.store_wait(0)


@gluon.jit
def copy(x_desc, o_desc, count_ptr, rows, UNUSED: gl.constexpr):
    """One tile a program from x to o: one warp loads it and four others store it."""
    tile = gl.allocate_shared_memory(x_desc.dtype, x_desc.block_type.shape, x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    fence_async_shared()
    gl.atomic_add(count_ptr, 1)
    row = gl.program_id(0) * rows
    gl.warp_specialize([(_store, (o_desc, row, tile, full)), (_load, (x_desc, row, tile, full))], [1], [24])


@gluon.jit
def product(x_desc, o_desc, PENDING: gl.constexpr):
    """o = x @ x of one 64 x 64 tile. With a PENDING product it is read too early, which makes ptxas serialise wgmma."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    tile = gl.allocate_shared_memory(x_desc.dtype, x_desc.block_type.shape, x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    fence_async_shared()
    mbarrier.expect(full, x_desc.block_type.nbytes)
    tma.async_load(x_desc, [0, 0], full, tile)
    mbarrier.wait(full, 0)
    acc = warpgroup_mma(tile, tile, gl.zeros([64, 64], gl.float32, LAYOUT), is_async=True)
    acc = warpgroup_mma_wait(PENDING, deps=(acc,))
    tile.store(acc.to(x_desc.dtype))
    fence_async_shared()
    tma.async_store(o_desc, [0, 0], tile)
    tma.store_wait(0)


@gluon.jit
def meet(x_ptr, o_ptr, MEET: gl.constexpr, WAIT: gl.constexpr, EARLY: gl.constexpr):
    """o = x + row, after the blocks of a cluster have met (MEET) and the launches before this one have ended (WAIT).

    EARLY reads x before it waits, which no kernel may.
    """
    rows = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    value = rows
    if EARLY:
        value += gl.load(x_ptr + rows)
    if WAIT:
        value = gl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.b32 $0, $1;", "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1
        )
    if not EARLY:
        value += gl.load(x_ptr + rows)
    if MEET:
        value = gl.inline_asm_elementwise(
            "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; mov.b32 $0, $1;",
            "=r,r",
            [value],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )
    gl.store(o_ptr + rows, value)
