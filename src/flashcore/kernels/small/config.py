"""Forms of the small forward kernel: how many blocks share a tile's keys, and how many each takes.

docs/notes/small-forward.md has the measurements behind the table.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashcore.target import SHARED_MEMORY_LIMIT

# of q, k and v, which the kernel is built for; others are padded up to one by the copy engine
HEAD_DIMS = (32, 64, 128)

ROWS = 64
# barriers, and what aligning the tiles takes, at most
COMPILER_SHARED = 2048
# of a thread, for its scores and its part of the output: with 160 of them there are no spills, with 192 there are
ACCUMULATOR_REGISTERS = 160


@dataclass(frozen=True, slots=True)
class SmallConfig:
    """A cluster of `cluster` blocks shares the keys of a tile of 64 rows; each takes `keys`, in tiles of `block_n`."""

    cluster: int
    keys: int
    block_n: int

    @property
    def name(self) -> str:
        return f"c{self.cluster}k{self.keys}n{self.block_n}"

    @property
    def capacity(self) -> int:
        """The most keys that a call may have."""
        return self.cluster * self.keys

    def shared_memory(self, head_dim: int) -> int:
        """Bytes of shared memory for the tiles and for what is exchanged."""
        tiles = 2 * (ROWS + 2 * self.keys) * head_dim
        exchanged = 0 if self.cluster == 1 else 4 * ROWS * (2 * head_dim - head_dim // self.cluster)
        return tiles + exchanged + 8 * ROWS * (self.cluster - 1)

    def resident(self, head_dim: int) -> int:
        """Blocks that a multiprocessor's shared memory holds at once."""
        return SHARED_MEMORY_LIMIT["sm_90a"] // (self.shared_memory(head_dim) + COMPILER_SHARED)

    def fits(self, head_dim: int) -> bool:
        """Whether a multiprocessor has the shared memory and a warpgroup the registers: all scores are in them at once."""
        return (
            self.cluster in (1, 2, 4)
            and self.keys % self.block_n == 0
            and (self.keys + head_dim) // 2 <= ACCUMULATOR_REGISTERS
            and self.shared_memory(head_dim) + COMPILER_SHARED <= SHARED_MEMORY_LIMIT["sm_90a"]
        )


# What a search (flashcore.search) may choose of each field.
CHOICES: dict[str, tuple[int, ...]] = {
    "cluster": (1, 2, 4),
    "keys": tuple(range(32, 289, 32)),
    "block_n": (32, 64, 128, 256),
}

_UP_TO_256 = (SmallConfig(1, 64, 64), SmallConfig(1, 128, 128), SmallConfig(2, 128, 128))
# head dim -> forms by capacity, of which a call takes the first that holds its keys. At head dim 128 the scores of 256 keys do
# not fit into the registers beside the output.
FORMS = {
    32: (*_UP_TO_256, SmallConfig(2, 256, 128), SmallConfig(4, 256, 128)),
    64: (*_UP_TO_256, SmallConfig(2, 256, 128), SmallConfig(4, 256, 128)),
    128: (*_UP_TO_256, SmallConfig(4, 128, 128)),
}


def padded_head_dim(head_dim: int) -> int:
    """The smallest of HEAD_DIMS that holds a call's.

    Raises:
        StopIteration: none does.
    """
    return next(d for d in HEAD_DIMS if head_dim <= d)


def capacity(head_dim: int) -> int:
    """The most keys that a call may have; `head_dim` is one of HEAD_DIMS."""
    return FORMS[head_dim][-1].capacity


def choose_config(head_dim: int, keys: int) -> SmallConfig:
    """The form for a call with at most capacity(head_dim) keys."""
    return next(form for form in FORMS[head_dim] if keys <= form.capacity)
