"""A search from its first proposal to its last: generation after generation proposed, built, judged and told.

All that is known of it lies in one folder, and in one file of that, Optuna's journal: the proposals, and each candidate as far
as it got. What was interrupted, at any moment, is taken up there by running the same search again. `result.json` is made
from it anew after each generation.

A generation is told as a whole, once each of its candidates has its verdict. Its score is the ratio of the hand-chosen form's
time to its own, both measured in the same rounds, so that visits to GPUs that are not alike can stand side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flashcore import environment
from flashcore.errors import ArgumentValueError, BinaryError
from flashcore.search.batch import read_batch
from flashcore.search.build import Outcome, build_candidates, build_incumbent, make_batch
from flashcore.search.kernels import ARCH, SEARCHABLE, Searchable
from flashcore.search.sampling import NO_TIME, POPULATION, Proposal, Sampler, Space, Study
from flashcore.search.schema import Batch, BatchResult, Environment, Judged, Problem, SearchResult, Trial
from flashcore.sources import kernel_hash

JOURNAL = "journal.log"
RESULT = "result.json"
BATCHES, JUDGED = "batches", "judged"
# what is kept beside the proposals; a generation under the number of its first candidate
_SETTINGS, _VISITS, _GENERATION = "settings", "visits", "generation "


class Measurer(Protocol):
    """Whoever has a GPU."""

    def judge(self, folder: Path, waiting: Sequence[int]) -> list[BatchResult]:
        """What GPUs said of the candidates of the batch in a folder, on one visit or several: of some at least that wait.

        Raises:
            AwaitingGpu: nothing yet of any of them, and what to do about it.
        """


class Builder(Protocol):
    """From proposals to binaries (search/build.py)."""

    def build(self, configs: Sequence[Any], numbers: Sequence[int], seen: dict[str, int]) -> list[Outcome]:
        """What becomes of each configuration. seen: machine code that was judged before -> the candidate that had it."""

    def batch(self, folder: Path, outcomes: Sequence[Outcome]) -> None:
        """Write what of these was built into a folder."""

    def read(self, folder: Path) -> Batch:
        """The batch in a folder. Raises BinaryError where it is not there, or is not what it says."""


@dataclass(frozen=True)
class Order:
    """What is asked of a search. `generation`: candidates that are built and judged together."""

    problem: Problem
    sampler: Sampler
    seed: int
    budget: int
    generation: int

    @classmethod
    def of(cls, problem: Problem, sampler: Sampler, seed: int, budget: int | None, generation: int | None = None) -> Order:
        """With defaults put in: an exhaustive search visits the GPU once, for the whole space.

        Raises:
            ArgumentValueError: a kernel that does not take the problem, or a budget or generation below 1.
        """
        searchable = SEARCHABLE[problem.impl]
        fitting = sum(1 for _ in searchable.space(problem))
        budget = fitting if budget is None else budget
        generation = (budget if sampler == "exhaustive" else POPULATION) if generation is None else generation
        for name, value in (("budget", budget), ("generation", generation)):
            if value < 1:
                raise ArgumentValueError(f"{name}: got {value}; allowed: at least 1")
        if sampler == "exhaustive" and budget < fitting:
            raise ArgumentValueError(
                f"budget: got {budget} for an exhaustive search; allowed: all {fitting} points, or none given"
            )
        return cls(problem, sampler, seed, budget, generation)


@dataclass(frozen=True)
class Progress:
    """How far a search is. best: the fastest candidate so far, where one was measured."""

    evaluations: int
    doing: str
    best: Trial | None


class CompilerBuilder:
    """Builds with the compiler of this machine."""

    def __init__(self, problem: Problem, sm_count: int, jobs: int | None, heard: Callable[[str], None]) -> None:
        self._problem, self._sm_count, self._jobs, self._heard = problem, sm_count, jobs, heard
        self._incumbent: Outcome | None = None

    def build(self, configs: Sequence[Any], numbers: Sequence[int], seen: dict[str, int]) -> list[Outcome]:
        count = 0

        def done(outcome: Outcome) -> None:
            nonlocal count
            count += 1
            self._heard(f"built {count} of {len(configs)}")

        self._heard(f"building {len(configs)}")
        return build_candidates(self._problem, configs, ARCH, numbers=numbers, seen=seen, jobs=self._jobs, done=done)

    def batch(self, folder: Path, outcomes: Sequence[Outcome]) -> None:
        if self._incumbent is None:
            self._incumbent = build_incumbent(self._problem, ARCH, self._sm_count)
        make_batch(folder, self._problem, ARCH, self._incumbent, outcomes)

    def read(self, folder: Path) -> Batch:
        return read_batch(folder)


class Search:
    """One search in its folder."""

    def __init__(self, order: Order, folder: Path, sm_count: int) -> None:
        """Begin it, or take up the one that is there.

        Raises:
            ArgumentValueError: the folder has another search than this one, or one of another source or space.
            UnsupportedError: Optuna is not installed.
        """
        self._order, self._folder = order, folder
        self._searchable: Searchable = SEARCHABLE[order.problem.impl]
        points = [self._searchable.values(config) for config in self._searchable.space(order.problem)]
        folder.mkdir(parents=True, exist_ok=True)
        self._space = Space(self._searchable.choices, points)
        self._study = Study(self._space, order.sampler, order.seed, folder / JOURNAL)
        kept = self._study.kept
        self._settings = _settings(order, self._space, self._searchable, sm_count)
        if _SETTINGS in kept:
            _same(kept[_SETTINGS], self._settings, folder)
        else:
            self._study.keep(_SETTINGS, self._settings)
        self._visits = [Environment.model_validate(visit) for visit in kept.get(_VISITS, [])]
        generations = (value for name, value in kept.items() if name.startswith(_GENERATION))
        self._trials = {trial.number: trial for found in generations for trial in map(Trial.model_validate, found)}

    @property
    def result(self) -> SearchResult:
        """What there is so far. Candidates that are proposed and not built yet are not in it."""
        found = environment.collect()
        return SearchResult(
            **{name: self._settings[name] for name in ("problem", "arch", "sampler", "seed", "triton", "source_sha256")},
            budget=self._order.budget,
            space=self._settings["space"],
            fitting=len(self._space.points),
            git_sha=found.git.sha if found.git else "unknown",
            git_dirty=found.git is None or found.git.dirty,
            time=found.time_utc.isoformat(),
            command=found.command,
            incumbent=self._settings["incumbent"],
            visits=self._visits,
            trials=[self._trials[number] for number in sorted(self._trials)],
        )

    def run(
        self, builder: Builder, measurer: Measurer, heard: Callable[[Progress], None] = lambda progress: None
    ) -> SearchResult:
        """Go on until the budget is used up or the space has no more.

        Raises:
            AwaitingGpu: a generation is built, and is to be judged elsewhere; what to do is in the message.
        """

        def say(doing: str) -> None:
            heard(Progress(sum(trial.verdict != "built" for trial in self._trials.values()), doing, self.best))

        # in one word, because results of several searches may meet in one folder on the way
        name = f"{self._order.problem.name}-{self._order.sampler}-s{self._order.seed}"
        try:
            while self._study.open or self._study.propose(min(self._order.generation, self._order.budget - self._study.count)):
                proposals = self._study.open
                folder = self._folder / BATCHES / f"{name}-{proposals[0].number:04d}"
                self._build(proposals, folder, builder, say)
                self._judge(proposals, folder, builder, measurer, say)
                for proposal in proposals:
                    self._study.tell(proposal, self.score(proposal.number))
                self.save()
                say("judged")
        finally:
            self.save()
        return self.result

    def save(self) -> None:
        """Write `result.json`."""
        self.result.save(self._folder / RESULT)

    @property
    def best(self) -> Trial | None:
        """The fastest candidate so far."""
        return _best(self._trials.values())

    def score(self, number: int) -> float:
        """Time over the hand-chosen form's; of the same binary as another's, that one's."""
        return score_of(self._trials, number)

    def _build(self, proposals: Sequence[Proposal], folder: Path, builder: Builder, say: Callable[[str], None]) -> None:
        """Build what of a generation is not built yet: all of it, or nothing, since it is kept as a whole."""
        new = [proposal for proposal in proposals if proposal.number not in self._trials]
        if not new:
            return
        say(f"building {len(new)}")
        first = min(proposal.number for proposal in proposals)
        seen = {
            t.sha256: t.number
            for t in self._trials.values()
            if t.number < first and t.sha256 and t.same_as is None and t.judged
        }
        configs = [self._searchable.configure(proposal.values) for proposal in new]
        outcomes = builder.build(configs, [proposal.number for proposal in new], seen)
        if any(outcome.verdict == "built" for outcome in outcomes):
            builder.batch(folder, outcomes)
        self._keep(
            [
                Trial(
                    number=outcome.number,
                    config=outcome.config,
                    name=outcome.name,
                    sampler=self._order.sampler,
                    seed=self._order.seed,
                    verdict=outcome.verdict,
                    same_as=outcome.same_as,
                    sha256=outcome.sha256,
                    resources=outcome.resources,
                    words=outcome.words,
                )
                for outcome in outcomes
            ]
        )

    def _judge(
        self, proposals: Sequence[Proposal], folder: Path, builder: Builder, measurer: Measurer, say: Callable[[str], None]
    ) -> None:
        """Have what was built judged, however many visits that takes."""
        while waiting := [p.number for p in proposals if self._trials[p.number].verdict == "built"]:
            say(f"{len(waiting)} to judge")
            batch = builder.read(folder)
            for found in measurer.judge(folder, waiting):
                self._take(found, batch)
            self._keep([self._trials[proposal.number] for proposal in proposals])
            if all(self._trials[number].verdict == "built" for number in waiting):
                raise BinaryError(f"{folder}: none of the {len(waiting)} candidates that are waiting was judged")

    def _take(self, found: BatchResult, batch: Batch) -> None:
        """Take in what a GPU said.

        Raises:
            ArgumentValueError: it is of another problem, of another source of the kernel, or of other binaries.
        """
        problem, source = self._order.problem, self._settings["source_sha256"]
        if found.problem != problem:
            raise ArgumentValueError(f"result: is of {found.problem.name}; allowed: of {problem.name}, which is searched")
        if found.source_sha256 != source:
            got = f"got a result of {problem.impl}'s source {found.source_sha256[:12]}"
            raise ArgumentValueError(f"result: {got}; allowed: of {source[:12]}, of which the candidates were built")
        names = {built.number: built.sha256 for built in batch.candidates}
        for judged in found.judged:
            if names.get(judged.number) != judged.sha256:
                got = f"got candidate {judged.number} with binary {judged.sha256[:12]}"
                raise ArgumentValueError(f"result: {got}; allowed: the candidates and binaries of its batch")
        for judged in found.judged:
            trial = self._trials[judged.number]
            if trial.verdict == "built":
                self._trials[judged.number] = _with(trial, judged)
        if found.environment not in self._visits:
            self._visits.append(found.environment)
            self._study.keep(_VISITS, [visit.model_dump(mode="json") for visit in self._visits])

    def _keep(self, trials: Sequence[Trial]) -> None:
        """Write down how far a generation is."""
        self._trials |= {trial.number: trial for trial in trials}
        self._study.keep(f"{_GENERATION}{trials[0].number:04d}", [trial.model_dump(mode="json") for trial in trials])


