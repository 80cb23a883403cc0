"""The roofline: ceilings, and every timed call at its arithmetic intensity and the rate it attained.

The intensity is the work's, not the kernel's: the operations of both products over the fewest bytes that must move
(bench/work.py), so that all implementations of a shape stand above one another (Williams, Waterman and Patterson,
"Roofline: an insightful visual performance model", 2009).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from flashcore.bench import work
from flashcore.bench.artifact import Artifact
from flashcore.bench.shapes import Shape
from flashcore.bench.view import measured_where
from flashcore.bench.work import Direction
from flashcore.errors import ArgumentValueError, UnsupportedError
from flashcore.profile.records import ProfileRecord
from flashcore.profile.subjects import contender_name


@dataclass(frozen=True)
class Ceilings:
    """Matrix rates in TFLOP/s by dtype, and the memory's bandwidth in TB/s. `source` says where they are from."""

    tflops: dict[str, float]
    tbytes: float
    source: str

    def bound(self, shape: Shape, direction: Direction = "fwd") -> work.Bound:
        """The shortest time these ceilings allow for a shape. Raises ArgumentValueError for a dtype they do not have."""
        if shape.dtype not in self.tflops:
            raise ArgumentValueError(f"dtype: {shape.dtype} has no ceiling ({self.source}); allowed: {', '.join(self.tflops)}")
        return work.roofline(shape, peak_tflops=self.tflops[shape.dtype], peak_tbytes=self.tbytes, direction=direction)


@dataclass(frozen=True)
class Point:
    """One call: who computed which shape in how many microseconds."""

    name: str
    shape: Shape
    us: float
    direction: Direction = "fwd"

    @property
    def intensity(self) -> float:
        """Operations for each byte that must move."""
        return intensity(self.shape, self.direction)

    @property
    def tflops(self) -> float:
        return work.tflops(self.shape, self.us, self.direction)


@dataclass(frozen=True)
class Roofline:
    """What is drawn and printed. `on_paper`: nothing of it was measured, its points are bounds. direction: of all points."""

    title: str
    ceilings: Ceilings
    points: tuple[Point, ...]
    notes: tuple[str, ...] = ()
    on_paper: bool = False
    direction: Direction = "fwd"

    def bound(self, shape: Shape) -> work.Bound:
        """The shortest time that the ceilings allow for a shape."""
        return self.ceilings.bound(shape, self.direction)

    @property
    def shapes(self) -> list[Shape]:
        """The shapes of the points, each once, in order."""
        return list(dict.fromkeys(point.shape for point in self.points))

    def share(self, point: Point) -> float:
        """How much of the roof a point attains: 1 is the bound."""
        return self.bound(point.shape).us / point.us


# From NVIDIA's datasheets: dense rates (half of what is given with sparsity) in TFLOP/s, and TB/s.
DATASHEETS = {
    "l4": ("NVIDIA L4", Ceilings({"fp16": 121.0, "bf16": 121.0}, 0.3, "the datasheet of the NVIDIA L4, dense")),
}


def intensity(shape: Shape, direction: Direction) -> float:
    """Operations for each byte that must move."""
    return work.flops(shape, direction) / work.min_bytes(shape, direction)


def of_artifact(
    artifact: Artifact, *, contender: str | None = None, shapes: Collection[Shape] = (), recorded: bool = True
) -> Roofline:
    """Every contender that was timed, or one of them, on every shape or some of them, under the run's own ceilings.

    recorded: the artifact is from an earlier run, maybe elsewhere, and the title says so.

    Raises:
        UnsupportedError: nothing of that was timed.
    """
    mode, direction = artifact.leading_mode, artifact.settings.direction
    points = tuple(
        Point(timed.name, record.shape, series.stats.p50, direction)
        for record in artifact.shapes
        if not shapes or record.shape in shapes
        for timed in record.contenders
        if timed.kind != "floor" and contender in (None, timed.name) and (series := timed.find(mode))
    )
    if not points:
        there = (c.name for record in artifact.shapes for c in record.contenders if c.kind != "floor" and c.find(mode))
        labels = ", ".join(record.shape.label for record in artifact.shapes)
        raise UnsupportedError(
            f"nothing to place: no time of {contender or 'any contender'} on {_labels(shapes) or 'any shape'}; "
            f"timed were {', '.join(dict.fromkeys(there)) or 'none'} on {labels or 'none'}"
        )
    where = measured_where(artifact)
    command = " ".join(artifact.environment.command[1:])
    return Roofline(
        title=f"Roofline {'recorded' if recorded else 'measured'} on {where}",
        ceilings=Ceilings(artifact.peaks.matrix_tflops, artifact.peaks.copy_tbytes, f"measured in the same run on {where}"),
        points=points,
        notes=(f"time: {mode} p50 of the run `{command}`",),
        direction=direction,
    )


def with_profiles(roofline: Roofline, records: Sequence[ProfileRecord]) -> Roofline:
    """The same with the profiled calls added: the sum of each call's kernels."""
    profiled = tuple(Point(f"{contender_name(record.impl)} (ncu)", record.shape, record.us) for record in records)
    note = (
        "(ncu): the call's kernels one after another under Nsight Compute, caches flushed before each: not a warm call's time"
    )
    return replace(roofline, points=(*roofline.points, *profiled), notes=(*roofline.notes, note) if records else roofline.notes)


def paper(name: str, shapes: Sequence[Shape]) -> Roofline:
    """The bounds that a GPU's datasheet sets for some shapes; no measurement.

    Raises:
        ArgumentValueError: there is no datasheet of that name, or it has no rate for a shape's dtype.
    """
    if name not in DATASHEETS:
        raise ArgumentValueError(f"paper: {name!r} is unknown; allowed: {', '.join(DATASHEETS)}")
    gpu, ceilings = DATASHEETS[name]
    return Roofline(
        title=f"Roofline on paper: {gpu} by its datasheet, NOT a measurement",
        ceilings=ceilings,
        points=tuple(Point("bound on paper", shape, ceilings.bound(shape).us) for shape in shapes),
        notes=("from the datasheet, never a measurement: real clocks, power and memory give less than these ceilings",),
        on_paper=True,
    )


def _labels(shapes: Collection[Shape]) -> str:
    return ", ".join(shape.label for shape in shapes)
