"""A plot of an artifact; needs matplotlib (flashcore[plot]).

Bars for one shape; the rate over the length, a line a contender, for shapes that differ in length alone; times side by
side for other grids.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from flashcore.bench.artifact import Artifact, SeriesRecord, ShapeRecord
from flashcore.bench.view import figure as figure_text
from flashcore.bench.view import rate, unit_of
from flashcore.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Draw = Callable[[Axes, Artifact, list[ShapeRecord]], None]

MAX_COLUMNS = 3
OURS = "#1b7f4d"
# Ours share a colour; the ones by name differ from auto by these.
DASHES = {"flashcore-portable": "--", "flashcore-hopper": ":", "flashcore-small": "-."}
HATCHES = {"flashcore-portable": "//", "flashcore-hopper": "..", "flashcore-small": "xx"}
FLOOR = "#b0b0b0"
PEERS = (
    "#4c72b0",
    "#dd8452",
    "#8172b3",
    "#c44e52",
    "#937860",
    "#da8bc3",
    "#64b5cd",
    "#ccb974",
    "#55606e",
    "#111111",
    "#a0522d",
)


def require_matplotlib() -> None:
    """Raise UnsupportedError where matplotlib is not installed, so that a run can say so before it measures."""
    if find_spec("matplotlib") is None:
        raise UnsupportedError("a plot needs matplotlib, which is not installed: pip install flashcore[plot]")


def plot(artifact: Artifact, path: Path) -> None:
    """Write a PNG. Raises UnsupportedError where matplotlib is not installed, or where nothing was timed."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not any(c.find(artifact.leading_mode) for record in artifact.shapes for c in record.contenders):
        raise UnsupportedError("a plot needs at least one contender that was timed; this artifact has none")
    panels = _panels(artifact)
    columns = min(len(panels), MAX_COLUMNS)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(8.0 if columns == 1 else 5.2 * columns, 4.8 if rows == 1 else 3.9 * rows), dpi=120)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    cells = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (title, draw, records) in zip(cells, panels, strict=False):
        draw(axes, artifact, records)
        axes.set_title(title, fontsize=10)
    found = artifact.environment
    what = "device time" if found.gpu else "wall clock on a CPU"
    figure.suptitle(f"{found.device_name}, {found.time_utc:%Y-%m-%d}, torch {found.torch}: {what}", fontsize=12)
    figure.savefig(path, format="png")


def _panels(artifact: Artifact) -> list[tuple[str, Draw, list[ShapeRecord]]]:
    """Title, way of drawing and shapes of each panel; shapes that differ in length alone share one."""
    if len(artifact.shapes) <= 2:
        return [(record.shape.label, _bars, [record]) for record in artifact.shapes]
    groups: dict[str, list[ShapeRecord]] = {}
    for record in artifact.shapes:
        shape = record.shape
        mask = "causal" if shape.causal else "not causal"
        groups.setdefault(f"D {shape.head_dim}, {mask}, {shape.dtype}", []).append(record)
    if all(len({r.shape.seqlen_k for r in records}) == len(records) > 2 for records in groups.values()):
        return [(title, _lines, records) for title, records in groups.items()]
    return [("lower is faster", _grouped, list(artifact.shapes))]


def _bars(axes: Axes, artifact: Artifact, records: list[ShapeRecord]) -> None:
    """Horizontal bars of the one shape, the fastest on top: the median, with p10 and p90 as error bars."""
    record = records[0]
    timed = [(c.name, c.kind, s.stats) for c in record.contenders if (s := c.find(artifact.leading_mode))]
    timed.sort(key=lambda item: -item[2].p50)
    for height, (_, kind, stats) in enumerate(timed):
        colour = {"ours": OURS, "floor": FLOOR}.get(kind, PEERS[0])
        spread = [[max(0.0, stats.p50 - stats.p10)], [max(0.0, stats.p90 - stats.p50)]]
        axes.barh(height, stats.p50, xerr=spread, color=colour, capsize=3)
        axes.annotate(
            figure_text(stats.p50),
            (stats.p90, height),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(timed)), [name for name, _, _ in timed])
    axes.set_xlabel("microseconds per launch, median (p10 to p90)")
    axes.margins(x=0.12)
    axes.set_xlim(left=0)


def _lines(axes: Axes, artifact: Artifact, records: list[ShapeRecord]) -> None:
    """The rate over the length, a line a contender."""
    unit = unit_of(records)
    for name, colour in _colours(artifact, records).items():
        points = [(n, rate(records[n], series.stats.p50, unit)) for n, series in _timed(artifact, records, name)]
        width = 2.5 if name.startswith("flashcore") else 1.5
        axes.plot(*zip(*points, strict=True), DASHES.get(name, "-"), marker="o", label=name, color=colour, linewidth=width)
    axes.set_xticks(range(len(records)), [str(record.shape.seqlen_k) for record in records])
    axes.set_xlabel("keys")
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)


def _grouped(axes: Axes, artifact: Artifact, records: list[ShapeRecord]) -> None:
    """A group of bars a shape: microseconds, on a logarithmic scale since the shapes' sizes differ."""
    colours = _colours(artifact, records)
    width = 0.8 / len(colours)
    for place, (name, colour) in enumerate(colours.items()):
        bars = [(n + (place + 0.5) * width - 0.4, series.stats.p50) for n, series in _timed(artifact, records, name)]
        centres, heights = zip(*bars, strict=True)
        axes.bar(centres, heights, width, label=name, color=colour, hatch=HATCHES.get(name), edgecolor="white", linewidth=0.4)
    labels = [record.shape.label.replace(" ", "\n") for record in records]
    axes.set_xticks(range(len(records)), labels, fontsize=7)
    axes.set_yscale("log")
    # A logarithmic axis has no zero for bars to stand on: half the shortest leaves every bar a length to compare.
    axes.set_ylim(bottom=0.5 * min(s.stats.p50 for name in colours for _, s in _timed(artifact, records, name)))
    axes.set_ylabel("microseconds per launch, median")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=7, ncols=2)


def _timed(artifact: Artifact, records: list[ShapeRecord], name: str) -> list[tuple[int, SeriesRecord]]:
    """The contender's series of the leading mode, each with the number of the shape it belongs to."""
    return [
        (number, series)
        for number, record in enumerate(records)
        for contender in record.contenders
        if contender.name == name and (series := contender.find(artifact.leading_mode))
    ]


def _colours(artifact: Artifact, records: list[ShapeRecord]) -> dict[str, str]:
    """A colour for each contender that was timed on one of these shapes, the floor left out."""
    names = dict.fromkeys(c.name for r in records for c in r.contenders if c.kind != "floor")
    peers = cycle(PEERS)
    timed = (name for name in names if _timed(artifact, records, name))
    return {name: OURS if name.startswith("flashcore") else next(peers) for name in timed}
