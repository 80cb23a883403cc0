"""FlashCore's own backward passes as something to verify.

Verification poisons memory by asking for deterministic algorithms, which a call would otherwise honour; so here each call says
whether its gradients are to be bitwise equal from run to run.
"""

from dataclasses import replace
from functools import partial

import torch

import flashcore
from flashcore import torch_backend
from flashcore.backward_plan import BackwardPlan, Wanted, plan_backward, request
from flashcore.backward_spec import BackwardSpec
from flashcore.errors import ArgumentValueError, UnsupportedError
from flashcore.kernels.registry import BACKWARDS, BINDINGS
from flashcore.kernels.specialisation import Specialisation
from flashcore.plan import Plan
from flashcore.runtime import engine
from flashcore.spec import Options
from flashcore.target import Target
from flashcore.verify.backward_inputs import BackwardInputs, build_backward
from flashcore.verify.cases import Case
from flashcore.verify.subject import OURS, named_sdpa, reject, spec_of
from flashcore.verify.suite import BackwardRan, Implementation, Ran

ALLOWED = (OURS, "auto", *BACKWARDS, torch_backend.IMPL)


def backward_implementations(impl: str) -> tuple[Implementation, ...]:
    """What `impl` stands for: "ours" for every backward pass of ours, in the planner's order, else the one implementation.

    One whose default sums by atomics is there a second time, asked for bitwise equal gradients.

    Raises:
        ArgumentValueError: there is no such impl, or it has no backward pass.
    """
    if impl not in ALLOWED:
        raise ArgumentValueError(f"impl: got {impl!r}; allowed: {', '.join(map(repr, ALLOWED))}")
    found = []
    for name in BACKWARDS if impl == OURS else (impl,):
        found.append(_implementation(name, deterministic=False))
        if name in BACKWARDS and _sums_by_atomics(name):
            found.append(_implementation(name, deterministic=True))
    return tuple(found)


def _implementation(impl: str, *, deterministic: bool) -> Implementation:
    named = Implementation(
        f"{impl}-deterministic" if deterministic else impl,
        partial(flashcore.attention, impl=impl, deterministic=deterministic),
        partial(named_sdpa, impl, deterministic=deterministic),
        explain_backward=partial(_explain, impl, deterministic),
    )
    if impl not in BACKWARDS:
        return named
    return replace(
        named,
        reject=partial(reject, BINDINGS[impl]),
        reject_backward=partial(_reject, impl, deterministic),
        binaries=partial(_binaries, impl, deterministic),
    )


def _binaries(impl: str, deterministic: bool, case: Case, target: Target) -> tuple[Specialisation, ...]:
    """Those that a case takes forward and backward, none where either pass does not take it."""
    spec = backward_spec_of(build_backward(case, torch.device("meta")), deterministic=deterministic)
    forward, backward, arch = BINDINGS[impl], BACKWARDS[impl], target.arch
    if arch is None or forward.reject(spec.call, arch, False) is not None or backward.reject(spec, arch, False) is not None:
        return ()
    program = backward.program(spec, arch, target.sm_count)
    return (
        forward.specialise_call(spec.call, arch, target.sm_count),
        *(launch.specialisation for launch in program.launches),
    )


def _sums_by_atomics(impl: str) -> bool:
    """Whether an ordinary call's default gradients may differ from run to run."""
    ordinary = build_backward(Case(name="ordinary"), torch.device("meta"))
    return not BACKWARDS[impl].reproducible(backward_spec_of(ordinary, deterministic=False))


def backward_spec_of(given: BackwardInputs, *, deterministic: bool) -> BackwardSpec:
    """What the case's backward pass asks for, given what comes in as kernels get it: contiguous, or as good."""
    case, x = given.case, given.inputs
    options = Options.check(**case.options, layout=case.layout, top_left=case.top_left, deterministic=deterministic)
    call = spec_of(case, x)
    return request(call, options, x.attn_mask, _wanted(given), do=None, dlse=given.dlse is not None)


def _wanted(given: BackwardInputs) -> Wanted:
    wrt, mask = given.case.wrt, given.inputs.attn_mask
    return "q" in wrt, "k" in wrt, "v" in wrt, "m" in wrt and mask is not None and mask.dtype != torch.bool


def _reject(impl: str, deterministic: bool, given: BackwardInputs) -> str | None:
    """Why a backward pass does not take a case on the inputs' device. That it has no binary for it would be no such reason."""
    target = Target.of(given.do.device)
    spec = backward_spec_of(given, deterministic=deterministic)
    return BACKWARDS[impl].reject(spec, target.arch, target.interpreted)


def _explain(impl: str, deterministic: bool, given: BackwardInputs) -> BackwardRan:
    plan = _planned(impl, deterministic, given)
    if plan is None:
        # by PyTorch, of whose kernels nothing is known; its fused ones sum by atomics
        return BackwardRan(torch_backend.IMPL, (), reproducible=False)
    sha256 = [binary.sha256 for binary in plan.binaries] or [None] * len(plan.program.launches)
    launches = [
        Ran(plan.impl, launch.specialisation.kernel, launch.specialisation.name, its)
        for launch, its in zip(plan.program.launches, sha256, strict=True)
    ]
    return BackwardRan(plan.impl, tuple(launches), plan.reproducible)


def _planned(impl: str, deterministic: bool, given: BackwardInputs) -> BackwardPlan | None:
    """The plan of a case's backward pass; None where PyTorch runs it."""
    if impl == "auto":
        plan = _plan_of_auto(deterministic, given)
        if plan.backward is None:
            return None
        impl = plan.impl
    if impl == torch_backend.IMPL:
        return None
    spec = backward_spec_of(given, deterministic=deterministic)
    found = plan_backward(spec, Target.of(given.do.device), impl)
    if isinstance(found, str):
        raise UnsupportedError(f"impl {impl!r}: {found}")
    return found


def _plan_of_auto(deterministic: bool, given: BackwardInputs) -> Plan:
    case, x = given.case, given.inputs
    leaves = [
        None if tensor is None else tensor.detach().requires_grad_(needed)
        for tensor, needed in zip((x.q, x.k, x.v, x.attn_mask), _wanted(given), strict=True)
    ]
    options = Options.check(**case.options, layout=case.layout, top_left=case.top_left, deterministic=deterministic)
    q, k, v, mask = leaves
    assert q is not None and k is not None and v is not None
    return engine.plan_call(q, k, v, mask, options, case.return_lse, "auto")[1]
