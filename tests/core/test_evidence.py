"""Evidence: which records prove something, what they prove it of, and what is still unproved."""

import re
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashcore import evidence
from flashcore.bench.artifact import Artifact, ContenderRecord, SeriesRecord, Settings, ShapeRecord, WorkRecord
from flashcore.bench.peaks import Peaks as MeasuredPeaks
from flashcore.bench.shapes import NAMED_SHAPES
from flashcore.bench.timing import Series
from flashcore.build.sets import BuiltSet
from flashcore.environment import Clocks, Environment, Git, Gpu
from flashcore.errors import BinaryError
from flashcore.evidence import Index
from flashcore.evidence.build import make_index, refusal, slug, unproved
from flashcore.kernels.registry import BINDINGS, EMPTY, KERNELS, Kernel
from flashcore.sources import kernel_hash, kernel_hashes
from flashcore.target import Target
from flashcore.verify.record import BinaryRecord, VerifyRecord

GOOD, BAD = "a" * 64, "b" * 64
CLOCKS = Clocks(sm_mhz=1980, memory_mhz=3201)
GPU = Gpu(
    name="NVIDIA H200", arch="sm_90", sm_count=132, l2_bytes=1, memory_bytes=1, driver="1", power_limit_w=700.0, clocks=CLOCKS
)
ENVIRONMENT = Environment(
    time_utc=datetime(2026, 11, 20, tzinfo=timezone.utc),
    command=["flashcore", "verify"],
    git=Git(sha="0" * 40, dirty=False),
    flashcore="0.1.0",
    python="3.12.3",
    torch="2.11.0",
    triton="3.9.0",
    cuda="13.0",
    cudnn="9",
    gpu=GPU,
    cpu="a CPU",
    cpu_cores=16,
    torch_threads=16,
    platform="Linux",
    kernel_sources=kernel_hashes(),
)


def _record(**changes: object) -> VerifyRecord:
    binary = BinaryRecord(kernel="portable_forward", specialisation="good", passed=("tiny", "edge"), failed=())
    fields = {
        "schema_version": 1,
        "environment": ENVIRONMENT,
        "implementation": "portable",
        "device": "NVIDIA H200",
        "interpreted": False,
        "suite": "all",
        "only": None,
        "passed": 2,
        "failed": 0,
        "skipped": 0,
        "binaries": {GOOD: binary},
        "cases": (),
    }
    return VerifyRecord(**{**fields, **changes})


def test_a_whole_passing_run_on_a_gpu_is_evidence() -> None:
    assert refusal(_record()) is None and refusal(_record(implementation="ours")) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"environment": ENVIRONMENT.model_copy(update={"gpu": None})}, "not made on a GPU"),
        ({"interpreted": True}, "not made on a GPU"),
        ({"suite": "mission"}, "partial: suite mission"),
        ({"only": "tiny-*"}, r"partial: suite all, only tiny-\*"),
        ({"implementation": "torch"}, "verified torch, not our kernels"),
        ({"implementation": "auto"}, "verified auto, not our kernels"),
        ({"failed": 3}, "3 failed cases"),
        ({"passed": 0, "skipped": 2, "binaries": {}}, "pass|binar"),
    ],
)
def test_a_record_that_proves_nothing_is_refused(changes: dict, words: str, tmp_path: Path) -> None:
    record = _record(**changes)
    assert re.search(words, refusal(record) or "")
    (tmp_path / "verify.json").write_text(record.model_dump_json())
    with pytest.raises(BinaryError, match=r"verify\.json"):
        make_index(tmp_path)


