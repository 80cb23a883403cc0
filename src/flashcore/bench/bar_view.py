"""A bar beside what was measured: every cell with its verdict, the geometric mean where one is wanted. Nothing is left out."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashcore.bench.artifact import Artifact, SeriesRecord, ShapeRecord
from flashcore.bench.bar import Bar, Cell, bars_of
from flashcore.bench.stats import Ratio, ratio_of_medians
from flashcore.bench.timing import Mode
from flashcore.bench.view import EMPTY, View, figure, measured_where, peaks_text, rate

AUTO = "flashcore"
FIRST: Mode = "device_warm"
REVERSED: Mode = "device_reversed"
FASTEST = "fastest SDPA"
MET, NOT_TIMED = "met", "not timed"


@dataclass(frozen=True)
class _Row:
    """One cell and what was measured of it. A ratio, of rates, is None where ours or one of the peers was not timed."""

    record: ShapeRecord
    cell: Cell
    ours: SeriesRecord | None
    peer: SeriesRecord | None
    peer_name: str
    first: Ratio | None
    reversed: Ratio | None
    auto: Ratio | None


def bar_views(artifact: Artifact) -> list[View]:
    """The tables, one a bar, of a run of a bar's grid and direction on a GPU; none for any other run."""
    if artifact.environment.gpu is None:
        return []
    return [_bar_view(bar, artifact) for bar in bars_of(artifact.settings.grid, artifact.settings.direction)]


def _bar_view(bar: Bar, artifact: Artifact) -> View:
    rows = [_measured(bar, record, cell) for record in artifact.shapes for cell in bar.of(record.shape)]
    columns = _columns(bar, artifact)
    cells = [tuple(text(row) for text in columns.values()) for row in rows]
    if bar.mean is not None:
        cells.append(_mean_row(bar, bar.mean, rows, columns))
    of = f" of {bar.ours}, backward" if bar.direction == "bwd" else ""
    return View(f"the bar{of}, {measured_where(artifact)}", tuple(columns), tuple(cells), _notes(bar, artifact, rows))


def _measured(bar: Bar, record: ShapeRecord, cell: Cell) -> _Row:
    peers = bar.peers[cell.mode]
    ours, auto = _series(record, bar.ours, cell.mode), _series(record, AUTO, cell.mode)
    peer_name, peer = _fastest(record, peers, cell.mode)
    in_reverse = (
        (_series(record, bar.ours, REVERSED), _fastest(record, peers, REVERSED)[1]) if bar.both_orders else (None, None)
    )
    return _Row(
        record,
        cell,
        ours,
        peer,
        peer_name,
        first=_ratio(ours, peer, peer_name),
        reversed=_ratio(*in_reverse, peer_name),
        auto=_ratio(auto, peer, peer_name),
    )


def _series(record: ShapeRecord, name: str, mode: Mode) -> SeriesRecord | None:
    return next((c.find(mode) for c in record.contenders if c.name == name), None)


def _floor(record: ShapeRecord, mode: Mode) -> SeriesRecord | None:
    return next((c.find(mode) for c in record.contenders if c.kind == "floor"), None)


def _fastest(record: ShapeRecord, peers: Sequence[str], mode: Mode) -> tuple[str, SeriesRecord | None]:
    """The peer with the lowest median. None where one was not timed: the fastest of the others might flatter us."""
    timed = {name: series for name in peers if (series := _series(record, name, mode))}
    if len(timed) < len(peers):
        return EMPTY, None
    name = min(timed, key=lambda name: timed[name].stats.p50)
    return name, timed[name]


def _ratio(ours: SeriesRecord | None, peer: SeriesRecord | None, peer_name: str) -> Ratio | None:
    return ratio_of_medians(ours.samples, peer.samples, baseline=peer_name) if ours and peer else None


def verdict(reached: Sequence[bool | None]) -> str:
    """Whether a cell is reached, from whether it is in each order that is asked for, None where it was not timed."""
    first, *others = reached
    if first is None:
        return NOT_TIMED
    known = [value for value in reached if value is not None]
    if all(known):
        return f"{MET}, in one order" if None in others else MET
    return "missed in one order" if any(known) else "missed"


def _verdict(bar: Bar, row: _Row) -> str:
    if row.cell.us is not None:
        return verdict([None if row.ours is None else row.ours.stats.p50 <= row.cell.us])
    if row.cell.faster is None:
        return EMPTY
    return _verdict_on(bar, row.cell.faster, *(ratio.value if ratio else None for ratio in (row.first, row.reversed)))


def _verdict_on(bar: Bar, wanted: float, first: float | None, other: float | None) -> str:
    orders = (first, other) if bar.both_orders else (first,)
    return verdict([None if value is None else value >= wanted for value in orders])


