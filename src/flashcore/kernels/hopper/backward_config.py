"""Forms of the Hopper backward's dq kernel: which one a call takes, and the predicate that says whether one fits the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from flashcore.kernels.hopper.config import BARRIER_SIZE, COMPILER_SHARED, REGISTERS, WARPGROUP_ROWS
from flashcore.target import SHARED_MEMORY_LIMIT

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

    def shared_memory(self, head_dim: int) -> int:
        """Bytes of shared memory for the tiles and their barriers; the compiler adds a little of its own."""
        rows = self.block_m + self.slots * self.block_n
        return 2 * rows * 2 * head_dim + 2 * BARRIER_SIZE * (self.warpgroups + self.slots)

    def fits(self, head_dim: int) -> bool:
        """Whether a multiprocessor has registers and memory for it, and the ring room for the keys of two blocks."""
        shared = self.shared_memory(head_dim) + COMPILER_SHARED
        return self.warpgroups in REGISTERS and self.slots >= 2 and shared <= SHARED_MEMORY_LIMIT["sm_90a"]


# By head dim, and whether there is a band: the fastest that spills nothing. A thread holds scores, do v^T and dq in float32,
# which leaves room for 64 keys; and, at head dim 128 where no mask has to be computed, for the output's gradient.
DQ_CONFIGS = {
    (64, False): DqConfig(3, 64, 4),
    (64, True): DqConfig(3, 64, 4),
    (128, False): DqConfig(2, 64, 4, do_registers=True),
    (128, True): DqConfig(2, 64, 4),
}
