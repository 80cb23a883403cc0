"""From configurations to what a GPU is to judge: built in parallel, held to the limits, and each machine code taken once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from flashcore.build import pool
from flashcore.build.gates import violations
from flashcore.build.machine_code import read_machine_code
from flashcore.errors import CompileError
from flashcore.kernels.specialisation import Specialisation
from flashcore.runtime import store
from flashcore.runtime.binary import Binary
from flashcore.search.batch import write_batch
from flashcore.search.kernels import SEARCHABLE, Config
from flashcore.search.schema import Batch, Built, Problem, Resources, Value

# Samples of each candidate; the interval of a ratio is then some tenths of a percent.
ROUNDS = 30


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a candidate before any GPU. `binary` and `resources` are there from where it could be compiled."""

    number: int
    config: dict[str, Value]
    specialisation: Specialisation
    verdict: Literal["compiler failed", "breaks a limit", "same binary", "built"]
    words: str | None = None
    same_as: int | None = None
    binary: Binary | None = None
    resources: Resources | None = None

    @property
    def name(self) -> str:
        """The specialisation's, for people."""
        return self.specialisation.name

    @property
    def sha256(self) -> str | None:
        """Of its machine code."""
        return None if self.binary is None else self.binary.info.sha256

    @property
    def built(self) -> Built:
        """What a batch says of it; there must be a binary."""
        assert self.binary is not None
        key, sha256 = self.specialisation.key, self.binary.info.sha256
        return Built(number=self.number, config=self.config, name=self.name, key=key, sha256=sha256)


def build_candidates(
    problem: Problem,
    configs: Sequence[Config],
    arch: str,
    *,
    numbers: Sequence[int] | None = None,
    seen: Mapping[str, int] | None = None,
    jobs: int | None = None,
    done: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Build every configuration, in their order; a crash of the compiler fails one of them.

    Args:
        numbers: the candidates', from 0 on where none are given; of two with the same machine code the lower one is judged.
        seen: machine code (SHA-256) that was judged before -> the candidate that had it.
        done: hears of each as it is built and held to the limits. Which are the same is known only at the end.

    Raises:
        ArgumentValueError, ValueError: the kernel does not take the problem, or a configuration does not fit it.
    """
    searchable = SEARCHABLE[problem.impl]
    candidates = [
        Outcome(number, searchable.values(config), searchable.specialise(problem, config), "compiler failed")
        for number, config in zip(range(len(configs)) if numbers is None else numbers, configs, strict=True)
    ]
    wanted = {candidate.specialisation: candidate for candidate in reversed(candidates)}
    ready: dict[Specialisation, Outcome] = {}

    def take(specialisation: Specialisation, binary: Binary | None, error: str | None) -> None:
        ready[specialisation] = _judge(wanted[specialisation], arch, binary, error)
        done(ready[specialisation])

    missing = []
    for specialisation in reversed(wanted):
        location = store.locate(specialisation, arch)
        binary = None if location is None else store.read(location)
        if binary is None:
            missing.append(pool.Request(specialisation, arch))
        else:
            take(specialisation, binary, None)

    def built(outcome: pool.Outcome) -> None:
        specialisation = outcome.request.specialisation
        location = store.locate(specialisation, arch)
        if outcome.binary is not None and location is not None:
            store.keep(location, outcome.binary)
        take(specialisation, outcome.binary, outcome.error)

    pool.compile_all(missing, jobs=jobs, done=built)
    judged = [replace(ready[one.specialisation], number=one.number, config=one.config) for one in candidates]
    return _told_apart(judged, seen or {})


def build_incumbent(problem: Problem, arch: str, sm_count: int) -> Outcome:
    """The hand-chosen form of a problem, which every candidate is timed beside. Its number is -1: no candidate's.

    Raises:
        CompileError: it cannot be built, or breaks a limit.
    """
    config = SEARCHABLE[problem.impl].incumbent(problem, sm_count)
    (outcome,) = build_candidates(problem, [config], arch, numbers=[-1], jobs=1)
    if outcome.verdict != "built":
        raise CompileError(f"the hand-chosen {outcome.name} is no incumbent: {outcome.verdict}: {outcome.words}")
    return outcome


def make_batch(
    folder: Path,
    problem: Problem,
    arch: str,
    incumbent: Outcome,
    outcomes: Sequence[Outcome],
    rounds: int = ROUNDS,
) -> Batch:
    """Write what of these was built, for a GPU to judge, into a folder."""
    chosen = [outcome for outcome in outcomes if outcome.verdict == "built"]
    batch = Batch(
        problem=problem, arch=arch, incumbent=incumbent.built, candidates=[one.built for one in chosen], rounds=rounds
    )
    write_batch(folder, batch, [one.binary for one in (incumbent, *chosen) if one.binary is not None])
    return batch


def _judge(candidate: Outcome, arch: str, binary: Binary | None, error: str | None) -> Outcome:
    """Hold a candidate to the limits of every binary."""
    if binary is None:
        return replace(candidate, words=error or "no reason given")
    try:
        code = read_machine_code(binary)
    except CompileError as unread:
        return replace(candidate, binary=binary, words=str(unread))
    resources = Resources(
        registers=code.registers, spill_loads=code.spill_loads, spill_stores=code.spill_stores, shared=code.shared
    )
    broken = violations(candidate.specialisation, arch, code)
    verdict: Literal["breaks a limit", "built"] = "breaks a limit" if broken else "built"
    return replace(candidate, verdict=verdict, words="; ".join(broken) or None, binary=binary, resources=resources)


def _told_apart(outcomes: Sequence[Outcome], seen: Mapping[str, int]) -> list[Outcome]:
    """Of those that were built, the first with each machine code stays so."""
    first: dict[str, Outcome] = {}
    for outcome in sorted(outcomes, key=lambda one: one.number):
        if outcome.verdict == "built" and outcome.binary is not None:
            first.setdefault(outcome.binary.info.sha256, outcome)
    return [_compared(outcome, first, seen) for outcome in outcomes]


def _compared(outcome: Outcome, first: Mapping[str, Outcome], seen: Mapping[str, int]) -> Outcome:
    if outcome.verdict != "built" or outcome.binary is None:
        return outcome
    sha256 = outcome.binary.info.sha256
    if sha256 in seen:
        return replace(outcome, verdict="same binary", same_as=seen[sha256])
    other = first[sha256]
    if other.number == outcome.number:
        return outcome
    assert other.binary is not None
    if _launched(other.binary) != _launched(outcome.binary):
        words = f"has the machine code of candidate {other.number}, and is launched in another way: they cannot be told apart"
        return replace(outcome, verdict="compiler failed", words=words)
    return replace(outcome, verdict="same binary", same_as=other.number)


def _launched(binary: Binary) -> tuple[object, ...]:
    """What a launch takes from a binary's record."""
    info = binary.info
    return info.symbol, info.threads, info.shared, info.cluster, info.programmatic, info.parameters
