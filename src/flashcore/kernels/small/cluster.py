"""What the blocks of a cluster do together, as PTX: Gluon knows clusters only by tensors that are spread over one.

Two things to know of addresses. Gluon hands a shared-memory descriptor to PTX as an offset within the block, without the rank
that a cluster's addresses hold, so every address here goes through `mapa`, the block's own too. And a `.aligned` instruction
needs a warp whose lanes are together, which after a wait for a barrier only `bar.warp.sync` promises.
"""

from flashcore.kernels.hopper.gluon_api import gl, gluon

LANES_TOGETHER: gl.constexpr = gl.constexpr("bar.warp.sync 0xffffffff; ")
WARP_ROWS: gl.constexpr = gl.constexpr(16)
# two numbers for each of 64 rows
ROW_BYTES: gl.constexpr = gl.constexpr(512)


@gluon.jit
def cluster_rank():
    """The block's number in its cluster."""
    return gl.inline_asm("mov.u32 $0, %cluster_ctarank;", "=r", [], gl.int32, is_pure=True)


@gluon.jit
def arrive_in_cluster(PUBLISH_BARRIERS: gl.constexpr):
    """Tell the others that this block has come here; with PUBLISH_BARRIERS they may then use the barriers it has initialised.

    Relaxed: what a release would add is a fence over the whole GPU, and nothing else is published this way.
    """
    fence: gl.constexpr = "fence.mbarrier_init.release.cluster; " if PUBLISH_BARRIERS else ""
    gl.inline_asm(LANES_TOGETHER + fence + "barrier.cluster.arrive.relaxed.aligned;")


@gluon.jit
def wait_for_cluster():
    """Wait until every block of the cluster has arrived."""
    gl.inline_asm(LANES_TOGETHER + "barrier.cluster.wait.acquire.aligned;")


@gluon.jit
def expect(barrier, NUM_BYTES: gl.constexpr):
    """Announce to one of the block's barriers how many bytes will come. One thread does, the one that starts TMA copies, so
    that nobody has to wait for it as all would in Gluon's own `expect`."""
    gl.inline_asm(
        """{ .reg .pred elected, first; .reg .b32 thread, rank, barrier;
        mov.u32 rank, %cluster_ctarank; mapa.shared::cluster.u32 barrier, $0, rank;
        mov.u32 thread, %tid.x; setp.lt.u32 first, thread, 32;
        elect.sync _|elected, 0xffffffff; and.pred elected, elected, first;
        @elected mbarrier.arrive.expect_tx.shared::cta.b64 _, [barrier], $1; }""",
        "r,n",
        [barrier, NUM_BYTES],
    )


@gluon.constexpr_function
def _send_rows(outputs, inputs):
    """PTX: the first of each four lanes, which hold the same two rows, sends their two pairs of numbers."""
    (m_0, m_1), (l_0, l_1), (inbox,), (barrier,), (peer,) = inputs
    send = "@first st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32"
    return f"""{{ .reg .pred first; .reg .b32 thread, quad, warp, to, remote;
        mov.u32 thread, %tid.x; and.b32 quad, thread, 3; setp.eq.u32 first, quad, 0;
        and.b32 quad, thread, 28; and.b32 warp, thread, 96; mad.lo.u32 to, warp, 2, {inbox}; add.u32 to, to, quad;
        mapa.shared::cluster.u32 to, to, {peer}; mapa.shared::cluster.u32 remote, {barrier}, {peer};
        {send} [to], {m_0}, [remote]; {send} [to+32], {m_1}, [remote];
        {send} [to+256], {l_0}, [remote]; {send} [to+288], {l_1}, [remote]; }}"""


@gluon.jit
def send_rows(m_i, l_i, inbox, barrier, peer):
    """Send two numbers for each of 64 rows to a block's inbox [2, 64] fp32; its barrier counts ROW_BYTES.

    m_i, l_i: rows of a wgmma accumulator.
    """
    gl.inline_asm(_send_rows, ("f", "f", "r", "r", "r"), [m_i, l_i, inbox, barrier, peer])


@gluon.jit
def send_tile(outbox, inbox, barrier, rank, peer, WARP_BYTES: gl.constexpr):
    """Copy a tile of shared memory to a block's inbox, whose barrier counts the bytes.

    Each warp sends WARP_BYTES, which must be what it wrote itself. This block must live until they have arrived.
    """
    gl.inline_asm(
        """{ .reg .pred elected; .reg .b32 warp, from, to, remote;
        mov.u32 warp, %tid.x; shr.u32 warp, warp, 5;
        mad.lo.u32 from, warp, $5, $0; mapa.shared::cluster.u32 from, from, $3;
        mad.lo.u32 to, warp, $5, $1; mapa.shared::cluster.u32 to, to, $4;
        mapa.shared::cluster.u32 remote, $2, $4;
        fence.proxy.async.shared::cta; bar.warp.sync 0xffffffff; elect.sync _|elected, 0xffffffff;
        @elected cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [to], [from], $5, [remote]; }""",
        "r,r,r,r,r,n",
        [outbox, inbox, barrier, rank, peer, WARP_BYTES],
    )