def _columns(bar: Bar, artifact: Artifact) -> dict[str, Callable[[_Row], str]]:
    """The name of each column, and what it shows of a row."""
    peer = _peer_title(bar)
    columns: dict[str, Callable[[_Row], str]] = {"shape": lambda row: row.record.shape.label}
    if len(bar.peers) > 1:
        columns["series"] = lambda row: row.cell.mode
    columns["bar"] = lambda row: _wanted(bar, row.cell)
    columns[f"{bar.ours} / {peer}"] = lambda row: EMPTY if row.cell.us is not None else _interval(bar, row.first)
    if bar.both_orders:
        columns["in the other order"] = lambda row: _number(bar, row.reversed.value if row.reversed else None)
    columns["verdict"] = lambda row: _verdict(bar, row)
    if bar.ours != AUTO:
        columns[f"{AUTO} / {peer}"] = lambda row: _number(bar, row.auto.value if row.auto else None)
    columns[f"{bar.ours} us"] = lambda row: _us(row.ours)
    if bar.told == "times":
        columns[f"{peer} us"] = lambda row: _us(row.peer)
        columns["which"] = lambda row: row.peer_name
        columns["floor us"] = lambda row: _us(_floor(row.record, row.cell.mode))
    else:
        columns["TFLOP/s"] = lambda row: _rate(row, row.ours)
        columns["% of matrix rate"] = lambda row: _share_of_peak(artifact, row)
        columns[f"{peer} TFLOP/s"] = lambda row: _rate(row, row.peer)
    return columns


def _peer_title(bar: Bar) -> str:
    names = {name for peers in bar.peers.values() for name in peers}
    return names.pop() if len(names) == 1 else FASTEST


def _mean_row(bar: Bar, wanted: float, rows: Sequence[_Row], columns: dict[str, Callable[[_Row], str]]) -> tuple[str, ...]:
    """The geometric means over the bar's cells; none where one of these was not timed."""
    judged = [row for row in rows if row.cell in bar.cells]
    by_order = ([row.first for row in judged], [row.reversed for row in judged], [row.auto for row in judged])
    first, other, auto = (_mean(ratios, len(bar.cells)) for ratios in by_order)
    shown = {
        "shape": f"geometric mean of the bar's {len(bar.cells)} cells",
        "bar": f"{wanted:.2f}",
        f"{bar.ours} / {_peer_title(bar)}": _number(bar, first),
        "in the other order": _number(bar, other),
        "verdict": _verdict_on(bar, wanted, first, other),
        f"{AUTO} / {_peer_title(bar)}": _number(bar, auto),
    }
    return tuple(shown.get(name, EMPTY) for name in columns)


def _mean(ratios: list[Ratio | None], wanted: int) -> float | None:
    values = [ratio.value for ratio in ratios if ratio is not None]
    return statistics.geometric_mean(values) if len(values) == wanted else None


def _notes(bar: Bar, artifact: Artifact, rows: Sequence[_Row]) -> tuple[str, ...]:
    ratio = f"{bar.ours} / {_peer_title(bar)}"
    medians = "medians of the same run, with a 95 % bootstrap interval"
    target = "the bar is a target of this project (bench/bar.py)"
    if bar.told == "rates":
        return (
            f"{ratio}: how many times faster by {FIRST} {medians}; {target}, and is met where the ratio reaches it in both "
            "orders",
            f"% of matrix rate: TFLOP/s over that of a large matrix product in this run ({peaks_text(artifact)})",
            *([_tally(bar, rows)] if bar.judged else []),
            _orders(artifact),
        )
    fastest = "; ".join(f"{mode}: {', '.join(peers)}" for mode, peers in bar.peers.items())
    return (
        f"{ratio}: our time over that of the fastest of SDPA's ways by {medians}; {target}, and is met where the ratio, or our "
        "time where the bar is in us, is no higher",
        f"compared only where all of these were timed: {fastest}",
        "floor: the empty kernel, launched by our launcher",
        _tally(bar, rows),
    )


def _tally(bar: Bar, rows: Sequence[_Row]) -> str:
    """How many of the bar's cells came out how; a shape of the bar that the run left out counts as not timed."""
    found = Counter(_verdict(bar, row) for row in rows if row.cell.wanted)
    found[NOT_TIMED] += len(bar.judged) - found.total()
    others = "".join(f"; {count} {name}" for name, count in found.items() if name != MET and count)
    return f"{found[MET]} of the bar's {len(bar.judged)} cells met{others}"


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


def _in_terms(bar: Bar, ratio: float) -> float:
    """A ratio of rates, which is what is reckoned with, as the bar tells it."""
    return ratio if bar.told == "rates" else 1 / ratio


def _wanted(bar: Bar, cell: Cell) -> str:
    if cell.us is not None:
        return f"{figure(cell.us)} us"
    return EMPTY if cell.faster is None else f"{_in_terms(bar, cell.faster):.2f}"


def _interval(bar: Bar, ratio: Ratio | None) -> str:
    if ratio is None:
        return EMPTY
    low, high = sorted(_in_terms(bar, end) for end in (ratio.low, ratio.high))
    return f"{_in_terms(bar, ratio.value):.3f} [{low:.3f}, {high:.3f}]"


def _number(bar: Bar, ratio: float | None) -> str:
    return EMPTY if ratio is None else f"{_in_terms(bar, ratio):.3f}"


def _us(series: SeriesRecord | None) -> str:
    return EMPTY if series is None else figure(series.stats.p50)


def _tflops(row: _Row, series: SeriesRecord | None) -> float | None:
    return None if series is None else rate(row.record, series.stats.p50, "TFLOP/s")


def _rate(row: _Row, series: SeriesRecord | None) -> str:
    tflops = _tflops(row, series)
    return EMPTY if tflops is None else figure(tflops)


def _share_of_peak(artifact: Artifact, row: _Row) -> str:
    tflops = _tflops(row, row.ours)
    return EMPTY if tflops is None else f"{100 * tflops / artifact.peaks.matrix_tflops[row.record.shape.dtype]:.1f}"
