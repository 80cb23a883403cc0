"""The bar beside what was measured: every cell of the grid with its verdict, and the geometric mean. Nothing is left out."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from flashcore.bench import bar, work
from flashcore.bench.artifact import Artifact, ContenderRecord, ShapeRecord
from flashcore.bench.stats import Ratio, ratio_of_medians
from flashcore.bench.timing import Mode
from flashcore.bench.view import EMPTY, View, figure, measured_where, peaks_text

AUTO = "flashcore"
FIRST: Mode = "device_warm"
REVERSED: Mode = "device_reversed"
COLUMNS = (
    "shape",
    "bar",
    f"{bar.OURS} / {bar.PEER}",
    "in the other order",
    "verdict",
    f"{AUTO} / {bar.PEER}",
    f"{bar.OURS} us",
    "TFLOP/s",
    "% of matrix rate",
    f"{bar.PEER} TFLOP/s",
)


@dataclass(frozen=True)
class _Cell:
    """One shape. A ratio is None where one of the two was not timed in that order."""

    record: ShapeRecord
    bar: float | None
    first: Ratio | None
    reversed: Ratio | None
    auto: Ratio | None


def bar_view(artifact: Artifact) -> View | None:
    """The table of a run of the bar's grid on a GPU; None for any other run."""
    if artifact.settings.grid != bar.GRID or artifact.environment.gpu is None:
        return None
    cells = [_cell(record) for record in artifact.shapes]
    notes = (
        f"{bar.OURS} / {bar.PEER}: how many times faster by {FIRST} medians of the same run, with a 95 % bootstrap interval; "
        "the bar is a target of this project (bench/bar.py), and is met where the ratio reaches it in both orders",
        f"% of matrix rate: TFLOP/s over that of a large matrix product in this run ({peaks_text(artifact)})",
        _orders(artifact),
    )
    rows = tuple(_row(artifact, cell) for cell in cells)
    return View(f"the bar, {measured_where(artifact)}", COLUMNS, (*rows, _mean_row(cells)), notes)


def _cell(record: ShapeRecord) -> _Cell:
    by_name = {contender.name: contender for contender in record.contenders}
    ours, auto, peer = (by_name.get(name) for name in (bar.OURS, AUTO, bar.PEER))
    return _Cell(
        record,
        bar.bar_of(record.shape),
        _ratio(ours, peer, FIRST),
        _ratio(ours, peer, REVERSED),
        _ratio(auto, peer, FIRST),
    )


def _ratio(contender: ContenderRecord | None, peer: ContenderRecord | None, mode: Mode) -> Ratio | None:
    mine, theirs = (c.find(mode) if c else None for c in (contender, peer))
    return ratio_of_medians(mine.samples, theirs.samples, baseline=bar.PEER) if mine and theirs else None


def verdict(wanted: float, first: float | None, other: float | None) -> str:
    """Whether a ratio reaches what is wanted, in each order that it was measured in (None: it was not)."""
    if first is None:
        return "not timed"
    reached = [value >= wanted for value in (first, other) if value is not None]
    if all(reached):
        return "met" if other is not None else "met, in one order"
    return "missed" if not any(reached) else "missed in one order"


def _row(artifact: Artifact, cell: _Cell) -> tuple[str, ...]:
    record = cell.record
    rates = {c.name: (s.stats.p50, work.tflops(record.shape, s.stats.p50)) for c in record.contenders if (s := c.find(FIRST))}
    us, rate = rates.get(bar.OURS, (None, None))
    peer_rate = rates.get(bar.PEER, (None, None))[1]
    first, other = (ratio.value if ratio else None for ratio in (cell.first, cell.reversed))
    return (
        record.shape.label,
        EMPTY if cell.bar is None else f"{cell.bar:.2f}",
        _interval(cell.first),
        _number(other),
        EMPTY if cell.bar is None else verdict(cell.bar, first, other),
        _number(cell.auto.value if cell.auto else None),
        EMPTY if us is None else figure(us),
        EMPTY if rate is None else figure(rate),
        EMPTY if rate is None else f"{100 * rate / artifact.peaks.matrix_tflops[record.shape.dtype]:.1f}",
        EMPTY if peer_rate is None else figure(peer_rate),
    )


def _mean_row(cells: list[_Cell]) -> tuple[str, ...]:
    """The geometric means over the bar's cells; none where one of these was not timed."""
    wanted = len(bar.cells())
    in_bar = [cell for cell in cells if cell.bar is not None]
    first = _mean([cell.first for cell in in_bar], wanted)
    other = _mean([cell.reversed for cell in in_bar], wanted)
    auto = _mean([cell.auto for cell in in_bar], wanted)
    return (
        f"geometric mean of the bar's {wanted} cells",
        f"{bar.MEAN:.2f}",
        _number(first),
        _number(other),
        verdict(bar.MEAN, first, other),
        _number(auto),
        *([EMPTY] * (len(COLUMNS) - 6)),
    )


def _mean(ratios: list[Ratio | None], wanted: int) -> float | None:
    values = [ratio.value for ratio in ratios if ratio is not None]
    return statistics.geometric_mean(values) if len(values) == wanted else None


def _orders(artifact: Artifact) -> str:
    """How far the second timing of each contender, in the reverse order, is from the first."""
    moved = [
        (series.to_first - 1, contender.name, record.shape.label)
        for record in artifact.shapes
        for contender in record.contenders
        if contender.kind != "floor" and (series := contender.find(REVERSED)) and series.to_first is not None
    ]
    if not moved:
        return "timed in one order only"
    most, name, label = max(moved, key=lambda entry: abs(entry[0]))
    median = statistics.median(abs(change) for change, _, _ in moved)
    return (
        "timed a second time with each round's order reversed: medians moved by "
        f"{100 * median:.2f} % in the median, by {100 * most:+.2f} % at most ({name}, {label})"
    )


def _interval(ratio: Ratio | None) -> str:
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]" if ratio else EMPTY


def _number(value: float | None) -> str:
    return EMPTY if value is None else f"{value:.3f}"
