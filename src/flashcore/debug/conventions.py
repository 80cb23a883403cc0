"""Conventions: in which units each kernel holds its stages, in which order it takes keys, and in which tiles it works.

In every kernel, s = score_factor * (q k^T) and m = maximum_factor * max(s) of the keys so far; the weights are
p = 2^(exponent * s - exponent / maximum_factor * m). All factors are float32 numbers, as the kernels are given them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from flashcore.debug.bounds import EMULATED_EXP2, EXP2

# What a tile's maximum is taken over: its own keys and those of the tiles below, or above; the whole row; its own alone.
Running = Literal["ascending", "descending", "row", "tile"]
# Whether the sum of a row has been divided by already: in the weights, in the output, in neither.
Normalised = Literal["weights", "output", "no"]

# of the ladder's own, those that multiply weights and values on the CUDA cores
_UNROUNDED = ("scalar", "vectorised", "tensor_core_qk")


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows and keys of the tiles that the scores and the weights are made in, and the rows that the output is made in."""

    scores: tuple[int, int]
    weights: tuple[int, int]
    output_rows: int


@dataclass(frozen=True, slots=True)
class Convention:
    """How one binary holds its stages (above). `rounds_weights`: to float16, for the product with the values."""

    tiles: Tiles
    score_factor: float
    exponent: float
    maximum_factor: float
    running: Running = "ascending"
    normalised: Normalised = "no"
    rounds_weights: bool = True
    exp2_error: float = EXP2

    @property
    def pivot_factor(self) -> float:
        """What a maximum is multiplied by to be in the exponent's units."""
        return self.exponent / self.maximum_factor


def float32(x: float) -> float:
    """The nearest float32."""
    return torch.tensor(x, dtype=torch.float32).item()


def _base_2(scale: float) -> float:
    return float32(scale * math.log2(math.e))


def _alike(block_m: int, block_n: int) -> Tiles:
    """The same tiles in every stage."""
    return Tiles((block_m, block_n), (block_m, block_n), block_m)


def of_ladder(step: str, scale: float, constants: list[dict[str, int]]) -> Convention:
    """A step of the ladder by the constants of its launches: scores are in base 2 from the outset."""
    first, last = constants[0], constants[-1]
    tiles = _alike(first["BLOCK_M"], first["BLOCK_N"])
    scaled = Convention(tiles, _base_2(scale), 1.0, 1.0, rounds_weights=step not in _UNROUNDED)
    if step != "unfused":
        return scaled
    tiles = Tiles(tiles.scores, (1, constants[1]["BLOCK_N"]), last["BLOCK_M"])
    return Convention(tiles, _base_2(scale), 1.0, 1.0, running="row", normalised="weights")


def of_production(impl: str, scale: float, constants: dict[str, int]) -> Convention:
    """A production kernel by its constants: products are scaled within the exponent."""
    factor = _base_2(scale)
    if impl == "portable":
        return Convention(_alike(constants["BLOCK_M"], constants["BLOCK_N"]), 1.0, factor, factor)
    if impl == "small":
        # a block of the cluster has one softmax over all of its keys, and the output is recorded when the blocks' are combined
        return Convention(_alike(64, constants["KEYS"]), 1.0, factor, 1.0, running="tile", normalised="output")
    tiles = _alike(64 * constants["WARPGROUPS"], constants["BLOCK_N"])
    error = EMULATED_EXP2 if constants["EMULATE_EXP2"] else EXP2
    return Convention(tiles, 1.0, factor, 1.0, running="descending", exp2_error=error)
