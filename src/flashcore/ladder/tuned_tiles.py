"""Step 6, tuned tiles: the same kernel, with tiles to fit the machine.

The idea. A program reads every key and value of its head once for each tile of queries, so the higher the tile, the fewer
bytes move for the same arithmetic. Wider tiles of keys mean fewer rounds, each with its maximum, its rescaling and its waits.
Against that: a tile's scores and results live in registers, and whoever holds more of them leaves room for fewer warps, at
the limit spilling them to memory. And fewer, larger tiles may be too few to fill the GPU.

What it should bring. The matrix units see operands of a size that they were made for. How much depends on the GPU, so the
tiles are a table: for few queries those that keep to 128 registers a thread, for many the largest here that spill nothing.
They were found by compiling. A sweep on a GPU may put others in their place.

The kernel is tensor_core_pv.py's, to the letter.

What it brought is in docs/ladder.md, made from the recorded run.
"""

from __future__ import annotations

from flashcore.kernels.program import Program
from flashcore.ladder.harness import Tile, fused
from flashcore.ladder.problem import Problem

# head dim -> (tile for few queries, for many)
TILES = {
    16: (Tile(64, 64, 4), Tile(128, 64, 8)),
    32: (Tile(64, 64, 4), Tile(128, 64, 8)),
    64: (Tile(64, 32, 4), Tile(128, 64, 8)),
    128: (Tile(64, 32, 8), Tile(128, 32, 8)),
}


def choose(problem: Problem, sm_count: int) -> Tile:
    """The larger tile where it still gives every multiprocessor two programs."""
    few, many = TILES[problem.head_dim]
    return many if problem.rows >= 2 * many.block_m * sm_count else few


def program(problem: Problem, arch: str, sm_count: int) -> Program:
    """One launch."""
    return fused("tuned_tiles", "tensor_core_pv", problem, choose(problem, sm_count))
