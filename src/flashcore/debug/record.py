"""The record: what a kernel wrote of its stages, and how to read it. The layout is kernels/view.py's."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashcore.bench.shapes import Shape
from flashcore.errors import ArgumentValueError

# kernels/view.py's, which only Triton can import
ROW_NUMBERS = 258
_OUTPUT = 2
# A NaN that no computation makes: what still holds it was never written.
_UNWRITTEN_BITS = 0x7FD15EED
# The mission shape takes 28 MiB.
MAX_BYTES = 2**30


@dataclass(frozen=True)
class Record:
    """`rows`: float32 (B, Hq, Sq, ROW_NUMBERS + 3 * Sk), NaN of a kind of its own where nothing has been written."""

    shape: Shape
    rows: torch.Tensor

    @classmethod
    def allocate(cls, shape: Shape, device: torch.device) -> Record:
        """A record in which nothing is written. Raises ArgumentValueError for a shape whose record is larger than MAX_BYTES."""
        size = (shape.batch, shape.heads_q, shape.seqlen_q, ROW_NUMBERS + 3 * shape.seqlen_k)
        needed = 4 * size[0] * size[1] * size[2] * size[3]
        if needed > MAX_BYTES:
            raise ArgumentValueError(
                f"shape: {shape.label} takes a record of {needed / 2**20:.0f} MiB; allowed: at most {MAX_BYTES / 2**20:.0f} MiB"
            )
        return cls(shape, torch.full(size, _UNWRITTEN_BITS, dtype=torch.int32, device=device).view(torch.float32))

    def head(self, batch: int, head: int) -> Head:
        """The part of one head."""
        rows, keys = self.rows[batch, head], self.shape.seqlen_k
        per_key = rows[:, ROW_NUMBERS:].split(keys, dim=1)
        output = rows[:, _OUTPUT : _OUTPUT + self.shape.head_dim_v]
        scores, weights, tile_maxima = per_key
        return Head(scores, weights, tile_maxima, rows[:, 0], rows[:, 1], output)


@dataclass(frozen=True)
class Head:
    """One head of a record, float32: what was recorded for each (row, key), row, or (row, column of the output).

    `tile_maxima`: the maximum that a tile's weights are relative to, at the tile's first key.
    """

    scores: torch.Tensor
    weights: torch.Tensor
    tile_maxima: torch.Tensor
    maximum: torch.Tensor
    total: torch.Tensor
    output: torch.Tensor


def written(x: torch.Tensor) -> torch.Tensor:
    """Where a part of a record has been written."""
    return x.view(torch.int32) != _UNWRITTEN_BITS
