"""What a shape must do at least: attended pairs, floating-point operations, bytes; and what a time makes of it."""

from __future__ import annotations

from typing import Literal, NamedTuple

from flashcore.bench.shapes import Shape


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


def flops(shape: Shape) -> int:
    """Floating-point operations of both products over the attended pairs; causal counts only the half it computes."""
    return 2 * attended_pairs(shape) * (shape.head_dim + shape.head_dim_v)


def min_bytes(shape: Shape) -> int:
    """Fewest bytes through device memory: q, k and v read once, o written once."""
    return shape.input_bytes + shape.output_bytes


def tflops(shape: Shape, us: float) -> float:
    """TFLOP/s of a launch that took `us` microseconds."""
    return flops(shape) / us * 1e-6


def tbytes(shape: Shape, us: float) -> float:
    """TB/s of a launch that took `us` microseconds, counting the fewest bytes possible."""
    return min_bytes(shape) / us * 1e-6


def roofline(shape: Shape, *, peak_tflops: float, peak_tbytes: float) -> Bound:
    """The shortest time that a measured matrix rate (TFLOP/s) and copy bandwidth (TB/s) allow for this shape."""
    compute = flops(shape) / peak_tflops * 1e-6
    memory = min_bytes(shape) / peak_tbytes * 1e-6
    return Bound(compute, "compute") if compute >= memory else Bound(memory, "memory")
