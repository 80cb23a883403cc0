"""What can be profiled, by name: each a contender of the benchmark, so it is run and judged as it is there."""

from __future__ import annotations

from flashcore import torch_backend
from flashcore.bench.contender import Contender
from flashcore.bench.contenders import contenders
from flashcore.errors import ArgumentValueError
from flashcore.kernels.registry import BINDINGS

# The contender behind each value of `impl=`. What else is to be profiled by name needs an entry and a contender.
CONTENDERS = {"auto": "flashcore", **{impl: f"flashcore-{impl}" for impl in BINDINGS}, torch_backend.IMPL: "sdpa-auto"}


def contender_name(impl: str) -> str:
    """What the benchmark calls an implementation. Raises ArgumentValueError for a name that is none."""
    if impl not in CONTENDERS:
        raise ArgumentValueError(f"impl: {impl!r} is unknown; allowed: {', '.join(CONTENDERS)}")
    return CONTENDERS[impl]


def subject(impl: str) -> Contender:
    """What runs an implementation. Raises ArgumentValueError for a name that is none."""
    return contenders()[contender_name(impl)]
