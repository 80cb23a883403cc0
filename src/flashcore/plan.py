"""make_plan: which implementation a call runs, with which binary, why, and what was rejected for what reason."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from flashcore import evidence, torch_backend
from flashcore.build.compile import triton_version
from flashcore.errors import ArgumentValueError, UnsupportedError
from flashcore.kernels.binding import Binding
from flashcore.kernels.registry import BINDINGS, KERNELS
from flashcore.kernels.specialisation import Specialisation
from flashcore.spec import AttentionSpec
from flashcore.target import SM_COUNTS, Target

# what `impl=` takes; after "auto", in the order of auto's preference where measurements do not decide
IMPLS = ("auto", *BINDINGS, torch_backend.IMPL)
_BY_NAME = "asked for by name"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a call will do. `str(plan)` is what `flashcore explain` prints."""

    # a name of IMPLS, and never "auto"
    impl: str
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
    if impl == "auto":
        return _choose(spec, target)
    if impl == torch_backend.IMPL:
        return Plan(impl, _BY_NAME)
    found = _plan_ours(BINDINGS[impl], spec, target)
    if isinstance(found, str):
        raise UnsupportedError(f"impl {impl!r}: {found}")
    return replace(found, reason=_BY_NAME)


def only_torch(why: str) -> Plan:
    """The plan of a call that PyTorch runs for want of something that every kernel of ours lacks."""
    reason = f"PyTorch's own attention, because each kernel of ours {why}"
    return Plan(torch_backend.IMPL, reason, tuple((impl, why) for impl in BINDINGS))


def _choose(spec: AttentionSpec, target: Target) -> Plan:
    """The fastest by evidence of all that may run; where it does not say, the first in the order of IMPLS."""
    rejected: dict[str, str] = {}
    candidates: list[Plan] = []
    for impl, binding in BINDINGS.items():
        found = _plan_ours(binding, spec, target)
        refusal = found if isinstance(found, str) else _refuse(found, target)
        if refusal is not None:
            rejected[impl] = refusal
        elif isinstance(found, Plan):
            candidates.append(found)
    best, *standing = (*candidates, Plan(torch_backend.IMPL, ""))
    unanswered: list[Plan] = []
    reason = "the first choice of those that apply; nothing near this call was measured"
    while standing:
        other = standing.pop(0)
        comparison = evidence.compare(spec, target, best.impl, other.impl)
        if comparison is None:
            rejected[other.impl] = f"comes after {best.impl}, and no measurement says that it is faster here"
            unanswered.append(other)
            continue
        reason = "the fastest of those measured near this call"
        rejected[comparison.loser] = comparison.why
        if comparison.winner == other.impl:
            rejected.pop(other.impl, None)
            # those that nothing compared with the one before may be compared with this one
            best, standing, unanswered = other, unanswered + standing, []
    listed = tuple((impl, rejected[impl]) for impl in IMPLS if impl in rejected)
    if best.impl == torch_backend.IMPL:
        reason = "PyTorch's own attention, because " + "; and ".join(f"{impl} {why}" for impl, why in listed)
    return replace(best, reason=reason, rejected=listed)


def _plan_ours(binding: Binding, spec: AttentionSpec, target: Target) -> Plan | str:
    """The plan with a kernel of ours, its reason still open, or why the kernel or a binary of it cannot run the call."""
    from flashcore.runtime.store import locate

    refusal = binding.reject(spec, target.arch, target.interpreted)
    if refusal is not None:
        return refusal
    arch = target.arch or "sm_90a"  # the interpreter runs the tiles of the GPU that the evidence is from
    sm_count = target.sm_count or SM_COUNTS[arch]
    specialisation = binding.specialise_call(spec, arch, sm_count)
    plan = Plan(
        binding.IMPL,
        "",
        kernel=binding.KERNEL,
        specialisation=specialisation,
        grid=binding.grid(spec, specialisation, sm_count),
        interpreted=target.interpreted,
    )
    if target.interpreted:
        return plan
    location = locate(specialisation, arch)
    if location is None:
        return (
            f"has no binary for this: {specialisation.name} is not among those shipped for {arch}, and Triton, which would "
            "compile it, is not installed (pip install flashcore[compile])"
        )
    sha256 = None if location.info is None else location.info.sha256
    state = evidence.state(binding.KERNEL, sha256, target)
    return replace(plan, evidence=state, origin=location.origin, binary_sha256=sha256)


def _refuse(plan: Plan, target: Target) -> str | None:
    """Why auto does not take what a named call would run."""
    assert plan.kernel is not None
    if plan.interpreted:
        return "on a CPU runs in Triton's interpreter, which is for checking, not for use"
    if plan.evidence == "experimental":
        return "has no evidence for its present source (run `flashcore verify --record`)"
    if plan.evidence == "compiled" and os.environ.get("FLASHCORE_STRICT", "0") == "1":
        return f"has a binary not verified on {target.arch}, and FLASHCORE_STRICT=1 refuses such"
    wanted = KERNELS[plan.kernel].triton
    if plan.origin == "compile" and wanted not in (None, triton_version()):
        return f"has no binary yet, and only Triton {wanted} is known to compile it; {triton_version()} is installed"
    return None
