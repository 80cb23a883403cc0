"""An artifact as an H200 would write it, made from known samples."""

from collections.abc import Callable
from datetime import datetime, timezone
from functools import cache

import pytest

from flashcore.bench import work
from flashcore.bench.artifact import Artifact, ContenderRecord, SeriesRecord, Settings, ShapeRecord, WorkRecord
from flashcore.bench.gate import Correctness
from flashcore.bench.peaks import Peaks
from flashcore.bench.shapes import GRIDS, NAMED_SHAPES, Shape
from flashcore.bench.stats import ratio_of_medians
from flashcore.bench.timing import Series
from flashcore.environment import Clocks, Environment, Git, Gpu

PEAKS = Peaks(copy_bytes=2**31, copy_tbytes=4.0, matrix_size=8192, matrix_tflops={"fp16": 650.0, "bf16": 680.0})
MEDIANS = {"flashcore": 8.0, "flashcore-portable": 10.0, "sdpa-flash": 10.2, "sdpa-cudnn": 9.0}


def around(median: float, count: int = 100) -> tuple[float, ...]:
    """Samples whose median is exactly `median`, within 1 % of it."""
    return tuple(median * (1 + 0.01 * (2 * number / (count - 1) - 1)) for number in range(count))


def _series(median: float) -> list[SeriesRecord]:
    measured = [
        Series("device_warm", 100, around(median)),
        Series("device_cold", 100, around(median * 1.5)),
        Series("eager_stream", 100, around(median * 3, 20)),
        Series("eager_latency", 1, around(median * 4, 50)),
    ]
    return [SeriesRecord.of(series) for series in measured]


@cache  # the intervals take longer than any test; a record is copied to be changed
def _contender(name: str, median: float) -> ContenderRecord:
    kind = "ours" if name.startswith("flashcore") else "sdpa"
    correctness = Correctness(checked="all", max_abs=1e-4, mean_abs=1e-5, bound=1e-3, passed=True, reason="")
    baseline = _series(MEDIANS["sdpa-cudnn"])
    series = [
        own.model_copy(update={"ratio": ratio_of_medians(own.samples, theirs.samples, baseline="sdpa-cudnn")})
        for own, theirs in zip(_series(median), baseline, strict=True)
    ]
    return ContenderRecord(name=name, kind=kind, status="timed", correctness=correctness, series=series)


def _record(shape: Shape) -> ShapeRecord:
    bound = work.roofline(shape, peak_tflops=PEAKS.matrix_tflops[shape.dtype], peak_tbytes=PEAKS.copy_tbytes)
    return ShapeRecord(
        shape=shape,
        work=WorkRecord(flops=work.flops(shape), min_bytes=work.min_bytes(shape), bound_us=bound.us, bound_limit=bound.limit),
        baseline="sdpa-cudnn",
        cold="up to 100 input sets",
        clocks_after=Clocks(sm_mhz=1980, memory_mhz=3201),
        contenders=[
            *(_contender(name, median) for name, median in MEDIANS.items()),
            ContenderRecord(name="xformers", kind="peer", status="not timed", reason="xformers is not installed"),
            ContenderRecord(name="flex", kind="peer", status="failed", reason="RuntimeError: no compiler"),
            ContenderRecord(
                name="empty kernel",
                kind="floor",
                status="timed",
                series=[
                    SeriesRecord.of(Series("device_warm", 512, around(1.2))),
                    SeriesRecord.of(Series("eager_stream", 100, around(4.7, 20))),
                    SeriesRecord.of(Series("eager_latency", 1, around(15.0, 50))),
                ],
            ),
        ],
    )


@pytest.fixture
def make_artifact() -> Callable[..., Artifact]:
    """A function of shapes (default: the mission shape) that makes an artifact of a GPU run."""

    def make(*shapes: Shape) -> Artifact:
        environment = Environment(
            time_utc=datetime(2026, 11, 20, tzinfo=timezone.utc),
            command=["flashcore", "bench"],
            git=Git(sha="0" * 40, dirty=False),
            flashcore="0.1.0",
            python="3.12.3",
            torch="2.11.0+cu130",
            triton="3.6.0",
            cuda="13.0",
            cudnn="9.19.0",
            gpu=Gpu(
                name="NVIDIA H200",
                arch="sm_90",
                sm_count=132,
                l2_bytes=60 * 2**20,
                memory_bytes=139 * 2**30,
                driver="580.159.04",
                power_limit_w=700.0,
                clocks=Clocks(sm_mhz=345, memory_mhz=3201),
            ),
            cpu="a CPU",
            cpu_cores=16,
            torch_threads=16,
            platform="Linux",
            kernel_sources={"portable_forward": "f" * 64},
        )
        settings = Settings(iters=100, warmup=20, seed=0, eager=True, cold=True, grid=None, samples={})
        records = [_record(shape) for shape in shapes or (NAMED_SHAPES["mission"],)]
        return Artifact(environment=environment, settings=settings, peaks=PEAKS, shapes=records)

    return make


@pytest.fixture
def decode_shapes() -> tuple[Shape, ...]:
    return GRIDS["decode"]
