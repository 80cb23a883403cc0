"""From a search and its retests to an entry of `tuned/<gpu>.json`: the fastest form that holds, or that none does.

A form holds where it is faster than the hand-chosen one beyond noise on the searched shape, in the search and again wherever
it was retested there, and is not slower beyond noise on some shape at least that the search did not see. One that is slower on
none comes before one that is; where it is, the hand-chosen form gets an entry of its own, so that calls near there keep it. The
best of many noisy times is too good by its selection, so the ratio that an entry carries is the retest's where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from flashcore import evidence, tuned
from flashcore.bench.shapes import GRIDS
from flashcore.errors import ArgumentValueError
from flashcore.evidence.build import slug
from flashcore.search.build import build_candidates
from flashcore.search.kernels import SEARCHABLE
from flashcore.search.retest import fastest
from flashcore.search.schema import BatchResult, Environment, Judged, Problem, SearchResult, Trial
from flashcore.sources import kernel_hash
from flashcore.stored import write_whole
from flashcore.tuned import Entry, Ratio, Table

Record = TypeVar("Record", bound=BaseModel)
# A form that is faster by less is not worth the binaries that a wheel would hold of it, one a dtype.
WORTH = 1.02


@dataclass(frozen=True, slots=True)
class Held:
    """What a form that holds was measured at: the searched problem, and by name those that the search did not see.

    slower: of the latter, where the hand-chosen form is faster beyond noise.
    """

    ratio: Ratio
    unseen: dict[str, Ratio]
    slower: tuple[Problem, ...]


def contest(trial: Trial, result: SearchResult, retests: Sequence[BatchResult]) -> Held | str:
    """Whether a form that the search measured holds; else why not, for people."""
    ratio = None if trial.judged is None else _ratio(trial.judged)
    if ratio is None or ratio.low <= 1:
        return f"{trial.name} is not faster than the hand-chosen form beyond noise: {ratio or trial.verdict}"
    unseen: dict[str, Ratio] = {}
    slower: list[Problem] = []
    for retest in retests:
        for judged in retest.judged:
            if judged.sha256 != trial.sha256:
                continue
            again = _ratio(judged)
            if again is None:
                return f"{trial.name} is not measured at {retest.problem.name}: {judged.verdict}, {judged.words}"
            if retest.problem == result.problem:
                if again.low <= 1:
                    return f"{trial.name} is not faster in the retest beyond noise: {again}"
                ratio = again
            else:
                unseen[retest.problem.name] = again
                if again.high < 1 and not _same_form(trial, retest):
                    slower.append(retest.problem)
    if ratio.value < WORTH:
        return f"{trial.name} is faster by less than {WORTH}, for which no binary is shipped: {ratio}"
    if not unseen:
        return f"{trial.name} was retested on no shape that the search did not see"
    if len(slower) == len(unseen):
        return f"{trial.name} is slower at every shape that the search did not see, such as {slower[0].name}"
    return Held(ratio, unseen, tuple(slower))


def _same_form(trial: Trial, retest: BatchResult) -> bool:
    """Whether the hand-chosen form of the retest is the very form: then the ratio is noise."""
    searchable = SEARCHABLE[retest.problem.impl]
    chosen = searchable.incumbent(retest.problem, retest.environment.sm_count)
    return searchable.values(chosen) == trial.config


def _ratio(judged: Judged) -> Ratio | None:
    if judged.ratio is None or judged.ratio_low is None or judged.ratio_high is None:
        return None
    return Ratio(value=judged.ratio, low=judged.ratio_low, high=judged.ratio_high)


def choose(result: SearchResult, retests: Sequence[BatchResult]) -> tuple[Trial | None, Held | None, dict[str, str], str]:
    """The fastest form that holds, what it was measured at, its binaries' SHA-256 by dtype; or None and why none does.

    Raises:
        ArgumentValueError: the records are not of one search on one GPU, or nothing that was faster has been retested.
    """
    _check(result, retests)
    measured = sum(trial.verdict == "measured" and trial.config != result.incumbent for trial in result.trials)
    faster = fastest(result, measured)
    if not faster:
        return None, None, {}, f"none of {measured} measured forms is faster beyond noise"
    retested = {judged.sha256 for retest in retests for judged in retest.judged if retest.problem != result.problem}
    contestants = [trial for trial in faster if trial.sha256 in retested]
    if not contestants:
        raise ArgumentValueError(
            f"retest: none of the {len(faster)} forms that were faster in the search of {result.problem.name} was retested on "
            "a shape that the search did not see; allowed: results of `flashcore search retest`"
        )
    verdicts = [(trial, contest(trial, result, retests)) for trial in contestants]
    refused = [held for _, held in verdicts if isinstance(held, str)]
    holding = [(trial, held) for trial, held in verdicts if isinstance(held, Held)]
    for trial, held in sorted(holding, key=lambda one: bool(one[1].slower)):  # the order of speed stays among equals
        built = _binaries(trial, result)
        if isinstance(built, dict):
            return trial, held, built, f"the fastest of {measured} measured forms that holds"
        refused.append(built)
    return None, None, {}, "; ".join(refused)


def _binaries(trial: Trial, result: SearchResult) -> dict[str, str] | str:
    """SHA-256 by dtype of a form's binaries, or which of them cannot be shipped."""
    config = SEARCHABLE[result.problem.impl].configure(trial.config)
    found: dict[str, str] = {}
    for dtype in tuned.DTYPES[tuned.precision(result.problem)]:
        problem = result.problem.model_copy(update={"dtype": dtype})
        (outcome,) = build_candidates(problem, [config], result.arch, jobs=1)
        if outcome.verdict != "built" or outcome.sha256 is None:
            return f"{outcome.name} cannot be shipped: {outcome.verdict}: {outcome.words}"
        found[dtype] = outcome.sha256
    if found[result.problem.dtype] != trial.sha256:
        raise ArgumentValueError(
            f"result: {trial.name} was {trial.sha256} in the search, by Triton {result.triton}, and is built as "
            f"{found[result.problem.dtype]} here; allowed: the same binary"
        )
    return found


