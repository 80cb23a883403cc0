"""What the generated blocks of the documents hold: Markdown made from the records under evidence/, and from nothing else.

A block names the artifacts it was made from. One that has not been recorded is said to be missing, and is no error.
"""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from flashcore import evidence
from flashcore.bench.artifact import Artifact, load
from flashcore.bench.bar_view import bar_views
from flashcore.bench.crossover_view import crossover_view
from flashcore.bench.markdown import to_markdown, view_to_markdown
from flashcore.bench.shapes import DTYPES
from flashcore.bench.view import View, figure
from flashcore.document_ladder_blocks import debug_views, ladder, ladder_bar, ladder_step
from flashcore.document_parts import NOTHING, each, origin, place, recorded, sources_of, table
from flashcore.environment import Environment
from flashcore.errors import ArgumentValueError
from flashcore.evidence.build import BACKWARD, EARLIER_BACKWARD
from flashcore.kernels.registry import KERNELS, SHIPPED_ARCHS, Kernel
from flashcore.ladder.steps import STEPS
from flashcore.search.report import SearchReport
from flashcore.search.report_view import to_markdown as search_tables
from flashcore.spec import MAX_HEAD_DIM
from flashcore.stored import read as read_record
from flashcore.target import ARCH_OF_CAPABILITY, Target
from flashcore.verify.cases import mission_cases
from flashcore.verify.record import CaseRecord, VerifyRecord, counts, read
from flashcore.verify.suite import VERDICTS

SMALL, HOPPER, PORTABLE = "flashcore-small", "flashcore-hopper", "flashcore-portable"
FLASH, CUDNN = "sdpa-flash", "sdpa-cudnn"
# What a reader compares first; EVALUATION.md has the whole tables.
COMPACT = ("flashcore", SMALL, HOPPER, PORTABLE, FLASH, CUDNN)
# Each kernel with the peer that its mean over a grid is told against.
MEANS = ((SMALL, CUDNN), (HOPPER, CUDNN), (PORTABLE, FLASH))


class HostTime(BaseModel):
    """Time of one call, in microseconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    median: float
    min: float
    max: float


class LaunchCost(BaseModel):
    """What tools/launch_cost.py writes: the same calls by the host's time and in a stream."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[2]
    environment: Environment
    host_us_per_call: dict[str, HostTime]
    # wall time, with the synchronisation after the last of many calls in a row
    stream_us_per_call: dict[str, HostTime]


class WheelVerdict(BaseModel):
    """What `flashcore verify --suite mission` said from the installed wheel."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    exit: int
    summary: list[str]


class WheelCheck(BaseModel):
    """What tools/check_wheel.py writes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1]
    environment: Environment
    wheel: str
    wheel_bytes: int
    flashcore: str
    triton: bool
    compilers: list[str]
    gpu: str
    origin: str
    binary_sha256: str
    max_abs_error: float
    verify_mission: WheelVerdict


def support() -> str:
    """Which GPUs have binaries, how far these are backed, and what a call may ask for."""
    rows = [_support_row(kernel, arch) for kernel in KERNELS.values() if kernel.computes for arch in kernel.archs]
    records = [path for name in ("verify", BACKWARD.removesuffix(".json")) for path in recorded(name)]
    origins = [f"verified: {_verify_origin(path, _read_verify(path))}" for path in records]
    earlier = [_verify_origin(path, _read_verify(path)) for path in recorded(EARLIER_BACKWARD.removesuffix(".json"))]
    origins += [f"verified, of binaries that are still the same, byte for byte: {one}" for one in earlier]
    return "\n".join(
        (
            table(("kernel", "arch", "compute capability", "binaries in a wheel", "verified", "state"), rows),
            "",
            f"- dtypes {', '.join(DTYPES)}; head dims 1 to {MAX_HEAD_DIM}, v's may differ from q's; any lengths of q and of k",
            "- MHA, GQA and MQA; causal, window, softcap, bool and additive masks that broadcast, LSE; any strides with a "
            "contiguous last dimension",
            *(f"- {one}" for one in origins or [f"verified: {NOTHING}"]),
        )
    )


def _support_row(kernel: Kernel, arch: str) -> tuple[str, ...]:
    target = Target(name=arch, arch=arch, capability=None, sm_count=0, interpreted=False)
    capabilities = ", ".join(f"{major}.{minor}" for (major, minor), of in ARCH_OF_CAPABILITY.items() if of == arch)
    source = evidence.state(kernel.id, None, target)
    if arch not in SHIPPED_ARCHS or not kernel.shipped(arch):
        return (kernel.id, arch, capabilities, "none", "none", f"on demand ({source}): Triton compiles it at the first call")
    shipped = {specialisation.name for specialisation in kernel.shipped(arch)}
    gpus: dict[str, set[str]] = {}
    for index in evidence.indexes():
        for sha256, (name, _) in index.verified.items():
            if index.arch == arch and name in shipped and evidence.state(kernel.id, sha256, target) == "verified":
                gpus.setdefault(index.gpu, set()).add(name)
    verified = f"{max(map(len, gpus.values()), default=0)} of {len(shipped)}"
    state = f"verified on {', '.join(gpus)}" if gpus else source
    return (kernel.id, arch, capabilities, str(len(shipped)), verified, state)


