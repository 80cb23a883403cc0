"""In what order a result lies in memory: in that of the input it belongs to, so that what a model does with it needs no copy.

A model that views (B, S, 3, H, D) as q, k and v of (B, H, S, D) turns o back into (B, S, H * D), and the gradients into one
tensor: both are free where o lies as q does. PyTorch's own attention does the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def dense_strides(shape: Sequence[int], like: Sequence[int]) -> tuple[int, int, int, int]:
    """Strides of a dense tensor of four dimensions, the first outermost and the last innermost.

    `like`: the strides of the tensor that it follows, which say which of the two dimensions between is the inner one; where
    they do not (one of the sizes is 1, the strides are equal) it is the latter.
    """
    _, first, second, row = (size if _less(1, size) else 1 for size in shape)
    if _less(1, first) and _less(1, second) and _less(like[1], like[2]):
        return first * second * row, row, first * row, 1
    return first * second * row, second * row, row, 1


def laid_out(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor itself where it lies as `dense_strides` says, else a copy that does."""
    strides = dense_strides(t.shape, like.stride())
    if all(size <= 1 or found == wanted for size, found, wanted in zip(t.shape, t.stride(), strides, strict=True)):
        return t
    return t.new_empty_strided(t.shape, strides).copy_(t)


def _less(a: int, b: int) -> bool:
    """a < b, of symbols too; what torch cannot know while it traces counts as false."""
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # takes seconds to import

    return guard_or_false(a < b)
