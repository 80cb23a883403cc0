"""Which configurations a search tries: Optuna proposes, by evolution or at random, and keeps what was proposed and told.

Optuna, because it has what this needs and no more: ask and tell, so that what is proposed can be built on one machine and
measured on another an hour later; a genetic algorithm; storage that survives an interruption. Kernel Tuner compiles and
launches CUDA and OpenCL kernels by itself on the GPU before it, which here is neither where nor how binaries are made.

Of Optuna's samplers NSGA-II: with one objective it is an elitist genetic algorithm (the best of parents and children live on,
parents are chosen in tournaments of two, each field comes from either parent and is now and then drawn anew). Fields here are
few and have two to nine values, most without an order that time follows, so CMA-ES, made for continuous ones, has nothing to
adapt; and a generation is measured in one visit to a GPU, which a sampler that learns from trial to trial (TPE) gives up its
advantage for.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flashcore.errors import UnsupportedError
from flashcore.search.schema import Value

Sampler = Literal["evolutionary", "random", "exhaustive"]
Values = dict[str, Value]
# Individuals of a generation. Small, because a search has tens to hundreds of evaluations: docs/notes/search.md.
POPULATION = 16
# Proposals in a row that are no use (they do not fit, or were seen) before a point is drawn from those that are left.
PATIENCE = 10
# What a candidate without a time is told as: worse than any other.
NO_TIME = float("inf")
_NAME = "search"


def require_optuna() -> None:
    """Raises UnsupportedError where Optuna is not installed."""
    try:
        import optuna  # noqa: F401  # asked only whether it is there
    except ImportError:
        raise UnsupportedError("a search needs Optuna, which is not installed: pip install 'flashcore[search]'") from None


@dataclass(frozen=True)
class Space:
    """What may be proposed: each field's choices, and the points among their product that fit, in the order of enumeration."""

    choices: Mapping[str, tuple[Value, ...]]
    points: Sequence[Values]


@dataclass(frozen=True)
class Proposal:
    """A point to evaluate; `number` counts evaluations from 0."""

    number: int
    values: Values


def point_key(values: Mapping[str, Value]) -> tuple[Value, ...]:
    """A point's identity: its values in the order of their fields' names."""
    return tuple(values[name] for name in sorted(values))


def _mend(journal: Path) -> None:
    """Cut off a last line that was not written whole: what is appended to it could not be read."""
    if journal.exists():
        text = journal.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            with journal.open("r+b") as file:
                file.truncate(whole)


class Study:
    """An Optuna study in which every evaluation is of a point that fits and that was not evaluated before.

    What Optuna proposes otherwise is told as failed, so that it takes no place in a generation, and another is asked for. That
    goes on in memory: the journal has the evaluations alone. With one nothing is forgotten: a study opened again has its
    proposals, what was told, and what was kept beside them.
    """

    def __init__(self, space: Space, sampler: Sampler, seed: int, journal: Path | None = None) -> None:
        """In memory, or kept in a journal, which goes on where it is there.

        Raises:
            UnsupportedError: Optuna is not installed.
        """
        require_optuna()
        import optuna
        from optuna.distributions import BaseDistribution, CategoricalDistribution
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._sampler = space, sampler
        self._distributions: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(choices) for name, choices in space.choices.items()
        }
        self._journal = None
        if journal is not None:
            _mend(journal)
            storage = JournalStorage(JournalFileBackend(str(journal)))
            self._journal = optuna.create_study(storage=storage, study_name=_NAME, load_if_exists=True)
        past = [] if self._journal is None else self._journal.get_trials(deepcopy=False)
        # No storage has the generators' states: one that begins again is to draw other numbers than the first time.
        self._random = random.Random(f"{seed} {len(past)}")
        drawn = self._random.randrange(2**32)
        self._study = optuna.create_study(
            sampler=optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=drawn)
            if sampler == "evolutionary"
            else optuna.samplers.RandomSampler(seed=drawn)
        )
        self._fitting = {point_key(values) for values in space.points}
        self._seen: set[tuple[Value, ...]] = set()
        # number -> the proposal, and its number in the study that is in memory; in the journal it is `number`
        self._open: dict[int, tuple[Proposal, int]] = {}
        for trial in past:
            self._study.add_trial(trial)
            self._seen.add(point_key(trial.params))
            if not trial.state.is_finished():
                self._open[trial.number] = Proposal(trial.number, {**trial.params}), trial.number

    def keep(self, name: str, value: object) -> None:
        """Keep something beside the proposals, as JSON has it, in place of what was kept by this name."""
        if self._journal is not None:
            self._journal.set_user_attr(name, value)

    @property
    def kept(self) -> dict[str, Any]:
        """What was kept, by name."""
        return {} if self._journal is None else self._journal.user_attrs

    @property
    def count(self) -> int:
        """How many points were proposed."""
        return len(self._seen)

    @property
    def open(self) -> list[Proposal]:
        """What was proposed and is not told of yet, in order."""
        return [self._open[number][0] for number in sorted(self._open)]

    def tell(self, proposal: Proposal, score: float) -> None:
        """Say how good a proposal was: the lower the better, NO_TIME where nothing was measured."""
        _, trial = self._open.pop(proposal.number)
        self._study.tell(trial, score)
        if self._journal is not None:
            self._journal.tell(proposal.number, score)

    def propose(self, count: int) -> list[Proposal]:
        """Up to `count` new points; fewer where the space has no more."""
        found: list[Proposal] = []
        while len(found) < count and self.count < len(self._fitting):
            found.append(self._next())
        return found

    def _next(self) -> Proposal:
        """A new point. There must be one."""
        for _ in range(0 if self._sampler == "exhaustive" else PATIENCE):
            proposal = self._ask()
            if proposal is not None:
                return proposal
        left = [values for values in self._space.points if point_key(values) not in self._seen]
        self._study.enqueue_trial(dict[str, Any](left[0] if self._sampler == "exhaustive" else self._random.choice(left)))
        proposal = self._ask()
        assert proposal is not None
        return proposal

    def _ask(self) -> Proposal | None:
        """What Optuna proposes, where it is of use."""
        from optuna.trial import TrialState

        trial = self._study.ask(self._distributions)
        key = point_key(trial.params)
        if key not in self._fitting or key in self._seen:
            self._study.tell(trial, state=TrialState.FAIL)
            return None
        proposal = Proposal(self.count, {**trial.params})
        if self._journal is not None:
            self._journal.add_trial(self._study.get_trials(deepcopy=False)[trial.number])
        self._seen.add(key)
        self._open[proposal.number] = proposal, trial.number
        return proposal