def _check(result: SearchResult, retests: Sequence[BatchResult]) -> None:
    """Raise ArgumentValueError unless the records belong together and are of the kernel that is there."""
    problem = result.problem
    environments = [*result.visits, *(retest.environment for retest in retests)]
    if not environments:
        raise ArgumentValueError(f"result: the search of {problem.name} was on no GPU; allowed: one that measured something")
    gpus = {(one.gpu, one.sm_count) for one in environments}
    if len(gpus) > 1:
        raise ArgumentValueError(f"retest: got records of {sorted(gpus)}; allowed: all of one GPU")
    binding = SEARCHABLE[problem.impl].binding
    source = kernel_hash(binding.KERNEL)
    if {result.source_sha256, *(retest.source_sha256 for retest in retests)} != {source}:
        raise ArgumentValueError(f"result: is of another source of {binding.KERNEL}; allowed: the present one, {source}")
    wanted = (problem.impl, problem.dtype, _features(problem))
    for retest in retests:
        if (retest.problem.impl, retest.problem.dtype, _features(retest.problem)) != wanted:
            raise ArgumentValueError(f"retest: got {retest.problem.name}; allowed: other sizes of {problem.name}")


def _features(problem: Problem) -> str:
    searchable = SEARCHABLE[problem.impl]
    return searchable.binding.features(searchable.spec(problem))


def promote(result_path: Path, retest_paths: Sequence[Path], gpu: str | None = None) -> Entry:
    """Judge a search by its retests, keep its records beside the GPU's evidence and write its entry, config None where no
    form holds, into the GPU's table. gpu: the table's name ("nvidia-h200"), where only records of that one are to pass.

    Raises:
        ArgumentValueError: a record cannot be read, is of another GPU, or as `choose`.
    """
    result = _read(SearchResult, result_path)
    retests = [_read(BatchResult, path) for path in retest_paths]
    trial, held, sha256, words = choose(result, retests)
    environment = (*result.visits, *(retest.environment for retest in retests))[0]
    if gpu is not None and gpu != slug(environment.gpu):
        raise ArgumentValueError(f"gpu: got {gpu}; allowed: the records', {slug(environment.gpu)}")
    folder = evidence.FOLDER / slug(environment.gpu)
    folder.mkdir(exist_ok=True)
    problem = result.problem
    records = {f"search-{problem.name}-{result.sampler}.json": result_path.read_text()}
    for path, retest in zip(retest_paths, retests, strict=True):
        name = f"retest-{problem.name}-at-{retest.problem.name}"
        # several visits to a GPU may have judged a batch
        visit = sum(other.startswith((f"{name}.json", f"{name}.visit")) for other in records)
        records[f"{name}.visit{visit}.json" if visit else f"{name}.json"] = path.read_text()
    # all were read before any is written: they may be what an earlier promotion kept here
    for name, text in records.items():
        write_whole(folder / name, text)
    kept = list(records)
    entry = Entry(
        problem=problem,
        features=_features(problem),
        config=None if trial is None else trial.config,
        ratio=None if held is None else held.ratio,
        unseen={} if held is None else held.unseen,
        source_sha256=result.source_sha256,
        sha256=sha256,
        search=kept[0],
        retests=kept[1:],
        words=words,
    )
    _write(entry, result.arch, environment)
    if trial is not None and held is not None:
        for slower in held.slower:
            _write(_hand_chosen(entry, slower, trial.name), result.arch, environment, keep=True)
    return entry


