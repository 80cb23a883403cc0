"""What was verified and measured on GPUs, and what follows from it for a plan.

The records of each GPU lie in a folder beside this file (`nvidia-h200/`): verify.json, verify-bwd.json (the gradients; and in
verify-bwd-*.json earlier ones, for what is the same byte for byte) and bench-*.json as the commands wrote them, and index.json,
the little of them that planning needs, made by `flashcore evidence` and never edited.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from flashcore import torch_backend
from flashcore.kernels.binding import Binding
from flashcore.kernels.registry import BACKWARDS, BINDINGS, KERNELS
from flashcore.nearness import MAX_DISTANCE, Sizes, distance
from flashcore.sources import kernel_hash
from flashcore.spec import AttentionSpec, Band
from flashcore.target import Target

State = Literal["verified", "compiled", "experimental"]
# What a call does: its forward pass, or with a gradient wanted the backward pass too.
Direction = Literal["fwd", "bwd", "fwdbwd"]

FOLDER = Path(__file__).parent
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
    # what of a call was timed
    direction: Direction = "fwd"
    us: dict[str, float]

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.batch * self.heads, self.seqlen_q, self.seqlen_k, self.head_dim)


class Peaks(BaseModel):
    """The ceilings measured on the GPU: matrix rate in TFLOP/s by dtype, copy bandwidth in TB/s."""

    model_config = ConfigDict(frozen=True)

    matrix_tflops: dict[str, float]
    copy_tbytes: float


class Index(BaseModel):
    """The evidence of one GPU: kernel source hashes, the binaries that passed every case they met, and timings.

    The kernels and binaries of backward passes are among the others.
    """

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


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two implementations at the measured shape nearest to a call: which is the faster choice, and why not the other."""

    winner: str
    loser: str
    why: str

    @classmethod
    def of(cls, first: tuple[str, float], second: tuple[str, float], where: str) -> Comparison:
        """From names and times in microseconds; the first wins unless the second is faster by more than noise."""
        (winner, best), (loser, time) = (second, first) if second[1] < MARGIN * first[1] else (first, second)
        verdict = "is slower here by measurement" if best < MARGIN * time else "is no faster here beyond noise"
        against = "PyTorch's SDPA" if winner == torch_backend.IMPL else winner
        return cls(winner, loser, f"{verdict}: {time:.1f} us against {best:.1f} for {against} at {where}")


def compare(spec: AttentionSpec, target: Target, first: str, second: str, *, direction: Direction = "fwd") -> Comparison | None:
    """Which of two implementations, by their `impl` names, a call is faster with; None where measurements do not say.

    Judges by the nearest shape of like features at which both were measured, no further than a factor of four away. Our own
    kernels are compared with one another by the measurements of another GPU of the same arch where this one has none, and
    calls with a window or a cap by calls without. The comparison with PyTorch speaks only of what was measured on this very
    GPU and PyTorch has a fused kernel for: no cap, no window; with a mask, causal or neither. direction: whether the forward
    pass counts, or it and the backward pass.
    """
    if 0 in spec.output_shape or spec.seqlen_k == 0:
        return None
    with_torch = torch_backend.IMPL in (first, second)
    if with_torch and not sdpa_is_fused(spec):
        return None
    contenders = tuple("sdpa-auto" if name == torch_backend.IMPL else f"flashcore-{name}" for name in (first, second))
    ours = [name for name in (first, second) if name != torch_backend.IMPL]
    # this GPU's own evidence first
    for index in sorted(indexes(), key=lambda index: index.gpu != target.name):
        if index.gpu != target.name and (with_torch or index.arch != target.arch):
            continue
        if any(index.sources.get(kernel) != kernel_hash(kernel) for name in ours for kernel in kernels_of(name, direction)):
            continue  # what was timed is not what would run
        alike = (
            timing
            for timing in index.timings
            if timing.direction == direction and timing.us.keys() >= set(contenders) and _alike(spec, timing)
        )
        sizes = Sizes.of(spec)
        for timing in sorted(alike, key=lambda timing: distance(sizes, timing.sizes)):
            if distance(sizes, timing.sizes) > MAX_DISTANCE:
                break
            if all(_same_binary(BINDINGS[name], spec, timing.head_dim, target) for name in ours):
                us = [timing.us[contender] for contender in contenders]
                return Comparison.of((first, us[0]), (second, us[1]), _where(spec, timing, index, target))
    return None


