"""The judgement of a part over all heads: the worst number, the wrong tiles, and the first of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict

from flashcore.bench.shapes import Shape
from flashcore.debug.oracles import Part

# A map of a head has no more cells than this; a cell then stands for several tiles.
MAP_ROWS, MAP_COLUMNS = 32, 64
WRONG, RIGHT = "#", "."


class TilePlace(BaseModel):
    """Where a tile lies: half-open ranges of rows and, where the part has a number for each key or tile of keys, of keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: int
    head: int
    rows: tuple[int, int]
    keys: tuple[int, int] | None

    def __str__(self) -> str:
        keys = "" if self.keys is None else f", keys {self.keys[0]} to {self.keys[1] - 1}"
        return f"batch {self.batch}, head {self.head}, rows {self.rows[0]} to {self.rows[1] - 1}{keys}"


class PartVerdict(BaseModel):
    """What became of a part of a view.

    `error` and `bound` are of the number that is worst in proportion to its bound; `error` is None where it is NaN or infinite,
    was never written, or was written where nothing should be. `tile`: rows and keys, 0 keys where it has no keys. `map`: the
    head of the first wrong tile, a line for each row of tiles.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    tile: tuple[int, int]
    tiles: int
    wrong: int
    error: float | None
    bound: float
    first: TilePlace | None
    map: tuple[str, ...]


def verdict(shape: Shape, heads: Sequence[Part]) -> PartVerdict:
    """One part, of all heads in the order of (batch, head)."""
    grids, worst = [], (-1.0, 0.0, 0.0)
    for part in heads:
        grids.append(_wrong_tiles(part))
        worst = max(worst, _worst(part))
    part, grid = heads[0], torch.stack(grids)
    _, error, bound = worst
    rows, columns = part.tile
    first = None
    if grid.any():
        # the first that the kernel came to, in a head
        where, m, n = (grid.flip(2) if part.last_first else grid).nonzero()[0].tolist()
        n = grid.shape[2] - 1 - n if part.last_first else n
        width = columns * part.keys
        first = TilePlace(
            batch=where // shape.heads_q,
            head=where % shape.heads_q,
            rows=(m * rows, min(shape.seqlen_q, (m + 1) * rows)),
            keys=(n * width, min(shape.seqlen_k, (n + 1) * width)) if part.keys else None,
        )
    return PartVerdict(
        name=part.name,
        tile=(rows, columns * part.keys),
        tiles=grid.numel(),
        wrong=int(grid.sum()),
        error=error if math.isfinite(error) else None,
        bound=bound,
        first=first,
        map=() if first is None else _map(grid[where]),
    )


def _wrong_tiles(part: Part) -> torch.Tensor:
    """Which tiles hold a wrong number, (tiles of rows, tiles of columns)."""
    return _any_by(~(part.error <= part.bound), *part.tile).cpu()


def _any_by(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Whether any of each rows x columns of a matrix is set."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    return padded.view(padded.shape[0] // rows, rows, -1, columns).any(3).any(1)


def _worst(part: Part) -> tuple[float, float, float]:
    """(in proportion, error, bound) of the worst number."""
    proportion = torch.where(part.error == 0, 0.0, part.error / part.bound)
    at = int(proportion.argmax())
    return proportion.flatten()[at].item(), part.error.flatten()[at].item(), part.bound.flatten()[at].item()


def _map(grid: torch.Tensor) -> tuple[str, ...]:
    """A head's tiles as text."""
    drawn = _any_by(grid, -(-grid.shape[0] // MAP_ROWS), -(-grid.shape[1] // MAP_COLUMNS))
    return tuple("".join(WRONG if wrong else RIGHT for wrong in line) for line in drawn.tolist())
