"""The launch of step 8, apart from its kernel: it must work with any Triton, and the kernel's Gluon imports with one only."""

from __future__ import annotations

from flashcore.kernels.program import Program
from flashcore.ladder.async_copies import STAGES
from flashcore.ladder.harness import Tile, fused
from flashcore.ladder.problem import Problem
from flashcore.ladder.tuned_tiles import choose

# Beside eight consumer warps and the producer's four, 168 registers a thread are left, which are too few at head dim 128.
TILE_128 = Tile(64, 32, 4)


def program(problem: Problem, arch: str, sm_count: int) -> Program:
    """One launch. A block has the tile's warps as consumers and, for the producer, four more."""
    tile = TILE_128 if problem.head_dim == 128 else choose(problem, sm_count)
    constants = {"STAGES": STAGES, "WGMMA": arch == "sm_90a"}
    return fused("warp_specialised", "warp_specialised", problem, tile, num_stages=STAGES, constants=constants)
