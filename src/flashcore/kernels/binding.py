"""Binding: what every kernel package says of itself, so that planning and launching need not know which kernel it is."""

from __future__ import annotations

from typing import Protocol

from flashcore.kernels.arguments import Argument
from flashcore.kernels.specialisation import Specialisation
from flashcore.spec import AttentionSpec


class Binding(Protocol):
    """The module `flashcore.kernels.<package>.binding`. Needs no compiler."""

    KERNEL: str
    # the name that `impl=` takes
    IMPL: str

    def reject(self, spec: AttentionSpec, arch: str | None, interpreted: bool) -> str | None:
        """Why this kernel cannot run a call on a device, or None when it can."""

    def specialise_call(self, spec: AttentionSpec, arch: str, sm_count: int) -> Specialisation:
        """The binary that a call on a GPU runs."""

    def features(self, spec: AttentionSpec) -> str:
        """What of a call configurations are tuned for (flashcore.tuned): all that its code depends on but the dtype."""

    def grid(self, spec: AttentionSpec, specialisation: Specialisation, sm_count: int) -> int:
        """Number of blocks of a call: programs, a multiple of the specialisation's cluster."""

    def arguments(self, spec: AttentionSpec, specialisation: Specialisation) -> tuple[Argument, ...]:
        """What fills the kernel's parameters, in their order."""

    def needs_counter(self, spec: AttentionSpec, specialisation: Specialisation, grid: int) -> bool:
        """Whether a call's launch of so many blocks takes the `counter`: one int32, zeroed before each launch."""

    def matrix_instruction(self, specialisation: Specialisation, arch: str) -> str | None:
        """The matrix instruction that a binary must hold; None where it is meant to hold none."""

    def shipped(self, arch: str) -> tuple[Specialisation, ...]:
        """The specialisations that a wheel holds for an arch."""
