"""The ladder's bar beside what was measured: how far the top must be ahead of what it began with. Targets, not measurements."""

from __future__ import annotations

from flashcore.bench.artifact import SeriesRecord
from flashcore.bench.bar_view import verdict
from flashcore.bench.shapes import Shape
from flashcore.bench.stats import ratio_of_medians
from flashcore.bench.view import EMPTY, View, figure
from flashcore.bench.work import tflops
from flashcore.ladder.artifact import LadderArtifact
from flashcore.ladder.checks import cases
from flashcore.ladder.measure import BASELINE, SHAPES
from flashcore.ladder.run import contender_name
from flashcore.ladder.steps import STEPS
from flashcore.ladder.table import series_of

# How many times as fast the top of the ladder is to be as its step FLOOR, on every shape ...
TOP, FLOOR = 15.0, "scalar"
# ... and the fastest of its steps as unfused PyTorch, on the long shape.
FASTEST = 15.0
# As it is called here, where a step is called unfused too.
BASELINE_NAME = "PyTorch"
COLUMNS = ("wanted", "shape", "bar", "measured", "of", "verdict")


def bar_view(artifact: LadderArtifact) -> View:
    """Every cell of the bar with its verdict, those that were not measured too."""
    cells = []
    for shape in SHAPES:
        timed = _timed(artifact, shape)
        steps = [step.name for step in STEPS if step.name in timed]
        cells.append(_cell(f"top of the ladder / {FLOOR}", shape, TOP, timed, steps[-1] if steps else None, FLOOR))
        if shape == SHAPES[-1]:
            fastest = min(steps, key=lambda name: timed[name].stats.p50, default=None)
            cells.append(_cell("fastest step / unfused PyTorch", shape, FASTEST, timed, fastest, BASELINE_NAME))
    return View(
        f"the bar, {artifact.environment.device_name}, {artifact.environment.time_utc:%Y-%m-%d}",
        COLUMNS,
        (*cells, _whole(artifact)),
        (
            "ratios of medians of the same run, with a 95 % bootstrap interval; the bar is a target of this project "
            "(ladder/bar.py), and is met where the ratio reaches it",
            "the top is the last of the steps that take the shape",
            *_beyond(artifact),
        ),
    )


def _timed(artifact: LadderArtifact, shape: Shape) -> dict[str, SeriesRecord]:
    """What was timed on a shape: steps by name, and PyTorch."""
    found = next((one for one in artifact.shapes if one.bench.shapes[0].shape == shape), None)
    if found is None:
        return {}
    records = {BASELINE_NAME: found.find(BASELINE), **{step.name: found.find(contender_name(step.name)) for step in STEPS}}
    return {name: series for name, record in records.items() if (series := series_of(record)) is not None}


def _cell(
    wanted: str, shape: Shape, bar: float, timed: dict[str, SeriesRecord], ours: str | None, below: str
) -> tuple[str, ...]:
    """A row of the table: a ratio, and whether it reaches the bar; not timed where either is missing."""
    ratio = None
    if ours is not None and below in timed:
        ratio = ratio_of_medians(timed[ours].samples, timed[below].samples, baseline=below)
    return (
        wanted,
        shape.label,
        f"{bar:.0f}",
        EMPTY if ratio is None else f"{ratio.value:.1f} [{ratio.low:.1f}, {ratio.high:.1f}]",
        ours or EMPTY,
        verdict([None if ratio is None else ratio.value >= bar]),
    )


def _beyond(artifact: LadderArtifact) -> tuple[str, ...]:
    """Where the bar against unfused PyTorch asks for more than a matrix product reaches in the same run: that it does."""
    shape = SHAPES[-1]
    timed = _timed(artifact, shape)
    if BASELINE_NAME not in timed:
        return ()
    bench = next(one.bench for one in artifact.shapes if one.bench.shapes[0].shape == shape)
    wanted, ceiling = tflops(shape, timed[BASELINE_NAME].stats.p50 / FASTEST), bench.peaks.matrix_tflops[shape.dtype]
    if wanted <= ceiling:
        return ()
    return (
        f"{FASTEST:.0f} times unfused PyTorch would be {figure(wanted)} TFLOP/s, and a large matrix product reached "
        f"{figure(ceiling)} in the same run: no kernel can",
    )


def _whole(artifact: LadderArtifact) -> tuple[str, ...]:
    """Whether the run has every step, each passed by every case, and each of its mutations caught, on a GPU."""
    wanted = {case.name for case in cases()}
    right = {one.step for one in artifact.verification if one.sound and not one.interpreted and wanted <= set(one.passed)}
    count = sum(step.name in right for step in STEPS)
    words = f"steps that pass all {len(wanted)} cases and whose mutations fail, in one run"
    return (words, EMPTY, str(len(STEPS)), str(count), EMPTY, verdict([count == len(STEPS)]))
