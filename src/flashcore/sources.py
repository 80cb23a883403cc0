"""Hashes of the kernels' sources: what evidence and caches are tied to."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent


@cache
def kernel_hash(kernel_id: str) -> str:
    """SHA-256 over the files that the kernel's binaries are made of."""
    from flashcore.kernels.registry import find_kernel

    digest = hashlib.sha256()
    for source in find_kernel(kernel_id).sources:
        digest.update(source.encode() + b"\0" + (PACKAGE / source).read_bytes() + b"\0")
    return digest.hexdigest()


def kernel_hashes() -> dict[str, str]:
    """Kernel id -> SHA-256 of its source, for every kernel."""
    from flashcore.kernels.registry import KERNELS

    return {kernel_id: kernel_hash(kernel_id) for kernel_id in KERNELS}
