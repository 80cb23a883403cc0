"""Measuring batches on a GPU: `flashcore search measure FOLDER...`.

This process only keeps the books. A child (judge.py) holds the GPU, judges one candidate after another and streams what it
finds; when a candidate takes it down, that is the candidate's verdict, and a new child goes on with the rest. What was judged
is on disk a moment later: the next visit goes on where this one ended.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flashcore.errors import ArgumentValueError, BinaryError
from flashcore.search.batch import read_batch
from flashcore.search.child import COMMAND, PATIENCE, Child, Limits
from flashcore.search.schema import Batch, BatchResult, Built, Environment, Judged
from flashcore.sources import kernel_hash
from flashcore.stored import write_whole
from flashcore.verify.watchdog import EXIT_CODE as HANG_CODE

# Beside the folder of a search's batches: what GPUs said of them.
JUDGED = "judged"
# Writing a large result after every candidate would take longer than some candidates do.
SAVE_SECONDS = 1.0


@dataclass
class Visit:
    """What a visit to a GPU brought. By batch folder: the results of this visit, why a batch could not be judged, and how
    many of its candidates are left for another visit."""

    results: dict[Path, BatchResult] = field(default_factory=dict)
    failures: dict[Path, str] = field(default_factory=dict)
    left: dict[Path, int] = field(default_factory=dict)


class Watcher:
    """Hears how a visit goes; this one says nothing."""

    def begin(self, folder: Path, batch: Batch, waiting: int) -> None:
        """A batch is next, with so many candidates to judge."""

    def judged(self, built: Built, judged: Judged) -> None:
        """A candidate has its verdict."""

    def say(self, words: str) -> None:
        """Something to know."""


def results_of(out: Path, name: str) -> list[BatchResult]:
    """What all visits found of a batch, by the name of its folder, the first visit first.

    Raises:
        BinaryError: a result cannot be read.
    """
    found = []
    for path in _visits(out, name):
        try:
            found.append(BatchResult.model_validate_json(path.read_text()))
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            raise BinaryError(f"{path}: no result that can be read: {error}") from error
    return found


def measure(
    folders: Sequence[Path],
    out: Path | None = None,
    *,
    seconds: float | None = None,
    watcher: Watcher | None = None,
    child: Sequence[str] = COMMAND,
    limits: Limits = PATIENCE,
) -> Visit:
    """Judge what no earlier visit judged of these batches; the results of this visit are `OUT/<folder's name>.<visit>.json`.

    Args:
        out: where results are, those of earlier visits too; None: for each batch, where the search that made it looks for them.
        seconds: begin no candidate later than so many seconds from now.
        child: the command of the process that judges.

    A batch that cannot be trusted, or whose earlier results cannot be read, is a failure of the visit; the others are judged.

    Raises:
        ArgumentValueError: two batches would have the same results' names.
    """
    outs = {folder: _searchs_own(folder) if out is None else out for folder in folders}
    places = [(place, folder.resolve().name) for folder, place in outs.items()]
    if len(set(places)) != len(folders):
        raise ArgumentValueError(f"folders: got {', '.join(map(str, folders))}; allowed: folders whose names differ")
    deadline = None if seconds is None else time.time() + seconds
    visit, heard = Visit(), watcher or Watcher()
    with tempfile.TemporaryDirectory(prefix="flashcore-judge-") as temporary:
        process = Child(child, Path(temporary) / "stderr")
        try:
            process.start()
            batches = [batch for place in folders if (batch := _trusted(place, outs[place], visit, heard)) is not None]
            for batch in batches:
                batch.run(process, deadline, limits)
                batch.report(visit)
        finally:
            process.stop()
    return visit


def _trusted(folder: Path, out: Path, visit: Visit, heard: Watcher) -> _Batch | None:
    """A batch, or None where it is a failure of the visit before anything of it is judged."""
    try:
        return _Batch(folder, out, heard)
    except BinaryError as error:
        visit.failures[folder] = str(error)
        heard.say(f"refused: {error}")
        return None


class _Batch:
    """One batch of a visit: what of it was judged, and on disk.

    Raises:
        BinaryError: the batch, or an earlier result of it, cannot be read or trusted.
    """

    def __init__(self, folder: Path, out: Path, watcher: Watcher) -> None:
        self._folder, self._watcher = folder, watcher
        self._batch = read_batch(folder)
        self._waiting = {one.number: one for one in _unjudged(folder, self._batch, out)}
        self._judged: list[Judged] = []
        self._environment: Environment | None = None
        self._sdpa: str | None = None
        self._failure: str | None = None
        name = folder.resolve().name
        earlier = _visits(out, name)
        self._path = out / f"{name}.{_number(earlier[-1]) + 1 if earlier else 0}.json"
        self._saved = 0.0

    def run(self, child: Child, deadline: float | None, limits: Limits) -> None:
        """Judge until nothing is left, the time is up, or the batch cannot be judged."""
        self._watcher.begin(self._folder, self._batch, len(self._waiting))
        try:
            while self._waiting and self._failure is None and (deadline is None or time.time() < deadline):
                child.ask(
                    {
                        "folder": str(self._folder.resolve()),
                        "numbers": list(self._waiting),
                        "deadline": deadline,
                        "sdpa": self._sdpa,
                    }
                )
                if self._listen(child, limits):
                    return
        finally:
            self._save()

    def _listen(self, child: Child, limits: Limits) -> bool:
        """Take in what a child says of the batch; whether it said that it is done."""
        running: Built | None = None
        judged = 0
        hung = False
        while True:
            try:
                said = child.hear(limits.setup if running is None and judged == 0 else limits.candidate)
            except TimeoutError:
                hung, said = True, None
                child.kill()
            if said is None:
                break
            match said:
                case {"ready": {"environment": environment, "sdpa": sdpa}}:
                    self._environment = Environment.model_validate(environment).model_copy(update={"command": _command()})
                    self._sdpa = sdpa
                case {"started": number}:
                    running = self._waiting[number]
                case {"judged": verdict}:
                    self._take(Judged.model_validate(verdict))
                    running, judged = None, judged + 1
                case {"refused": words}:
                    self._failure = words
                    return True
                case {"done": True}:
                    return True
                case _:
                    raise BinaryError(f"{self._folder}: the process that judges said {said}, which means nothing")
        status, words = child.stop()
        if running is not None:
            how: Literal["hang", "crash"] = "hang" if hung or status == HANG_CODE else "crash"
            why = f"the process that judged it ended with status {status}: {words}"
            self._take(Judged(number=running.number, sha256=running.sha256, verdict=how, words=why))
        elif judged == 0:
            # not a candidate's doing, and it would come again
            self._failure = f"the process that judges {'hung' if hung else 'ended'} before any candidate: {status}: {words}"
        else:
            self._watcher.say(f"judging begins anew after status {status}: {words}")
        return False

    def _take(self, judged: Judged) -> None:
        built = self._waiting.pop(judged.number)
        if judged.sha256 != built.sha256:
            raise BinaryError(f"{self._folder}: {built.name} was to be judged, and {judged.sha256} was")
        self._judged.append(judged)
        self._watcher.judged(built, judged)
        if time.monotonic() > self._saved + SAVE_SECONDS:
            self._save()

    def _save(self) -> None:
        result = self._result()
        if result is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, result.model_dump_json() + "\n")
        self._saved = time.monotonic()

    def _result(self) -> BatchResult | None:
        """Of this visit; None where nothing was judged in it."""
        if self._environment is None or not self._judged:
            return None
        kernel = json.loads(self._batch.incumbent.key)["kernel"]
        return BatchResult(
            problem=self._batch.problem,
            environment=self._environment,
            source_sha256=kernel_hash(kernel),
            sdpa_backend=self._sdpa or None,
            judged=self._judged,
        )

    def report(self, visit: Visit) -> None:
        """Put down what came of it."""
        result = self._result()
        if result is not None:
            visit.results[self._folder] = result
        if self._failure is not None:
            visit.failures[self._folder] = self._failure
        if self._waiting:
            visit.left[self._folder] = len(self._waiting)


def _searchs_own(folder: Path) -> Path:
    """A search has its batches in a folder, and beside that one what was judged of them."""
    return folder.resolve().parent.parent / JUDGED


def _command() -> list[str]:
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _visits(out: Path, name: str) -> list[Path]:
    """The results of a batch's visits, in their order."""
    found = (path for path in out.glob("*.json") if re.fullmatch(rf"{re.escape(name)}\.\d+\.json", path.name))
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    """A visit's, by its result's name."""
    return int(path.suffixes[-2][1:])


