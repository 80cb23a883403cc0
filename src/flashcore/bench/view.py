"""Tables of text made from an artifact: what the terminal, the documents and the evidence show is the same table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from flashcore.bench.artifact import Artifact, ContenderRecord, SeriesRecord, ShapeRecord
from flashcore.bench.stats import Ratio
from flashcore.bench.timing import Mode

PUBLISHED_SAMPLES = 100
EMPTY = "-"

Unit = Literal["TFLOP/s", "TB/s"]


@dataclass(frozen=True)
class View:
    """A titled table: every row has as many cells as there are columns; the notes belong under it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def views(artifact: Artifact) -> list[View]:
    """One table a shape for a run of one or two shapes; for more, one of all, and where measured one cold and one of calls."""
    if len(artifact.shapes) <= 2:
        return [shape_view(artifact, record) for record in artifact.shapes]
    tables = [grid_view(artifact, artifact.leading_mode)]
    if _was_timed(artifact, "device_cold"):
        tables.append(grid_view(artifact, "device_cold"))
    if _was_timed(artifact, "eager_stream"):
        tables.append(call_view(artifact))
    if any(contender.peak_bytes is not None for record in artifact.shapes for contender in record.contenders):
        tables.append(memory_view(artifact))
    return tables


def _was_timed(artifact: Artifact, mode: Mode) -> bool:
    return any(contender.find(mode) for record in artifact.shapes for contender in record.contenders)


def shape_view(artifact: Artifact, record: ShapeRecord) -> View:
    """One row a contender, the fastest first, then those that failed; who was not timed is a note with the reason."""
    mode = artifact.leading_mode
    on_gpu = mode == "device_warm"
    columns = ["contender", "device us p50 (p10-p90)" if on_gpu else "wall us p50 (p10-p90)"]
    columns += ["cold us", "eager us", "latency us"] if on_gpu else []
    with_peak = any(contender.peak_bytes is not None for contender in record.contenders)
    columns += ["peak MiB"] if with_peak else []
    columns += [unit_of([record]), "% of bound", f"x {record.baseline}" if record.baseline else "ratio", "verdict"]
    shown = [contender for contender in record.contenders if contender.status != "not timed"]
    ordered = sorted(shown, key=lambda c: s.stats.p50 if (s := c.find(mode)) else float("inf"))
    rows = tuple(tuple(_shape_row(record, contender, mode, with_peak)) for contender in ordered)
    bound = f"bound {figure(record.work.bound_us)} us ({record.work.bound_limit})"
    notes = [f"{bound}, from the peaks measured in this run: {peaks_text(artifact)}"]
    if on_gpu:
        notes.append(f"cold: {record.cold}")
    if record.baseline:
        notes.append(f"x {record.baseline}: its median over the row's, with a 95 % bootstrap interval; above 1 is faster")
    notes += [f"{c.name} is {c.detail}" for c in shown if c.kind == "ours" and c.detail]
    notes += [f"{c.name}: not timed: {c.reason}" for c in record.contenders if c.status == "not timed"]
    return View(
        f"{_what(artifact)}{record.shape.label} on {measured_where(artifact)}",
        tuple(columns),
        rows,
        (*notes, *_caveats(artifact)),
    )


def grid_view(artifact: Artifact, mode: Mode) -> View:
    """One row a shape, one column a contender that was timed anywhere: time and rate; then ours to the baseline."""
    unit = unit_of(artifact.shapes)
    names = _timed_names(artifact.shapes, mode)
    ours = [name for name in names if name.startswith("flashcore")]
    columns = ("shape", *names, *(f"{name} / best SDPA" for name in ours))
    rows = []
    for record in artifact.shapes:
        by_name = {contender.name: contender for contender in record.contenders}
        cells = [_grid_cell(record, by_name.get(name), mode, unit) for name in names]
        ratios = [_ratio_to(record, by_name.get(name), mode) for name in ours]
        rows.append((record.shape.label, *cells, *ratios))
    notes = (
        f"each cell: {mode} p50 in us ({unit}); peaks measured in this run: {peaks_text(artifact)}",
        "last columns: times faster than the fastest SDPA backend of the row, with a 95 % bootstrap interval",
        *_reasons(artifact),
        *_caveats(artifact),
    )
    return View(f"{_what(artifact)}{mode} on {measured_where(artifact)}", columns, tuple(rows), notes)


def call_view(artifact: Artifact) -> View:
    """What a call from Python takes, the host included: one row a shape, one column a contender, the floor among them."""
    names = _timed_names(artifact.shapes, "eager_stream")
    rows = []
    for record in artifact.shapes:
        by_name = {contender.name: contender for contender in record.contenders}
        rows.append((record.shape.label, *(_call_cell(by_name.get(name)) for name in names)))
    notes = (
        "each cell: eager_stream p50 in us (eager_latency p50): wall clock a call of many in a row, and of one call with the "
        "synchronisation after it",
        *_caveats(artifact),
    )
    return View(f"{_what(artifact)}eager_stream on {measured_where(artifact)}", ("shape", *names), tuple(rows), notes)


def memory_view(artifact: Artifact) -> View:
    """The device memory of one forward and backward pass: one row a shape, one column a contender."""
    names = dict.fromkeys(c.name for r in artifact.shapes for c in r.contenders if c.peak_bytes is not None)
    rows = []
    for record in artifact.shapes:
        by_name = {contender.name: contender for contender in record.contenders}
        rows.append((record.shape.label, *(_peak(by_name.get(name)) for name in names)))
    notes = (
        "each cell: MiB that one forward and backward pass takes at most beside q, k, v and do: what it returns, what it keeps "
        "between the two and its workspace, by torch's caching allocator",
    )
    return View(f"peak memory on {measured_where(artifact)}", ("shape", *names), tuple(rows), notes)


