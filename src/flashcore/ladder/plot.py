"""The plot of a run: a bar a step, the achieved rate against the ceiling, a panel a shape. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flashcore.bench.plot import OURS, PEERS, require_matplotlib
from flashcore.bench.view import figure as figure_text
from flashcore.errors import UnsupportedError
from flashcore.ladder.artifact import LadderArtifact
from flashcore.ladder.table import Row, rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(artifact: LadderArtifact, path: Path) -> None:
    """Write a PNG. Raises UnsupportedError where matplotlib is not installed, or where nothing was timed."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(shape, [row for row in rows(artifact, shape) if row.us is not None]) for shape in artifact.shapes]
    panels = [(shape, timed) for shape, timed in panels if timed]
    if not panels:
        raise UnsupportedError("a plot needs at least one step that was timed; this artifact has none")
    figure = Figure(figsize=(6.4 * len(panels), 4.8), dpi=120)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    for axes, (shape, timed) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        one = shape.bench.shapes[0].shape
        _bars(axes, timed, shape.bench.peaks.matrix_tflops[one.dtype])
        axes.set_title(one.label, fontsize=10)
    found = artifact.environment
    figure.suptitle(f"The ladder on {found.device_name}, {found.time_utc:%Y-%m-%d}: device time", fontsize=12)
    figure.savefig(path, format="png")


def _bars(axes: Axes, timed: list[Row], ceiling: float) -> None:
    """Horizontal bars from the first step at the top, on a logarithmic scale, each with its time."""
    for height, row in enumerate(timed):
        assert row.tflops is not None and row.us is not None
        axes.barh(height, row.tflops, color=PEERS[0] if height == 0 else OURS)
        axes.annotate(
            f"{figure_text(row.us)} us",
            (row.tflops, height),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.axvline(
        ceiling, color="#555555", linestyle="--", linewidth=1.2, label=f"measured ceiling, {figure_text(ceiling)} TFLOP/s"
    )
    axes.set_yticks(range(len(timed)), [row.name for row in timed])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("TFLOP/s")
    axes.margins(x=0.2)
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.06))