def cost_of_determinism(spec: AttentionSpec, target: Target, impl: str) -> str | None:
    """What bitwise equal gradients cost near a call, as measured on this very GPU; None where it was not."""
    index, contenders = _of_gpu(target.name), (f"flashcore-{impl}", f"flashcore-{impl}-deterministic")
    if index is None or 0 in spec.output_shape or spec.seqlen_k == 0:
        return None
    if any(index.sources.get(kernel) != kernel_hash(kernel) for kernel in kernels_of(impl, "bwd")):
        return None
    timed = (timing for timing in index.timings if timing.direction == "bwd" and timing.us.keys() >= set(contenders))
    sizes = Sizes.of(spec)
    timing = min((one for one in timed if _alike(spec, one)), key=lambda one: distance(sizes, one.sizes), default=None)
    if timing is None or distance(sizes, timing.sizes) > MAX_DISTANCE:
        return None
    usual, fixed = (timing.us[contender] for contender in contenders)
    return f"{fixed / usual:.2f} times as long, the backward pass alone, at {_where(spec, timing, index, target)}"


def kernels_of(impl: str, direction: Direction) -> tuple[str, ...]:
    """The kernels that an implementation is made of which were timed in this direction; its gradients' shipped ones.

    One without a backward pass has no gradients to be timed.
    """
    forward = (BINDINGS[impl].KERNEL,)
    if direction == "fwd" or impl not in BACKWARDS:
        return forward
    return (*forward, *(kernel for kernel in BACKWARDS[impl].KERNELS if not KERNELS[kernel].on_demand))


def sdpa_is_fused(spec: AttentionSpec) -> bool:
    """Whether torch_backend runs a call by SDPA with a kernel that takes its band: only that was measured."""
    if spec.softcap != 0 or spec.return_lse or not (spec.band == Band(None, None) or spec.square_causal):
        return False
    return spec.mask is None or spec.mask.dtype in (torch.bool, spec.dtype)


def _alike(spec: AttentionSpec, timing: Timing) -> bool:
    return (
        timing.mask == ("none" if spec.mask is None else spec.mask.kind)
        and timing.precision == ("fp32" if spec.dtype.itemsize == 4 else "half")
        # a mask is measured without causality, which costs either side less than the mask does
        and (spec.mask is not None or timing.causal == (spec.band.hi is not None))
    )


def _same_binary(binding: Binding, spec: AttentionSpec, head_dim: int, target: Target) -> bool:
    """Whether a kernel runs the call's head dims and a measured one with the same code."""
    assert target.arch is not None  # the kernel was found to run there
    other = replace(spec, head_dim=head_dim, head_dim_v=head_dim)
    if binding.reject(other, target.arch, False) is not None:
        return False
    mine, measured = (binding.specialise_call(call, target.arch, target.sm_count) for call in (spec, other))
    return mine == measured


def _where(spec: AttentionSpec, timing: Timing, index: Index, target: Target) -> str:
    lengths = str(timing.seqlen_q) if timing.seqlen_q == timing.seqlen_k else f"{timing.seqlen_q}/{timing.seqlen_k}"
    shape = [f"{timing.batch},{timing.heads},{lengths},{timing.head_dim}"]
    if timing.causal:
        shape.append("causal")
    if timing.mask != "none":
        shape.append(f"{timing.mask} mask")
    measured_bands = (Band(None, None), Band(None, 0), Band(None, spec.seqlen_k - spec.seqlen_q))
    without = "" if spec.band in measured_bands and spec.softcap == 0 else " without window and cap"
    gpu = index.gpu if index.gpu == target.name else f"{index.gpu}, whose arch is {target.arch} too"
    return f"the nearest measured shape ({', '.join(shape)}){without} on {gpu}"
