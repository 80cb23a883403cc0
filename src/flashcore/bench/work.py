"""What a shape must do at least: attended pairs, floating-point operations, bytes; and what a time makes of it.

`direction`: the forward pass, the backward pass alone, or both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

from flashcore.bench.shapes import Shape

Direction = Literal["fwd", "bwd", "fwdbwd"]


class Bound(NamedTuple):
    """The shortest time the measured ceilings allow, in microseconds, and which of them sets it."""

    us: float
    limit: Literal["compute", "memory"]


def attended_pairs(shape: Shape) -> int:
    """(query, key) pairs that are attended, over all batches and query heads; causal is aligned bottom-right."""
    per_head = shape.seqlen_q * shape.seqlen_k
    if shape.causal:
        # Row i attends i + 1 + (Sk - Sq) keys, clamped to 0 .. Sk: the rows that attend any form an arithmetic series.
        last = shape.seqlen_k
        first = max(1, 1 + shape.seqlen_k - shape.seqlen_q)
        per_head = (first + last) * (last - first + 1) // 2
    return shape.batch * shape.heads_q * per_head


def flops(shape: Shape, direction: Direction = "fwd") -> int:
    """Floating-point operations of the products over the attended pairs; causal counts only the half it computes.

    Forward the scores and the output; backward the scores again, dp, dv, dq and dk: 2.5 times as many where the head dims are
    one.
    """
    d, dim_v = shape.head_dim, shape.head_dim_v
    of_a_pair = {"fwd": d + dim_v, "bwd": 3 * d + 2 * dim_v, "fwdbwd": 4 * d + 3 * dim_v}
    return 2 * attended_pairs(shape) * of_a_pair[direction]


def min_bytes(shape: Shape, direction: Direction = "fwd") -> int:
    """Fewest bytes through device memory: forward q, k, v and the mask read once, o written once; backward all of these and do
    read once, dq, dk and dv written once. What a row has one number of counts for nothing."""
    forward = shape.input_bytes + shape.output_bytes
    backward = forward + shape.output_bytes + replace(shape, mask="none").input_bytes
    return {"fwd": forward, "bwd": backward, "fwdbwd": forward + backward}[direction]


def tflops(shape: Shape, us: float, direction: Direction = "fwd") -> float:
    """TFLOP/s of a launch that took `us` microseconds."""
    return flops(shape, direction) / us * 1e-6


def tbytes(shape: Shape, us: float, direction: Direction = "fwd") -> float:
    """TB/s of a launch that took `us` microseconds, counting the fewest bytes possible."""
    return min_bytes(shape, direction) / us * 1e-6


def roofline(shape: Shape, *, peak_tflops: float, peak_tbytes: float, direction: Direction = "fwd") -> Bound:
    """The shortest time that a measured matrix rate (TFLOP/s) and copy bandwidth (TB/s) allow for this shape."""
    compute = flops(shape, direction) / peak_tflops * 1e-6
    memory = min_bytes(shape, direction) / peak_tbytes * 1e-6
    return Bound(compute, "compute") if compute >= memory else Bound(memory, "memory")
