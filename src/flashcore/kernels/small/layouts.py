"""Layouts of partial results: between registers, the shared memory of a cluster, and global memory."""

from flashcore.kernels.hopper.gluon_api import gl, gluon


@gluon.constexpr_function
def exchanged(columns, part_columns):
    """Shared memory of a [64, columns] wgmma accumulator in the order in which threads hold it, part after part of its columns.

    Four numbers of a thread lie together, then those of the next lane, so that there are no bank conflicts; and what a warp
    holds of a part is contiguous.
    """
    thread = [[0, 1], [8, 0]]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    groups = [[0, 1 << bit] for bit in range(3, columns.bit_length() - 1)]
    within = part_columns.bit_length() - 4
    warps = [[16, 0], [32, 0]]
    return gl.SharedLinearLayout([*thread, *lanes, *groups[:within], *warps, *groups[within:]])


@gluon.constexpr_function
def stored(columns):
    """Registers from which [64, columns] half-precision numbers are stored: 16 bytes a thread where there are as many, and
    the rows of each warp as in a wgmma accumulator, so that nothing crosses warps on the way."""
    column_bits = [[0, 1 << bit] for bit in range(columns.bit_length() - 1)]
    row_bits = [[1 << bit, 0] for bit in range(4)]
    together = min(3, len(column_bits) - 1)  # a warp's 16 rows of 2^n columns are 2^(n-1) numbers a thread
    beside = column_bits[together : together + 2]
    rows = row_bits[: 5 - len(beside)]
    left = [*row_bits[len(rows) :], *column_bits[together + len(beside) :]]
    return gl.DistributedLinearLayout(
        reg_bases=[*column_bits[:together], *left],
        lane_bases=[*beside, *rows],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, columns],
    )
