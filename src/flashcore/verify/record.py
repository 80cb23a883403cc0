"""The JSON file that a verification leaves: what ran where, and for each binary which cases it passed.

A case has a record under each implementation that was verified.

This is the raw material of evidence, so it says everything and interprets nothing: whether a record proves anything
of a binary is for evidence.py to decide.
"""

import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from flashcore.environment import Environment, collect
from flashcore.verify.suite import VERDICTS, CaseResult, Ran, Verdict
from flashcore.verify.tolerance import Comparison

# 2: the backward pass. A record of 1 is one of 2 that has nothing of it, so both are read.
SCHEMA_VERSION: Literal[2] = 2

Direction = Literal["fwd", "bwd"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Error(_Model):
    """A Comparison; a number that was not finite is None."""

    max_abs: float | None
    mean_abs: float | None
    bound: float | None


class LaunchRecord(_Model):
    """One launch of a backward pass; binary_sha256 is None where it was interpreted."""

    kernel: str | None
    specialisation: str | None
    binary_sha256: str | None


class CaseRecord(_Model):
    """One case under one implementation. output and lse are None where nothing was compared; reason is "" when it passed.

    implementation is the one that was asked for, impl the one that the plan of the call named; they differ under "auto".
    gradients, by name, and launches are of a backward pass, reproducible says whether its runs are meant to be bitwise equal;
    kernel, specialisation and binary_sha256 are a forward call's.
    """

    name: str
    # the default is for records from when there was one kernel
    implementation: str = "portable"
    verdict: Verdict
    reason: str
    output: Error | None
    lse: Error | None
    bitwise_equal: bool | None
    impl: str | None
    kernel: str | None
    specialisation: str | None
    binary_sha256: str | None
    gradients: dict[str, Error] = {}
    launches: tuple[LaunchRecord, ...] = ()
    reproducible: bool | None = None
    seconds: float


class BinaryRecord(_Model):
    """The cases that one binary ran, by name."""

    kernel: str | None
    specialisation: str | None
    passed: tuple[str, ...]
    failed: tuple[str, ...]


class VerifyRecord(_Model):
    """A whole run. `binaries` is keyed by SHA-256; it is empty where kernels were interpreted.

    direction: whether forward calls were judged, or the gradients of the backward passes.
    implementation is what was asked for: one by name, or verify/subject.py's OURS for every kernel of ours. The counts are
    of the records in `cases`. environment holds the time, the command line and the hash of each kernel's source. suite and
    only say which cases were asked for, so that a partial run cannot pass for a full one.
    """

    schema_version: Literal[1, 2]
    direction: Direction = "fwd"
    environment: Environment
    implementation: str
    device: str
    interpreted: bool
    suite: str
    only: str | None
    passed: int
    failed: int
    skipped: int
    rejected: int = 0
    binaries: dict[str, BinaryRecord]
    cases: tuple[CaseRecord, ...]


def write(
    path: Path,
    results: Sequence[CaseResult],
    *,
    implementation: str,
    device: str,
    interpreted: bool,
    suite: str,
    only: str | None,
    direction: Direction = "fwd",
) -> VerifyRecord:
    """Write the results to `path` as JSON, whole or not at all, and return what was written."""
    record = VerifyRecord(
        schema_version=SCHEMA_VERSION,
        direction=direction,
        environment=collect(),
        implementation=implementation,
        device=device,
        interpreted=interpreted,
        suite=suite,
        only=only,
        **counts(results),
        binaries=_binaries(results),
        cases=tuple(map(_case, results)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(record.model_dump_json(indent=1) + "\n")
        os.chmod(temporary, 0o644)  # mkstemp's 0600 is for secrets; this file gets committed
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return record


def counts(results: Iterable[CaseResult | CaseRecord]) -> dict[Verdict, int]:
    """How many results there are of each verdict."""
    found = Counter(result.verdict for result in results)
    return {verdict: found[verdict] for verdict in VERDICTS}


def read(path: Path) -> VerifyRecord:
    """Read a record back. Raises pydantic.ValidationError for a file that is not one, or of another schema version."""
    return VerifyRecord.model_validate_json(path.read_text())


def _launches(result: CaseResult) -> tuple[Ran, ...]:
    """What ran of the pass that was judged."""
    if result.backward is not None:
        return result.backward.launches
    return () if result.ran is None else (result.ran,)


def _binaries(results: Sequence[CaseResult]) -> dict[str, BinaryRecord]:
    by_hash: dict[str, tuple[Ran, list[CaseResult]]] = {}
    for result in results:
        for ran in _launches(result):
            if ran.binary_sha256 is not None:
                by_hash.setdefault(ran.binary_sha256, (ran, []))[1].append(result)
    return {
        sha256: BinaryRecord(
            kernel=ran.kernel,
            specialisation=ran.specialisation,
            passed=_names(its, "passed"),
            failed=_names(its, "failed"),
        )
        for sha256, (ran, its) in by_hash.items()
    }


def _names(results: Sequence[CaseResult], verdict: Verdict) -> tuple[str, ...]:
    """The cases of this verdict, each once: a binary may run in it under two implementations, or twice in a pass."""
    return tuple(dict.fromkeys(result.case.name for result in results if result.verdict == verdict))


def _case(result: CaseResult) -> CaseRecord:
    ran, backward = result.ran, result.backward
    named = ran or backward
    return CaseRecord(
        name=result.case.name,
        implementation=result.implementation,
        verdict=result.verdict,
        reason=result.reason,
        output=_error(result.output),
        lse=_error(result.lse),
        bitwise_equal=result.bitwise_equal,
        impl=named.impl if named else None,
        kernel=ran.kernel if ran else None,
        specialisation=ran.specialisation if ran else None,
        binary_sha256=ran.binary_sha256 if ran else None,
        gradients={name: error for name, its in result.gradients.items() if (error := _error(its)) is not None},
        launches=tuple(
            LaunchRecord(kernel=one.kernel, specialisation=one.specialisation, binary_sha256=one.binary_sha256)
            for one in (backward.launches if backward else ())
        ),
        reproducible=backward.reproducible if backward else None,
        seconds=round(result.seconds, 4),
    )


def _error(comparison: Comparison | None) -> Error | None:
    if comparison is None:
        return None
    numbers = (comparison.max_abs, comparison.mean_abs, comparison.bound)
    max_abs, mean_abs, bound = (x if math.isfinite(x) else None for x in numbers)
    return Error(max_abs=max_abs, mean_abs=mean_abs, bound=bound)
