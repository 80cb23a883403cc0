"""What a kernel's parameters are filled with at a launch, in the parameters' order. Data only; runtime/launch.py packs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

# The tensors of a call. `counter` is one int32, zero when the kernel starts, for a kernel that asks for it
# (Binding.needs_counter). `workspace` is device memory between the launches of the ladder's first step, `view` what a kernel
# records where flashcore.debug asks it to. What follows is of backward passes (kernels/program.py). The engine gives no address
# for any of these in a forward call.
#
# delta: sum(do * o) - dlse of each row. row_lse: the log-sum-exp as the kernels want it. dq_sum, dkv_sum: float32 sums of dq,
# and of dk and dv. progress: int32 numbers by which the blocks of a launch share their work.
TensorName = Literal[
    "q",
    "k",
    "v",
    "mask",
    "o",
    "lse",
    "counter",
    "workspace",
    "view",
    "do",
    "dlse",
    "dq",
    "dk",
    "dv",
    "dmask",
    "delta",
    "row_lse",
    "dq_sum",
    "dkv_sum",
    "progress",
]
TENSORS: tuple[TensorName, ...] = get_args(TensorName)


@dataclass(frozen=True, slots=True)
class Pointer:
    """The address of one of the call's tensors, null where the call has none."""

    tensor: TensorName


@dataclass(frozen=True, slots=True)
class TensorMap:
    """A TMA tensor map over one of the call's tensors, or over a part of it that begins `offset` elements after its address.

    `shape` and `strides` are in elements, outermost dimension first; the last stride is 1. The box, the swizzle and the
    element type belong to the binary (runtime/binary.py), because the compiler chose them.
    """

    tensor: TensorName
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0


Argument = Pointer | TensorMap | int | float
