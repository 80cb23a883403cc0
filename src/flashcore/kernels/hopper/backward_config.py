"""Head dims that the Hopper backward is built for, and the forms of its kernels that make one gradient or two: which one a call
takes, and the predicates that say whether one fits the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from flashcore.kernels.hopper.config import BARRIER_SIZE, COMPILER_SHARED, REGISTERS, WARPGROUP_ROWS
from flashcore.target import SHARED_MEMORY_LIMIT

# (head dim of q and k, head dim of v) that the kernels are built for; others are padded up to one by the copy engine.
HEAD_DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))

# Elements of the output that a program of the prepare kernel reads: with 128 threads, eight loads of 16 bytes a thread.
PREPARED_ELEMENTS = 8192


@dataclass(frozen=True, slots=True)
class DqConfig:
    """`warpgroups` of 64 query rows a tile; blocks of `block_n` keys in a ring of `slots`.

    q_registers, do_registers: queries, or their output's gradient, are held in registers: products of 64 columns with both
    operands in shared memory take all of its bandwidth.
    """

    warpgroups: int
    block_n: int
    slots: int
    q_registers: bool = False
    do_registers: bool = False

    @property
    def name(self) -> str:
        held = ("q" if self.q_registers else "") + ("d" if self.do_registers else "")
        return f"w{self.warpgroups}n{self.block_n}k{self.slots}{held}"

    @property
    def block_m(self) -> int:
        """Query rows of a tile."""
        return self.warpgroups * WARPGROUP_ROWS

    def shared_memory(self, head_dims: tuple[int, int]) -> int:
        """Bytes of shared memory for the tiles and their barriers; the compiler adds a little of its own."""
        rows = self.block_m + self.slots * self.block_n
        return 2 * rows * sum(head_dims) + 2 * BARRIER_SIZE * (self.warpgroups + self.slots)

    def fits(self, head_dims: tuple[int, int]) -> bool:
        """Whether a multiprocessor has registers and memory for it, and the ring room for the keys of two blocks."""
        shared = self.shared_memory(head_dims) + COMPILER_SHARED
        return self.warpgroups in REGISTERS and self.slots >= 2 and shared <= SHARED_MEMORY_LIMIT["sm_90a"]


# By head dims, and whether there is a band: the fastest that spills nothing. A thread holds scores, do v^T and dq in float32,
# which leaves room for 64 keys, or 32 beside 256 columns of dq; and, at head dim 128 where no mask has to be computed, for the
# output's gradient.
DQ_CONFIGS = {
    ((64, 64), False): DqConfig(3, 64, 4),
    ((64, 64), True): DqConfig(3, 64, 4),
    ((128, 128), False): DqConfig(2, 64, 4, do_registers=True),
    ((128, 128), True): DqConfig(2, 64, 4),
    ((192, 128), False): DqConfig(2, 64, 3),
    ((192, 128), True): DqConfig(2, 64, 3),
    ((256, 256), False): DqConfig(2, 32, 3),
    ((256, 256), True): DqConfig(2, 32, 3),
}


@dataclass(frozen=True, slots=True)
class WideConfig:
    """dk and dv of wide heads: blocks of `block_m` query rows in a ring of `slots`, and `exchanged` tiles between the
    warpgroups."""

    block_m: int
    slots: int
    exchanged: int = 2

    @property
    def name(self) -> str:
        return f"m{self.block_m}k{self.slots}x{self.exchanged}"

    def shared_memory(self, head_dims: tuple[int, int]) -> int:
        """Bytes of shared memory for the tiles and their barriers; the compiler adds a little of its own."""
        tiles = 2 * (WARPGROUP_ROWS + self.slots * self.block_m) * sum(head_dims)
        exchanged = 2 * self.exchanged * WARPGROUP_ROWS * self.block_m
        row_numbers = 2 * 4 * self.slots * self.block_m
        return tiles + exchanged + row_numbers + 2 * BARRIER_SIZE * (self.slots + self.exchanged + 2)

    def fits(self, head_dims: tuple[int, int]) -> bool:
        """Whether a multiprocessor has memory for it, and the ring room for the queries of two blocks and those to come."""
        return self.slots >= 3 and self.shared_memory(head_dims) + COMPILER_SHARED <= SHARED_MEMORY_LIMIT["sm_90a"]


# By head dims: a thread holds 64 keys' dk, or dv, and the products that its next factor is made of.
WIDE_CONFIGS = {(192, 128): WideConfig(64, 4), (256, 256): WideConfig(32, 4)}
