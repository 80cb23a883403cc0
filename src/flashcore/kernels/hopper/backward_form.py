"""What binaries of the backward kernels for padded head dims are like: dq's, and those of dk and dv of wide heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from flashcore.kernels.arguments import TensorMap, TensorName
from flashcore.kernels.hopper.backward_factors import factor_parameters
from flashcore.kernels.hopper.backward_features import BackwardFeatures
from flashcore.kernels.hopper.head_dims import HeadDims, tile_columns
from flashcore.kernels.specialisation import TYPE_NAMES, Parameter, Specialisation


class Form(Protocol):
    """How a kernel does its work, of which its table has one for each head dim."""

    @property
    def name(self) -> str: ...

    def fits(self, head_dims: HeadDims) -> bool: ...


def specialise_form(
    kernel: str,
    features: BackwardFeatures,
    form: Form,
    *,
    rows: Mapping[TensorName, int],
    integers: Sequence[str],
    registers: tuple[int, int],
    constants: Mapping[str, int | bool],
) -> Specialisation:
    """The binary of a kernel for these features in a form whose own constants are given.

    rows: of each tensor's tiles, in the order of the kernel's maps; integers: the names of its numbers; registers: of a thread
    of the consumers, and of the producer.

    Raises:
        ValueError: the form does not fit the GPU.
    """
    if not form.fits(features.head_dims):
        raise ValueError(f"{form.name} does not fit head dims {features.head_dims}")
    parameters, tails = _map_parameters(TYPE_NAMES[features.dtype], rows, features.head_dims)
    parameters += [Parameter(f"{tensor}_ptr", "*fp32", 16) for tensor in ("row_lse", "delta")]
    parameters += [Parameter(name, "i32") for name in integers]
    factors, absent = factor_parameters(softcap=features.softcap)
    banded = {"HAS_LO": features.banded, "HAS_HI": features.banded}
    setmaxnreg = dict(zip(("CONSUMER_REGISTERS", "PRODUCER_REGISTERS"), registers, strict=True))
    return Specialisation(
        kernel=kernel,
        name=f"{kernel}-{features.name}-{form.name}",
        parameters=(*parameters, *factors, *tails),
        constants=tuple(sorted((absent | banded | setmaxnreg | dict(constants)).items())),
        num_warps=4,
        num_stages=1,
    )


def _map_parameters(
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


def tail_maps(specialisation: Specialisation, maps: Mapping[TensorName, TensorMap]) -> list[TensorMap]:
    """Those of a kernel's maps, in its order, that fill the parameters of tails, which are of other columns."""
    names = {parameter.name for parameter in specialisation.parameters}
    return [tensor_map for tensor, tensor_map in maps.items() if f"{tensor}_tail_map" in names]
