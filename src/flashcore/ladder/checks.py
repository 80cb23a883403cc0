"""Verification of a step: the mission's cases, and the suite's mutations put around it, each of which must fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from pydantic import BaseModel, ConfigDict

from flashcore.ladder.run import implementation
from flashcore.ladder.steps import Step
from flashcore.verify.cases import Case, mission_cases
from flashcore.verify.mutations import INSIDE, Mutation
from flashcore.verify.mutations import implementation as mutated
from flashcore.verify.suite import Implementation, run_case

# The steps have no log-sum-exp, and a mistake inside a kernel cannot be put around one.
MUTATIONS = tuple(mutation for mutation in Mutation if mutation not in (*INSIDE, Mutation.BASE_2_LSE))
# Two tiles of keys of the mutations' width, which is enough to skip one of them.
MUTATED_CASE = "small-seed0"


class StepVerification(BaseModel):
    """What became of a step's cases. `failed`: case -> reason; `missed`: mutations that passed, and so prove nothing right."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: str
    interpreted: bool
    passed: list[str]
    failed: dict[str, str]
    mutations: list[str]
    missed: list[str]
    refused: str | None = None

    @property
    def sound(self) -> bool:
        """Whether the step may be timed; a step that ran nothing may not."""
        return bool(self.passed) and not self.failed and not self.missed and bool(self.mutations)

    @property
    def summary(self) -> str:
        """The verdict in words."""
        if self.refused is not None:
            return f"not run: {self.refused}"
        words = [f"{len(self.passed)} of {len(self.passed) + len(self.failed)} cases passed"]
        words.append(f"{len(self.mutations) - len(self.missed)} of {len(self.mutations)} mutations caught")
        words += [f"first failure: {name}: {reason}" for name, reason in list(self.failed.items())[:1]]
        words += [f"not caught: {name}" for name in self.missed]
        return "; ".join(words)


def cases() -> list[Case]:
    """The 15 cases of the mission, without the log-sum-exp that no step has."""
    return [replace(case, return_lse=False) for case in mission_cases()]


def verify_step(
    step: Step,
    device: torch.device,
    chosen: Sequence[Case],
    *,
    interpreted: bool,
    subject: Implementation | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> StepVerification:
    """Judge a step by `verify`'s suite on these cases, then each mutation around it. `subject` stands in for the step."""
    right = subject or implementation(step)
    passed: list[str] = []
    failed: dict[str, str] = {}
    for case in chosen:
        progress(f"{step.name}: {case.name}")
        (result,) = run_case(case, [right], device)
        if result.verdict == "passed":
            passed.append(case.name)
        else:
            failed[case.name] = result.reason
    missed = []
    case = next(case for case in cases() if case.name == MUTATED_CASE)
    for mutation in MUTATIONS:
        progress(f"{step.name}: {mutation.value}")
        (result,) = run_case(case, [mutated(mutation, right)], device)
        # one that raised was not judged, so that nothing was caught
        if result.verdict != "failed" or result.output is None:
            missed.append(mutation.value)
    return StepVerification(
        step=step.name,
        interpreted=interpreted,
        passed=passed,
        failed=failed,
        mutations=[mutation.value for mutation in MUTATIONS],
        missed=missed,
    )
