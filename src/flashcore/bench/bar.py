"""The bar of the forward kernel for Hopper: what this project means to reach on an H200. A target, not a measurement."""

from __future__ import annotations

from flashcore.bench.shapes import GRIDS, Shape

GRID = "fa"
# Whose time is compared with whose: each figure is PEER's median over OURS in one run, above 1 where ours is faster.
OURS = "flashcore-hopper"
PEER = "sdpa-cudnn"

LENGTHS = (512, 1024, 4096, 16384)
# head dim -> for each of the lengths: not causal, causal
RATIOS: dict[int, tuple[tuple[float, float], ...]] = {
    64: ((1.02, 1.02), (1.02, 1.02), (1.11, 1.10), (1.18, 1.18)),
    128: ((1.02, 1.02), (1.03, 1.18), (1.08, 1.22), (1.12, 1.17)),
    256: ((1.00, 1.00), (1.00, 1.00), (1.02, 1.02), (1.02, 1.04)),
}
# the geometric mean over all these cells
MEAN = 1.10


def bar_of(shape: Shape) -> float | None:
    """The least ratio wanted for a shape; None where the bar says nothing of it."""
    if shape not in GRIDS[GRID] or shape.seqlen_q not in LENGTHS:
        return None
    return RATIOS[shape.head_dim][LENGTHS.index(shape.seqlen_q)][shape.causal]


def cells() -> tuple[Shape, ...]:
    """The shapes that the bar speaks of."""
    return tuple(shape for shape in GRIDS[GRID] if bar_of(shape) is not None)
