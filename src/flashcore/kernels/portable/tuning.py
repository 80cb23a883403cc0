"""Which tile configuration the portable forward kernel takes: hand-chosen by measurement (docs/notes/portable-forward.md)."""

from __future__ import annotations

import torch

from flashcore.kernels.portable.config import PortableConfig


def choose_config(block_d: int, dtype: torch.dtype, arch: str, plain: bool, rows: int, sm_count: int) -> PortableConfig:
    """The configuration for a call with `rows` query rows in all (B * H * Sq) on a GPU of `sm_count` multiprocessors."""
    if dtype == torch.float32:
        return {64: PortableConfig(32, 32, 4, 2), 128: PortableConfig(32, 32, 4, 2), 256: PortableConfig(16, 16, 4, 1)}[block_d]
    if not plain:
        return {64: PortableConfig(64, 64, 4, 2), 128: PortableConfig(64, 64, 4, 2), 256: PortableConfig(64, 32, 4, 2)}[block_d]
    if arch == "sm_90a" and rows >= 128 * sm_count:
        return {64: PortableConfig(128, 64, 4, 3), 128: PortableConfig(128, 64, 8, 3), 256: PortableConfig(128, 64, 8, 2)}[block_d]
    return {64: PortableConfig(64, 64, 4, 2), 128: PortableConfig(64, 64, 4, 2), 256: PortableConfig(64, 32, 4, 2)}[block_d]
