"""A checkout with evidence of one GPU, made from values known here."""

import json
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path

import pytest

from flashcore import documents, evidence
from flashcore.bench.artifact import Artifact, ContenderRecord, SeriesRecord, Settings, ShapeRecord, WorkRecord
from flashcore.bench.peaks import Peaks
from flashcore.bench.shapes import GRIDS, NAMED_SHAPES, Shape
from flashcore.bench.stats import ratio_of_medians
from flashcore.bench.timing import Series
from flashcore.bench.work import Direction
from flashcore.debug.artifact import DebugArtifact, ViewVerdict
from flashcore.debug.compare import PartVerdict
from flashcore.debug.views import VIEWS
from flashcore.environment import Clocks, Environment, Git, Gpu
from flashcore.evidence import Index
from flashcore.kernels.registry import KERNELS, LADDER
from flashcore.ladder.artifact import LadderArtifact, TimedShape
from flashcore.ladder.checks import StepVerification, cases
from flashcore.ladder.measure import SHAPES
from flashcore.ladder.steps import STEPS
from flashcore.search.report import Best, Found, SearchReport
from flashcore.search.schema import Environment as SearchVisit
from flashcore.search.schema import Problem
from flashcore.sources import kernel_hash, kernel_hashes
from flashcore.verify.record import BinaryRecord, CaseRecord, Error, LaunchRecord, VerifyRecord

MEDIANS = {
    "flashcore": 8.0,
    "flashcore-small": 4.0,
    "flashcore-hopper": 4.5,
    "flashcore-portable": 5.0,
    "sdpa-flash": 10.0,
    "sdpa-cudnn": 9.0,
    "sdpa-efficient": 20.0,
    "unfused": 123.0,
}


def environment() -> Environment:
    clocks = Clocks(sm_mhz=1980, memory_mhz=3201)
    return Environment(
        time_utc=datetime(2026, 11, 20, tzinfo=timezone.utc),
        command=["flashcore"],
        git=Git(sha="abcdef012345" + "0" * 28, dirty=True),
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
            l2_bytes=2**26,
            memory_bytes=2**37,
            driver="580.159.04",
            power_limit_w=700.0,
            clocks=clocks,
        ),
        cpu="a CPU",
        cpu_cores=16,
        torch_threads=16,
        platform="Linux",
        kernel_sources=kernel_hashes(),
    )


def _series(median: float) -> list[SeriesRecord]:
    samples = (median * 0.99, median, median * 1.01)
    ratio = ratio_of_medians(samples, (8.9, 9.0, 9.1), baseline="sdpa-cudnn")
    modes = (
        Series("device_warm", 100, samples),
        Series("device_cold", 100, tuple(2 * s for s in samples)),
        Series("eager_stream", 100, tuple(3 * s for s in samples)),
        Series("eager_latency", 1, tuple(4 * s for s in samples)),
    )
    return [SeriesRecord.of(series).model_copy(update={"ratio": ratio}) for series in modes]


def _artifact(shapes: tuple[Shape, ...], grid: str | None = None, direction: Direction = "fwd") -> Artifact:
    timed = [
        ContenderRecord(name=name, kind="ours" if name.startswith("flashcore") else "sdpa", status="timed", series=_series(us))
        for name, us in MEDIANS.items()
    ]
    return Artifact(
        environment=environment(),
        settings=Settings(iters=100, warmup=20, seed=0, eager=True, cold=True, grid=grid, direction=direction, samples={}),
        peaks=Peaks(copy_bytes=2**31, copy_tbytes=4.0, matrix_size=8192, matrix_tflops={"fp16": 650.0}),
        shapes=[
            ShapeRecord(
                shape=shape,
                work=WorkRecord(flops=1, min_bytes=1, bound_us=1.0, bound_limit="compute"),
                baseline="sdpa-cudnn",
                cold="up to 100 input sets",
                clocks_after=Clocks(),
                contenders=timed,
            )
            for shape in shapes
        ],
    )


def _case(name: str, verdict: str, error: float, implementation: str = "portable") -> CaseRecord:
    return CaseRecord.model_validate(
        {
            "name": name,
            "implementation": implementation,
            "verdict": verdict,
            "reason": "" if verdict == "passed" else f"{name} is {verdict}",
            "output": Error(max_abs=error, mean_abs=error, bound=1.0),
            "lse": None,
            "bitwise_equal": True,
            "impl": implementation,
            "kernel": f"{implementation}_forward",
            "specialisation": "one",
            "binary_sha256": None if verdict == "rejected" else {"portable": "1", "hopper": "2"}[implementation] * 64,
            "seconds": 0.1,
        }
    )