def best_of(result: SearchResult) -> Trial | None:
    """The fastest candidate of a search; None where none was measured."""
    return _best(result.trials)


def _best(trials: Iterable[Trial]) -> Trial | None:
    measured = [(trial.judged.ratio, trial) for trial in trials if trial.judged is not None and trial.judged.ratio is not None]
    return max(measured, key=lambda one: one[0])[1] if measured else None


def score_of(trials: dict[int, Trial], number: int) -> float:
    """A candidate's time over the hand-chosen form's, by the trials of its search; NO_TIME where it has none."""
    trial = trials[number]
    if trial.same_as is not None:
        trial = trials[trial.same_as]
    ratio = None if trial.judged is None else trial.judged.ratio
    return NO_TIME if ratio is None else 1 / ratio


def _with(trial: Trial, judged: Judged) -> Trial:
    return trial.model_copy(update={"verdict": judged.verdict, "words": judged.words, "judged": judged})


def _settings(order: Order, space: Space, searchable: Searchable, sm_count: int) -> dict[str, Any]:
    """What makes a search this one; two that differ in it cannot go on in one folder."""
    from flashcore.build.compile import triton_version

    return {
        "problem": order.problem.model_dump(mode="json"),
        "arch": ARCH,
        "sampler": order.sampler,
        "seed": order.seed,
        "source_sha256": kernel_hash(searchable.binding.KERNEL),
        "space": {name: list(choices) for name, choices in space.choices.items()},
        "fitting": len(space.points),
        "triton": triton_version() or "none",
        "incumbent": searchable.values(searchable.incumbent(order.problem, sm_count)),
    }


def _same(kept: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with another search."""
    for name, value in now.items():
        if kept[name] != value:
            what = {"source_sha256": "the kernel's source", "fitting": "the points that fit"}.get(name, name)
            raise ArgumentValueError(
                f"out: {folder} has a search with {what} {kept[name]}, and this one has {value}; allowed: the same search, "
                "which goes on, or another folder"
            )
