"""What searches came to, as a record: the best found against the hand-chosen, and the samplers against an exhaustive search.

A report is made of results that hold together and of no others. How a sampler does is not told from one run, which is luck:
it runs with many seeds over the times that an exhaustive search measured.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np

from flashcore import environment
from flashcore.bench.stats import ratio_of_medians
from flashcore.errors import ArgumentValueError
from flashcore.search.kernels import SEARCHABLE
from flashcore.search.replay import replay
from flashcore.search.run import best_of, score_of
from flashcore.search.sampling import POPULATION, Sampler, Space, point_key
from flashcore.search.schema import Environment, Problem, SearchResult, Strict, Trial, Value
from flashcore.stored import Stored, read

SEEDS = 50
# How near the optimum is near enough, and in what part of the exhaustive search's evaluations a sampler is to be there.
NEAR = 0.99
PART = 3
SAMPLERS: tuple[Sampler, ...] = ("evolutionary", "random")
# Recomputed from the samples, a ratio must be what the record says.
_TOLERANCE = 1e-9


class Curves(Strict):
    """A sampler over many seeds on one exhaustive record.

    low, middle, high: 10th, 50th and 90th percentile over the seeds of the best speed so far, as a multiple of the hand-chosen
    form's, after each evaluation; 0 where nothing was measured. reached: evaluations to NEAR of the optimum by seed, None
    where the budget was not enough.
    """

    sampler: Sampler
    low: list[float]
    middle: list[float]
    high: list[float]
    reached: list[int | None]

    @property
    def share(self) -> float:
        """Of the seeds, how many reached it."""
        return sum(one is not None for one in self.reached) / len(self.reached)

    @property
    def typical(self) -> float | None:
        """The median over the seeds of the evaluations that took; None where that is beyond the budget."""
        found = median(float("inf") if one is None else one for one in self.reached)
        return None if found == float("inf") else found


class Comparison(Strict):
    """The samplers on the times of an exhaustive search; budget: a third of its evaluations."""

    budget: int
    optimum: float
    curves: list[Curves]


class Best(Strict):
    """The fastest candidate of a search. Times in microseconds, medians; ratio: to the hand-chosen form, with its interval."""

    name: str
    config: dict[str, Value]
    us: float
    incumbent_us: float
    sdpa_us: float | None
    ratio: float
    ratio_low: float
    ratio_high: float


class Found(Strict):
    """What one search came to.

    visits: the first to each GPU and software that judged. speeds: the best so far, as a multiple of the hand-chosen form's,
    after each evaluation.
    """

    artifact: str
    artifact_sha256: str
    problem: Problem
    sampler: str
    seed: int
    visits: list[Environment]
    source_sha256: str
    fitting: int
    evaluations: int
    verdicts: dict[str, int]
    incumbent: dict[str, Value]
    best: Best | None
    speeds: list[float]
    compared: Comparison | None

    @property
    def gpus(self) -> list[str]:
        """Where it was judged."""
        return sorted({visit.gpu for visit in self.visits})

    @property
    def exhaustive(self) -> bool:
        """Whether it evaluated all that fits, and nothing is left to judge."""
        return self.sampler == "exhaustive" and "built" not in self.verdicts


class SearchReport(Strict, Stored):
    """What `flashcore search report` writes."""

    kind: Literal["flashcore-search-report"] = "flashcore-search-report"
    schema_version: Literal[1] = 1
    time: str
    command: list[str]
    git_sha: str
    git_dirty: bool
    seeds: int
    # the file's name under docs/img, where one was drawn
    plot: str | None = None
    searches: list[Found]


def make_report(paths: Sequence[Path], seeds: int = SEEDS, say: Callable[[str], None] = lambda words: None) -> SearchReport:
    """Read, check and compare the results of searches.

    Raises:
        ArgumentValueError: none given, one that cannot be read or does not hold together, or two of the same search.
    """
    if not paths:
        raise ArgumentValueError("result: got none; allowed: at least one")
    if seeds < 1:
        raise ArgumentValueError(f"seeds: got {seeds}; allowed: at least 1")
    results = {path: read(SearchResult, path) for path in paths}
    broken = [f"{path}: {words}" for path, result in results.items() for words in damages(result)]
    if broken:
        more = f"; and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise ArgumentValueError(f"result: {broken[0]}{more}; allowed: results as `flashcore search run` writes them")
    kinds = Counter((result.problem.name, result.sampler, result.seed) for result in results.values())
    (name, sampler, seed), count = kinds.most_common(1)[0]
    if count > 1:
        raise ArgumentValueError(f"result: got {count} of {name}, {sampler}, seed {seed}; allowed: each search once")
    found = environment.collect()
    searches = []
    for path, result in results.items():
        say(f"{result.problem.name}, {result.sampler}")
        searches.append(_found(path, result, seeds))
    return SearchReport(
        time=found.time_utc.isoformat(),
        command=found.command,
        git_sha=found.git.sha if found.git else "unknown",
        git_dirty=found.git is None or found.git.dirty,
        seeds=seeds,
        searches=sorted(searches, key=lambda one: (one.problem.name, one.sampler, one.seed)),
    )


def damages(result: SearchResult) -> list[str]:
    """What in a result contradicts itself or the kernel's own space, in words; empty for a sound one."""
    trials = {trial.number: trial for trial in result.trials}
    words = [] if [trial.number for trial in result.trials] == list(range(len(result.trials))) else ["candidates are missing"]
    repeated = len(result.trials) - len({point_key(trial.config) for trial in result.trials})
    words += [f"{repeated} configurations more than once"] if repeated else []
    words += ["times and no visit to a GPU"] if any(trial.judged for trial in result.trials) and not result.visits else []
    if result.sampler == "exhaustive" and len(result.trials) != result.fitting:
        words.append(f"exhaustive, and has {len(result.trials)} of {result.fitting} configurations")
    for trial in result.trials:
        words += [f"candidate {trial.number}: {found}" for found in _damage(trial, trials, result)]
    return words


