"""make_plan: which implementation a call runs, with which binary, why, and what was rejected for what reason."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flashcore import evidence, torch_backend, tuned
from flashcore.backward_plan import BackwardPlan, plan_backward
from flashcore.backward_spec import BackwardSpec
from flashcore.errors import ArgumentValueError, UnsupportedError
from flashcore.evidence import Comparison
from flashcore.kernels.binding import Binding
from flashcore.kernels.registry import BINDINGS
from flashcore.kernels.specialisation import Specialisation
from flashcore.planned_binary import PlannedBinary, describe
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
    # of a kernel of ours: where its form comes from, a search or the kernel's own table
    form: str | None = None
    # None where PyTorch or the interpreter runs the call
    binary: PlannedBinary | None = None
    interpreted: bool = False
    # where a gradient is needed and is ours
    backward: BackwardPlan | None = None

    @property
    def evidence(self) -> str:
        """The state of its binary; "none" where no binary of ours is involved."""
        return "none" if self.binary is None else self.binary.evidence

    @property
    def origin(self) -> str | None:
        """Where its binary is or would come from."""
        return None if self.binary is None else self.binary.origin

    @property
    def binary_sha256(self) -> str | None:
        """Of its binary, where that is there already."""
        return None if self.binary is None else self.binary.sha256

    def __str__(self) -> str:
        lines = [f"impl        {self.impl}", f"why         {self.reason}"]
        if self.specialisation is not None:
            lines += describe(self.specialisation, self.grid, self.binary)
            lines.append(f"form        {self.form}")
        if self.backward is not None:
            lines.append(str(self.backward))
        lines += [f"rejected    {impl}: {why}" for impl, why in self.rejected]
        return "\n".join(lines)


def check_impl(impl: str) -> None:
    """Raise ArgumentValueError unless `impl` is the name of an implementation or "auto"."""
    if impl not in IMPLS:
        raise ArgumentValueError(f"impl: got {impl!r}; allowed: {', '.join(map(repr, IMPLS))}")


def make_plan(
    spec: AttentionSpec, target: Target, impl: str, gradient: BackwardSpec | None = None, *, ours: bool = False
) -> Plan:
    """Choose for a validated call.

    Args:
        gradient: what is asked of the backward pass; None where no gradient is needed. The same implementation runs both.
        ours: "auto" takes PyTorch only where no kernel of ours can run the call.

    Raises:
        ArgumentValueError: unknown impl.
        UnsupportedError: the named impl cannot run this call on this device; it never falls back.
    """
    check_impl(impl)
    if impl == "auto":
        return _choose(spec, target, gradient, ours)
    if impl == torch_backend.IMPL:
        return Plan(impl, _BY_NAME)
    found = _plan_ours(BINDINGS[impl], spec, target, gradient)
    if isinstance(found, str):
        raise UnsupportedError(f"impl {impl!r}: {found}")
    return replace(found, reason=_BY_NAME)


def only_torch(why: str) -> Plan:
    """The plan of a call that PyTorch runs for want of something that every kernel of ours lacks."""
    reason = f"PyTorch's own attention, because each kernel of ours {why}"
    return Plan(torch_backend.IMPL, reason, tuple((impl, why) for impl in BINDINGS))


def _choose(spec: AttentionSpec, target: Target, gradient: BackwardSpec | None, ours: bool) -> Plan:
    """The fastest by evidence of all that may run; where it does not say, the first in the order of IMPLS."""
    rejected: dict[str, str] = {}
    candidates: list[Plan] = []
    for impl, binding in BINDINGS.items():
        found = _plan_ours(binding, spec, target, gradient)
        refusal = found if isinstance(found, str) else _refuse(found, target)
        if refusal is not None:
            rejected[impl] = refusal
        elif isinstance(found, Plan):
            candidates.append(found)
    if candidates and gradient is not None and gradient.deterministic:
        rejected[torch_backend.IMPL] = "promises no bitwise equal gradients from its fused kernels, and these were asked for"
    elif not (candidates and ours):
        candidates.append(Plan(torch_backend.IMPL, ""))
    best, *standing = candidates
    unanswered: list[Plan] = []
    reason = "the first choice of those that apply; nothing near this call was measured"
    while standing:
        other = standing.pop(0)
        comparison = _compare(spec, target, best.impl, other.impl, gradient)
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


def _compare(spec: AttentionSpec, target: Target, first: str, second: str, gradient: BackwardSpec | None) -> Comparison | None:
    """By measurements, of both directions where a gradient is needed: PyTorch's fused kernels stand there until these speak."""
    if gradient is None:
        return evidence.compare(spec, target, first, second)
    comparison = evidence.compare(spec, target, first, second, direction="fwdbwd")
    if comparison is None and second == torch_backend.IMPL and evidence.sdpa_is_fused(spec):
        why = "has no measurement of forward and backward near this call that says it is as fast as PyTorch's SDPA"
        return Comparison(second, first, why)
    return comparison


def _plan_ours(binding: Binding, spec: AttentionSpec, target: Target, gradient: BackwardSpec | None) -> Plan | str:
    """The plan with a kernel of ours, its reason still open, or why the kernel or a binary of it cannot run the call."""
    call = spec if gradient is None else gradient.call
    refusal = binding.reject(call, target.arch, target.interpreted)
    if refusal is not None:
        return refusal
    arch = target.arch or "sm_90a"  # the interpreter runs the tiles of the GPU that the evidence is from
    sm_count = target.sm_count or SM_COUNTS[arch]
    specialisation = binding.specialise_call(call, arch, sm_count)
    plan = Plan(
        binding.IMPL,
        "",
        kernel=binding.KERNEL,
        specialisation=specialisation,
        grid=binding.grid(call, specialisation, sm_count),
        form=tuned.why(binding.IMPL, call, arch, sm_count),
        interpreted=target.interpreted,
    )
    if gradient is not None:
        backward = plan_backward(gradient, target, binding.IMPL)
        if isinstance(backward, str):
            return backward
        plan = replace(plan, backward=backward)
    if target.interpreted:
        return plan
    binary = PlannedBinary.find(specialisation, arch, target)
    if isinstance(binary, str):
        return binary
    return replace(plan, binary=binary)


def _refuse(plan: Plan, target: Target) -> str | None:
    """Why auto does not take what a named call would run."""
    if plan.interpreted:
        return "on a CPU runs in Triton's interpreter, which is for checking, not for use"
    assert plan.binary is not None
    refusal = plan.binary.refused_by_auto(target)
    return plan.backward.refused_by_auto(target) if refusal is None and plan.backward is not None else refusal
