"""What the ladder's tests share: one torch thread, and an artifact as a GPU would write it, made from known samples."""

from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from types import SimpleNamespace

import pytest
import torch

from flashcore.bench import work
from flashcore.bench.artifact import Artifact, ContenderRecord, SeriesRecord, Settings, ShapeRecord, WorkRecord
from flashcore.bench.gate import Correctness
from flashcore.bench.peaks import Peaks
from flashcore.bench.shapes import Shape
from flashcore.bench.timing import Series
from flashcore.environment import Clocks, Environment, Gpu
from flashcore.ladder.artifact import LadderArtifact, TimedShape
from flashcore.ladder.checks import StepVerification
from flashcore.ladder.code import KernelCode
from flashcore.ladder.measure import SHAPES

_ENVIRONMENT = Environment(
    time_utc=datetime(2026, 11, 20, tzinfo=timezone.utc), command=["flashcore", "ladder"], git=None, flashcore="0.1.0",
    python="3.12.3", torch="2.11.0", triton="3.9.0", cuda="13.0", cudnn=None, cpu="a CPU", cpu_cores=16, torch_threads=16,
    platform="Linux", kernel_sources={},
    gpu=Gpu(
        name="a GPU", arch="sm_90", sm_count=132, l2_bytes=2**25, memory_bytes=2**37, driver=None, power_limit_w=None,
        clocks=Clocks(),
    ),
)  # fmt: skip
_RIGHT = Correctness(checked="all", max_abs=1e-4, mean_abs=1e-5, bound=1e-3, passed=True, reason="")
_CODE = KernelCode(
    specialisation="ladder_x", arch="sm_90a", sha256="0" * 64, triton="3.9.0", registers=40, spills=0, shared=1024, matrix={},
    async_copies=0, arriving_copies=0, wide_loads=3, narrow_loads=0,
)  # fmt: skip

MEDIANS = {"unfused": 80.0, "ladder-unfused": 40.0, "ladder-scalar": 160.0}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _timed(name: str, us: float) -> ContenderRecord:
    series = SeriesRecord.of(Series("device_warm", 10, (us,) * 20))
    return ContenderRecord(name=name, kind="ours", status="timed", correctness=_RIGHT, series=[series])


def _bench(shape: Shape, records: list[ContenderRecord]) -> Artifact:
    peaks = Peaks(copy_bytes=2**31, copy_tbytes=4.0, matrix_size=8192, matrix_tflops={"fp16": 500.0})
    found = ShapeRecord(
        shape=shape,
        work=WorkRecord(flops=work.flops(shape), min_bytes=work.min_bytes(shape), bound_us=1.0, bound_limit="compute"),
        baseline=None,
        cold="",
        clocks_after=Clocks(),
        contenders=records,
    )
    settings = Settings(iters=20, warmup=20, seed=0, eager=False, cold=False, grid=None, samples={})
    return Artifact(environment=_ENVIRONMENT, settings=settings, peaks=peaks, shapes=[found])


@pytest.fixture
def known() -> SimpleNamespace:
    """`timed` makes a contender's record of one median, `bench` the bench's artifact of a shape; `code` is a binary's."""
    return SimpleNamespace(timed=_timed, bench=_bench, code=_CODE)


@pytest.fixture
def make_ladder() -> Callable[..., LadderArtifact]:
    """A function that makes the artifact of a run of three steps, the last of which was wrong."""

    def make(**changes: object) -> LadderArtifact:
        steps = ["unfused", "scalar", "vectorised"]
        names = [f"{name}-seed0" for name in ("tiny", "small")]
        verification = [
            StepVerification(
                step=step,
                interpreted=False,
                passed=names if step != "vectorised" else names[:1],
                failed={} if step != "vectorised" else {names[1]: "output: not finite everywhere"},
                mutations=["one NaN"],
                missed=[],
            )
            for step in steps
        ]
        wrong = ContenderRecord(name="ladder-vectorised", kind="peer", status="not timed", reason=verification[2].summary)
        shapes = [
            TimedShape(
                bench=_bench(
                    shape, [_timed("unfused", 80.0), _timed("ladder-unfused", 40.0), _timed("ladder-scalar", 160.0), wrong]
                ),
                code={"unfused": [_CODE, _CODE.model_copy(update={"registers": 90, "spills": 2})], "scalar": [_CODE]},
            )
            for shape in SHAPES
        ]
        given = {"environment": _ENVIRONMENT, "sources": {}, "steps": steps, "verification": verification, "shapes": shapes}
        return LadderArtifact(**{**given, **changes})

    return make
