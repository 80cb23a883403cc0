"""What the steps' kernels share, so that a step's own file holds its idea and little else.

On the device: where a program's tile lies, how a tile is read and written, the online softmax. On the host: tiles, and the
launch of a fused kernel as data, which flashcore.runtime launches or interprets.

The maths, in every step: scores are scaled by scale * log2(e), so that softmax is taken by exp2; statistics are float32. Keys
past the end score -inf. The maximum is finite all the same, because every tile of keys that is walked has at least one key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import triton
import triton.language as tl

from flashcore.kernels.arguments import Pointer
from flashcore.kernels.program import Launch, Program
from flashcore.kernels.specialisation import Parameter, Specialisation
from flashcore.ladder.problem import Problem

LOG2_E = math.log2(math.e)
# Torch's allocations begin at multiples of it, and one load takes as much.
VECTOR_BYTES = 16


@triton.jit
def tile_of_program(seqlen_q, BLOCK_M: tl.constexpr):
    """The first query of this program's tile, and its head counted over the batch, in 64 bits."""
    num_m = tl.cdiv(seqlen_q, BLOCK_M)
    return tl.program_id(0) % num_m * BLOCK_M, (tl.program_id(0) // num_m).to(tl.int64)


@triton.jit
def load_rows(base, rows, seqlen, HEAD_DIM: tl.constexpr):
    """Rows of one head, zero past its end. [rows, HEAD_DIM]"""
    d = tl.arange(0, HEAD_DIM)
    return tl.load(base + rows[:, None] * HEAD_DIM + d[None, :], mask=(rows < seqlen)[:, None], other=0.0)


@triton.jit
def store_rows(base, rows, seqlen, o, HEAD_DIM: tl.constexpr):
    """The counterpart of load_rows: rows past the end are not written."""
    d = tl.arange(0, HEAD_DIM)
    tl.store(base + rows[:, None] * HEAD_DIM + d[None, :], o.to(base.dtype.element_ty), mask=(rows < seqlen)[:, None])


@triton.jit
def online_softmax(s, m_i, l_i):
    """Take a tile of scores into the running maximum and sum; alpha is what earlier results must be multiplied by."""
    m_new = tl.maximum(m_i, tl.max(s, 1))
    p = tl.exp2(s - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    return p, alpha, m_new, l_i * alpha + tl.sum(p, 1)


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries of a program, keys that it takes at a time, and its warps."""

    block_m: int
    block_n: int
    num_warps: int


def launch(
    step: str,
    function: str,
    tensors: Sequence[Parameter],
    problem: Problem,
    tile: Tile,
    *,
    constants: dict[str, int],
    numbers: Sequence[tuple[str, str, int | float]],
    grid: int,
    num_stages: int = 1,
) -> Launch:
    """A launch of the ladder's kernel `function` with these pointers ("q_ptr" is of tensor q) and then these numbers."""
    name = f"{step}-d{problem.head_dim}-m{tile.block_m}n{tile.block_n}w{tile.num_warps}s{num_stages}"
    specialisation = Specialisation(
        kernel=f"ladder_{function}",
        name=f"ladder_{name}",
        parameters=(*tensors, *(Parameter(number, kind) for number, kind, _ in numbers)),
        constants=tuple(constants.items()),
        num_warps=tile.num_warps,
        num_stages=num_stages,
    )
    # names of TENSORS, which a str cannot say
    pointers = tuple(Pointer(parameter.name.removesuffix("_ptr")) for parameter in tensors)  # type: ignore[arg-type]
    return Launch(specialisation, grid, (*pointers, *(value for _, _, value in numbers)))


def fused(
    step: str,
    function: str,
    problem: Problem,
    tile: Tile,
    *,
    divisor: int = VECTOR_BYTES,
    num_stages: int = 1,
    constants: Mapping[str, int] = MappingProxyType({}),
) -> Program:
    """The one launch of a fused kernel (q, k, v, o, the lengths, the scale), a program for each tile of queries of each head.

    `divisor`: of the tensors' addresses, as the compiler is told. `constants`: those that the kernel has beside the tile's.
    """
    one = launch(
        step,
        function,
        [Parameter(f"{tensor}_ptr", "*fp16", divisor) for tensor in "qkvo"],
        problem,
        tile,
        constants={"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "HEAD_DIM": problem.head_dim, **constants},
        numbers=(
            ("seqlen_q", "i32", problem.seqlen_q),
            ("seqlen_k", "i32", problem.seqlen_k),
            ("scale", "fp32", problem.scale * LOG2_E),
        ),
        grid=math.ceil(problem.seqlen_q / tile.block_m) * problem.batch * problem.heads,
        num_stages=num_stages,
    )
    return Program((one,))
