"""FlashCore itself as something to verify."""

from dataclasses import replace
from functools import partial

import torch

import flashcore
from flashcore.errors import ArgumentValueError
from flashcore.kernels.binding import Binding
from flashcore.kernels.registry import BINDINGS
from flashcore.kernels.specialisation import Specialisation
from flashcore.plan import IMPLS, Plan
from flashcore.runtime import engine
from flashcore.spec import AttentionSpec, Options
from flashcore.target import Target
from flashcore.verify.cases import Case
from flashcore.verify.inputs import Inputs, build
from flashcore.verify.suite import Implementation

# Every kernel of ours, each case under all of them that take it: what evidence is made of.
OURS = "ours"


def flashcore_implementations(impl: str) -> tuple[Implementation, ...]:
    """What `impl` stands for: "ours" for every kernel of ours, in the planner's order, else the one implementation.

    Raises:
        ArgumentValueError: there is no such impl.
    """
    if impl == OURS:
        return tuple(map(_implementation, BINDINGS))
    if impl not in IMPLS:
        raise ArgumentValueError(f"impl: got {impl!r}; allowed: {', '.join(map(repr, (OURS, *IMPLS)))}")
    return (_implementation(impl),)


def _implementation(impl: str) -> Implementation:
    """`flashcore.attention`, its SDPA entry and their plans, with `impl` bound."""
    attention = partial(flashcore.attention, impl=impl)
    explain = partial(flashcore.explain, impl=impl)
    if impl == "auto":
        sdpa, explain_sdpa = flashcore.scaled_dot_product_attention, flashcore.explain_sdpa
        return Implementation(impl, attention, sdpa, explain, explain_sdpa)
    # torch's signature has no impl, and auto would pass over a kernel that has no evidence yet: a named one is reached
    # by what scaled_dot_product_attention itself calls.
    named = Implementation(impl, attention, partial(named_sdpa, impl), explain, partial(_explain_sdpa, impl))
    if impl not in BINDINGS:
        return named
    return replace(named, reject=partial(reject, BINDINGS[impl]), binaries=partial(_binaries, BINDINGS[impl]))


def _binaries(binding: Binding, case: Case, target: Target) -> tuple[Specialisation, ...]:
    """The one that a case takes, none where the kernel does not take it."""
    spec = spec_of(case, build(case, torch.device("meta")))
    if target.arch is None or binding.reject(spec, target.arch, False) is not None:
        return ()
    return (binding.specialise_call(spec, target.arch, target.sm_count),)


def reject(binding: Binding, case: Case, inputs: Inputs) -> str | None:
    """Why a kernel does not take a case on the inputs' device. That it has no binary for it would be no such reason."""
    spec = spec_of(case, inputs)
    target = Target.of(spec.device)
    return binding.reject(spec, target.arch, target.interpreted)


def spec_of(case: Case, inputs: Inputs) -> AttentionSpec:
    """What the case's call asks for."""
    options = Options.check(**case.options, layout=case.layout, top_left=case.top_left)
    return AttentionSpec.from_tensors(inputs.q, inputs.k, inputs.v, inputs.attn_mask, options, return_lse=case.return_lse)


def named_sdpa(
    impl: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    deterministic: bool | None = None,
) -> torch.Tensor:
    """SDPA's semantics by a named implementation; enable_gqa is implied by the head counts."""
    o, _ = engine.run(
        query,
        key,
        value,
        attn_mask,
        causal=is_causal,
        scale=scale,
        window=None,
        softcap=0.0,
        return_lse=False,
        layout="bhsd",
        impl=impl,
        top_left=True,
        deterministic=deterministic,
    )
    return o


def _explain_sdpa(
    impl: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Plan:
    options = Options.check(causal=is_causal, scale=scale, window=None, softcap=0.0, layout="bhsd", top_left=True)
    return engine.plan_call(query, key, value, attn_mask, options, False, impl)[1]
