"""The table of a run: for each shape a row a step, the same rows as Markdown, and what one step brought in words."""

from __future__ import annotations

from dataclasses import dataclass

from flashcore.bench.artifact import ContenderRecord, SeriesRecord
from flashcore.bench.markdown import view_to_markdown
from flashcore.bench.stats import ratio_of_medians
from flashcore.bench.view import EMPTY, View, figure
from flashcore.bench.work import tflops
from flashcore.ladder.artifact import LadderArtifact, TimedShape
from flashcore.ladder.code import KernelCode
from flashcore.ladder.measure import BASELINE
from flashcore.ladder.run import contender_name

COLUMNS = (
    "step",
    "us",
    "TFLOP/s",
    "% of ceiling",
    "x the step before",
    "x unfused PyTorch",
    "registers",
    "spills",
    "shared",
    "verdict",
)


@dataclass(frozen=True)
class Row:
    """One step on one shape; figures are None where it was not timed. `before`: the ratio to the step before that was timed."""

    name: str
    us: float | None
    tflops: float | None
    share: float | None
    before: float | None
    baseline: float | None
    code: tuple[KernelCode, ...]
    verdict: str


def rows(artifact: LadderArtifact, shape: TimedShape) -> list[Row]:
    """Unfused PyTorch, then every step in order, those not timed with the reason."""
    baseline = series_of(shape.find(BASELINE))
    found = [_row(shape, shape.find(BASELINE), "PyTorch, unfused", None, baseline, ())]
    before: SeriesRecord | None = None
    for step in artifact.steps:
        record = shape.find(contender_name(step))
        found.append(_row(shape, record, step, before, baseline, tuple(shape.code.get(step, ()))))
        before = series_of(record) or before
    return found


def _row(
    shape: TimedShape,
    record: ContenderRecord | None,
    name: str,
    before: SeriesRecord | None,
    baseline: SeriesRecord | None,
    code: tuple[KernelCode, ...],
) -> Row:
    series = series_of(record)
    if record is None or series is None:
        return Row(
            name, None, None, None, None, None, code, "not run" if record is None else f"{record.status}: {record.reason}"
        )
    one = shape.bench.shapes[0].shape
    rate = tflops(one, series.stats.p50)
    ceiling = shape.bench.peaks.matrix_tflops[one.dtype]
    return Row(
        name,
        series.stats.p50,
        rate,
        rate / ceiling,
        _ratio(series, before),
        _ratio(series, baseline),
        code,
        "right" if record.correctness is not None and record.correctness.passed else "not checked",
    )


def series_of(record: ContenderRecord | None) -> SeriesRecord | None:
    """What was timed of a contender, if it was."""
    return None if record is None else record.find("device_warm")


def _ratio(series: SeriesRecord, other: SeriesRecord | None) -> float | None:
    """How many times faster than the other."""
    return None if other is None else ratio_of_medians(series.samples, other.samples, baseline="").value


def view(artifact: LadderArtifact, shape: TimedShape) -> View:
    """The table of one shape. A step of several kernels shows the most registers and shared memory, and the sum of spills."""
    one, peaks = shape.bench.shapes[0].shape, shape.bench.peaks
    found, size = artifact.environment, peaks.matrix_size
    return View(
        title=f"the ladder at {one.label}",
        columns=COLUMNS,
        rows=tuple(_cells(row) for row in rows(artifact, shape)),
        notes=(
            f"{found.device_name}, {found.time_utc:%Y-%m-%d}; median of {shape.bench.settings.iters} CUDA-graph replays, "
            "interleaved; L2 warm",
            f"the ceiling: {figure(peaks.matrix_tflops[one.dtype])} TFLOP/s, by a product of {size} x {size} in this run",
            "x the step before: how many times as fast as the last step above that was timed; below 1 is slower",
            "registers and shared memory (bytes): the most of a step's kernels; made by Triton "
            f"{', '.join(sorted({code.triton for codes in shape.code.values() for code in codes})) or EMPTY}",
        ),
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        EMPTY if row.us is None else figure(row.us),
        EMPTY if row.tflops is None else figure(row.tflops),
        EMPTY if row.share is None else f"{100 * row.share:.1f}",
        EMPTY if row.before is None else f"{row.before:.2f}",
        EMPTY if row.baseline is None else f"{row.baseline:.2f}",
        *code_cells(row.code),
        row.verdict,
    )


def code_cells(code: tuple[KernelCode, ...]) -> tuple[str, str, str]:
    """Registers, spills and shared memory of a step's kernels."""
    if not code:
        return (EMPTY,) * 3
    return (
        str(max(one.registers for one in code)),
        str(sum(one.spills for one in code)),
        str(max(one.shared for one in code)),
    )


def to_markdown(artifact: LadderArtifact) -> str:
    """Every table of the artifact as GitHub Markdown; ends with a newline."""
    return "\n".join(view_to_markdown(view(artifact, shape)) for shape in artifact.shapes)


def brought(artifact: LadderArtifact, step: str) -> list[str]:
    """What a step came to, a sentence a shape; says so where the run has none of it."""
    sentences = []
    for shape in artifact.shapes:
        row = next((row for row in rows(artifact, shape)[1:] if row.name == step), None)
        label = shape.bench.shapes[0].shape.label
        sentences.append(f"{label}: {'not in this run' if row is None else _words(row)}")
    return sentences or ["no shape was timed"]


def _words(row: Row) -> str:
    if row.us is None or row.share is None:
        return row.verdict
    words = f"{figure(row.us)} us, {100 * row.share:.1f} % of the ceiling"
    words += "" if row.before is None else f"; {row.before:.2f} times as fast as the step before"
    return words + ("" if row.baseline is None else f"; {row.baseline:.2f} times as fast as unfused PyTorch")