def _verify_record() -> VerifyRecord:
    cases = (
        _case("mission-seed0", "passed", 0.25),
        _case("mask-bool", "passed", 0.125),
        _case("mask-add", "failed", 1.5),
        _case("far-batch", "skipped", 0.0),
        _case("mission-seed0", "passed", 0.5, "hopper"),
        _case("mask-bool", "rejected", 0.0, "hopper"),
        _case("mask-add", "rejected", 0.0, "hopper"),
        _case("far-batch", "passed", 0.25, "hopper"),
    )
    return VerifyRecord(
        schema_version=1,
        environment=environment(),
        implementation="ours",
        device="NVIDIA H200",
        interpreted=False,
        suite="all",
        only=None,
        passed=4,
        failed=1,
        skipped=1,
        rejected=2,
        binaries={"1" * 64: BinaryRecord(kernel="portable_forward", specialisation="one", passed=("mask-bool",), failed=())},
        cases=cases,
    )


def _backward_record() -> VerifyRecord:
    """One case of the portable backward pass, by two launches."""
    launches = tuple(
        LaunchRecord(kernel=f"portable_backward_{part}", specialisation=part, binary_sha256=number * 64)
        for part, number in (("delta", "3"), ("dq", "4"))
    )
    errors = {name: Error(max_abs=share, mean_abs=0.0, bound=1.0) for name, share in (("dq", 0.25), ("dk", 0.75), ("dv", 0.5))}
    plain = {"output": None, "kernel": None, "specialisation": None, "binary_sha256": None}
    case = _case("mask-bool", "passed", 0.0).model_copy(update={**plain, "gradients": errors, "launches": launches})
    counted = {"passed": 1, "failed": 0, "skipped": 0, "rejected": 0}
    binaries = {
        one.binary_sha256: BinaryRecord(kernel=one.kernel, specialisation=one.specialisation, passed=(case.name,), failed=())
        for one in launches
    }
    changes = {**counted, "schema_version": 2, "direction": "bwd", "binaries": binaries, "cases": (case,)}
    return _verify_record().model_copy(update=changes)


def _index() -> Index:
    """Two of the binaries shipped for sm_90a are verified."""
    shipped = KERNELS["portable_forward"].shipped("sm_90a")
    return Index(
        gpu="NVIDIA H200",
        arch="sm_90a",
        sources=kernel_hashes(),
        verified={str(number) * 64: (one.name, 3) for number, one in enumerate(shipped[:2])},
        peaks=None,
        timings=[],
    )


def _ladder() -> LadderArtifact:
    """A run in which every step is right, and takes half the time of the one before: 512 us, 256 us, ..."""
    artifact = _artifact((SHAPES[0],))
    names = ["unfused", *(f"ladder-{step.name}" for step in STEPS)]
    records = [
        ContenderRecord(name=name, kind="ours", status="timed", series=_series(2.0 ** (10 - number)))
        for number, name in enumerate(names)
    ]
    shapes = [artifact.shapes[0].model_copy(update={"shape": shape, "contenders": records}) for shape in SHAPES]
    return LadderArtifact(
        environment=environment(),
        sources={kernel: kernel_hash(kernel) for kernel in LADDER},
        steps=[step.name for step in STEPS],
        verification=[
            StepVerification(
                step=step.name,
                interpreted=False,
                passed=[case.name for case in cases()],
                failed={},
                mutations=["one NaN"],
                missed=[],
            )
            for step in STEPS
        ],
        shapes=[TimedShape(bench=artifact.model_copy(update={"shapes": [shape]}), code={}) for shape in shapes],
    )


