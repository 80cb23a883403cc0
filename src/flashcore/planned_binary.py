"""PlannedBinary: the binary of a specialisation as far as a plan needs to know it, and whether auto may take it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from flashcore import evidence
from flashcore.build.compile import triton_version
from flashcore.kernels.registry import KERNELS
from flashcore.kernels.specialisation import Specialisation
from flashcore.target import Target

# "verified", "compiled" or "experimental" as design.md defines them, the best first
STATES: tuple[evidence.State, ...] = ("verified", "compiled", "experimental")


@dataclass(frozen=True, slots=True)
class PlannedBinary:
    """Where a binary is or would come from ("shipped", "cached", "compile"), its SHA-256 where it is known, what backs it."""

    specialisation: Specialisation
    origin: str
    sha256: str | None
    evidence: evidence.State

    @classmethod
    def find(cls, specialisation: Specialisation, arch: str, target: Target) -> PlannedBinary | str:
        """The binary, or why there is none."""
        from flashcore.runtime.store import locate

        location = locate(specialisation, arch)
        if location is None:
            return (
                f"has no binary for this: {specialisation.name} is not among those shipped for {arch}, and Triton, which would "
                "compile it, is not installed (pip install flashcore[compile])"
            )
        sha256 = None if location.info is None else location.info.sha256
        return cls(specialisation, location.origin, sha256, evidence.state(specialisation.kernel, sha256, target))

    def refused_by_auto(self, target: Target) -> str | None:
        """Why auto does not take what a named call would run."""
        if self.evidence == "experimental":
            return "has no evidence for its present source (run `flashcore verify --record`)"
        if self.evidence == "compiled" and os.environ.get("FLASHCORE_STRICT", "0") == "1":
            return f"has a binary not verified on {target.arch}, and FLASHCORE_STRICT=1 refuses such"
        wanted = KERNELS[self.specialisation.kernel].triton
        if self.origin == "compile" and wanted not in (None, triton_version()):
            return f"has no binary yet, and only Triton {wanted} is known to compile it; {triton_version()} is installed"
        return None


def describe(specialisation: Specialisation, grid: int, binary: PlannedBinary | None) -> list[str]:
    """A launch as lines for people; without a binary it is the interpreter's."""
    lines = [f"kernel      {specialisation.name}", f"grid        {grid} programs"]
    if binary is None:
        return [*lines, "binary      none: Triton's interpreter runs the source"]
    where = f"binary      {binary.origin}, SHA-256 {binary.sha256 or 'known once it is compiled'}"
    return [*lines, where, f"evidence    {binary.evidence}"]
