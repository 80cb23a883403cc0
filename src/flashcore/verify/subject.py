"""FlashCore itself as something to verify."""

from functools import partial

import torch

import flashcore
from flashcore.errors import ArgumentValueError
from flashcore.plan import IMPLS, Plan
from flashcore.runtime import engine
from flashcore.spec import Options
from flashcore.verify.suite import Implementation


def flashcore_implementation(impl: str) -> Implementation:
    """`flashcore.attention`, its SDPA entry and their plans, with `impl` bound.

    Raises:
        ArgumentValueError: there is no such impl.
    """
    if impl not in IMPLS:
        raise ArgumentValueError(f"impl: got {impl!r}; allowed: {', '.join(map(repr, IMPLS))}")
    attention = partial(flashcore.attention, impl=impl)
    explain = partial(flashcore.explain, impl=impl)
    if impl == "auto":
        sdpa, explain_sdpa = flashcore.scaled_dot_product_attention, flashcore.explain_sdpa
        return Implementation(impl, attention, sdpa, explain, explain_sdpa)
    # torch's signature has no impl, and auto would pass over a kernel that has no evidence yet: a named one is reached
    # by what scaled_dot_product_attention itself calls.
    return Implementation(impl, attention, partial(_sdpa, impl), explain, partial(_explain_sdpa, impl))


def _sdpa(
    impl: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
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