def _debug_artifact() -> DebugArtifact:
    """The scalar step's views; a quarter of the bound is used, and one of five tiles of the output is wrong."""

    def part(wrong: int) -> PartVerdict:
        return PartVerdict(name="s", tile=(16, 1), tiles=5, wrong=wrong, error=0.25, bound=1.0, first=None, map=[])

    return DebugArtifact(
        environment=environment(),
        subject="scalar",
        shape=NAMED_SHAPES["mission"],
        seed=0,
        interpreted=False,
        kernels=["ladder_scalar-d64"],
        sources={"ladder_scalar": kernel_hash("ladder_scalar")},
        binaries=["6" * 64],
        views=[ViewVerdict(view=view, parts=[part(int(view == "pv"))]) for view in VIEWS],
    )


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A source checkout with no evidence and no documents, in place of this one."""
    package = tmp_path / "src" / "flashcore"
    (package / "evidence").mkdir(parents=True)
    for folder in ("img", "notes"):
        (tmp_path / "docs" / folder).mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(documents, "PACKAGE", package)
    monkeypatch.setattr(evidence, "FOLDER", package / "evidence")
    evidence.indexes.cache_clear()
    yield tmp_path
    evidence.indexes.cache_clear()


def _search_report() -> SearchReport:
    sizes = {"batch": 4, "heads": 8, "heads_k": 8, "seqlen_q": 128, "seqlen_k": 128, "head_dim": 64, "head_dim_v": 64}
    form = {"cluster": 1, "keys": 128, "block_n": 128}
    visit = SearchVisit(
        gpu="NVIDIA H200",
        sm_count=132,
        driver="580.159.04",
        torch="2.11.0+cu130",
        cuda="13.0",
        git_sha="abcdef012345" + "0" * 28,
        git_dirty=True,
        time="2026-11-20T00:00:00+00:00",
        command=["flashcore"],
    )
    best = Best(name="f", config=form, us=2.0, incumbent_us=2.2, sdpa_us=4.0, ratio=1.1, ratio_low=1.09, ratio_high=1.11)
    found = Found(
        artifact="search-small.json",
        artifact_sha256=sha256(b"{}").hexdigest(),
        problem=Problem(impl="small", **sizes),
        sampler="random",
        seed=0,
        visits=[visit],
        source_sha256=kernel_hash("small_forward"),
        fitting=40,
        evaluations=2,
        verdicts={"measured": 2},
        incumbent=form,
        best=best,
        speeds=[1.0, 1.1],
        compared=None,
    )
    return SearchReport(
        time=visit.time, command=visit.command, git_sha=visit.git_sha, git_dirty=True, seeds=50, plot="s.png", searches=[found]
    )


@pytest.fixture
def record(checkout: Path) -> Callable[[], Path]:
    """A function that writes every artifact of one GPU, and returns their folder."""

    def write() -> Path:
        folder = evidence.FOLDER / "nvidia-h200"
        folder.mkdir()
        _artifact((NAMED_SHAPES["mission"],)).save(folder / "bench-mission.json")
        _artifact(GRIDS["small"], "small").save(folder / "bench-small.json")
        _artifact(GRIDS["fa"][:4], "fa").save(folder / "bench-fa.json")
        _artifact(GRIDS["decode"]).save(folder / "bench-decode.json")
        _artifact(GRIDS["features"]).save(folder / "bench-features.json")
        _artifact(GRIDS["crossover"], "crossover").save(folder / "bench-crossover.json")
        _artifact(GRIDS["fa-bwd"], "fa-bwd", "bwd").save(folder / "bench-bwd.json")
        _artifact(GRIDS["fa-bwd"], "fa-bwd", "fwdbwd").save(folder / "bench-fwdbwd.json")
        _artifact(GRIDS["train"], "train", "fwdbwd").save(folder / "bench-train.json")
        _artifact(GRIDS["fa-bwd"][:1], None, "bwd").save(folder / "bench-bwd-wide.json")
        _ladder().save(folder / "ladder.json")
        (folder / "search-small.json").write_text("{}")
        _search_report().save(folder / "search.json")
        (folder / "debug").mkdir()
        _debug_artifact().save(folder / "debug" / "scalar.json")
        (folder / "verify.json").write_text(_verify_record().model_dump_json())
        (folder / "verify-bwd.json").write_text(_backward_record().model_dump_json())
        (folder / "index.json").write_text(_index().model_dump_json())
        cost = {
            "schema_version": 2,
            "environment": environment().model_dump(mode="json"),
            "host_us_per_call": {"our launcher": {"median": 4.5, "min": 4.25, "max": 6.0}},
            "stream_us_per_call": {"our launcher": {"median": 7.5, "min": 7.0, "max": 8.0}},
        }
        (folder / "launch-cost.json").write_text(json.dumps(cost))
        wheel = {
            "schema_version": 1,
            "environment": environment().model_dump(mode="json"),
            "wheel": "flashcore-0.1.0-py3-none-any.whl",
            "wheel_bytes": 3_000_000,
            "flashcore": "from the wheel",
            "triton": False,
            "compilers": [],
            "gpu": "NVIDIA H200",
            "origin": "shipped",
            "binary_sha256": "1" * 64,
            "max_abs_error": 0.0002,
            "verify_mission": {"exit": 0, "summary": ["15 passed, 0 failed, 0 skipped"]},
        }
        (folder / "wheel.json").write_text(json.dumps(wheel))
        evidence.indexes.cache_clear()
        return folder

    return write
