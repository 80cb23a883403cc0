"""Which tile configuration the portable forward kernel takes.

Hopper's plain rows were chosen by a sweep on an H200 (docs/notes/portable-forward.md); all others are the largest tiles that
compile without a spill, not measured on their GPUs.
"""

from __future__ import annotations

from typing import Literal

from flashcore.kernels.portable.config import PortableConfig

# What a call makes of the loop: the tuned core, features that only add arithmetic, masks, or float32 without tensor cores.
Kind = Literal["plain", "causal", "window", "general", "mask", "fp32"]

C = PortableConfig
# kind -> head dim -> (configuration for few rows, for many)
_HOPPER: dict[Kind, dict[int, tuple[C, C]]] = {
    "plain": {
        64: (C(64, 128, 4, 3, 3), C(128, 64, 4, 3, 3)),
        128: (C(64, 64, 4, 3, 1), C(64, 64, 4, 3, 1)),
        256: (C(64, 32, 4, 2, 2), C(128, 32, 8, 3, 1)),
    },
    "causal": {
        64: (C(64, 64, 4, 3, 3), C(64, 64, 4, 3, 3)),
        128: (C(64, 64, 4, 3, 1), C(64, 64, 4, 3, 1)),
        256: (C(64, 32, 4, 2, 2), C(128, 32, 8, 3, 3)),
    },
    "window": {
        64: (C(64, 64, 4, 3, 3),) * 2,
        128: (C(64, 64, 4, 3, 1),) * 2,
        256: (C(128, 32, 8, 3, 3),) * 2,
    },
    "general": {
        64: (C(64, 64, 4, 2, 2),) * 2,
        128: (C(64, 64, 4, 2, 1),) * 2,
        256: (C(128, 32, 8, 2, 1),) * 2,
    },
    "mask": {
        64: (C(64, 64, 4, 2, 2),) * 2,
        128: (C(64, 32, 8, 2, 2),) * 2,
        256: (C(64, 16, 8, 2, 2),) * 2,
    },
    "fp32": {
        64: (C(32, 32, 4, 1, 1),) * 2,
        128: (C(32, 64, 8, 1, 1),) * 2,
        256: (C(32, 16, 8, 1, 1),) * 2,
    },
}
_OTHERS: dict[Kind, dict[int, tuple[C, C]]] = {
    "plain": {
        64: (C(64, 64, 4, 3, 1), C(128, 64, 8, 2, 2)),
        128: (C(64, 32, 4, 2, 2), C(128, 32, 8, 2, 2)),
        256: (C(64, 16, 8, 2, 2),) * 2,
    },
    "causal": {
        64: (C(64, 64, 4, 3, 1), C(128, 64, 8, 2, 2)),
        128: (C(64, 32, 4, 2, 2), C(128, 32, 8, 2, 2)),
        256: (C(64, 16, 8, 2, 2),) * 2,
    },
    "window": {
        64: (C(128, 64, 8, 2, 2),) * 2,
        128: (C(128, 32, 8, 2, 2),) * 2,
        256: (C(64, 16, 8, 2, 2),) * 2,
    },
    "general": {
        64: (C(64, 64, 8, 2, 1),) * 2,
        128: (C(64, 32, 8, 2, 2),) * 2,
        256: (C(64, 16, 8, 2, 2),) * 2,
    },
    "mask": {
        64: (C(64, 32, 8, 2, 2),) * 2,
        128: (C(64, 32, 8, 2, 2),) * 2,
        256: (C(64, 16, 8, 2, 2),) * 2,
    },
    "fp32": {
        64: (C(32, 16, 4, 1, 1),) * 2,
        128: (C(32, 32, 4, 2, 1),) * 2,
        256: (C(32, 16, 8, 1, 1),) * 2,
    },
}


def configurations(kind: Kind, block_d: int, arch: str) -> tuple[PortableConfig, PortableConfig]:
    """The configurations for few query rows and for many."""
    return (_HOPPER if arch == "sm_90a" else _OTHERS)[kind][block_d]


def choose_config(kind: Kind, block_d: int, arch: str, rows: int, sm_count: int) -> PortableConfig:
    """The configuration for a call with `rows` query rows in all (B * H * Sq) on a GPU of `sm_count` multiprocessors."""
    few, many = configurations(kind, block_d, arch)
    # "many" starts where its larger tiles still give every multiprocessor two
    return many if rows >= 2 * many.block_m * sm_count else few
