"""The plot of a report: the best so far against evaluations, a panel a problem. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flashcore.bench.plot import OURS, PEERS, require_matplotlib
from flashcore.errors import UnsupportedError
from flashcore.search.report import NEAR, PART, Found, SearchReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"evolutionary": OURS, "random": PEERS[1], "exhaustive": PEERS[0]}
_ACROSS = 3


def plot(report: SearchReport, path: Path) -> None:
    """Write a PNG. Raises UnsupportedError where matplotlib is not installed, or where nothing was measured."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[Found]] = {}
    for one in report.searches:
        if one.best is not None:
            panels.setdefault(one.problem.name, []).append(one)
    if not panels:
        raise UnsupportedError("a plot needs at least one candidate that was measured; this report has none")
    across = min(_ACROSS, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(5.6 * across, 4.0 * down), dpi=110)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for panel, (name, searches) in zip(axes, panels.items(), strict=False):
        _panel(panel, searches)
        panel.set_title(name, fontsize=10)
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    gpus = sorted({gpu for one in report.searches for gpu in one.gpus})
    figure.suptitle(f"Best found so far, {', '.join(gpus)}, {report.time[:10]}", fontsize=12)
    figure.savefig(path, format="png")


def _panel(axes: Axes, searches: list[Found]) -> None:
    for one in searches:
        if one.compared is None:
            shown = _shown(one.speeds)
            label = f"{one.sampler}, seed {one.seed}"
            axes.plot(range(1, len(shown) + 1), shown, color=_COLOURS[one.sampler], linewidth=1.0, label=label)
            continue
        for curves in one.compared.curves:
            evaluations = range(1, len(curves.middle) + 1)
            colour = _COLOURS[curves.sampler]
            label = f"{curves.sampler}, {len(curves.reached)} seeds: median, 10-90 %"
            axes.plot(evaluations, _shown(curves.middle), color=colour, linewidth=1.6, label=label)
            axes.fill_between(
                evaluations, curves.low, curves.high, where=[low > 0 for low in curves.low], color=colour, alpha=0.2
            )
        optimum = one.compared.optimum
        axes.axhline(optimum, color="#555555", linewidth=1.0, label=f"optimum of all {one.fitting}: {optimum:.3f}")
        axes.axhline(NEAR * optimum, color="#555555", linestyle="--", linewidth=0.9, label=f"{NEAR:.0%} of it")
        axes.axvline(one.fitting / PART, color="#b0b0b0", linestyle="--", linewidth=0.9, label=f"1/{PART} of its evaluations")
    axes.axhline(1.0, color="#b0b0b0", linewidth=0.9, linestyle=":", label="hand-chosen")
    axes.set_xlabel("evaluations")
    axes.set_ylabel("speed, x hand-chosen")
    axes.legend(fontsize=7, loc="lower right")


def _shown(speeds: list[float]) -> list[float]:
    """Where nothing was measured yet there is no line."""
    return [speed or float("nan") for speed in speeds]
