"""Step 3, vectorised: the same kernel, told where its tensors begin.

The idea. A thread can load 16 bytes, eight halves, with one instruction, if their address is a multiple of 16. Rows of a
contiguous tensor are so where the tensor begins so, and PyTorch's do. The compiler cannot know that; it is said here, as a
divisor of each pointer. From it the compiler lays out the tile anew: eight neighbouring halves a thread instead of one.

What it should bring. An eighth of the load instructions for the same arithmetic. And a row of a tile now lies in a few
threads, so that the sum along it takes fewer exchanges between them.

The kernel is scalar.py's, to the letter, and so is the tile: what changes is one number.

What it brought is in docs/ladder.md, made from the recorded run.
"""

from __future__ import annotations

from flashcore.kernels.program import Program
from flashcore.ladder.harness import VECTOR_BYTES, fused
from flashcore.ladder.problem import Problem
from flashcore.ladder.scalar import TILE

DIVISOR = VECTOR_BYTES


def program(problem: Problem, arch: str, sm_count: int) -> Program:
    """One launch."""
    return fused("vectorised", "scalar", problem, TILE, divisor=DIVISOR)
