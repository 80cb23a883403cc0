"""Who is timed: ours, PyTorch's, other packages'; by name, and by what a grid takes unless asked otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import flashcore
from flashcore.bench.contender import Attention, Contender
from flashcore.bench.inputs import Inputs
from flashcore.bench.library_contenders import library_contenders
from flashcore.bench.torch_contenders import torch_contenders
from flashcore.bench.work import Direction
from flashcore.errors import ArgumentValueError, UnsupportedError
from flashcore.kernels.registry import BACKWARDS, BINDINGS

if TYPE_CHECKING:
    from flashcore.plan import Plan

_COMPILES = "it compiles anew for every shape"
_SCORES = "its scores go through memory, which would take most of the run"
_SLOWEST = "by far the slowest of the fused backends here, it would take the most of the run"
# What a grid leaves out unless it is named, and why.
GRID_LEAVES_OUT: dict[str, dict[str, str]] = {
    "small": {"flex": _COMPILES},
    "fa-bwd": {"sdpa-math": _SCORES},
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


def contenders(direction: Direction = "fwd") -> dict[str, Contender]:
    """Every contender by name, whether or not this machine has it. Of gradients: ours and SDPA's backends."""
    every: tuple[Contender, ...]
    if direction == "fwd":
        every = (
            _ours("flashcore", "auto"),
            *(_ours(f"flashcore-{impl}", impl) for impl in BINDINGS),
            *torch_contenders(),
            *library_contenders(),
        )
    else:
        # asked for or not: the gate poisons memory by asking for deterministic algorithms, which a call would honour
        every = (
            _ours("flashcore", "auto", deterministic=False),
            *(_ours(f"flashcore-{impl}", impl, deterministic=False) for impl in BACKWARDS),
            *(_ours(f"flashcore-{impl}-deterministic", impl, deterministic=True) for impl in BACKWARDS),
            *(contender for contender in torch_contenders() if contender.name.startswith("sdpa-")),
        )
    return {contender.name: contender for contender in every}


def select(names: Sequence[str], grid: str | None, direction: Direction = "fwd") -> tuple[list[Contender], dict[str, str]]:
    """The contenders to run, and those left out with the reason; no names means all that the grid takes.

    Raises ArgumentValueError for a name that no contender has.
    """
    every = contenders(direction)
    unknown = [name for name in names if name not in every]
    if unknown:
        raise ArgumentValueError(f"impl: {', '.join(unknown)} is unknown; allowed: {', '.join(every)}")
    if names:
        return [every[name] for name in dict.fromkeys(names)], {}
    left_out = {name: why for name, why in GRID_LEAVES_OUT.get(grid or "", {}).items() if name in every}
    reasons = {name: f"left out of the grid: {why}; ask for it with --impl {name}" for name, why in left_out.items()}
    return [contender for contender in every.values() if contender.name not in reasons], reasons


@dataclass(frozen=True)
class _Ours:
    """One of our implementations by name; deterministic is for its gradients, None where none are taken."""

    impl: str
    deterministic: bool | None

    def options(self, inputs: Inputs) -> dict[str, Any]:
        """The arguments of our calls but the tensors."""
        shape = inputs.shape
        return {
            "causal": shape.causal,
            "scale": shape.scale,
            "attn_mask": inputs.mask,
            "layout": "bhsd",
            "impl": self.impl,
            "deterministic": self.deterministic,
        }

    def plan(self, inputs: Inputs) -> Plan:
        return flashcore.explain(inputs.q, inputs.k, inputs.v, **self.options(inputs))


def _ours(name: str, impl: str, *, deterministic: bool | None = None) -> Contender:
    asked = _Ours(impl, deterministic)
    return Contender(
        name, "ours", partial(_prepare_ours, asked), partial(_ours_unavailable, asked), detail=partial(_plan_text, asked)
    )


def _prepare_ours(asked: _Ours, inputs: Inputs) -> Attention:
    call = partial(flashcore.attention, inputs.q, inputs.k, inputs.v, **asked.options(inputs))
    # Without return_lse the result is o alone, which the signature cannot say.
    return cast("Attention", call)


def _ours_unavailable(asked: _Ours, inputs: Inputs) -> str | None:
    try:
        plan = asked.plan(inputs)
        default = replace(asked, deterministic=False).plan(inputs) if asked.deterministic else None
    except UnsupportedError as error:
        return str(error)
    if plan.interpreted:
        return "interpreted: Triton's interpreter runs this kernel, and its time would say nothing about it"
    if default is not None and default.backward is not None and default.backward.reproducible:
        return "its gradients are bitwise equal from run to run as they are"
    return None


def _plan_text(asked: _Ours, inputs: Inputs) -> str:
    plan = asked.plan(inputs)
    what = plan.specialisation.name if plan.specialisation else plan.impl
    binary = f", binary {plan.binary_sha256}" if plan.binary_sha256 else ""
    text = f"{plan.impl}: {what}, evidence {plan.evidence}{binary}"
    if plan.backward is None:
        return text
    launches = "".join(
        f"; {one.specialisation.name}, evidence {one.evidence}, binary {one.sha256}" for one in plan.backward.binaries
    )
    return f"{text}; backward {plan.backward.workspace_bytes} bytes of workspace{launches}"
