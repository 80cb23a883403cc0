"""Who is timed: ours, PyTorch's, other packages'; by name, and by what a grid takes unless asked otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import flashcore
from flashcore.bench.contender import Attention, Contender
from flashcore.bench.inputs import Inputs
from flashcore.bench.library_contenders import library_contenders
from flashcore.bench.torch_contenders import torch_contenders
from flashcore.errors import ArgumentValueError, UnsupportedError
from flashcore.kernels.registry import BINDINGS

if TYPE_CHECKING:
    from flashcore.plan import Plan

_COMPILES = "it compiles anew for every shape"
_SCORES = "its scores go through memory, which would take most of the run"
_SLOWEST = "by far the slowest of the fused backends here, it would take the most of the run"
# What a grid leaves out unless it is named, and why.
GRID_LEAVES_OUT: dict[str, dict[str, str]] = {
    "small": {"flex": _COMPILES},
    "fa": {
        "sdpa-math": _SCORES,
        "flex": _COMPILES,
        "unfused": _SCORES,
        "sdpa-efficient": _SLOWEST,
    },
    "decode": {"flex": _COMPILES},
    "features": {"flex": _COMPILES, "sdpa-math": _SCORES, "unfused": _SCORES},
    "crossover": {"flex": _COMPILES, "sdpa-math": _SCORES, "unfused": _SCORES, "sdpa-efficient": _SLOWEST},
}


def contenders() -> dict[str, Contender]:
    """Every contender by name, whether or not this machine has it."""
    every = (
        _ours("flashcore", "auto"),
        *(_ours(f"flashcore-{impl}", impl) for impl in BINDINGS),
        *torch_contenders(),
        *library_contenders(),
    )
    return {contender.name: contender for contender in every}


def select(names: Sequence[str], grid: str | None) -> tuple[list[Contender], dict[str, str]]:
    """The contenders to run, and those left out with the reason; no names means all that the grid takes.

    Raises ArgumentValueError for a name that no contender has.
    """
    every = contenders()
    unknown = [name for name in names if name not in every]
    if unknown:
        raise ArgumentValueError(f"impl: {', '.join(unknown)} is unknown; allowed: {', '.join(every)}")
    if names:
        return [every[name] for name in dict.fromkeys(names)], {}
    left_out = GRID_LEAVES_OUT.get(grid or "", {})
    reasons = {name: f"left out of the grid: {why}; ask for it with --impl {name}" for name, why in left_out.items()}
    return [contender for contender in every.values() if contender.name not in reasons], reasons


def _ours(name: str, impl: str) -> Contender:
    return Contender(
        name, "ours", partial(_prepare_ours, impl), partial(_ours_unavailable, impl), detail=partial(_plan_text, impl)
    )


def _prepare_ours(impl: str, inputs: Inputs) -> Attention:
    call = partial(flashcore.attention, inputs.q, inputs.k, inputs.v, **_options(impl, inputs))
    # Without return_lse the result is o alone, which the signature cannot say.
    return cast("Attention", call)


def _ours_unavailable(impl: str, inputs: Inputs) -> str | None:
    try:
        plan = _plan(impl, inputs)
    except UnsupportedError as error:
        return str(error)
    if plan.interpreted:
        return "interpreted: Triton's interpreter runs this kernel, and its time would say nothing about it"
    return None


def _plan(impl: str, inputs: Inputs) -> Plan:
    return flashcore.explain(inputs.q, inputs.k, inputs.v, **_options(impl, inputs))


def _options(impl: str, inputs: Inputs) -> dict[str, Any]:
    """The arguments of our calls but the tensors."""
    shape = inputs.shape
    return {
        "causal": shape.causal,
        "scale": shape.scale,
        "attn_mask": inputs.mask,
        "layout": "bhsd",
        "impl": impl,
    }


def _plan_text(impl: str, inputs: Inputs) -> str:
    plan = _plan(impl, inputs)
    what = plan.specialisation.name if plan.specialisation else plan.impl
    binary = f", binary {plan.binary_sha256}" if plan.binary_sha256 else ""
    return f"{plan.impl}: {what}, evidence {plan.evidence}{binary}"
