"""Target: the device a plan is made for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch

# The architecture whose binaries a GPU of this compute capability runs. 8.6 and 8.7 run sm_80's machine code.
ARCH_OF_CAPABILITY = {
    (8, 0): "sm_80",
    (8, 6): "sm_80",
    (8, 7): "sm_80",
    (8, 9): "sm_89",
    (9, 0): "sm_90a",
    (10, 0): "sm_100a",
    (10, 3): "sm_103a",
    (12, 0): "sm_120a",
    (12, 1): "sm_121a",
}

# Shared memory one block may use, in bytes. sm_80 is held to 8.6's limit, because 8.6 and 8.7 run its binaries.
SHARED_MEMORY_LIMIT = {
    "sm_80": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90a": 227 * 1024,
    "sm_100a": 227 * 1024,
    "sm_103a": 227 * 1024,
    "sm_120a": 99 * 1024,
    "sm_121a": 99 * 1024,
}

# Multiprocessors of an L4 and of an H200: what tiles are chosen for where there is no GPU to ask.
SM_COUNTS = {"sm_89": 58, "sm_90a": 132}


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter. Triton reads the variable once, when a kernel is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True, slots=True)
class Target:
    """A device as the planner sees it; `arch` is None where no kernel of ours can be built for it."""

    name: str
    arch: str | None
    capability: tuple[int, int] | None
    sm_count: int
    interpreted: bool

    @classmethod
    def of(cls, device: torch.device) -> Target:
        """The target behind a torch device. A CPU has an arch only in name: "cpu", run by the interpreter or not at all."""
        if device.type == "cuda":
            return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)
        return cls(
            name=device.type,
            arch=None,
            capability=None,
            sm_count=0,
            interpreted=device.type == "cpu" and interpreting(),
        )


@cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    return Target(
        name=properties.name,
        arch=ARCH_OF_CAPABILITY.get(capability),
        capability=capability,
        sm_count=properties.multi_processor_count,
        interpreted=False,
    )
