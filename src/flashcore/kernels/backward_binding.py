"""BackwardBinding: what a kernel package says of its backward pass, so that planning and launching need not know it."""

from __future__ import annotations

from typing import Protocol

from flashcore.backward_spec import BackwardSpec
from flashcore.kernels.program import Program
from flashcore.kernels.specialisation import Specialisation


class BackwardBinding(Protocol):
    """The module `flashcore.kernels.<package>.backward_binding`. Needs no compiler."""

    # the name that `impl=` takes
    IMPL: str
    # the ids of the kernels that its programs are made of
    KERNELS: tuple[str, ...]

    def reject(self, spec: BackwardSpec, arch: str | None, interpreted: bool) -> str | None:
        """Why it cannot run such a pass on a device, or None when it can."""

    def program(self, spec: BackwardSpec, arch: str, sm_count: int) -> Program:
        """The launches of a pass, and what memory they need. Bitwise reproducible where the spec asks for it."""

    def reproducible(self, spec: BackwardSpec) -> bool:
        """Whether the program of a pass gives bitwise equal results run to run, asked for or not."""

    def matrix_instruction(self, specialisation: Specialisation, arch: str) -> str | None:
        """The matrix instruction that a binary must hold; None where it is meant to hold none."""

    def shipped(self, arch: str) -> tuple[Specialisation, ...]:
        """The specialisations, of all its kernels, that a wheel holds for an arch."""