def _artifact(us: dict[str, float | None], dtype: str = "fp16", tflops: float = 600.0) -> Artifact:
    def contender(name: str, median: float | None) -> ContenderRecord:
        if median is None:
            return ContenderRecord(name=name, kind="sdpa", status="failed", reason="it does not run")
        series = [SeriesRecord.of(Series("device_warm", 100, (median,) * 20))]
        return ContenderRecord(name=name, kind="sdpa", status="timed", series=series)

    shape = replace(NAMED_SHAPES["mission"], dtype=dtype)
    record = ShapeRecord(
        shape=shape,
        work=WorkRecord(flops=1, min_bytes=1, bound_us=1.0, bound_limit="memory"),
        baseline=None,
        cold="",
        clocks_after=CLOCKS,
        contenders=[contender(name, median) for name, median in us.items()],
    )
    peaks = MeasuredPeaks(copy_bytes=1, copy_tbytes=4.0, matrix_size=1, matrix_tflops={"fp16": tflops})
    settings = Settings(iters=20, warmup=20, seed=0, eager=True, cold=True, grid=None, samples={})
    return Artifact(environment=ENVIRONMENT, settings=settings, peaks=peaks, shapes=[record])


def test_an_index_is_what_the_records_add_up_to_and_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = BinaryRecord(kernel="portable_forward", specialisation="bad", passed=("tiny",), failed=("edge",))
    passing = _record().binaries[GOOD]
    folder = tmp_path / slug("NVIDIA H200")
    folder.mkdir()
    (folder / "verify.json").write_text(_record(binaries={GOOD: passing, BAD: failing}).model_dump_json())
    _artifact({"flashcore-portable": 8.0, "sdpa-auto": 9.0, "flex": None}).save(folder / "bench-a.json")
    _artifact({"flashcore-portable": 80.0}, dtype="fp32", tflops=700.0).save(folder / "bench-b.json")
    index = make_index(folder)
    verified = {kernel: source for kernel, source in kernel_hashes().items() if kernel in ("empty", "portable_forward")}
    assert (index.gpu, index.arch, index.sources) == ("NVIDIA H200", "sm_90a", verified)
    assert index.verified == {GOOD: ("good", 2)}
    assert (index.peaks.matrix_tflops, index.peaks.copy_tbytes) == ({"fp16": 700.0}, 4.0)
    timing, single = index.timings
    assert (timing.precision, single.precision, timing.mask) == ("half", "fp32", "none")
    assert timing.us == {"flashcore-portable": 8.0, "sdpa-auto": 9.0}
    assert (timing.batch, timing.heads, timing.seqlen_q, timing.seqlen_k, timing.head_dim) == (1, 8, 512, 512, 64)
    assert not timing.causal
    (folder / "index.json").write_text(index.model_dump_json(indent=1))
    monkeypatch.setattr(evidence, "FOLDER", tmp_path)
    evidence.indexes.cache_clear()
    assert evidence.indexes() == (index,)
    assert evidence.peaks("NVIDIA H200") == index.peaks and evidence.peaks("NVIDIA L4") is None


def _timed(folder: Path, **changed: str) -> dict[str, float]:
    """What an index takes from a benchmark of other sources than were verified."""
    (folder / "verify.json").write_text(_record().model_dump_json())
    times = {"flashcore": 8.0, "flashcore-portable": 8.0, "flashcore-fast": 7.0, "sdpa-auto": 9.0}
    environment = ENVIRONMENT.model_copy(update={"kernel_sources": {**ENVIRONMENT.kernel_sources, **changed}})
    _artifact(times).model_copy(update={"environment": environment}).save(folder / "bench-a.json")
    return make_index(folder).timings[0].us


def test_what_was_timed_of_another_source_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"flashcore", "flashcore-portable", "flashcore-fast", "sdpa-auto"}
    assert _timed(tmp_path).keys() == names
    assert _timed(tmp_path, portable_forward="0" * 64).keys() == names - {"flashcore", "flashcore-portable"}
    assert _timed(tmp_path, empty="0" * 64).keys() == names
    fast = Kernel("fast_forward", "nowhere", "f", ("kernels/empty.py",), SimpleNamespace(KERNEL="fast_forward", IMPL="fast"))
    monkeypatch.setitem(KERNELS, "fast_forward", fast)
    monkeypatch.setitem(BINDINGS, "fast", fast.binding)
    assert _timed(tmp_path, fast_forward="0" * 64).keys() == names - {"flashcore", "flashcore-fast"}
    # a kernel that the verification has no binary of is not verified, whatever its source was then
    monkeypatch.setitem(ENVIRONMENT.kernel_sources, "fast_forward", "0" * 64)
    assert _timed(tmp_path).keys() == names and "fast_forward" not in make_index(tmp_path).sources


