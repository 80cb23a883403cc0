"""The tensor maps that a Hopper backward kernel takes: one a tensor, and another for columns beyond a power of two."""

from __future__ import annotations

from collections.abc import Mapping

from flashcore.kernels.arguments import TensorName
from flashcore.kernels.hopper.head_dims import tile_columns
from flashcore.kernels.specialisation import Parameter


def map_parameters(
    element: str, rows: Mapping[TensorName, int], head_dims: tuple[int, int]
) -> tuple[list[Parameter], list[Parameter]]:
    """The parameters of the tensors' maps, in the order of `rows` (rows of a tile), and those of their tails.

    head_dims: that of q, k and their gradients, and that of v, the output and their gradients.
    """
    mains, tails = [], []
    for tensor, count in rows.items():
        main, tail = tile_columns(head_dims[tensor in ("v", "do", "dv")])
        mains.append(Parameter(f"{tensor}_map", f"tensormap<{element}[1,1,{count},{main}]>"))
        if tail:
            tails.append(Parameter(f"{tensor}_tail_map", f"tensormap<{element}[1,1,{count},{tail}]>"))
    return mains, tails
