"""What can be profiled, by name: each a contender of the benchmark, so it is run and judged as it is there."""

from __future__ import annotations

from flashcore import torch_backend
from flashcore.bench.contender import Contender
from flashcore.bench.contenders import contenders
from flashcore.errors import ArgumentValueError
from flashcore.kernels.registry import BINDINGS
from flashcore.ladder import run as ladder
from flashcore.ladder.steps import STEPS, find_step

# The contender behind each value of `impl=`, and then behind each step of the ladder that is no implementation. What else is
# to be profiled by name needs an entry and a contender.
CONTENDERS = {
    "auto": "flashcore",
    **{impl: f"flashcore-{impl}" for impl in BINDINGS},
    torch_backend.IMPL: "sdpa-auto",
    **{step.name: ladder.contender_name(step.name) for step in STEPS if step.impl is None},
}


def contender_name(impl: str) -> str:
    """What the benchmark or the ladder calls it. Raises ArgumentValueError for a name that is none."""
    if impl not in CONTENDERS:
        raise ArgumentValueError(f"impl: {impl!r} is unknown; allowed: {', '.join(CONTENDERS)}")
    return CONTENDERS[impl]


def subject(impl: str) -> Contender:
    """What runs an implementation or a step. Raises ArgumentValueError for a name that is none."""
    name = contender_name(impl)
    known = contenders()
    return known[name] if name in known else ladder.contender(find_step(impl))
