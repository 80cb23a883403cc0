"""Tile configurations of the portable backward kernels, and which of them each kernel takes.

Hopper's plain and band rows for head dims 64 and 128 were chosen by timing candidates on an H200 (docs/notes/backward.md); all
others by compiling, not measured: the largest tiles that hold their accumulators in registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flashcore.target import SHARED_MEMORY_LIMIT

# The kernels that work in tiles of rows by keys.
Tiled = Literal["rest", "dkdv", "dq", "dmask"]
# What a call makes of the loop: tensor cores with nothing in the way, a band's edges, features that add arithmetic, masks, or
# float32.
Kind = Literal["plain", "band", "general", "mask", "fp32"]


@dataclass(frozen=True, slots=True)
class BackwardConfig:
    """BLOCK_M query rows by BLOCK_N keys a tile, on num_warps warps, with num_stages tiles of what is walked over in flight.

    `edge` is the size, in the direction of the walk, of the tiles in the loops that mask: at the band's edges, or everywhere
    under a mask. Masking takes registers, and a smaller tile wastes less beyond the edge. It divides the size elsewhere.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    edge: int

    @property
    def name(self) -> str:
        edge = "" if self.edge in (self.block_m, self.block_n) else f"e{self.edge}"
        return f"m{self.block_m}n{self.block_n}w{self.num_warps}s{self.num_stages}{edge}"

    def fits(self, arch: str, kernel: Tiled, block_d: int, element_size: int) -> bool:
        """Whether the tiles walked over, in flight, and those owned fit into shared memory together: two tensors of each."""
        owned, walked = (self.block_n, self.block_m) if kernel == "dkdv" else (self.block_m, self.block_n)
        tiles = owned + self.num_stages * walked
        return 2 * tiles * block_d * element_size <= SHARED_MEMORY_LIMIT[arch]


C = BackwardConfig
# Of the kernels that have rows and no tiles of scores.
ROWS = C(32, 0, 4, 1, 0)
# kernel -> kind -> head dim -> configuration
_Table = dict[Tiled, dict[Kind, dict[int, BackwardConfig]]]
_HOPPER: _Table = {
    "dkdv": {
        "plain": {64: C(64, 64, 4, 2, 32), 128: C(64, 128, 8, 2, 16), 256: C(16, 64, 8, 2, 16)},
        "band": {64: C(32, 64, 4, 2, 32), 128: C(32, 64, 4, 3, 32), 256: C(16, 64, 8, 2, 16)},
        "general": {64: C(64, 128, 8, 2, 32), 128: C(32, 64, 4, 2, 16), 256: C(16, 64, 8, 2, 16)},
        "mask": {64: C(32, 128, 8, 2, 32), 128: C(16, 64, 4, 2, 16), 256: C(16, 64, 8, 2, 16)},
        "fp32": {64: C(32, 32, 4, 1, 32), 128: C(16, 32, 8, 1, 16), 256: C(16, 16, 8, 1, 16)},
    },
    "dq": {
        "plain": {64: C(64, 64, 4, 3, 64), 128: C(128, 64, 8, 3, 32), 256: C(64, 32, 8, 2, 32)},
        "band": {64: C(64, 64, 4, 3, 64), 128: C(128, 64, 8, 3, 32), 256: C(64, 32, 8, 2, 32)},
        "general": {64: C(64, 64, 4, 2, 64), 128: C(64, 64, 4, 2, 32), 256: C(64, 32, 8, 2, 32)},
        "mask": {64: C(64, 64, 4, 2, 64), 128: C(64, 32, 8, 2, 32), 256: C(64, 16, 8, 2, 16)},
        "fp32": {64: C(32, 32, 4, 1, 32), 128: C(32, 16, 8, 1, 16), 256: C(16, 16, 8, 1, 16)},
    },
}
_OTHERS: _Table = {
    "dkdv": {
        "plain": {64: C(64, 64, 4, 2, 32), 128: C(32, 64, 8, 2, 32), 256: C(16, 64, 8, 1, 16)},
        "band": {64: C(64, 64, 4, 2, 32), 128: C(32, 64, 8, 2, 32), 256: C(16, 64, 8, 1, 16)},
        "general": {64: C(64, 64, 8, 2, 32), 128: C(32, 64, 8, 2, 32), 256: C(16, 64, 8, 1, 16)},
        "mask": {64: C(16, 64, 4, 2, 16), 128: C(16, 64, 8, 2, 16), 256: C(16, 64, 8, 1, 16)},
        "fp32": {64: C(16, 32, 4, 1, 16), 128: C(16, 16, 4, 1, 16), 256: C(16, 16, 8, 1, 16)},
    },
    "dq": {
        "plain": {64: C(64, 64, 4, 2, 32), 128: C(64, 32, 4, 2, 32), 256: C(64, 16, 8, 1, 16)},
        "band": {64: C(64, 64, 4, 2, 32), 128: C(64, 32, 4, 2, 32), 256: C(64, 16, 8, 1, 16)},
        "general": {64: C(64, 64, 8, 2, 32), 128: C(64, 32, 8, 2, 32), 256: C(64, 16, 8, 1, 16)},
        "mask": {64: C(64, 32, 8, 2, 32), 128: C(64, 32, 8, 1, 32), 256: C(64, 16, 8, 1, 16)},
        "fp32": {64: C(32, 16, 4, 1, 16), 128: C(16, 16, 4, 1, 16), 256: C(16, 16, 8, 1, 16)},
    },
}
# Of the kernels that only additive masks need, on any arch: (half, float32).
_MASKS: dict[Tiled, dict[int, tuple[BackwardConfig, BackwardConfig]]] = {
    "rest": {
        64: (C(64, 64, 4, 1, 64), C(32, 32, 4, 1, 32)),
        128: (C(64, 32, 4, 1, 32), C(32, 32, 4, 1, 32)),
        256: (C(64, 16, 8, 1, 16), C(16, 16, 4, 1, 16)),
    },
    "dmask": {
        64: (C(64, 32, 8, 1, 32), C(32, 32, 4, 1, 32)),
        128: (C(64, 32, 8, 1, 32), C(32, 32, 4, 1, 32)),
        256: (C(64, 16, 8, 1, 16), C(16, 16, 4, 1, 16)),
    },
}


def choose_config(kernel: Tiled, kind: Kind, block_d: int, arch: str) -> BackwardConfig:
    """The configuration of a kernel."""
    if kernel in _MASKS:
        return _MASKS[kernel][block_d][kind == "fp32"]
    return (_HOPPER if arch == "sm_90a" else _OTHERS)[kernel][kind][block_d]
