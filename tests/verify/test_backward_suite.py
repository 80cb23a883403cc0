"""The backward suite: what it lets pass, and what it must not."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from flashcore.errors import ArgumentValueError
from flashcore.kernels.registry import BACKWARDS
from flashcore.verify import backward_subject
from flashcore.verify.backward_inputs import build_backward
from flashcore.verify.backward_mutations import (
    INSIDE,
    BackwardMutation,
    implementation,
    plain_attention,
    run_backward_mutations,
)
from flashcore.verify.backward_subject import backward_implementations
from flashcore.verify.backward_suite import judge_backward, prepare_backward
from flashcore.verify.cases import Case, mission_cases, select
from flashcore.verify.suite import BackwardRan, Implementation, run_case, run_suite

CPU = torch.device("cpu")
TINY = mission_cases()[0]
STEPS = (prepare_backward, judge_backward)


def _judge(attention, case: Case = TINY, **fields):
    return run_case(case, [Implementation("stand-in", attention, **fields)], CPU, STEPS)[0]


class _Changed(torch.autograd.Function):
    """The identity, whose gradient is what `change` makes of the right one."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


def _with_dq(change, q, k, v, **options):
    return plain_attention(_Changed.apply(q, change), k, v, **options)


def test_the_right_backward_pass_passes_some_cases_of_each_group() -> None:
    # all of them take minutes
    steps = {"backward": 3, "mission": 8, "edge": 17, "tile": 43, "short": 47, "shipped": 19}
    cases = [case for suite, step in steps.items() for case in select(suite, backward=True)[::step]]
    wanted = [*select("backward", "backward-only-dq", backward=True), *select("backward", "backward-mask-hqk", backward=True)]
    results = list(run_suite([*cases, *wanted], [implementation(None)], CPU, STEPS))
    assert [f"{r.case.name}: {r.reason}" for r in results if r.verdict == "failed"] == []
    assert sum(r.verdict == "passed" for r in results) > 60
    gradients = {name for r in results for name in r.gradients}
    assert gradients == {"dq", "dk", "dv", "dmask"}
    assert all(r.gradients.keys() == {"dq"} for r in results if r.case.wrt == "q")


def test_each_mutation_fails_and_the_right_one_passes() -> None:
    cases = [
        *select("backward", "backward-softcap-d64-*", backward=True),
        *select("backward", "backward-lse-d64-*", backward=True),
        *select("backward", "backward-gqa-8-2-*", backward=True),
    ]
    results = list(run_backward_mutations(cases, CPU))
    assert [result.mutation for result in results] == [None, *BackwardMutation]
    assert [result.mutation for result in results if not result.as_it_should_be] == []
    assert all(result.cases == len(cases) for result in results)


def test_mutations_are_put_around_a_kernel_that_is_named() -> None:
    right = Implementation("kernel", plain_attention, reject=lambda case, inputs: "no" if case.seed else None)
    results = list(run_backward_mutations(mission_cases()[:3], CPU, right))
    assert {result.cases for result in results} == {1}
    names = {result.mutation: result.failed[0].implementation for result in results if result.failed}
    assert names[BackwardMutation.UNSCALED_DQ] == "kernel, dq not scaled"
    # of its own inside, a kernel can be asked nothing: those mistakes are made in the plain one
    assert all(names[one].startswith("plain") for one in INSIDE if one in names)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("number", range(3))
def test_a_mutated_backward_pass_of_ours_fails_on_a_gpu(number: int) -> None:
    kernel = backward_implementations("ours")[number]
    cases = [
        *select("backward", "backward-softcap-d64-*", backward=True),
        *select("backward", "backward-lse-d64-*", backward=True),
        *select("backward", "backward-gqa-8-2-*", backward=True),
    ]
    results = list(run_backward_mutations(cases, torch.device("cuda", 0), kernel))
    if not results[0].cases:
        pytest.skip(f"{kernel.name} runs on no such GPU")
    capless = {BackwardMutation.UNCAPPED} if results[0].cases < len(cases) else set()
    assert {result.mutation for result in results if not result.as_it_should_be} <= capless


def test_a_case_without_the_feature_does_not_show_the_mistake() -> None:
    """Why the suite needs its groups: without grouped heads, a cap or the log-sum-exp these are no mistakes."""
    case = replace(TINY, return_lse=False)
    for mutation in (BackwardMutation.ONE_HEAD_OF_GROUP, BackwardMutation.UNCAPPED, BackwardMutation.IGNORED_DLSE):
        assert run_case(case, [implementation(mutation)], CPU, STEPS)[0].verdict == "passed"


def _drifting(by: float):
    """Gradients of q that differ from run to run in one element."""
    turn = iter(range(100))

    def drift(dq: torch.Tensor) -> torch.Tensor:
        dq = dq.clone()
        dq[0, 0, 0, 0] += by * next(turn)
        return dq

    return partial(_with_dq, drift)


