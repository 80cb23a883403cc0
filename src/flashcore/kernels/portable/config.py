"""Tile configurations of the portable forward kernel, and the predicate that says whether one fits a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from flashcore.target import SHARED_MEMORY_LIMIT


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
        """Whether the pipelined K and V tiles and the query tile fit into shared memory together."""
        stages = max(self.num_stages, self.edge_stages) * 2 * self.block_n * block_d * element_size
        query = self.block_m * block_d * element_size
        return stages + query <= SHARED_MEMORY_LIMIT[arch]