def _unjudged(folder: Path, batch: Batch, out: Path) -> list[Built]:
    """What no earlier visit judged of a batch.

    Raises:
        BinaryError: an earlier result under its name is of something else.
    """
    sha256 = {one.number: one.sha256 for one in batch.candidates}
    for result in results_of(out, folder.resolve().name):
        if result.problem != batch.problem:
            raise BinaryError(f"{out}: holds results of {result.problem.name} under the name of {folder}; use another folder")
        for judged in result.judged:
            if sha256.pop(judged.number, judged.sha256) != judged.sha256:
                raise BinaryError(f"{out}: candidate {judged.number} of {folder} was another binary then; use another folder")
    return [one for one in batch.candidates if one.number in sha256]


class Reporter(Watcher):
    """Tells people: the best so far, and whatever went wrong, a line each; on a terminal a bar too."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self.progress.add_task("", total=0)
        self._best = 0.0

    def begin(self, folder: Path, batch: Batch, waiting: int) -> None:
        self._best = 0.0
        self.progress.reset(self._task, total=waiting, description=batch.problem.name)
        self.say(f"{folder}: {batch.problem.name}: {waiting} of {len(batch.candidates)} candidates to judge")

    def judged(self, built: Built, judged: Judged) -> None:
        self.progress.advance(self._task)
        if judged.verdict != "measured":
            self.say(f"{judged.verdict}: {built.name}: {judged.words}")
        elif judged.ratio is not None and judged.ratio > self._best:
            self._best = judged.ratio
            interval = f"{judged.ratio_low:.3f} to {judged.ratio_high:.3f}"
            self.say(f"best so far {judged.ratio:.3f} ({interval}) of the hand-chosen form's speed: {built.name}")

    def say(self, words: str) -> None:
        self._console.print(words, highlight=False, markup=False, soft_wrap=True)


def run(folders: Sequence[Path], out: Path | None, seconds: float | None, console: Console) -> Visit:
    """`measure`, telling people how it goes, and what came of it.

    Raises:
        BinaryError: some batch could not be judged; the others were.
    """
    reporter = Reporter(console)
    with reporter.progress:
        visit = measure(folders, out, seconds=seconds, watcher=reporter)
    for folder, result in visit.results.items():
        reporter.say(f"{folder}: {_summary(result)}")
    for folder, count in visit.left.items():
        reporter.say(f"{folder}: {count} candidates left for another visit")
    if visit.failures:
        raise BinaryError("; ".join(f"{folder}: {words}" for folder, words in visit.failures.items()))
    return visit


def _summary(result: BatchResult) -> str:
    verdicts = [one.verdict for one in result.judged]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    return f"{counts}; SDPA's backend {result.sdpa_backend or 'none'}; {result.environment.gpu}"