def benchmark(name: str) -> str:
    """Every table of a benchmark artifact."""
    return each(f"bench-{name}", lambda path: _of_artifact(path, load(path)))


def compact(name: str) -> str:
    """A grid's table with only the contenders that a reader compares first, by the mode that leads."""
    return each(f"bench-{name}", lambda path: _compact(path, load(path)))


def _of_artifact(path: Path, artifact: Artifact) -> str:
    notes = [_bench_origin(path, artifact), *_mean_ratio(artifact)]
    return to_markdown(artifact).rstrip() + "".join(f"\n- {note}" for note in notes)


def _mean_ratio(artifact: Artifact) -> list[str]:
    """Each kernel to a backend of SDPA over all shapes of a grid; nothing for a single shape, whose table says it."""
    notes = []
    for ours, peer in MEANS:
        ratios = []
        for record in artifact.shapes:
            us = {c.name: series.stats.p50 for c in record.contenders if (series := c.find(artifact.leading_mode))}
            if ours in us and peer in us:
                ratios.append(us[peer] / us[ours])
        if len(ratios) > 1:
            mean = f"{statistics.geometric_mean(ratios):.2f} (least {min(ratios):.2f}, most {max(ratios):.2f})"
            notes.append(f"{ours} is {mean} times as fast as {peer}: geometric mean of {len(ratios)} shapes")
    return notes


def bar(name: str) -> str:
    """The bars of a benchmark artifact's grid beside what was measured."""
    return each(f"bench-{name}", partial(_of_views, bar_views))


def crossover() -> str:
    """Where our kernels change places."""
    return each("bench-crossover", partial(_of_views, _crossover_views))


def _crossover_views(artifact: Artifact) -> list[View]:
    view = crossover_view(artifact)
    return [] if view is None else [view]


def _of_views(make: Callable[[Artifact], list[View]], path: Path) -> str:
    artifact = load(path)
    tables = "\n".join(map(view_to_markdown, make(artifact))).rstrip() or "no run of the grid on a GPU\n"
    return f"{tables}\n- {_bench_origin(path, artifact)}"


def _bench_origin(path: Path, artifact: Artifact) -> str:
    return origin(path, artifact.environment, sources_of(artifact.environment, artifact.settings.direction))


def _compact(path: Path, artifact: Artifact) -> str:
    mode = artifact.leading_mode
    records = [
        record.model_copy(
            update={
                "contenders": [
                    contender.model_copy(update={"series": [s for s in contender.series if s.mode == mode]})
                    for contender in record.contenders
                    if contender.name in COMPACT
                ]
            }
        )
        for record in artifact.shapes
    ]
    return _of_artifact(path, artifact.model_copy(update={"shapes": records}))


def verification(name: str) -> str:
    """How many cases of each group passed, failed, were skipped and were rejected, for each implementation."""
    return each(name, lambda path: _verification(path, _read_verify(path)))


def _verification(path: Path, record: VerifyRecord) -> str:
    by_implementation: dict[str, list[CaseRecord]] = {}
    for case in record.cases:
        by_implementation.setdefault(case.implementation, []).append(case)
    tables = [_verified(record, name, cases) for name, cases in by_implementation.items()]
    return "\n".join((*tables, f"- {_verify_origin(path, record)}"))


def _verify_origin(path: Path, record: VerifyRecord) -> str:
    return origin(path, record.environment, sources_of(record.environment, record.direction))


def _verified(record: VerifyRecord, name: str, cases: Sequence[CaseRecord]) -> str:
    """The table of one implementation. Groups that it rejected altogether have no row; the notes count them."""
    mission = {case.name for case in mission_cases()}
    groups: dict[str, list[CaseRecord]] = {}
    for case in cases:
        group = "the 15 of the mission" if case.name in mission else case.name.partition("-")[0]
        groups.setdefault(group, []).append(case)
    taken = {group: its for group, its in groups.items() if any(case.verdict != "rejected" for case in its)}
    rows = [_group_row(group, its) for group, its in (*taken.items(), ("all", cases))]
    ran = (sha256 for case in cases for sha256 in (case.binary_sha256, *(one.binary_sha256 for one in case.launches)))
    binaries = {sha256 for sha256 in ran if sha256}
    rejections = Counter(case.reason for case in cases if case.verdict == "rejected")
    lines = [
        f"**{name} on {record.device}, suite {record.suite}**",
        "",
        table(("cases", *VERDICTS, "largest error / its bound"), rows),
        "",
        f"- {len(binaries)} binaries of {name} ran",
        *(f"- {name} rejected {count}: {reason}" for reason, count in rejections.items()),
        *(f"- {c.verdict}: {c.name}: {c.reason}" for c in cases if c.verdict in ("failed", "skipped")),
        "",
    ]
    return "\n".join(lines)


