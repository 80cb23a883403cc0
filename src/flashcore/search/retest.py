"""Retests: the fastest forms of a search, judged again in a fresh process, at its shape and at shapes that it did not see.

The best of many noisy times is too good by its selection, and a form may owe its time to one length. What a retest finds is not
selected by time, and is of the calls that an entry of the tuned table would be taken for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flashcore.errors import ArgumentValueError
from flashcore.search.build import build_candidates, build_incumbent, make_batch
from flashcore.search.kernels import SEARCHABLE
from flashcore.search.schema import Problem, SearchResult, Trial
from flashcore.target import SM_COUNTS

# How many of the fastest are retested: the first that holds is taken.
TOP = 3
ROUNDS = 100
# Scores of all heads from which on a shape is not doubled: its float64 result would take longer than all timing.
MAX_SCORES = 2**33


def make_retests(
    result: SearchResult,
    folder: Path,
    *,
    top: int = TOP,
    rounds: int = ROUNDS,
    jobs: int | None = None,
    say: Callable[[str], None] = lambda words: None,
) -> list[Path]:
    """Write a batch for the searched shape and for each unseen one, with those of the fastest forms that fit there.

    Returns the batches' folders, none where the search found nothing that is faster than the hand-chosen form beyond noise.

    Raises:
        ArgumentValueError: there is no shape like the searched one that the kernel takes.
        CompileError: a hand-chosen form cannot be built.
    """
    chosen = fastest(result, top)
    if not chosen:
        say(f"{result.problem.name}: nothing was faster than the hand-chosen form beyond noise")
        return []
    problems = unseen(result.problem)
    if not problems:
        raise ArgumentValueError(f"result: {result.problem.name} has no like shape that {result.problem.impl} takes")
    searchable = SEARCHABLE[result.problem.impl]
    made = []
    for problem in (result.problem, *problems):
        fitting = [trial for trial in chosen if searchable.fits(problem, searchable.configure(trial.config))]
        configs = [searchable.configure(trial.config) for trial in fitting]
        outcomes = build_candidates(problem, configs, result.arch, numbers=[one.number for one in fitting], jobs=jobs)
        for trial, outcome in zip(fitting, outcomes, strict=True):
            if outcome.sha256 != trial.sha256:
                raise ArgumentValueError(
                    f"result: {trial.name} was {trial.sha256} in the search, by Triton {result.triton}, and is here "
                    f"{outcome.sha256} ({outcome.verdict}); allowed: the same binary, of the same source"
                )
        if not outcomes:
            say(f"{problem.name}: none of the fastest fits")
            continue
        incumbent = build_incumbent(problem, result.arch, SM_COUNTS[result.arch])
        place = folder / f"{result.problem.name}-at-{problem.name}"
        make_batch(place, problem, result.arch, incumbent, outcomes, rounds)
        say(f"{place}: {', '.join(outcome.name for outcome in outcomes)}")
        made.append(place)
    return made


def fastest(result: SearchResult, top: int) -> list[Trial]:
    """The fastest forms that beat the hand-chosen one beyond noise, the best first."""
    faster = [
        (trial.judged.ratio, trial)
        for trial in result.trials
        if trial.verdict == "measured"
        and trial.config != result.incumbent
        and trial.judged is not None
        and trial.judged.ratio is not None
        and trial.judged.ratio_low is not None
        and trial.judged.ratio_low > 1
    ]
    return [trial for _, trial in sorted(faster, key=lambda one: one[0], reverse=True)[:top]]


def unseen(problem: Problem) -> list[Problem]:
    """Shapes near a problem, of the same features, that its kernel takes: more of it, longer, shorter, of an odd length."""
    searchable = SEARCHABLE[problem.impl]
    features = searchable.binding.features(searchable.spec(problem))
    q, k = problem.seqlen_q, problem.seqlen_k
    scores = problem.batch * problem.heads * q * k
    changes: list[dict[str, int]] = [{"batch": 2 * problem.batch}]
    if 4 * scores <= MAX_SCORES:
        changes.append({"seqlen_q": 2 * q, "seqlen_k": 2 * k})
    changes.append({"seqlen_q": q // 2, "seqlen_k": k // 2})
    # no multiple of any tile, unless the lengths differ by one
    changes.append({"seqlen_q": 3 * q // 4 | 1, "seqlen_k": 3 * k // 4 | 1})
    found = []
    for change in changes:
        near = problem.model_copy(update=change)
        try:
            spec = searchable.spec(near)
        except ArgumentValueError:  # a size that the kernel does not take
            continue
        if searchable.binding.features(spec) == features:
            found.append(near)
    return found