def _hand_chosen(entry: Entry, problem: Problem, form: str) -> Entry:
    """The entry that keeps the hand-chosen form at a shape where a promoted one is slower."""
    words = f"{form}, promoted for {entry.problem.name}, is slower here: {entry.unseen[problem.name]}"
    return entry.model_copy(
        update={"problem": problem, "config": None, "ratio": None, "unseen": {}, "sha256": {}, "words": words}
    )


def _write(entry: Entry, arch: str, environment: Environment, *, keep: bool = False) -> None:
    """Put an entry into its GPU's table, in place of one of the same problem; keep: leave one that is there."""
    path = tuned.FOLDER / f"{slug(environment.gpu)}.json"
    table = tuned.tables().get(path)
    if table is None:
        table = Table(gpu=environment.gpu, arch=arch, sm_count=environment.sm_count, entries=[])
    if (table.gpu, table.arch, table.sm_count) != (environment.gpu, arch, environment.sm_count):
        raise ArgumentValueError(
            f"result: is of {environment.gpu} with {environment.sm_count} multiprocessors, {arch}; "
            f"allowed: {table.gpu}, {table.sm_count}, {table.arch}, as {path} says"
        )
    others = [one for one in table.entries if one.place != entry.place]
    if keep and len(others) < len(table.entries):
        return
    entries = sorted((*others, entry), key=lambda one: one.place)
    table.model_copy(update={"entries": entries}).save(path)
    tuned.forget()


def unmeasured(entry: Entry) -> list[str]:
    """Shapes of the benchmark's grids that take a promoted entry's form, though neither its search nor a retest was there."""
    (table,) = (table for table in tuned.tables().values() if entry in table.entries)
    searchable, found = SEARCHABLE[entry.problem.impl], []
    for shape in (*GRIDS["small"], *GRIDS["fa"]) if entry.config is not None else ():
        sizes = {"batch": shape.batch, "heads": shape.heads_q, "heads_k": shape.heads_k}
        lengths = {"seqlen_q": shape.seqlen_q, "seqlen_k": shape.seqlen_k}
        dims = {"head_dim": shape.head_dim, "head_dim_v": shape.head_dim_v}
        problem = entry.problem.model_copy(update={**sizes, **lengths, **dims, "causal": shape.causal})
        if problem.name in (entry.problem.name, *entry.unseen):
            continue
        try:
            taken = tuned.find(problem.impl, searchable.spec(problem), table.arch, table.sm_count)
        except ArgumentValueError:
            continue  # the kernel does not take it
        if taken is not None and taken.entry == entry:
            found.append(problem.name)
    return found


def unfounded(entry: Entry, folder: Path) -> str | None:
    """Why an entry's records, in the folder of its GPU's evidence, do not say what it says; None where they do."""
    try:
        result = _read(SearchResult, folder / entry.search)
        retests = [_read(BatchResult, folder / name) for name in entry.retests]
        _check(result, retests)
    except ArgumentValueError as error:
        return str(error)
    if entry.config is None:
        problems = {result.problem.name, *(retest.problem.name for retest in retests)}
        return (
            None if entry.problem.name in problems else f"{entry.search} and its retests are of {', '.join(sorted(problems))}"
        )
    if result.problem != entry.problem:
        return f"{entry.search} is of {result.problem.name}"
    binary = entry.sha256[entry.problem.dtype]
    trial = next((one for one in result.trials if one.config == entry.config and one.sha256 == binary), None)
    if trial is None:
        return f"{entry.search} has no such form with the binary {binary}"
    held = contest(trial, result, retests)
    if isinstance(held, str):
        return held
    if (held.ratio, held.unseen) != (entry.ratio, entry.unseen):
        return "its ratios are not its records'"
    searchable = SEARCHABLE[entry.problem.impl]
    for problem in held.slower:
        taken = tuned.find(entry.problem.impl, searchable.spec(problem), result.arch, retests[0].environment.sm_count)
        if taken is not None and taken.entry == entry:
            return f"it is taken at {problem.name}, where it is slower: {entry.unseen[problem.name]}"
    return None


def _read(record: type[Record], path: Path) -> Record:
    try:
        return record.model_validate_json(path.read_text())
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise ArgumentValueError(f"record: {path} is no {record.__name__} that can be read: {error}") from error