def test_runs_that_differ_fail_unless_the_plan_says_they_may() -> None:
    by_atomics = BackwardRan("x", (), reproducible=False)
    result = _judge(_drifting(1e-3))
    assert result.verdict == "failed" and result.bitwise_equal is False and "dq: 3 runs" in result.reason
    result = _judge(_drifting(1e-3), explain_backward=lambda given: replace(by_atomics, reproducible=True))
    assert result.verdict == "failed" and "bitwise" in result.reason
    result = _judge(_drifting(1e-4), explain_backward=lambda given: by_atomics)
    assert result.verdict == "passed" and result.bitwise_equal is False
    # each within its bound of the first, and the last further from it than that
    result = _judge(_drifting(0.9 * result.gradients["dq"].bound), explain_backward=lambda given: by_atomics)
    assert result.verdict == "failed" and "apart" in result.reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda dq: dq.masked_fill(torch.ones_like(dq).cumsum(1) == 1, float("nan")), "dq: not finite"),
        (lambda dq: dq * 0.9, "dq: max error"),
        (lambda dq: torch.empty_like(dq), "dq: not finite"),  # poisoned memory
    ],
)
def test_wrong_gradients_fail(change, words: str) -> None:
    assert words in _judge(partial(_with_dq, change)).reason


def test_what_takes_no_part_has_gradient_0_and_nothing_near_it() -> None:
    """A row without keys, and a key without rows, whose gradients are within every bound."""
    case = replace(TINY, seqlen_q=40, seqlen_k=32, causal=True, return_lse=False)

    def nudged(dq: torch.Tensor) -> torch.Tensor:
        dq = dq.clone()
        dq[0, 3] = 1e-6
        return dq

    result = _judge(partial(_with_dq, nudged), case)
    assert (result.verdict, result.reason) == ("failed", "dq: is not 0 of what takes no part")
    assert result.gradients["dq"].passed
    assert _judge(plain_attention, case).verdict == "passed"
    unattended = replace(TINY, seqlen_k=64, window=(4, 4), return_lse=False)

    def nudged_key(q, k, v, **options):
        def change(dk: torch.Tensor) -> torch.Tensor:
            dk = dk.clone()
            dk[0, 0] = 1e-6
            return dk

        return plain_attention(q, _Changed.apply(k, change), v, **options)

    assert "dk: is not 0" in _judge(nudged_key, unattended).reason


def test_what_raises_or_is_not_connected_fails_with_its_words() -> None:
    def raises(dq):
        raise RuntimeError("illegal memory access")

    assert "illegal memory access" in _judge(partial(_with_dq, raises)).reason

    def detached(q, k, v, **options):
        return plain_attention(q.detach(), k, v, **options)

    result = _judge(detached)
    assert result.verdict == "failed" and "not have been used" in result.reason


def test_a_gradient_that_came_in_must_not_be_written_to() -> None:
    def overwrites(do: torch.Tensor) -> torch.Tensor:
        result = do.clone()
        do.mul_(2)
        return result

    def attention(q, k, v, **options):
        o, lse = plain_attention(q, k, v, **options)
        return _Changed.apply(o, overwrites), lse

    assert "was modified" in _judge(attention).reason


def test_rejections_of_either_pass_are_no_failures() -> None:
    result = _judge(plain_attention, reject_backward=lambda given: "takes no fp16 backwards")
    assert (result.verdict, result.reason) == ("rejected", "takes no fp16 backwards")
    result = _judge(plain_attention, reject=lambda case, inputs: "takes no fp16")
    assert (result.verdict, result.reason) == ("rejected", "takes no fp16")


def test_what_comes_in_is_its_own_draw_and_lies_as_the_inputs_do() -> None:
    given = build_backward(replace(TINY, storage="padded"), CPU)
    assert not torch.equal(given.do, given.inputs.q) and given.do.stride() == given.inputs.q.stride()
    assert given.dlse is not None and given.dlse.shape == (1, 1, 32)
    again = build_backward(TINY, CPU)
    assert torch.equal(given.do, again.do) and build_backward(replace(TINY, return_lse=False), CPU).dlse is None
    assert not torch.equal(build_backward(replace(TINY, seed=42), CPU).do, again.do)
    with pytest.raises(ValueError, match="no row that attends nothing"):
        build_backward(replace(TINY, dead_rows=True), CPU)


def test_ours_is_every_backward_pass_twice_where_it_sums_by_atomics(monkeypatch) -> None:
    names = [one.name for one in backward_implementations("ours")]
    assert names[0] == "hopper" and "hopper-deterministic" in names and "portable" in names
    assert "portable-deterministic" not in names and set(names) <= {
        f"{i}{d}" for i in BACKWARDS for d in ("", "-deterministic")
    }
    assert [one.name for one in backward_implementations("torch")] == ["torch"]
    monkeypatch.setattr(backward_subject, "_sums_by_atomics", lambda impl: True)
    assert [one.name for one in backward_implementations("portable")] == ["portable", "portable-deterministic"]
    for impl in ("small", "cudnn"):
        with pytest.raises(ArgumentValueError, match="allowed: 'ours', 'auto', 'hopper', 'portable', 'torch'"):
            backward_implementations(impl)


@pytest.mark.parametrize("name", ["torch", "auto"])
def test_pytorchs_gradients_are_verified_too(name: str) -> None:
    (case,) = select("edge", "mask-add-causal-bf16")
    (result,) = run_case(case, backward_implementations(name), CPU, STEPS)
    assert result.verdict == "passed" and result.gradients.keys() == {"dq", "dk", "dv", "dmask"}
    assert result.backward == BackwardRan("torch", (), reproducible=False)
    (dead,) = select("edge", "dead-mask-bool-fp16")
    assert run_case(dead, backward_implementations(name), CPU, STEPS)[0].verdict == "skipped"
