"""What was verified and measured on GPUs, and what follows from it for a plan. The JSON beside this file is the record."""

from __future__ import annotations

from typing import Literal

from flashcore.spec import AttentionSpec
from flashcore.target import Target

State = Literal["verified", "compiled", "experimental"]


def state(kernel: str, binary_sha256: str | None, target: Target) -> State:
    """How far this very binary is backed by a run on a GPU."""
    return "experimental"


def slower_than_torch(spec: AttentionSpec, target: Target) -> str | None:
    """Why PyTorch is the faster choice for this call by the recorded measurements, or None where it is not known to be."""
    return None
