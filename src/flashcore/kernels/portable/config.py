"""Tile configurations of the portable forward kernel, and the predicate that says whether one fits a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from flashcore.target import SHARED_MEMORY_LIMIT

# Of a thread, for scores and outputs: with 192 of them there are forms without spills, with 256 there are none.
ACCUMULATOR_REGISTERS = 192


@dataclass(frozen=True, slots=True)
class PortableConfig:
    """BLOCK_M query rows by BLOCK_N keys a tile, on num_warps warps, with num_stages tiles of K and V in flight.

    `edge_stages` are the tiles in flight in the loops that mask: the band's edges, or every tile under a mask.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    edge_stages: int

    @property
    def name(self) -> str:
        edge = "" if self.edge_stages == self.num_stages else f"e{self.edge_stages}"
        return f"m{self.block_m}n{self.block_n}w{self.num_warps}s{self.num_stages}{edge}"

    def fits(self, arch: str, block_d: int, element_size: int) -> bool:
        """Whether the pipelined K and V tiles and the query tile fit into shared memory, and what is summed into registers."""
        stages = max(self.num_stages, self.edge_stages) * 2 * self.block_n * block_d * element_size
        query = self.block_m * block_d * element_size
        accumulators = self.block_m * (self.block_n + block_d) // (32 * self.num_warps)
        return stages + query <= SHARED_MEMORY_LIMIT[arch] and accumulators <= ACCUMULATOR_REGISTERS


# What a search (flashcore.search) may choose of each field.
CHOICES: dict[str, tuple[int, ...]] = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (16, 32, 64, 128, 256),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3, 4),
    "edge_stages": (1, 2, 3, 4),
}
