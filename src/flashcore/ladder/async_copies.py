"""Step 7, async copies: the next keys are on their way while these are worked on.

The idea. A load into registers and from there to shared memory keeps its threads waiting for device memory. cp.async (sm_80
and later) copies from device memory to shared memory with no register between, and lets the threads go on. With STAGES
buffers, the loop asks for the tile of keys and values that it will need STAGES - 1 rounds later, and computes on one that
has come.

What it should bring. Memory's latency hides behind the matrix units' work, in one program, without relying on other warps
being ready to run. It costs shared memory, a pair of tiles a stage.

The kernel is tensor_core_pv.py's, to the letter, and the tiles are those of tuned_tiles.py: the compiler makes the ring of
buffers when it is asked for more than one stage.

What it brought is in docs/ladder.md, made from the recorded run.
"""

from __future__ import annotations

from flashcore.kernels.program import Program
from flashcore.ladder.harness import fused
from flashcore.ladder.problem import Problem
from flashcore.ladder.tuned_tiles import choose

STAGES = 3


def program(problem: Problem, arch: str, sm_count: int) -> Program:
    """One launch."""
    return fused("async_copies", "tensor_core_pv", problem, choose(problem, sm_count), num_stages=STAGES)
