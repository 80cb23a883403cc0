"""A recorded benchmark run in the evidence that a call can be placed by, where there is no GPU to time it on."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from flashcore.bench import artifact as bench
from flashcore.bench.artifact import Artifact
from flashcore.bench.shapes import Shape
from flashcore.errors import ArgumentValueError, UnsupportedError
from flashcore.evidence.build import artifacts, folders
from flashcore.ladder import artifact as ladder

SHOWN = 12
LADDER = "ladder.json"


def find(contender: str, shapes: Collection[Shape]) -> Artifact:
    """The latest recorded run that timed a contender's calls, not their gradients, on all of these shapes.

    Raises:
        UnsupportedError: there is none; names shapes that were recorded.
    """
    every = (run for folder in folders() for run in (*artifacts(folder), *_ladder(folder)))
    runs = [run for run in every if run.settings.direction == "fwd"]
    fitting = [run for run in runs if set(shapes) <= set(_timed(run, contender))]
    if not fitting:
        known = list(dict.fromkeys(shape.label for run in runs for shape in _timed(run, contender)))
        more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
        raise UnsupportedError(
            f"no recorded run timed {contender} on {', '.join(shape.label for shape in shapes)}; "
            f"recorded are {'; '.join(known[:SHOWN]) or 'no shapes'}{more}"
        )
    return max(fitting, key=lambda run: run.environment.time_utc)


def load(path: Path) -> Artifact:
    """What an artifact of `flashcore bench` or of `flashcore ladder` timed, the ladder's shapes in one.

    Raises:
        ArgumentValueError: it cannot be read, or is of neither.
    """
    try:
        runs = [shape.bench for shape in ladder.load(path).shapes]
    except ArgumentValueError:
        return bench.load(path)  # or says what is wrong with it
    if not runs:
        raise ArgumentValueError(f"artifact: {path} holds no shape that was timed; allowed: a ladder that was run on a GPU")
    return runs[0].model_copy(update={"shapes": [record for run in runs for record in run.shapes]})


def _ladder(folder: Path) -> list[Artifact]:
    """What the ladder's record of a GPU timed, a run a shape; none where there is no such record."""
    path = folder / LADDER
    return [shape.bench for shape in ladder.load(path).shapes] if path.exists() else []


def _timed(run: Artifact, contender: str) -> list[Shape]:
    return [
        record.shape
        for record in run.shapes
        if any(timed.name == contender and timed.find(run.leading_mode) for timed in record.contenders)
    ]
