"""Progress: counts in global memory by which the blocks of a launch share their work, and learn what others have done."""

from flashcore.kernels.hopper.gluon_api import gl, gluon


@gluon.jit
def start_draw(counter_ptr):
    """One warp: draw the next number from a counter without waiting for it. One lane gets it, the others 0."""
    return gl.inline_asm(
        "{ .reg .pred p; mov.b32 $0, 0; elect.sync _|p, 0xffffffff; @p atom.global.add.u32 $0, [$1], 1; }",
        "=r,l",
        [counter_ptr],
        gl.int32,
    )


@gluon.jit
def finish_draw(drawn):
    """The number drawn, in all lanes."""
    return gl.inline_asm("redux.sync.add.u32 $0, $1, 0xffffffff;", "=r,r", [drawn], gl.int32)


@gluon.jit
def report(count_ptr):
    """One warp: add one to a count, for all that it and those it has heard of by barriers have written until now."""
    gl.inline_asm(
        """{ .reg .pred p; bar.warp.sync 0xffffffff; elect.sync _|p, 0xffffffff;
        @p red.release.gpu.global.add.u32 [$0], 1; }""",
        "l",
        [count_ptr],
    )


@gluon.jit
def have_reported(count_ptr, count):
    """One warp: whether so many have reported by now. If so, what they wrote before can be read."""
    reported = gl.inline_asm(
        """{ .reg .pred p; .reg .u32 n; ld.acquire.gpu.global.u32 n, [$1]; setp.ge.u32 p, n, $2;
        vote.sync.all.pred p, p, 0xffffffff; selp.b32 $0, 1, 0, p; }""",
        "=r,l,r",
        [count_ptr, count],
        gl.int32,
    )
    return reported != 0
