"""How near two calls are in size: how far what was measured of one, or tuned for it, is taken to hold for another."""

from __future__ import annotations

import math
from typing import NamedTuple

from flashcore.spec import AttentionSpec

# Beyond a factor of four in work or parallelism from the nearest measured shape, nothing is claimed.
MAX_DISTANCE = 2.0


class Sizes(NamedTuple):
    """What of a call's shape its speed follows: query heads of the whole batch, lengths, the larger head dim."""

    heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int

    @classmethod
    def of(cls, spec: AttentionSpec) -> Sizes:
        return cls(spec.batch * spec.heads_q, spec.seqlen_q, spec.seqlen_k, max(spec.head_dim, spec.head_dim_v))


def distance(one: Sizes, other: Sizes) -> float:
    """In factors of two: of both lengths, half each, of the number of heads and of the head dim. No size may be 0."""
    rows = math.log2(one.seqlen_q / other.seqlen_q) / 2
    keys = math.log2(one.seqlen_k / other.seqlen_k) / 2
    return abs(rows) + abs(keys) + abs(math.log2(one.heads / other.heads)) + abs(math.log2(one.head_dim / other.head_dim))
