"""What a contender is: one way to compute attention that the timer can run, and the reasons it may have not to."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from flashcore.bench.inputs import Inputs

Kind = Literal["ours", "sdpa", "peer", "floor"]
Attention = Callable[[], torch.Tensor]
# What is timed: attention, or what makes (dq, dk, dv) of it.
Output = torch.Tensor | tuple[torch.Tensor, ...]
Run = Callable[[], Output]

# The part of a device's memory that an implementation which writes the whole score matrix may take.
MEMORY_SHARE = 0.25


@dataclass(frozen=True)
class Contender:
    """One way to compute attention.

    kind: "sdpa" is a backend of PyTorch's SDPA, forced: the fastest of these is what ratios are taken to.
    unavailable_reason(inputs): why it cannot or must not run on these inputs, or None.
    prepare(inputs): a call without arguments that returns o (B,Hq,Sq,Dv); whatever is not part of a user's call
    (layouts, masks, plans) is done before. May raise; the gate lists what it says.
    context: entered around the calls, such as the one that forces a backend; never inside a timed loop.
    detail(inputs): what it is made of (a version, a plan), for the record.
    """

    name: str
    kind: Kind
    prepare: Callable[[Inputs], Attention]
    unavailable_reason: Callable[[Inputs], str | None] = lambda inputs: None
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    detail: Callable[[Inputs], str | None] = lambda inputs: None


def on_cuda(inputs: Inputs) -> bool:
    return inputs.q.device.type == "cuda"


def not_installed(module: str, package: str) -> str | None:
    """Why a third-party module cannot be imported, or None."""
    return f"{package} is not installed" if find_spec(module) is None else None


def too_large(inputs: Inputs, bytes_per_score: int) -> str | None:
    """Why an implementation that keeps `bytes_per_score` for every score does not fit this device, or None."""
    needed = inputs.shape.score_elements * bytes_per_score
    if on_cuda(inputs):
        memory = torch.cuda.get_device_properties(inputs.q.device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    allowed = int(memory * MEMORY_SHARE)
    if needed <= allowed:
        return None
    return f"its scores would take {needed / 2**30:.1f} GiB of memory; at most {allowed / 2**30:.1f} GiB is allowed"