def _damage(trial: Trial, trials: dict[int, Trial], result: SearchResult) -> list[str]:
    words = []
    names = {name: tuple(values) for name, values in result.space.items()}
    if trial.config.keys() != names.keys() or any(value not in names[name] for name, value in trial.config.items()):
        words.append("is not in the space")
    if (trial.judged is not None) != (trial.verdict in ("measured", "wrong", "hang", "crash")):
        words.append(f"{trial.verdict}, {'and' if trial.judged else 'without'} a GPU's judgement")
    if (trial.same_as is not None) != (trial.verdict == "same binary"):
        words.append(f"{trial.verdict}, and the same as {trial.same_as}")
    elif trial.same_as is not None:
        other = trials.get(trial.same_as)
        if other is None or other.number >= trial.number or other.sha256 != trial.sha256 or other.same_as is not None:
            words.append(f"is said to be the same as {trial.same_as}, which is none such")
    judged = trial.judged
    if judged is None:
        return words
    if (judged.number, judged.sha256, judged.verdict) != (trial.number, trial.sha256, trial.verdict):
        words.append("another's judgement")
    if trial.verdict == "measured":
        if not judged.us or len(judged.us) != len(judged.incumbent_us) or min(judged.us + judged.incumbent_us) <= 0:
            words.append("no samples beside the hand-chosen form's")
        elif judged.ratio is None or abs(median(judged.incumbent_us) / median(judged.us) / judged.ratio - 1) > _TOLERANCE:
            words.append(f"ratio {judged.ratio}, which is not its samples'")
    return words


def _found(path: Path, result: SearchResult, seeds: int) -> Found:
    trials = {trial.number: trial for trial in result.trials}
    speeds, best = [], 0.0
    for number in trials:
        best = max(best, 1 / score_of(trials, number))
        speeds.append(best)
    verdicts = Counter[str](trial.verdict for trial in result.trials)
    found = Found(
        artifact=path.name,
        artifact_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        problem=result.problem,
        sampler=result.sampler,
        seed=result.seed,
        visits=list({(one.gpu, one.driver, one.cuda, one.torch): one for one in reversed(result.visits)}.values()),
        source_sha256=result.source_sha256,
        fitting=result.fitting,
        evaluations=len(result.trials),
        verdicts=dict(verdicts),
        incumbent=result.incumbent,
        best=_best(best_of(result)),
        speeds=speeds,
        compared=None,
    )
    # In less than two generations evolution has not begun: its first is drawn at random.
    if not found.exhaustive or best == 0 or result.fitting // PART < 2 * POPULATION:
        return found
    return found.model_copy(update={"compared": _compare(result, trials, seeds)})


def _best(trial: Trial | None) -> Best | None:
    if trial is None or trial.judged is None:
        return None
    judged = trial.judged
    ratio = ratio_of_medians(judged.us, judged.incumbent_us, baseline="incumbent")
    return Best(
        name=trial.name,
        config=trial.config,
        us=median(judged.us),
        incumbent_us=median(judged.incumbent_us),
        sdpa_us=median(judged.sdpa_us) if judged.sdpa_us else None,
        ratio=ratio.value,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
    )


def _compare(result: SearchResult, trials: dict[int, Trial], seeds: int) -> Comparison:
    scores = {point_key(trial.config): score_of(trials, trial.number) for trial in result.trials}
    space = Space({name: tuple(values) for name, values in result.space.items()}, [trial.config for trial in result.trials])
    optimum = 1 / min(scores.values())
    budget = result.fitting // PART
    curves = []
    for sampler in SAMPLERS:
        runs = [[1 / score for score in replay(space, scores, sampler, seed, budget)] for seed in range(seeds)]
        low, middle, high = np.percentile(np.array(runs), (10, 50, 90), axis=0)
        reached = [next((n for n, speed in enumerate(run, 1) if speed >= NEAR * optimum), None) for run in runs]
        curves.append(Curves(sampler=sampler, low=low.tolist(), middle=middle.tolist(), high=high.tolist(), reached=reached))
    return Comparison(budget=budget, optimum=optimum, curves=curves)


def form_name(impl: str, config: dict[str, Value]) -> str:
    """The short name of a configuration. A hand-chosen one need not be in the space."""
    return SEARCHABLE[impl].config(**config).name  # type: ignore[arg-type]  # read from the record of such a one
