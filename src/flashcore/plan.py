"""make_plan: which implementation a call runs, with which binary, why, and what was rejected for what reason."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from flashcore import evidence
from flashcore.errors import ArgumentValueError, UnsupportedError
from flashcore.kernels.portable import binding as portable
from flashcore.kernels.specialisation import Specialisation
from flashcore.spec import AttentionSpec
from flashcore.target import Target

IMPLS = ("auto", "portable", "torch")
Impl = Literal["portable", "torch"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a call will do. `str(plan)` is what `flashcore explain` prints."""

    impl: Impl
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()
    kernel: str | None = None
    specialisation: Specialisation | None = None
    grid: int = 0
    # "verified", "compiled" or "experimental" as design.md defines them; "none" where no binary of ours is involved
    evidence: str = "none"
    origin: str | None = None
    binary_sha256: str | None = None
    interpreted: bool = False

    def __str__(self) -> str:
        lines = [f"impl        {self.impl}", f"why         {self.reason}"]
        if self.specialisation is not None:
            lines += [f"kernel      {self.specialisation.name}", f"grid        {self.grid} programs"]
            if self.interpreted:
                lines.append("binary      none: Triton's interpreter runs the source")
            else:
                lines.append(f"binary      {self.origin}, SHA-256 {self.binary_sha256 or 'known once it is compiled'}")
                lines.append(f"evidence    {self.evidence}")
        lines += [f"rejected    {impl}: {why}" for impl, why in self.rejected]
        return "\n".join(lines)


def check_impl(impl: str) -> None:
    """Raise ArgumentValueError unless `impl` is the name of an implementation or "auto"."""
    if impl not in IMPLS:
        raise ArgumentValueError(f"impl: got {impl!r}; allowed: {', '.join(map(repr, IMPLS))}")


def make_plan(spec: AttentionSpec, target: Target, impl: str) -> Plan:
    """Choose for a validated call.

    Raises:
        ArgumentValueError: unknown impl.
        UnsupportedError: the named impl cannot run this call on this device; it never falls back.
    """
    check_impl(impl)
    if impl == "torch":
        return Plan("torch", "asked for by name")
    refusal = portable.reject(spec, target.arch, target.interpreted)
    if impl == "auto" and refusal is None and target.interpreted:
        refusal = "on a CPU it runs in Triton's interpreter, which is for checking, not for use"
    if refusal is None:
        why = "asked for by name" if impl == "portable" else "the fastest kernel of ours that applies"
        found = _portable(spec, target, why)
        if isinstance(found, Plan):
            refusal = _refuse_on_evidence(found, spec, target) if impl == "auto" else None
            if refusal is None:
                return found
        else:
            refusal = found
    if impl == "portable":
        raise UnsupportedError(f"impl 'portable': {refusal}")
    return Plan("torch", f"PyTorch's own attention, because portable {refusal}", rejected=(("portable", refusal),))


def _portable(spec: AttentionSpec, target: Target, reason: str) -> Plan | str:
    """The plan with the portable kernel, or why there is no binary for it."""
    from flashcore.runtime.store import locate

    arch = target.arch or "sm_90a"  # the interpreter runs the tiles of the GPU that the evidence is from
    specialisation = portable.specialise_call(spec, arch, target.sm_count or 132)
    grid = portable.grid(spec, specialisation)
    if target.interpreted:
        return Plan("portable", reason, (), portable.KERNEL, specialisation, grid, "none", None, None, True)
    location = locate(specialisation, arch)
    if location is None:
        return (
            f"has no binary for this: {specialisation.name} is not among those shipped for {arch}, and Triton, which would "
            "compile it, is not installed (pip install flashcore[compile])"
        )
    sha256 = None if location.info is None else location.info.sha256
    state = evidence.state(portable.KERNEL, sha256, target)
    return Plan("portable", reason, (), portable.KERNEL, specialisation, grid, state, location.origin, sha256, False)


def _refuse_on_evidence(plan: Plan, spec: AttentionSpec, target: Target) -> str | None:
    if plan.evidence == "experimental":
        return "has no evidence for its present source (run `flashcore verify --record`)"
    if plan.evidence == "compiled" and os.environ.get("FLASHCORE_STRICT", "0") == "1":
        return f"has a binary not verified on {target.arch}, and FLASHCORE_STRICT=1 refuses such"
    return evidence.slower_than_torch(spec, target)
