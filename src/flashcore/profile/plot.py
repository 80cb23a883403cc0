"""The roofline as a picture; needs matplotlib (flashcore[plot]).

All that is written stands in a legend beside the axes, so that no label covers a point: the ceilings, a colour for each
implementation, a marker for each shape or, of many shapes, for each group of a kind.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, product
from pathlib import Path
from typing import TYPE_CHECKING

from flashcore.bench.plot import PEERS, require_matplotlib
from flashcore.bench.shapes import Shape
from flashcore.profile.roofline import Roofline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

OURS = ("#1b7f4d", "#5fbf8a", "#9acd32", "#0b3d2e", "#2fa4a0")
MARKERS = "os^vDPX*<>phHd8"
# More shapes than this are told apart by what kind they are of.
MAX_SHAPES = 8
# Room around the points, and around the ridge, as a factor.
MARGIN = 3.0
# A shape's points stand side by side, from its intensity up to this factor to the right: equal rates stay visible, and none
# comes to stand above the slope that was below it.
SPREAD = 1.4
GREY = "#777777"
ROOF = "#444444"
HEADING = "heading"


def save(roofline: Roofline, path: Path) -> None:
    """Write a PNG. Raises UnsupportedError where matplotlib is not installed."""
    draw(roofline).savefig(path, format="png")


def draw(roofline: Roofline) -> Figure:
    """The figure: one logarithmic axes with ceilings and points, and a legend to the right of it."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 6.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    handles = [*_ceilings(axes, roofline), *_points(axes, roofline)]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    several = len({point.name for point in roofline.points}) > 1
    beside = "; a shape's points side by side, from there to the right" if several else ""
    axes.set_xlabel(f"arithmetic intensity: FLOPs for each byte that must move{beside}", fontsize=9)
    axes.set_ylabel("bound on paper, TFLOP/s" if roofline.on_paper else "attained TFLOP/s")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    # between the decades few of the marks have room for a label
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    axes.grid(which="both", alpha=0.2)
    axes.set_title(roofline.title, fontsize=11)
    legend = figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    for handle, text in zip(handles, legend.get_texts(), strict=True):
        if handle.get_gid() == HEADING:
            text.set_fontweight("bold")
    return figure


def _ceilings(axes: Axes, roofline: Roofline) -> list[Line2D]:
    """A roof for each dtype that has a point: the bandwidth's slope up to the ridge, the matrix rate from there on."""
    ceilings = roofline.ceilings
    used = list(dict.fromkeys(point.shape.dtype for point in roofline.points))
    ridges = [ceilings.tflops[dtype] / ceilings.tbytes for dtype in used]
    left = min(*(point.intensity for point in roofline.points), *ridges) / MARGIN
    right = max(*(point.intensity for point in roofline.points), *ridges) * MARGIN
    low = min(point.tflops for point in roofline.points) / MARGIN
    handles = [_heading("ceilings, by the datasheet" if roofline.on_paper else "ceilings, measured")]
    (slope,) = axes.plot([left, max(ridges)], [left * ceilings.tbytes, max(ridges) * ceilings.tbytes], color=ROOF)
    slope.set_label(f"{'memory' if roofline.on_paper else 'copy'} {ceilings.tbytes:.3g} TB/s")
    handles.append(slope)
    for (dtype, ridge), style in zip(zip(used, ridges, strict=True), cycle(("--", "-.", ":")), strict=False):
        (flat,) = axes.plot([ridge, right], [ceilings.tflops[dtype]] * 2, color=ROOF, linestyle=style)
        flat.set_label(f"{dtype} matrix products {ceilings.tflops[dtype]:.3g} TFLOP/s")
        handles.append(flat)
    axes.set_xlim(left, right)
    axes.set_ylim(low, max(ceilings.tflops[dtype] for dtype in used) * MARGIN / 2)
    return handles


def _points(axes: Axes, roofline: Roofline) -> list[Line2D]:
    """The points, and what the legend says of their colours and markers."""
    from matplotlib.lines import Line2D

    names = list(dict.fromkeys(point.name for point in roofline.points))
    colours, spread = _colours(names), _spread(names)
    kind = _kind_of(roofline.shapes)
    kinds = list(dict.fromkeys(kind(point.shape) for point in roofline.points))
    every = cycle((marker, hollow) for hollow, marker in product((False, True), MARKERS))
    looks = dict(zip(kinds, every, strict=False))
    for point in roofline.points:
        marker, hollow = looks[kind(point.shape)]
        colour = colours[point.name]
        inside = "none" if hollow or roofline.on_paper else colour
        beside = point.intensity * spread[point.name]
        axes.plot(beside, point.tflops, marker, color=colour, markerfacecolor=inside, markersize=6, alpha=0.85, clip_on=False)
    handles = [_heading("who")]
    handles += [Line2D([], [], color=colours[name], marker="s", linestyle="none", label=name) for name in names]
    handles.append(_heading("shape: " + ("B,H,S,D" if len(roofline.shapes) <= MAX_SHAPES else "what it is of")))
    for name, (marker, hollow) in looks.items():
        inside = "none" if hollow or roofline.on_paper else GREY
        handles.append(Line2D([], [], color=GREY, marker=marker, markerfacecolor=inside, linestyle="none", label=name))
    return handles


def _colours(names: list[str]) -> dict[str, str]:
    """Greens for ours, other colours for the others."""
    ours, peers = cycle(OURS), cycle(PEERS)
    return {name: next(ours if name.startswith("flashcore") else peers) for name in names}


def _kind_of(shapes: list[Shape]) -> Callable[[Shape], str]:
    if len(shapes) <= MAX_SHAPES:
        return lambda shape: shape.label
    return _group


def _group(shape: Shape) -> str:
    """A shape by what it is of, its sizes but the head dim left out."""
    parts = [f"D {shape.head_dim}", shape.dtype]
    parts += ["causal"] if shape.causal else []
    parts += [] if shape.mask == "none" else [f"{shape.mask} mask"]
    return ", ".join(parts)


def _heading(text: str) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none", label=text, gid=HEADING)


def _spread(names: list[str]) -> dict[str, float]:
    """The factor by which each name's points stand to the right of their intensity; 1 for the first."""
    return {name: SPREAD ** (number / len(names)) for number, name in enumerate(names)}