def _backward_record(**changes: object) -> VerifyRecord:
    binary = BinaryRecord(kernel="portable_backward_dq", specialisation="dq", passed=("tiny",), failed=())
    return _record(**{"schema_version": 2, "direction": "bwd", "binaries": {BAD: binary}, **changes})


def test_the_gradients_record_is_added_to_the_forwards(tmp_path: Path) -> None:
    (tmp_path / "verify.json").write_text(_record().model_dump_json())
    without = make_index(tmp_path)
    (tmp_path / "verify-bwd.json").write_text(_backward_record().model_dump_json())
    index = make_index(tmp_path)
    assert index.verified == {**without.verified, BAD: ("dq", 1)}
    assert index.sources == {**without.sources, "portable_backward_dq": kernel_hash("portable_backward_dq")}


def test_an_earlier_record_of_gradients_stands_for_the_binaries_that_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "verify.json").write_text(_record().model_dump_json())
    (tmp_path / "verify-bwd.json").write_text(_backward_record().model_dump_json())
    later = make_index(tmp_path)
    other = BinaryRecord(kernel="portable_backward_dq", specialisation="dq-other", passed=("tiny", "small"), failed=())
    sources = {**ENVIRONMENT.kernel_sources, "portable_backward_dq": "0" * 64}
    # and of a binary that both have, the later one's word stands
    same = BinaryRecord(kernel="portable_backward_dq", specialisation="dq", passed=("tiny", "small", "large"), failed=())
    earlier = _backward_record(
        binaries={"e" * 64: other, BAD: same}, environment=ENVIRONMENT.model_copy(update={"kernel_sources": sources})
    )
    path = tmp_path / "verify-bwd-earlier.json"
    path.write_text(earlier.model_dump_json())
    index = make_index(tmp_path)
    assert index.verified == {**later.verified, "e" * 64: ("dq-other", 2)}
    # of a source it says nothing that the later one does not
    assert index.sources == later.sources and index.timings == later.timings
    path.write_text(earlier.model_copy(update={"failed": 1}).model_dump_json())
    with pytest.raises(BinaryError, match=r"verify-bwd-earlier\.json.*1 failed cases"):
        make_index(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"direction": "fwd"}, "is of direction fwd, not bwd"),
        ({"failed": 1}, "1 failed cases"),
        ({"suite": "backward"}, "partial: suite backward"),
        ({"device": "NVIDIA L4"}, "is of NVIDIA L4"),
    ],
)
def test_a_record_of_gradients_that_proves_nothing_is_refused(changes: dict, words: str, tmp_path: Path) -> None:
    (tmp_path / "verify.json").write_text(_record().model_dump_json())
    (tmp_path / "verify-bwd.json").write_text(_backward_record(**changes).model_dump_json())
    with pytest.raises(BinaryError, match=rf"verify-bwd\.json.*{words}"):
        make_index(tmp_path)


def _in_direction(artifact: Artifact, direction: str) -> Artifact:
    return artifact.model_copy(update={"settings": artifact.settings.model_copy(update={"direction": direction})})


def test_times_of_gradients_are_of_both_passes_and_of_the_sources_of_both(tmp_path: Path) -> None:
    (tmp_path / "verify.json").write_text(_record().model_dump_json())
    (tmp_path / "verify-bwd.json").write_text(_backward_record().model_dump_json())
    times = {"flashcore": 8.0, "flashcore-portable": 8.0, "flashcore-portable-deterministic": 8.5, "sdpa-auto": 9.0}
    for direction in ("bwd", "fwdbwd"):
        _in_direction(_artifact(times), direction).save(tmp_path / f"bench-{direction}.json")
    assert {timing.direction: timing.us for timing in make_index(tmp_path).timings} == {"bwd": times, "fwdbwd": times}
    (tmp_path / "bench-bwd.json").unlink()
    changed = {**ENVIRONMENT.kernel_sources, "portable_backward_dkdv": "0" * 64}
    other = ENVIRONMENT.model_copy(update={"kernel_sources": changed})
    stale = _in_direction(_artifact(times), "fwdbwd").model_copy(update={"environment": other})
    stale.save(tmp_path / "bench-fwdbwd.json")
    assert make_index(tmp_path).timings[0].us == {"sdpa-auto": 9.0}
    # forward, that kernel does not run
    _in_direction(stale, "fwd").save(tmp_path / "bench-fwdbwd.json")
    assert make_index(tmp_path).timings[0].us == times


