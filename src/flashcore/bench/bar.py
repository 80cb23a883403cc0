"""The bars: what this project means to reach on an H200, each over one grid. Targets, not measurements.

One convention holds inside: a cell wants ours to be at least so many times as fast as the fastest of the peers, which is that
peer's median over ours in the same run. `told` says in which terms a bar was set and is shown: "rates", ours over the peer's
and at least the figure, or "times", ours over the peer's and at most the figure, which is one over the figure inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flashcore.bench.shapes import GRIDS, NAMED_SHAPES, Shape
from flashcore.bench.timing import Mode
from flashcore.bench.work import Direction

Told = Literal["rates", "times"]


@dataclass(frozen=True)
class Cell:
    """What is wanted of one series on one shape: to be so many times as fast as the peers, or to take at most `us`.

    With neither it is measured and not judged.
    """

    shape: Shape
    mode: Mode = "device_warm"
    faster: float | None = None
    us: float | None = None

    @property
    def wanted(self) -> bool:
        return self.faster is not None or self.us is not None


@dataclass(frozen=True)
class Bar:
    """What is wanted of contender `ours` over a grid.

    peers: for each mode that it speaks of, those whose fastest it is held against.
    mean: the least geometric mean of the ratios over all cells; None: nothing is wanted of it.
    direction: what of a call is timed.
    both_orders: a cell is reached where it is in both orders of timing.
    """

    grid: str
    ours: str
    peers: dict[Mode, tuple[str, ...]]
    told: Told
    cells: tuple[Cell, ...]
    mean: float | None = None
    both_orders: bool = False
    direction: Direction = "fwd"

    @property
    def judged(self) -> tuple[Cell, ...]:
        """The cells in which something is wanted."""
        return tuple(cell for cell in self.cells if cell.wanted)

    @property
    def times_calls(self) -> bool:
        """Whether it speaks of the time that a call from Python takes."""
        return any(mode.startswith("eager") for mode in self.peers)

    def of(self, shape: Shape) -> tuple[Cell, ...]:
        """The cells of a shape; for one that the bar says nothing of, a cell in which nothing is wanted."""
        return tuple(cell for cell in self.cells if cell.shape == shape) or (Cell(shape),)


LENGTHS = (512, 1024, 4096, 16384)
# head dim -> for each of the lengths: not causal, causal
_FA_RATIOS: dict[int, tuple[tuple[float, float], ...]] = {
    64: ((1.02, 1.02), (1.02, 1.02), (1.11, 1.10), (1.18, 1.18)),
    128: ((1.02, 1.02), (1.03, 1.18), (1.08, 1.22), (1.12, 1.17)),
    256: ((1.00, 1.00), (1.00, 1.00), (1.02, 1.02), (1.02, 1.04)),
}
# The forward kernel for Hopper, on long sequences.
FA = Bar(
    grid="fa",
    ours="flashcore-hopper",
    peers={"device_warm": ("sdpa-cudnn",)},
    told="rates",
    cells=tuple(
        Cell(shape, faster=_FA_RATIOS[shape.head_dim][LENGTHS.index(shape.seqlen_q)][shape.causal])
        for shape in GRIDS["fa"]
        if shape.seqlen_q in LENGTHS
    ),
    mean=1.10,
    both_orders=True,
)

_FUSED = ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient")
# With warm caches, for each shape of the grid in its order: our time over the fastest peer's, at most.
_SMALL_SHARES = (0.44, 0.45, 0.50, 0.60, 0.60, 0.70, 0.85)
_COLD_SHARE = 1.0
# Of the call from Python, at the mission shape.
_CALL_SHARE, _CALL_US = 0.60, 10.0


def _small_cells(shape: Shape, share: float) -> tuple[Cell, ...]:
    device = (Cell(shape, faster=1 / share), Cell(shape, "device_cold", faster=1 / _COLD_SHARE))
    if shape != NAMED_SHAPES["mission"]:
        return device
    return (*device, Cell(shape, "eager_stream", faster=1 / _CALL_SHARE), Cell(shape, "eager_stream", us=_CALL_US))


# What a user of small shapes gets: auto's choice, from Python too.
SMALL = Bar(
    grid="small",
    ours="flashcore",
    # a call is held against every way there is to call SDPA, which is more than the fused backends forced
    peers={"device_warm": _FUSED, "device_cold": _FUSED, "eager_stream": (*_FUSED, "sdpa-math", "sdpa-auto")},
    told="times",
    cells=tuple(
        cell for shape, share in zip(GRIDS["small"], _SMALL_SHARES, strict=True) for cell in _small_cells(shape, share)
    ),
)

# head dim -> for lengths of 1024, 4096 and 16384: not causal, causal
_BACKWARD_RATIOS: dict[int, tuple[tuple[float, float], ...]] = {
    64: ((1.40, 1.10), (1.22, 1.26), (1.26, 1.34)),
    128: ((1.10, 1.10), (1.16, 1.15), (1.17, 1.17)),
}
# head dim -> what bitwise equal gradients may cost
_DETERMINISTIC_RATIOS = {64: 0.92, 128: 0.95}


def _of_backward(ours: str, peer: str, cells: tuple[Cell, ...], mean: float | None = None) -> Bar:
    peers: dict[Mode, tuple[str, ...]] = {"device_warm": (peer,)}
    return Bar("fa-bwd", ours, peers, "rates", cells, mean, both_orders=True, direction="bwd")


BACKWARD = (
    _of_backward(
        "flashcore-hopper",
        "sdpa-cudnn",
        tuple(
            Cell(shape, faster=_BACKWARD_RATIOS[shape.head_dim][(1024, 4096, 16384).index(shape.seqlen_q)][shape.causal])
            for shape in GRIDS["fa-bwd"]
        ),
    ),
    _of_backward(
        "flashcore-hopper-deterministic",
        "sdpa-cudnn",
        tuple(Cell(shape, faster=_DETERMINISTIC_RATIOS[shape.head_dim]) for shape in GRIDS["fa-bwd"]),
    ),
    # judged by its mean alone
    _of_backward("flashcore-portable", "sdpa-flash", tuple(Cell(shape) for shape in GRIDS["fa-bwd"]), mean=1.10),
)

BARS = (FA, SMALL, *BACKWARD)


def bars_of(grid: str | None, direction: Direction) -> tuple[Bar, ...]:
    """The bars that a run of this grid, in this direction, is held against."""
    return tuple(bar for bar in BARS if (bar.grid, bar.direction) == (grid, direction))
