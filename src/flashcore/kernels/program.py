"""A computation that takes several launches, as data: the launches in order, and the memory they share. Needs no compiler."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from flashcore.kernels.arguments import Argument, TensorName
from flashcore.kernels.specialisation import Specialisation


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch: the binary's identity, the number of programs, and what fills its parameters."""

    specialisation: Specialisation
    grid: int
    arguments: tuple[Argument, ...]


@dataclass(frozen=True, slots=True)
class Workspace:
    """Device memory that the launches of a program share, contiguous, with nothing defined in it before the first of them."""

    tensor: TensorName
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Program:
    """Launches in their order, and what memory they need beside the tensors of the call."""

    launches: tuple[Launch, ...]
    workspaces: tuple[Workspace, ...] = ()

    def allocate(self, device: torch.device) -> dict[TensorName, torch.Tensor]:
        """The workspaces, by name."""
        return {one.tensor: torch.empty(one.shape, dtype=one.dtype, device=device) for one in self.workspaces}

    @property
    def workspace_bytes(self) -> int:
        return sum(workspace.bytes for workspace in self.workspaces)
