"""A run, with a timer that is not one: what is timed, what is left out and why, and how many samples are taken."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from flashcore.bench.artifact import Artifact
from flashcore.bench.contender import Contender
from flashcore.bench.runner import Request as BenchRequest
from flashcore.ladder import measure
from flashcore.ladder.artifact import LadderArtifact
from flashcore.ladder.checks import StepVerification, cases, verify_step
from flashcore.ladder.measure import MIN_ITERS, SHAPES, Request, bounded_iters
from flashcore.ladder.steps import STEPS, find_step
from flashcore.target import Target
from flashcore.verify.cases import mission_cases
from flashcore.verify.mutations import Mutation, implementation, tiled_attention
from flashcore.verify.suite import Implementation

CPU = torch.device("cpu")
H200 = Target(name="NVIDIA H200", arch="sm_90a", capability=(9, 0), sm_count=132, interpreted=False)


def test_the_cases_are_the_missions_but_for_the_log_sum_exp() -> None:
    assert [case.name for case in cases()] == [case.name for case in mission_cases()] and len(cases()) == 15
    assert not any(case.return_lse for case in cases())


def test_slow_calls_take_fewer_samples_and_never_too_few() -> None:
    assert bounded_iters(100, [1e-5] * 9) == 100
    assert bounded_iters(100, [0.5, 0.5]) == 60
    assert bounded_iters(100, [30.0]) == MIN_ITERS and bounded_iters(10, [30.0]) == 10


def _judge(wrong: Mutation | None) -> StepVerification:
    small = [case for case in cases() if case.name in ("tiny-seed0", "small-seed0")]
    return verify_step(find_step("scalar"), CPU, small, interpreted=False, subject=implementation(wrong))


def test_a_right_step_is_sound_and_a_wrong_one_is_not() -> None:
    assert _judge(None).sound and _judge(None).summary == "2 of 2 cases passed; 5 of 5 mutations caught"
    wrong = _judge(Mutation.SCALED_OUTPUT)
    assert not wrong.sound and set(wrong.failed) == {"tiny-seed0", "small-seed0"} and "first failure" in wrong.summary


def test_a_mutation_that_raises_or_passes_is_not_caught() -> None:
    calls = []

    def tires(q, k, v, **options):
        calls.append(q)
        if len(calls) > 3:  # a case is run three times
            raise RuntimeError("launch failed")
        return tiled_attention(q, k, v, **options)

    tiny = [case for case in cases() if case.name == "tiny-seed0"]
    found = verify_step(find_step("scalar"), CPU, tiny, interpreted=False, subject=Implementation("tires", tires))
    assert found.passed == ["tiny-seed0"] and len(found.missed) == 5 and not found.sound


def _fake(
    monkeypatch: pytest.MonkeyPatch, known: SimpleNamespace, wrong: str
) -> tuple[Callable[..., LadderArtifact], list[BenchRequest]]:
    """A GPU on which every step but `wrong` is right, and a timer that notes what it is asked."""
    asked: list[BenchRequest] = []

    def verified(step, device, chosen, *, interpreted, progress):
        failed = {"tiny-seed0": "output: wrong"} if step.name == wrong else {}
        names = [case.name for case in chosen if case.name not in failed]
        return StepVerification(
            step=step.name, interpreted=interpreted, passed=names, failed=failed, mutations=["one NaN"], missed=[]
        )

    monkeypatch.setattr(measure, "verify_step", verified)
    monkeypatch.setattr(measure.Target, "of", lambda device: H200)
    monkeypatch.setattr(measure, "call_seconds", lambda chosen, shape, device: [1.0] * len(chosen))
    monkeypatch.setattr(
        measure, "compile_steps", lambda steps, problem, arch, sm_count: {step.name: [known.code] for step in steps}
    )

    def note(request: BenchRequest, device: torch.device, progress: object) -> Artifact:
        asked.append(request)
        return known.bench(request.shapes[0], [known.timed(contender.name, 10.0) for contender in request.contenders])

    return partial(measure.run, measure=note), asked


def test_what_is_right_is_timed_beside_pytorch_and_what_is_wrong_is_listed(
    monkeypatch: pytest.MonkeyPatch, known: SimpleNamespace
) -> None:
    run, asked = _fake(monkeypatch, known, wrong="vectorised")
    found = run(Request(STEPS, cases()), torch.device("cuda"), lambda what: None)
    names = ["unfused", *(f"ladder-{step.name}" for step in STEPS if step.name != "vectorised")]
    assert [[contender.name for contender in request.contenders] for request in asked] == [names] * 2
    assert [list(request.shapes) for request in asked] == [[shape] for shape in SHAPES]
    assert all(set(request.left_out) == {"ladder-vectorised"} and not request.eager for request in asked)
    # a round takes a second for each contender, so that the budget would hold fewer of them
    assert {request.iters for request in asked} == {MIN_ITERS}
    # the small kernel does not take the long shape, so it has no binary there
    assert [("small" in shape.code, "vectorised" in shape.code) for shape in found.shapes] == [(True, False), (False, False)]
    assert [line.split(":")[0] for line in found.failures] == ["vectorised"]


def test_nothing_is_timed_on_a_cpu_or_where_nothing_is_right(monkeypatch: pytest.MonkeyPatch, known: SimpleNamespace) -> None:
    run, asked = _fake(monkeypatch, known, wrong="scalar")
    steps = [find_step("scalar")]
    assert run(Request(STEPS, cases()), CPU, lambda what: None).shapes == []
    assert run(Request(steps, cases()), torch.device("cuda"), lambda what: None).shapes == []
    assert asked == []


def test_a_contender_runs_the_step_on_the_benchs_inputs() -> None:
    from flashcore.bench.inputs import InputSets
    from flashcore.bench.shapes import Shape
    from flashcore.errors import UnsupportedError
    from flashcore.ladder.run import contender

    one = contender(find_step("scalar"))
    assert isinstance(one, Contender) and (one.name, one.kind) == ("ladder-scalar", "ours")
    # here it gets as far as finding no GPU
    with pytest.raises(UnsupportedError, match="scalar: needs a GPU"):
        one.prepare(InputSets(Shape(1, 1, 1, 8, 8, 64, 64), CPU, 0)[0])
    assert contender(find_step("small")).name == "ladder-small"