def _peak(contender: ContenderRecord | None) -> str:
    return EMPTY if contender is None or contender.peak_bytes is None else figure(contender.peak_bytes / 2**20)


def _what(artifact: Artifact) -> str:
    """What of a call was timed, for a title."""
    return {"fwd": "", "bwd": "backward: ", "fwdbwd": "forward and backward: "}[artifact.settings.direction]


def unit_of(records: Sequence[ShapeRecord]) -> Unit:
    """The rate these shapes are told in together: TB/s where bytes set the bound of all of them, else TFLOP/s."""
    return "TB/s" if all(record.work.bound_limit == "memory" for record in records) else "TFLOP/s"


def rate(record: ShapeRecord, us: float, unit: Unit) -> float:
    """The rate of a launch that took `us` microseconds, of the work that the record's direction has."""
    amount = record.work.min_bytes if unit == "TB/s" else record.work.flops
    return amount / us * 1e-6


def figure(value: float) -> str:
    """Three significant digits, and at least the whole part: 0.0123, 9.04, 68.8, 1234."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _shape_row(record: ShapeRecord, contender: ContenderRecord, mode: Mode, with_peak: bool) -> list[str]:
    leading = contender.find(mode)
    extra: list[Mode] = ["device_cold", "eager_stream", "eager_latency"] if mode == "device_warm" else []
    cells = [contender.name, _spread(leading), *(_median(contender.find(other)) for other in extra)]
    cells += [_peak(contender)] if with_peak else []
    if leading is None or contender.kind == "floor":
        cells += [EMPTY, EMPTY, EMPTY]
    else:
        p50 = leading.stats.p50
        share = f"{100 * record.work.bound_us / p50:.1f}"
        ratio = "baseline" if contender.name == record.baseline else _ratio(leading.ratio)
        cells += [figure(rate(record, p50, unit_of([record]))), share, ratio]
    return [*cells, _verdict(contender)]


def _verdict(contender: ContenderRecord) -> str:
    if contender.status != "timed":
        return f"{contender.status}: {contender.reason}"
    checked = contender.correctness
    if checked is None:
        return "floor"
    part = "" if checked.checked == "all" else f" in {len(checked.checked)} heads"
    return f"ok {checked.max_abs:.1e} <= {checked.bound:.1e}{part}"


def _grid_cell(record: ShapeRecord, contender: ContenderRecord | None, mode: Mode, unit: Unit) -> str:
    series = contender.find(mode) if contender else None
    if contender is None or series is None:
        return not_timed(contender)
    if contender.kind == "floor":
        return figure(series.stats.p50)
    return f"{figure(series.stats.p50)} ({figure(rate(record, series.stats.p50, unit))})"


def _call_cell(contender: ContenderRecord | None) -> str:
    stream, latency = (contender.find(mode) if contender else None for mode in ("eager_stream", "eager_latency"))
    if stream is None:
        return not_timed(contender)
    return f"{figure(stream.stats.p50)} ({_median(latency)})"


def not_timed(contender: ContenderRecord | None) -> str:
    """The cell of a contender without a time: its status where it ought to have one."""
    return contender.status if contender and contender.status in ("wrong", "failed") else EMPTY


def _ratio_to(record: ShapeRecord, contender: ContenderRecord | None, mode: Mode) -> str:
    series = contender.find(mode) if contender else None
    return _ratio(series.ratio) if series else EMPTY


def _timed_names(records: Iterable[ShapeRecord], mode: Mode) -> list[str]:
    """Contenders with a time in some row, in the order of the first; wrong and failed ones belong to the table too."""
    shown = (c.name for r in records for c in r.contenders if c.find(mode) or c.status in ("wrong", "failed"))
    return list(dict.fromkeys(shown))


def _reasons(artifact: Artifact) -> list[str]:
    """One note for each contender and reason of not being timed, with the shapes it holds for."""
    found: dict[tuple[str, str], list[str]] = {}
    for record in artifact.shapes:
        for contender in record.contenders:
            if contender.status != "timed":
                found.setdefault((contender.name, f"{contender.status}: {contender.reason}"), []).append(record.shape.label)
    total = len(artifact.shapes)
    return [
        f"{name}: {reason} ({'all shapes' if len(labels) == total else '; '.join(labels)})"
        for (name, reason), labels in found.items()
    ]


def _caveats(artifact: Artifact) -> list[str]:
    notes = []
    if artifact.environment.gpu is None:
        notes.append("No GPU: wall clock on this machine's CPU. It says nothing about any GPU kernel.")
    if artifact.settings.iters < PUBLISHED_SAMPLES:
        notes.append(f"{artifact.settings.iters} samples each; a figure to be quoted needs {PUBLISHED_SAMPLES}.")
    return notes


def measured_where(artifact: Artifact) -> str:
    """On what and when, for a title."""
    found = artifact.environment
    return f"{found.device_name}, torch {found.torch}, {found.time_utc:%Y-%m-%d}"


def peaks_text(artifact: Artifact) -> str:
    """The ceilings measured in the run, for a note."""
    rates = (f"{dtype} {value:.3g} TFLOP/s" for dtype, value in artifact.peaks.matrix_tflops.items())
    return ", ".join((f"copy {artifact.peaks.copy_tbytes:.3g} TB/s", *rates))


def _spread(series: SeriesRecord | None) -> str:
    if series is None:
        return EMPTY
    stats = series.stats
    return f"{figure(stats.p50)} ({figure(stats.p10)}-{figure(stats.p90)})"


def _median(series: SeriesRecord | None) -> str:
    return figure(series.stats.p50) if series else EMPTY


def _ratio(ratio: Ratio | None) -> str:
    return f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio else EMPTY
