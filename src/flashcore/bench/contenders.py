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
from flashcore.errors import ArgumentValueError
from flashcore.target import Target

if TYPE_CHECKING:
    from flashcore.plan import Plan

# What a grid leaves out unless it is named: FlexAttention compiles for every shape, and at 16k tokens whatever writes
# its scores to memory takes most of the run. Each is listed with the reason.
GRID_LEAVES_OUT: dict[str, tuple[str, ...]] = {
    "small": ("flex",),
    "fa": ("sdpa-math", "flex", "unfused"),
    "decode": ("flex",),
    "features": ("flex", "sdpa-math", "unfused"),
}


def contenders() -> dict[str, Contender]:
    """Every contender by name, whether or not this machine has it."""
    every = (
        _ours("flashcore", "auto"),
        _ours("flashcore-portable", "portable"),
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
    left_out = GRID_LEAVES_OUT.get(grid or "", ())
    reasons = {name: f"left out of the grid; ask for it with --impl {name}" for name in left_out}
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
    target = Target.of(inputs.q.device)
    if inputs.q.device.type == "cpu" and (impl != "auto" or _plan(impl, inputs).interpreted):
        return "interpreted: on a CPU Triton's interpreter runs this kernel, and its time would say nothing about it"
    return "interpreted: TRITON_INTERPRET is set" if target.interpreted and impl != "auto" else None


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
