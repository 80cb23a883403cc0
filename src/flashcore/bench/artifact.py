"""The JSON artifact of a run: everything measured, raw samples included, and what it was measured on.

Documents, plots and evidence are made from artifacts; none of their figures is typed by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from flashcore.bench.contender import Kind
from flashcore.bench.gate import Correctness
from flashcore.bench.peaks import Peaks
from flashcore.bench.shapes import Shape
from flashcore.bench.stats import Ratio, Stats, summarise
from flashcore.bench.timing import Mode, Series
from flashcore.bench.work import Direction
from flashcore.environment import Clocks, Environment
from flashcore.stored import Stored, read

# 2: gradients. An artifact of 1 is one of 2 that has none, so both are read.
SCHEMA_VERSION: Literal[2] = 2
# A sample is an event time (0.5 us fine) over the launches of a replay: below a tenth of a nanosecond there is nothing.
SAMPLE_DECIMALS = 4

Status = Literal["timed", "not timed", "failed", "wrong"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class SeriesRecord(_Record):
    """One series (see bench/timing.py for the modes), in microseconds per launch or call; `ratio` to the baseline's.

    to_first: of "device_reversed", its median over that of "device_warm".
    """

    mode: Mode
    launches_per_sample: int
    stats: Stats
    ratio: Ratio | None = None
    to_first: float | None = None
    samples: list[float]

    @classmethod
    def of(cls, series: Series) -> SeriesRecord:
        samples = [round(sample, SAMPLE_DECIMALS) for sample in series.samples]
        return cls(mode=series.mode, launches_per_sample=series.launches, stats=summarise(samples), samples=samples)


class ContenderRecord(_Record):
    """What became of one contender on one shape. `reason` says why it is not "timed"; only "timed" has series.

    peak_bytes: of gradients on a GPU, the memory that one forward and backward pass takes at most beside its inputs.
    """

    name: str
    kind: Kind
    status: Status
    reason: str = ""
    detail: str | None = None
    correctness: Correctness | None = None
    peak_bytes: int | None = None
    series: list[SeriesRecord] = []

    def find(self, mode: Mode) -> SeriesRecord | None:
        return next((series for series in self.series if series.mode == mode), None)


class WorkRecord(_Record):
    """What the shape must do at least (see bench/work.py) and the bound that the run's measured peaks put on it."""

    flops: int
    min_bytes: int
    bound_us: float
    bound_limit: Literal["compute", "memory"]


class ShapeRecord(_Record):
    """One shape: its work, and every contender. `baseline` is the fastest SDPA backend by the mode that leads."""

    shape: Shape
    work: WorkRecord
    baseline: str | None
    cold: str
    clocks_after: Clocks
    contenders: list[ContenderRecord]


class Settings(_Record):
    """How the run was made."""

    iters: int
    warmup: int
    seed: int
    eager: bool
    cold: bool
    retime: bool = False
    grid: str | None
    direction: Direction = "fwd"
    samples: dict[str, str]


class Artifact(_Record, Stored):
    """One run of `flashcore bench`."""

    schema_version: Literal[1, 2] = SCHEMA_VERSION
    kind: Literal["flashcore-bench"] = "flashcore-bench"
    environment: Environment
    settings: Settings
    peaks: Peaks
    shapes: list[ShapeRecord]

    @property
    def leading_mode(self) -> Mode:
        """The mode that tables and plots rank by: device time on a GPU, wall clock on a CPU."""
        return "wall" if self.environment.gpu is None else "device_warm"

    @property
    def own_failures(self) -> list[str]:
        """Where a kernel of ours gave a wrong result or failed, one line each; empty when the run is sound."""
        return [
            f"{contender.name} on {record.shape.label}: {contender.reason}"
            for record in self.shapes
            for contender in record.contenders
            if contender.kind == "ours" and contender.status in ("failed", "wrong")
        ]


def load(path: Path) -> Artifact:
    """Read an artifact. Raises ArgumentValueError when it cannot be read, or is not one of this schema version."""
    return read(Artifact, path)
