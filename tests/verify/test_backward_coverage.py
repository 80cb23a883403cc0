"""What the backward suite's cases reach between them: every backward binary of a wheel, and every head dim with tiles."""

from functools import cache

import pytest
import torch

from flashcore.backward_spec import BackwardSpec
from flashcore.kernels.registry import BACKWARDS, BINDINGS, SHIPPED_ARCHS
from flashcore.verify.backward_cases import backward_cases
from flashcore.verify.backward_inputs import build_backward
from flashcore.verify.backward_subject import backward_spec_of
from flashcore.verify.cases import select
from flashcore.verify.tuned_cases import tuned_cases

SM_COUNTS = {"sm_90a": 132}
META = torch.device("meta")


@cache
def _specs() -> dict[tuple[str, bool], BackwardSpec]:
    """What each of the suite's own cases asks for, by its name and whether gradients are to be bitwise equal."""
    return {
        (case.name, deterministic): backward_spec_of(build_backward(case, META), deterministic=deterministic)
        for case in backward_cases()
        if not (case.dead_rows or case.dead_nan)  # NaN is no part of a spec, and meta tensors hold none
        for deterministic in (False, True)
    }


@pytest.mark.parametrize("impl", BACKWARDS)
@pytest.mark.parametrize("arch", [arch for arch in SHIPPED_ARCHS if arch in SM_COUNTS])
def test_every_shipped_backward_binary_runs_in_some_case(impl: str, arch: str) -> None:
    binding = BACKWARDS[impl]
    taken = [
        spec
        for spec in _specs().values()
        if BINDINGS[impl].reject(spec.call, arch, False) is None and binding.reject(spec, arch, False) is None
    ]
    reached = {launch.specialisation for spec in taken for launch in binding.program(spec, arch, SM_COUNTS[arch]).launches}
    assert len(binding.shipped(arch)) > 10
    assert [one.name for one in binding.shipped(arch) if one not in reached] == []


def test_the_suite_has_every_forward_case_and_its_own() -> None:
    forward = {case.name for case in select("all")}
    both = [case.name for case in select("all", backward=True)]
    assert len(both) == len(set(both)) and set(both) - forward == {case.name for case in backward_cases()}
    # what is tuned are forms of forward kernels
    assert forward - {case.name for case in tuned_cases()} < set(both)


def test_training_without_a_log_sum_exp_and_with_its_gradient_meet_both_dtypes() -> None:
    cases = backward_cases()
    for dtype in (torch.float16, torch.bfloat16):
        for head_dim in (64, 96, 128, 256):
            its = [case for case in cases if (case.dtype, case.head_dim) == (dtype, head_dim)]
            assert {case.return_lse for case in its} == {False, True} and any(case.softcap for case in its)
    assert {case.wrt for case in cases} == {"qkvm", "qkv", "q", "kv"}
    assert any(case.heads_q > case.heads_k and case.causal and case.dead_rows for case in cases)


def test_its_own_cases_are_few_and_cheap() -> None:
    cases = backward_cases()
    assert len(cases) <= 170
    small = [case.batch * case.heads_q * case.seqlen_q * case.seqlen_k for case in cases if not case.needs_bytes]
    assert max(small) < 2**20
