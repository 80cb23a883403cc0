"""What was verified and measured on GPUs, and what follows from it for a plan.

The records of each GPU lie in a folder beside this file (`nvidia-h200/`): verify.json and bench-*.json as the commands wrote
them, and index.json, the little of them that planning needs, made by `flashcore evidence` and never edited.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from flashcore.sources import kernel_hash
from flashcore.spec import AttentionSpec, Band
from flashcore.target import Target

State = Literal["verified", "compiled", "experimental"]

FOLDER = Path(__file__).parent
# Beyond a factor of four in work or parallelism from the nearest measured shape, nothing is claimed.
MAX_DISTANCE = 2.0
# Head dims with binaries of their own (kernels/portable/binding.py).
EXACT_DIMS = (64, 128, 256)
# Measured ratios closer to 1 than this are noise.
MARGIN = 0.97


class Timing(BaseModel):
    """Device time (L2 warm, p50, microseconds) of one shape, by contender."""

    model_config = ConfigDict(frozen=True)

    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    causal: bool
    # "half" (fp16 and bf16 take the same code) or "fp32"
    precision: Literal["half", "fp32"]
    mask: Literal["none", "bool", "additive"]
    us: dict[str, float]


class Peaks(BaseModel):
    """The ceilings measured on the GPU: matrix rate in TFLOP/s by dtype, copy bandwidth in TB/s."""

    model_config = ConfigDict(frozen=True)

    matrix_tflops: dict[str, float]
    copy_tbytes: float


class Index(BaseModel):
    """The evidence of one GPU: kernel source hashes, the binaries that passed every case they met, and timings."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = 1
    gpu: str
    arch: str
    # kernel id -> SHA-256 of the source that was verified
    sources: dict[str, str]
    # binary SHA-256 -> (specialisation, cases passed)
    verified: dict[str, tuple[str, int]]
    peaks: Peaks | None
    timings: list[Timing]


@cache
def indexes() -> tuple[Index, ...]:
    """The evidence of every GPU there is any of. Raises pydantic.ValidationError for a damaged file."""
    return tuple(Index.model_validate_json(path.read_text()) for path in sorted(FOLDER.glob("*/index.json")))


def state(kernel: str, binary_sha256: str | None, target: Target) -> State:
    """How far a binary is backed: it passed on a GPU of this arch, its source did elsewhere, or neither."""
    current = [index for index in indexes() if index.sources.get(kernel) == kernel_hash(kernel)]
    if any(index.arch == target.arch and binary_sha256 in index.verified for index in current):
        return "verified"
    return "compiled" if current else "experimental"


def _of_gpu(name: str) -> Index | None:
    return next((index for index in indexes() if index.gpu == name), None)


def peaks(gpu: str) -> Peaks | None:
    """The measured ceilings of a GPU by its name, or None where none are recorded."""
    index = _of_gpu(gpu)
    return None if index is None else index.peaks


def slower_than_torch(spec: AttentionSpec, target: Target) -> str | None:
    """Why PyTorch is the faster choice for a call by the measurements on this GPU; None where they do not say so.

    Speaks only of what was measured and PyTorch has a fused kernel for (no cap, no window; with a mask, causal or neither),
    by the nearest shape of like features, no further than a factor of four away.
    """
    index = _of_gpu(target.name)
    full = spec.band == Band(None, None)
    if index is None or spec.softcap != 0 or not (full or spec.square_causal):
        return None
    if 0 in spec.output_shape or spec.seqlen_k == 0:
        return None
    if spec.return_lse or (spec.mask is not None and spec.mask.dtype not in (torch.bool, spec.dtype)):
        return None  # torch_backend does these by hand, not by SDPA
    head_dim = max(spec.head_dim, spec.head_dim_v)
    exact = spec.head_dim == spec.head_dim_v and head_dim in EXACT_DIMS
    mask = "none" if spec.mask is None else spec.mask.kind
    precision = "fp32" if spec.dtype.itemsize == 4 else "half"
    general = mask != "none" or precision == "fp32"

    def distance(timing: Timing) -> float:
        """In factors of two: of both lengths, half each, of the number of heads and of the head dim."""
        dims = math.log2(head_dim / timing.head_dim)
        rows = math.log2(spec.seqlen_q / timing.seqlen_q) / 2
        keys = math.log2(spec.seqlen_k / timing.seqlen_k) / 2
        heads = math.log2(spec.batch * spec.heads_q / (timing.batch * timing.heads))
        return abs(rows) + abs(keys) + abs(heads) + abs(dims)

    alike = [
        timing
        for timing in index.timings
        if timing.mask == mask
        and timing.precision == precision
        # a mask is measured without causality, which costs either side less than the mask does
        and (timing.causal == spec.square_causal or mask != "none")
        # of plain half calls, those whose head dim fills its block run other code than those whose does not
        and (general or (timing.head_dim == head_dim if exact else timing.head_dim not in EXACT_DIMS))
        and {"flashcore-portable", "sdpa-auto"} <= timing.us.keys()
    ]
    if not alike:
        return None
    nearest = min(alike, key=distance)
    ours, torchs = nearest.us["flashcore-portable"], nearest.us["sdpa-auto"]
    if distance(nearest) > MAX_DISTANCE or torchs >= MARGIN * ours:
        return None
    return (
        f"is slower here by measurement: {ours:.1f} us against {torchs:.1f} for PyTorch's SDPA at the nearest measured shape "
        f"({nearest.batch},{nearest.heads},{nearest.seqlen_q},{nearest.head_dim}"
        f"{', ' + nearest.mask + ' mask' if nearest.mask != 'none' else ''}) on {index.gpu}"
    )
