"""How far a stage may be from its oracle: bounds of the rounding in its own arithmetic, derived here and nowhere else.

Nothing here is chosen or measured. Each bound counts the float32 roundings that a number goes through and charges every one of
them an ULP (2^-23): twice what rounding to nearest may lose, because matrix units truncate. A stage is given the very numbers
that the kernel had, so that no stage pays for another's errors.

- score: D products and their sum, in any order: each term meets at most D roundings. Two more scale it.
- weight 2^x, x = e s - f m: x is off by an ULP of each of the three terms at most, and the exponential by its own error.
- sum of N terms, rescaled C times: each term meets at most N + T additions (T tiles), and for each rescaling an exponential,
  whose argument is off as above, and a product. Where the maximum stays the factor is 2^0, exactly: such steps do not count.
- output: as the sum, with each term's magnitude |p v|. Weights that the kernel rounds to float16 are rounded by the oracle too.
"""

from __future__ import annotations

import math

import torch

ULP = 2.0**-23
# of ex2.approx, relative (PTX ISA, "ex2")
EXP2 = 2.0**-22
# of kernels/hopper/softmax.exp2_partly_emulated: its polynomial's 7.5e-5, and four roundings
EMULATED_EXP2 = 7.5e-5 + 4 * ULP
# of a division or a reciprocal by div.full, and of the product with it
DIVISION = 4 * ULP
# what may be flushed to zero, or come out as the least normal number instead
TINY = 2.0**-125


def score(head_dim: int, magnitude: torch.Tensor) -> torch.Tensor:
    """Of scores whose terms have these magnitudes, sum |q| |k|, scaled."""
    return (head_dim + 2) * ULP * magnitude + TINY


def maximum(want: torch.Tensor, factor: float) -> torch.Tensor:
    """Of maxima: they are numbers of the kernel's own, exactly, unless it multiplies them."""
    return torch.zeros_like(want) if factor == 1 else ULP * want.abs()


def weight(want: torch.Tensor, terms: tuple[torch.Tensor, ...], exp2_error: float, divided: bool) -> torch.Tensor:
    """Of weights 2^x, where x is made of these terms, and which may have been divided by their sum."""
    argument = ULP * torch.stack(terms).abs().sum(0)
    relative = torch.expm1(math.log(2) * argument) + exp2_error + (DIVISION if divided else 0.0)
    return want * relative + TINY


def rescaled_sum(terms: int, tiles: int, rescalings: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Relative to the sum of the terms' magnitudes, of a sum of `terms` numbers: of all, or of a tile's where each is summed by
    itself. `rescalings` of each row; `largest`: the magnitude of its largest maximum, in base 2."""
    factor = torch.expm1(4 * math.log(2) * ULP * largest) + EXP2 + ULP
    return (terms + tiles) * ULP + rescalings * factor
