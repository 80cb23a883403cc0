"""A run of the ladder: verify every step, then, on a GPU, time those that are right, interleaved, and record all of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from flashcore import environment
from flashcore.bench import contenders, runner
from flashcore.bench.contender import Contender
from flashcore.bench.inputs import InputSets
from flashcore.bench.shapes import Shape
from flashcore.kernels.registry import LADDER
from flashcore.ladder.artifact import LadderArtifact, TimedShape
from flashcore.ladder.checks import StepVerification, verify_step
from flashcore.ladder.code import KernelCode, compile_steps
from flashcore.ladder.problem import Problem
from flashcore.ladder.run import contender, contender_name
from flashcore.ladder.steps import Step
from flashcore.sources import kernel_hash
from flashcore.target import Target
from flashcore.verify.cases import Case
from flashcore.verify.watchdog import watchdog

# The mission shape, and a long one.
SHAPES = (Shape(1, 8, 8, 512, 512, 64, 64), Shape(4, 16, 16, 4096, 4096, 64, 64))
# PyTorch's three steps through memory: what ratios are taken to.
BASELINE = "unfused"
ITERS = 100
# No shape takes much longer than this to time, but no series has fewer samples than MIN_ITERS.
BUDGET_SECONDS = 60.0
MIN_ITERS = 20
HANG_SECONDS = 120.0

# What is being done.
Progress = Callable[[str], None]
# Measures a request on a device, as bench.runner.run does.
Measure = Callable[[runner.Request, torch.device, Callable[[int, str, float], None]], "runner.Artifact"]


@dataclass(frozen=True)
class Request:
    """What to run: the steps, in order, on these cases, and then on these shapes."""

    steps: Sequence[Step]
    cases: Sequence[Case]
    shapes: Sequence[Shape] = SHAPES
    iters: int = ITERS


def run(request: Request, device: torch.device, progress: Progress, measure: Measure = runner.run) -> LadderArtifact:
    """Verify, and on a GPU time what was verified. Nothing is timed that failed."""
    target = Target.of(device)
    verification = [_verify(step, request, device, target, progress) for step in request.steps]
    sound = {one.step: one for one in verification if one.sound}
    timed = [step for step in request.steps if step.name in sound]
    left_out = {contender_name(one.step): one.summary for one in verification if not one.sound}
    shapes = []
    if device.type == "cuda" and timed:
        shapes = [_time(shape, timed, left_out, request.iters, device, target, progress, measure) for shape in request.shapes]
    return LadderArtifact(
        environment=environment.collect(device),
        sources={kernel: kernel_hash(kernel) for kernel in LADDER},
        steps=[step.name for step in request.steps],
        verification=verification,
        shapes=shapes,
    )


def _verify(step: Step, request: Request, device: torch.device, target: Target, progress: Progress) -> StepVerification:
    shape = SHAPES[0]
    refused = step.refusal(problem_of(shape), target.arch, target.interpreted)
    if refused is not None:
        return StepVerification(
            step=step.name, interpreted=target.interpreted, passed=[], failed={}, mutations=[], missed=[], refused=refused
        )
    return verify_step(step, device, request.cases, interpreted=target.interpreted, progress=progress)


def _time(
    shape: Shape,
    steps: Sequence[Step],
    left_out: dict[str, str],
    iters: int,
    device: torch.device,
    target: Target,
    progress: Progress,
    measure: Measure,
) -> TimedShape:
    chosen = [contenders.contenders()[BASELINE], *(contender(step) for step in steps)]
    progress(f"{shape.label}: first calls")
    seconds = call_seconds(chosen, shape, device)
    request = runner.Request(
        shapes=[shape],
        contenders=chosen,
        left_out=left_out,
        iters=bounded_iters(iters, seconds),
        eager=False,
        cold=False,
    )
    bench = measure(request, device, lambda number, what, fraction: progress(f"{shape.label}: {what}"))
    return TimedShape(bench=bench, code=_code(steps, shape, target))


def problem_of(shape: Shape) -> Problem:
    """A shape of the bench as the ladder's problem."""
    return Problem(shape.batch, shape.heads_q, shape.seqlen_q, shape.seqlen_k, shape.head_dim, shape.scale)


def _code(steps: Sequence[Step], shape: Shape, target: Target) -> dict[str, list[KernelCode]]:
    """The binaries of the steps that take the shape."""
    assert target.arch is not None
    problem = problem_of(shape)
    taking = [step for step in steps if step.refusal(problem, target.arch, False) is None]
    return compile_steps(taking, problem, target.arch, target.sm_count)


def bounded_iters(iters: int, seconds: Sequence[float]) -> int:
    """How many samples of each contender fit the budget, where one call of each takes so long."""
    return max(min(iters, MIN_ITERS), min(iters, int(BUDGET_SECONDS / max(sum(seconds), 1e-9))))


def call_seconds(chosen: Sequence[Contender], shape: Shape, device: torch.device) -> list[float]:
    """The wall clock of one call of each contender that takes the shape, after a first one; nothing is judged here."""
    inputs = InputSets(shape, device, 0)[0]
    taken = []
    for one in chosen:
        if one.unavailable_reason(inputs) is not None:
            continue
        with watchdog(HANG_SECONDS, f"{one.name}: first calls"), torch.no_grad():
            try:
                call = one.prepare(inputs)
                call()
            except Exception:  # the run itself lists it with what it says
                continue
            torch.cuda.synchronize(device)
            started = time.perf_counter()
            call()
            torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - started)
    return taken