def test_without_benchmarks_there_are_no_timings(tmp_path: Path) -> None:
    (tmp_path / "verify.json").write_text(_record().model_dump_json())
    index = make_index(tmp_path)
    assert index.peaks is None and index.timings == []


def _index(**changes: object) -> Index:
    fields = {
        "gpu": "NVIDIA H200",
        "arch": "sm_90a",
        "sources": kernel_hashes(),
        "verified": {GOOD: ("good", 2)},
        "peaks": None,
        "timings": [],
    }
    return Index(**{**fields, **changes})


def _built(*sha256: str, kernel: str = "portable_forward", failures: dict[str, str] | None = None) -> BuiltSet:
    binaries = tuple(SimpleNamespace(info=SimpleNamespace(kernel=kernel, name=f"k-{s[0]}", sha256=s)) for s in sha256)
    return BuiltSet("sm_90a", binaries, failures or {})


def test_what_is_unproved_is_named() -> None:
    assert unproved(_index(), _built(GOOD)) == []
    (other,) = unproved(_index(), _built(GOOD, BAD))
    assert "k-b" in other and BAD in other and "NVIDIA H200" in other
    others = {kernel: source for kernel, source in kernel_hashes().items() if kernel != "portable_forward"}
    (changed,) = unproved(_index(sources={**others, "portable_forward": "0" * 64}), _built(GOOD))
    assert changed == "portable_forward: its source changed since it was verified on NVIDIA H200"
    (never,) = unproved(_index(sources=others), _built(GOOD))
    assert never == "portable_forward: was never verified on NVIDIA H200"
    (fails,) = unproved(_index(), _built(GOOD, failures={"k-x": "ptxas: no"}))
    assert fails == "k-x: does not build: ptxas: no"
    # the empty kernel computes nothing that evidence could vouch for
    assert unproved(_index(), _built(BAD, kernel="empty")) == []


def test_a_kernel_needs_no_proof_on_an_arch_that_it_is_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    binary = replace(EMPTY, kernel="fast_forward")
    elsewhere = SimpleNamespace(IMPL="fast", shipped=lambda arch: (binary,) if arch == "sm_90a" else ())
    monkeypatch.setitem(KERNELS, "fast_forward", Kernel("fast_forward", "nowhere", "f", ("kernels/empty.py",), elsewhere))
    sources = {kernel: source for kernel, source in kernel_hashes().items() if kernel != "fast_forward"}
    assert unproved(_index(sources=sources, arch="sm_80"), _built(GOOD)) == []
    assert unproved(_index(sources=sources), _built(GOOD)) == ["fast_forward: was never verified on NVIDIA H200"]


def test_the_state_of_a_binary(h200: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    ampere = Target(name="A100", arch="sm_80", capability=(8, 0), sm_count=108, interpreted=False)

    def state(binary: str | None, target: Target, *found: Index) -> str:
        monkeypatch.setattr(evidence, "indexes", lambda: found)
        return evidence.state("portable_forward", binary, target)

    current, stale = _index(), _index(sources={"portable_forward": "0" * 64})
    assert state(GOOD, h200, current) == "verified"
    assert state(GOOD, h200, stale, current) == "verified"
    assert state(BAD, h200, current) == "compiled" and state(None, h200, current) == "compiled"
    assert state(GOOD, ampere, current) == "compiled"
    assert state(GOOD, h200, stale) == "experimental" and state(GOOD, h200) == "experimental"
    assert current.sources["portable_forward"] == kernel_hash("portable_forward")


def test_the_evidence_that_is_there_can_be_read() -> None:
    for index in evidence.indexes():
        assert index.verified and all(len(sha256) == 64 and cases > 0 for sha256, (_, cases) in index.verified.items())
        assert torch.cuda.is_available() or index.gpu
