"""Run a step on tensors: launched on a GPU, interpreted on a CPU; and as what `verify` and `bench` take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import torch

import flashcore
from flashcore.bench.contender import Attention, Contender
from flashcore.bench.contenders import contenders
from flashcore.bench.inputs import Inputs
from flashcore.errors import FlashCoreError, UnsupportedError
from flashcore.kernels.arguments import TENSORS
from flashcore.ladder.problem import Problem
from flashcore.ladder.steps import Step
from flashcore.target import Target
from flashcore.verify.suite import Implementation

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def attend(step: Step, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None) -> torch.Tensor:
    """softmax(scale * q k^T) v by this step, for contiguous float16 q, k, v of (B, H, S, D).

    Raises:
        ArgumentTypeError, ArgumentValueError: the tensors or the scale are not what the steps take.
        UnsupportedError: the step does not run on this device, or not this problem.
    """
    return prepare(step, Problem.of(q, k, v, scale), q.device)(q, k, v)


def prepare(step: Step, problem: Problem, device: torch.device) -> Forward:
    """The step with everything done that does not depend on the tensors' memory, which must be such as `Problem.of` takes."""
    target = Target.of(device)
    reason = step.refusal(problem, target.arch, target.interpreted)
    if reason is not None:
        raise UnsupportedError(f"{step.name}: {reason}")
    if step.impl is not None:
        # without return_lse the result is o alone, which the signature cannot say
        return partial(flashcore.attention, impl=step.impl, scale=problem.scale, layout="bhsd")  # type: ignore[return-value]
    return _prepare_interpreted(step, problem) if target.interpreted else _prepare_launches(step, problem, device)


@lru_cache(maxsize=256)
def _prepare_launches(step: Step, problem: Problem, device: torch.device) -> Forward:
    from flashcore.runtime.launch import Launcher
    from flashcore.runtime.store import obtain

    target = Target.of(device)
    assert target.arch is not None
    program = step.program(problem, target.arch, target.sm_count)
    launches = [
        Launcher(obtain(one.specialisation, target), device, grid=one.grid, arguments=one.arguments).launch
        for one in program.launches
    ]

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        o = torch.empty_like(q)
        given = {"q": q, "k": k, "v": v, "o": o, **program.allocate(device)}
        addresses = [given[name].data_ptr() if name in given else 0 for name in TENSORS]
        for launch in launches:
            launch(addresses)
        return o

    return forward


def _prepare_interpreted(step: Step, problem: Problem) -> Forward:
    from flashcore.runtime.interpret import interpret

    program = step.program(problem, "cpu", 0)

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        o = torch.empty_like(q)
        given = {"q": q, "k": k, "v": v, "o": o, **program.allocate(q.device)}
        for one in program.launches:
            interpret(one.specialisation, one.grid, one.arguments, given)
        return o

    return forward


def implementation(step: Step) -> Implementation:
    """The step as something to verify, on cases that ask for no log-sum-exp."""
    return Implementation(step.name, partial(_attention, step))


def _attention(
    step: Step,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None,
    layout: str,
    causal: bool,
    window: tuple[int, int] | None,
    softcap: float,
    attn_mask: torch.Tensor | None,
    return_lse: bool,
) -> torch.Tensor:
    """`flashcore.attention` by a step, for calls in the plainest form."""
    if causal or window is not None or softcap or attn_mask is not None or return_lse:
        raise UnsupportedError(f"{step.name}: takes no mask, softcap or LSE; allowed: plain attention")
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = attend(step, q.contiguous(), k.contiguous(), v.contiguous(), scale=scale)
    return o.transpose(1, 2) if layout == "bshd" else o


def contender(step: Step) -> Contender:
    """The step as something to time, under its contender name."""
    if step.impl is not None:
        return replace(contenders()[f"flashcore-{step.impl}"], name=contender_name(step.name))
    return Contender(contender_name(step.name), "ours", partial(_prepare_contender, step), partial(_refusal, step))


def contender_name(step: str) -> str:
    """A step's name among the contenders, where PyTorch has an `unfused` too."""
    return f"ladder-{step}"


def _refusal(step: Step, inputs: Inputs) -> str | None:
    """Why a step does not take a shape of the benchmark: its kernels have no other features to be asked for."""
    shape = inputs.shape
    if shape.causal or shape.mask != "none":
        return "the ladder's steps are for plain attention, neither causal nor masked"
    try:
        problem = Problem.of(inputs.q, inputs.k, inputs.v, shape.scale)
    except FlashCoreError as error:
        return str(error)
    target = Target.of(inputs.q.device)
    return step.refusal(problem, target.arch, target.interpreted)


def _prepare_contender(step: Step, inputs: Inputs) -> Attention:
    problem = Problem.of(inputs.q, inputs.k, inputs.v, inputs.shape.scale)
    return partial(prepare(step, problem, inputs.q.device), inputs.q, inputs.k, inputs.v)