def _group_row(name: str, cases: Sequence[CaseRecord]) -> tuple[str, ...]:
    counted = counts(cases)
    errors = [error for case in cases for error in (case.output, *case.gradients.values()) if error]
    shares = [error.max_abs / error.bound for error in errors if error.max_abs is not None and error.bound]
    return (name, *(str(counted[verdict]) for verdict in VERDICTS), f"{max(shares):.2f}" if shares else "-")


def launch() -> str:
    """What a call costs the host."""
    return each("launch-cost", _launch)


def _launch(path: Path) -> str:
    try:
        cost = LaunchCost.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise ArgumentValueError(f"artifact: {path} is not what tools/launch_cost.py writes: {error}") from error
    columns = ("call", "host us, median", "min", "max", "in a stream, median")
    rows = [
        (name, *map(figure, (host.median, host.min, host.max, cost.stream_us_per_call[name].median)))
        for name, host in cost.host_us_per_call.items()
    ]
    return f"{table(columns, rows)}\n\n- {origin(path, cost.environment, sources_of(cost.environment, 'fwd'))}"


def wheel() -> str:
    """A wheel that ran where there is no Triton and no compiler."""
    return each("wheel", _wheel)


def _wheel(path: Path) -> str:
    try:
        check = WheelCheck.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise ArgumentValueError(f"artifact: {path} is not what tools/check_wheel.py writes: {error}") from error
    rows = [
        ("wheel", f"{check.wheel}, {check.wheel_bytes / 1e6:.1f} MB"),
        ("Triton importable", "yes" if check.triton else "no"),
        ("compilers on the PATH", ", ".join(check.compilers) or "none"),
        ("binary of the mission shape", f"{check.origin}, SHA-256 {check.binary_sha256}"),
        ("`flashcore verify --suite mission`", f"exit {check.verify_mission.exit}: {' '.join(check.verify_mission.summary)}"),
    ]
    return f"{table(('what', 'found'), rows)}\n\n- {origin(path, check.environment, sources_of(check.environment, 'fwd'))}"


def search() -> str:
    """What searches for configurations found."""
    return each("search", _search)


def _search(path: Path) -> str:
    report = read_record(SearchReport, path)
    for one in report.searches:
        made_from = path.with_name(one.artifact)
        if not made_from.exists() or hashlib.sha256(made_from.read_bytes()).hexdigest() != one.artifact_sha256:
            got = f"{path} was made from {one.artifact}, which is not beside it as it was then"
            raise ArgumentValueError(f"artifact: {got}; allowed: the report of what is there (`flashcore search report`)")
    return search_tables(report, place(path))


BLOCKS: dict[str, Callable[[], str]] = {
    "support": support,
    "mission": partial(benchmark, "mission"),
    "small": partial(compact, "small"),
    "fa": partial(compact, "fa"),
    "decode": partial(compact, "decode"),
    "features": partial(compact, "features"),
    "wheel": wheel,
    "small-full": partial(benchmark, "small"),
    "fa-full": partial(benchmark, "fa"),
    "bar-fa": partial(bar, "fa"),
    "bar-small": partial(bar, "small"),
    "crossover": crossover,
    "verify": partial(verification, "verify"),
    "verify-bwd": partial(verification, "verify-bwd"),
    "bar-bwd": partial(bar, "bwd"),
    "bwd-full": partial(benchmark, "bwd"),
    "fwdbwd-full": partial(benchmark, "fwdbwd"),
    "train-full": partial(benchmark, "train"),
    "bwd-wide-full": partial(benchmark, "bwd-wide"),
    "launch": launch,
    "ladder-table": ladder,
    "bar-ladder": ladder_bar,
    "debug-views": debug_views,
    "search": search,
    **{f"ladder-{step.name}": partial(ladder_step, step.name) for step in STEPS},
}


def _read_verify(path: Path) -> VerifyRecord:
    try:
        return read(path)
    except (OSError, ValidationError) as error:
        raise ArgumentValueError(f"artifact: {path} is not a record of flashcore verify: {error}") from error
