"""Head dims of q and k and of v that a kernel is built for: what a call's are padded up to, their name, their tiles."""

from __future__ import annotations

HeadDims = tuple[int, int]


def padded_head_dims(built: tuple[HeadDims, ...], head_dim: int, head_dim_v: int) -> HeadDims:
    """The first of those built that holds a call's. Raises StopIteration where none does."""
    return next((d, dv) for d, dv in built if head_dim <= d and head_dim_v <= dv)


def head_dims_name(head_dims: HeadDims) -> str:
    """A short readable id."""
    head_dim, head_dim_v = head_dims
    return f"d{head_dim}" if head_dim == head_dim_v else f"d{head_dim}v{head_dim_v}"


def tile_columns(head_dim: int) -> tuple[int, int]:
    """(main, tail) columns of the tiles that a head dim is kept in (operand.py); no tail where it is a power of two."""
    main = 1 << (head_dim.bit_length() - 1)
    return main, head_dim - main
